//! The initial RAM disk: as high as the kernel allows, out of the way of the kernel's unpacking.

use std::fs::File;
use std::io::{self, Cursor, SeekFrom};
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::kernel::Image;
use super::{Kernel, Loaded};
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;

/// Where an initrd was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Initrd {
    pub(crate) start: u32,
    pub(crate) size: u32,
}

/// Why an initrd was not loaded.
///
/// ```
/// use vmm::boot::{BootError, BootSource, InitrdError, Kernel, load};
///
/// let kernel = Kernel::Bytes(vmm::guest_images::PROBE.into());
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let with = |initrd: &Kernel| load(&memory, &BootSource { kernel: &kernel, initrd: Some(initrd), cmdline: "" });
/// let missing = with(&Kernel::from("/no/such/initrd"));
/// assert!(matches!(missing, Err(BootError::Initrd(InitrdError::Open { .. }))));
/// let large = with(&Kernel::Bytes(vec![0; 80 << 20].into()));
/// assert!(matches!(large, Err(BootError::Initrd(InitrdError::TooLarge { .. }))));
/// # Ok::<(), vmm::memory::MemoryError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file could not be opened.
    #[error("could not open the initrd {}: {source}; name a readable cpio archive", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file could not be read into guest memory.
    #[error("could not read the initrd {name} into guest memory: {reason}; is it a regular, complete file?")]
    Read {
        /// The image.
        name: String,
        /// What the system said.
        reason: String,
    },
    /// No bytes at all.
    #[error("the initrd {0} is empty; leave --initrd out, or build it again")]
    Empty(String),
    /// No room between the kernel and the end of usable memory.
    #[error(
        "the initrd {name} of {size} bytes does not fit between the kernel's end at {kernel_end:#x} and {limit:#x}; give the machine at least {} MiB",
        (.size + .kernel_end) / (1 << 20) + 64
    )]
    TooLarge {
        /// The image.
        name: String,
        /// Its bytes.
        size: u64,
        /// Where the kernel's own memory ends.
        kernel_end: u64,
        /// The end of what may be used.
        limit: u64,
    },
}

/// The end of the RAM that starts at 0.
pub(super) fn ram_end(memory: &GuestMemory) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, GuestMemoryRegion::len)
}

/// Reads `image` to the highest place that `kernel` allows.
pub(super) fn load(memory: &GuestMemory, image: &Kernel, kernel: &Loaded) -> Result<Initrd, InitrdError> {
    match image {
        Kernel::Path(path) => {
            let mut file =
                File::open(path).map_err(|source| InitrdError::Open { path: path.clone(), source })?;
            load_image(memory, &mut file, image, kernel)
        }
        Kernel::Bytes(bytes) => load_image(memory, &mut Cursor::new(bytes), image, kernel),
    }
}

fn load_image<F: Image>(
    memory: &GuestMemory,
    image: &mut F,
    named: &Kernel,
    kernel: &Loaded,
) -> Result<Initrd, InitrdError> {
    let read = |reason: String| InitrdError::Read { name: named.name(), reason };
    let size = image.seek(SeekFrom::End(0)).map_err(|e| read(e.to_string()))?;
    image.rewind().map_err(|e| read(e.to_string()))?;
    if size == 0 {
        return Err(InitrdError::Empty(named.name()));
    }
    let start = place(ram_end(memory), size, kernel).map_err(|limit| InitrdError::TooLarge {
        name: named.name(),
        size,
        kernel_end: kernel.end,
        limit,
    })?;
    let len = usize::try_from(size).expect("it fits the RAM below 3 GiB");
    memory.read_exact_volatile_from(GuestAddress(start), image, len).map_err(|e| read(e.to_string()))?;
    let fits = "below initrd_addr_max, a 32-bit field";
    Ok(Initrd { start: u32::try_from(start).expect(fits), size: u32::try_from(size).expect(fits) })
}

/// The page where an initrd of `size` bytes starts, or the limit that it would have had to stay below.
fn place(ram: u64, size: u64, kernel: &Loaded) -> Result<u64, u64> {
    let limit = ram.min(u64::from(kernel.header.initrd_addr_max) + 1);
    let start = limit.checked_sub(size).ok_or(limit)? & !(PAGE - 1);
    if start < kernel.end { Err(limit) } else { Ok(start) }
}
