//! Guest RAM: one memfd, mapped shared, so that another process (a vhost-user back end) can be handed it.
//!
//! RAM fills the guest physical addresses from 0 to the MMIO hole at 3 GiB and goes on at 4 GiB
//! ([`crate::layout`]). Pages are allocated when they are first touched, by the guest or by a loader; nothing
//! here touches any, and unread memory reads as zeros. The memfd is sealed against resizing: a peer that holds
//! it cannot shrink it under our feet.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use crate::layout::{MMIO_HOLE, RAM_ABOVE_4G};

/// Guest RAM; clones share it.
///
/// ```
/// use vmm::memory::{GuestMemory, allocate};
/// use vmm::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
///
/// let memory: GuestMemory = allocate(64 << 20)?;
/// memory.write_obj(0xdead_beef_u32, GuestAddress(0x1000))?;
/// assert_eq!(memory.clone().read_obj::<u32>(GuestAddress(0x1000))?, 0xdead_beef);
/// assert_eq!(memory.last_addr(), GuestAddress((64 << 20) - 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Smallest RAM of a machine, in bytes.
pub const MIN_MEMORY: u64 = 4 << 20;
/// Largest RAM of a machine, in bytes: below 2^39 - 1 GiB, the narrowest physical address space in use.
pub const MAX_MEMORY: u64 = 256 << 30;
/// Below this a stock distribution kernel is unlikely to reach its init.
pub const LINUX_FLOOR: u64 = 128 << 20;
const PAGE: u64 = 4096;

/// Why a machine got no memory.
///
/// ```
/// use vmm::memory::{MIN_MEMORY, MemoryError, allocate};
///
/// assert!(matches!(allocate(MIN_MEMORY - 4096), Err(MemoryError::OutOfBounds(_))));
/// assert!(matches!(allocate(MIN_MEMORY + 1), Err(MemoryError::Unaligned(_))));
/// assert!(allocate(MIN_MEMORY).is_ok());
/// ```
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than [`MIN_MEMORY`] or more than [`MAX_MEMORY`].
    #[error(
        "{} bytes of memory is not between 4 MiB and 256 GiB; Linux wants at least 128 MiB",
        .0
    )]
    OutOfBounds(u64),
    /// Not a whole number of pages.
    #[error("{0} bytes of memory is not a multiple of 4096; round it up")]
    Unaligned(u64),
    /// The kernel gave no memfd of this size.
    #[error(
        "could not set up {size} bytes of shared memory: {source}; check the limits of this user (ulimit -v, -f, -n)"
    )]
    Memfd {
        /// Bytes wanted.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The memfd could not be mapped.
    #[error("could not map {size} bytes of guest memory: {source}; check ulimit -v and vm.overcommit_memory")]
    Map {
        /// Bytes wanted.
        size: u64,
        /// What the kernel said.
        source: MmapRegionError,
    },
}

/// The guest address ranges that `size` bytes of RAM occupy: (first byte, bytes).
pub fn ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(MMIO_HOLE);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(RAM_ABOVE_4G), size - low));
    }
    ranges
}

/// Makes `size` bytes of zeroed guest RAM.
///
/// # Errors
/// [`MemoryError`], when the size is out of bounds or the host refuses.
pub fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) {
        return Err(MemoryError::OutOfBounds(size));
    }
    if !size.is_multiple_of(PAGE) {
        return Err(MemoryError::Unaligned(size));
    }
    let file = sealed_memfd(size).map_err(|source| MemoryError::Memfd { size, source })?;
    map(file, size)
}

/// A memfd of `size` bytes that nobody can resize.
fn sealed_memfd(size: u64) -> io::Result<File> {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(size)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

fn map(file: File, size: u64) -> Result<GuestMemory, MemoryError> {
    let file = Arc::new(file);
    let mut offset = 0;
    let mut regions = Vec::with_capacity(2);
    for (base, len) in ranges(size) {
        let mapping = MmapRegionBuilder::new(usize::try_from(len).expect("RAM is below 2^38 bytes"))
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { size, source })?;
        regions.push(GuestRegionMmap::new(mapping, base).expect("no range reaches the end of 2^64"));
        offset += len;
    }
    Ok(GuestMemory::from_regions(regions).expect("the ranges are sorted and disjoint"))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn ram_leaves_the_mmio_hole_free() {
        assert_eq!(ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ranges(5 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        assert!(matches!(allocate(0), Err(MemoryError::OutOfBounds(0))));
        assert!(matches!(allocate(MAX_MEMORY + PAGE), Err(MemoryError::OutOfBounds(_))));
        assert!(matches!(allocate(MIN_MEMORY + 1), Err(MemoryError::Unaligned(_))));
    }

    #[test]
    fn memory_is_shared_zeroed_and_sealed() {
        let memory = allocate(8 << 20).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1234)).unwrap(), 0);
        memory.write_obj(0x55u8, GuestAddress(0x10_0000)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut byte, 0x10_0000).unwrap();
        assert_eq!(byte, [0x55], "what the guest writes is in the file");
        assert!(file.set_len(4096).is_err(), "a peer cannot shrink it");
        assert!(!GuestMemoryBackend::check_range(&memory, GuestAddress((8 << 20) - 1), 2));
    }

    #[test]
    fn memory_behind_the_hole_is_where_the_file_goes_on() {
        let memory = allocate((3 << 30) + (16 << 20)).unwrap();
        memory.write_obj(7u8, GuestAddress(RAM_ABOVE_4G)).unwrap();
        let high = memory.find_region(GuestAddress(RAM_ABOVE_4G)).unwrap();
        assert_eq!(high.file_offset().unwrap().start(), 3 << 30);
        assert!(memory.find_region(GuestAddress(MMIO_HOLE)).is_none());
    }
}
