//! The guests of Pontoon: the init of our Linux images, the builder of those images, and the
//! parts it is made of.
//!
//! - [`store`]: images, built once and kept: [`Store`], [`Image`].
//! - [`initrd`]: what one boot is asked to do, carried behind an image's initrd.
//! - [`deb`]: Debian packages without root: resolved, fetched, verified, unpacked.
//! - [`rootfs`]: images with a disk: Debian with systemd, ssh and apt.
//! - [`cpio`]: the writer of initramfs archives.
//! - [`progress`]: how long work tells what it does.
//! - [`program`]: programs of their own for Linux guests: [`INIT`] (`init/`), [`LAB_INIT`] (`lab-init/`).
//! - [`AGENT`]: the guest agent, a program of its own in `agent/`.

pub mod cpio;
pub mod deb;
mod debian;
pub mod initrd;
pub mod program;
pub mod progress;
pub mod rootfs;
pub mod store;

#[cfg(test)]
#[path = "../../tests/src/skip.rs"]
mod skip;

pub use program::{INIT, LAB_INIT, Program};
pub use progress::{Progress, Silent};
pub use rootfs::{KernelSource, RootfsOptions};
pub use store::{BuildOptions, Error, Image, Manifest, Store, cache_dir};

/// The guest agent: a static x86-64 ELF program without libc, to be put at `/usr/sbin/pontoon-agent` of a Linux image. It
/// listens on vsock port 1024 for the host, as root, and is restarted by the image's init if it ends.
pub const AGENT: &[u8] = include_bytes!(env!("PONTOON_AGENT"));

/// The probe: a bare-metal ELF guest that carries out the network orders of its command line and reports
/// in JSON lines on COM1 (docs/probe.md).
pub const PROBE: &[u8] = include_bytes!(env!("PONTOON_PROBE"));
