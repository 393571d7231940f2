//! From a kernel image to a vCPU that is about to run it: the 64-bit boot protocol of Linux
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), for bzImages, `vmlinux` ELFs and bare-metal ELFs.
//!
//! **Enters:** a [`Kernel`] (a file or bytes), perhaps an initrd and a command line, and the guest's RAM.
//! **Leaves:** RAM that holds kernel, initrd, command line, `boot_params` with the e820 map, identity page tables for
//! the low 4 GiB and a GDT; and [`Entry`], what the boot vCPU's registers must say.
//!
//! Everything in an image's headers is checked before a byte is written: a wild header is refused with the field and
//! its value, and nothing is ever written outside of RAM or below 1 MiB by an image. Refused: bzImages without a 64-bit
//! entry or before protocol 2.12 (Linux 3.8), ELFs that are not static x86-64 executables, more than 64 segments, images
//! or initrds that do not fit the RAM below 3 GiB.

mod bzimage;
mod cmdline;
mod e820;
mod elf;
mod entry;
mod file;
mod initrd;
mod kernel;
mod paging;
mod reset_vector;
mod zero_page;

use vm_memory::GuestAddress;

pub use bzimage::BzImageError;
pub use cmdline::CmdlineError;
pub use e820::{E820Entry, E820Kind, e820_map};
pub use elf::ElfError;
pub use entry::{Entry, initial_regs, initial_sregs};
pub use initrd::InitrdError;
pub use kernel::{Kernel, KernelError, KernelFormat};
pub use paging::IDENTITY_MAPPED;

use crate::memory::GuestMemory;

/// What is to be booted.
///
/// ```
/// use vmm::boot::{BootSource, Kernel, load};
/// use vmm::vm_memory::{Bytes, GuestAddress};
///
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let kernel = Kernel::Bytes(vmm::guest_images::PROBE.into());
/// let (entry, _) = load(&memory, &BootSource { kernel: &kernel, initrd: None, cmdline: "quiet" })?;
/// let mut line = [0; 6];
/// memory.read_slice(&mut line, GuestAddress(vmm::layout::CMDLINE))?;
/// assert_eq!((&line, entry.rip >= 1 << 20), (b"quiet\0", true));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct BootSource<'a> {
    /// The kernel image.
    pub kernel: &'a Kernel,
    /// An initial RAM disk, in any format that the kernel knows.
    pub initrd: Option<&'a Kernel>,
    /// The command line.
    pub cmdline: &'a str,
}

/// Why a machine could not be prepared for booting.
///
/// ```
/// use vmm::boot::{BootError, BootSource, Kernel, KernelError, load};
///
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let kernel = Kernel::from("/no/such/vmlinuz");
/// let refused = load(&memory, &BootSource { kernel: &kernel, initrd: None, cmdline: "" });
/// assert!(matches!(refused, Err(BootError::Kernel(KernelError::Open { .. }))));
/// # Ok::<(), vmm::memory::MemoryError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM disk.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// Boot data has no place in RAM.
    #[error(
        "{what} at {at:#x} could not be written to guest memory: {source}; give the machine at least 4 MiB"
    )]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Guest physical address.
        at: u64,
        /// What guest memory said.
        source: vm_memory::GuestMemoryError,
    },
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loaded {
    pub(crate) format: KernelFormat,
    pub(crate) entry: GuestAddress,
    /// First byte behind what the kernel uses until it has set up its own memory management.
    pub(crate) end: u64,
    /// What the image says about itself; made up for an ELF.
    pub(crate) header: linux_loader::loader::bootparam::setup_header,
}

/// Loads `source` into `memory` and writes everything that the boot protocol asks for, except the ACPI tables, whose
/// RSDP is at [`crate::layout::ACPI`].
///
/// # Errors
/// [`BootError`], with nothing written by a refused image.
pub fn load(memory: &GuestMemory, source: &BootSource<'_>) -> Result<(Entry, KernelFormat), BootError> {
    let kernel = kernel::load(memory, source.kernel)?;
    let initrd = source.initrd.map(|image| initrd::load(memory, image, &kernel)).transpose()?;
    let cmdline = cmdline::write(memory, source.cmdline, &kernel)?;
    zero_page::write(memory, &kernel, initrd, cmdline)?;
    paging::write(memory)?;
    entry::write_gdt(memory)?;
    reset_vector::write(memory)?;
    Ok((Entry { rip: kernel.entry.0 }, kernel.format))
}

#[cfg(test)]
mod tests;
