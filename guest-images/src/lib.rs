//! The guests of Pontoon: the init of our Linux images, the builder of those images, and the
//! parts it is made of.
//!
//! - [`deb`]: Debian packages without root: resolved, fetched, verified, unpacked.
//! - [`cpio`]: the writer of initramfs archives.
//! - [`progress`]: how long work tells what it does.

pub mod cpio;
pub mod deb;
pub mod progress;

pub use progress::{Progress, Silent};

/// The init of our Linux images: a static x86-64 ELF program, to be put at `/init` of an initramfs.
pub const INIT: &[u8] = include_bytes!(env!("PONTOON_INIT"));

/// PID 1 of the lab's outer machine: a static x86-64 ELF program, to be put at `/init` of its initramfs.
pub const LAB_INIT: &[u8] = include_bytes!(env!("PONTOON_LAB_INIT"));
