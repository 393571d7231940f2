//! From guest memory to the pages of its file, and away with them.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

use super::PAGE;

/// Whole pages of guest memory, to be given back: a region's number, and bytes from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pages {
    region: usize,
    start: u64,
    end: u64,
}

impl Pages {
    /// The whole pages of a piece of guest memory, if it has any.
    pub(super) fn within(memory: &GuestMemoryMmap<()>, piece: &VolatileSlice<'_>) -> Option<Self> {
        let address = piece.ptr_guard().as_ptr().addr();
        memory.iter().enumerate().find_map(|(region, found)| {
            let offset = u64::try_from(address.checked_sub(found.as_ptr().addr())?).ok()?;
            let end = offset.checked_add(piece.len() as u64).filter(|end| *end <= found.len())?;
            Self::new(region, offset.next_multiple_of(PAGE), end / PAGE * PAGE)
        })
    }

    /// The page with this number, if it is in memory.
    pub(super) fn numbered(memory: &GuestMemoryMmap<()>, number: u32) -> Option<Self> {
        let address = GuestAddress(u64::from(number) * PAGE);
        memory.iter().enumerate().find_map(|(region, found)| {
            let MemoryRegionAddress(start) = found.to_region_addr(address)?;
            let end = start.checked_add(PAGE).filter(|end| *end <= found.len())?;
            Self::new(region, start, end)
        })
    }

    fn new(region: usize, start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { region, start, end })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Appends `next` if it follows in the same region; or gives it back.
    pub(super) fn join(&mut self, next: Self) -> Option<Self> {
        if next.region == self.region && next.start == self.end {
            self.end = next.end;
            return None;
        }
        Some(next)
    }

    /// Splits off what is beyond `bytes`, a multiple of a page.
    pub(super) fn split(self, bytes: u64) -> (Self, Option<Self>) {
        let cut = self.start.saturating_add(bytes).min(self.end);
        (Self { end: cut, ..self }, Self::new(self.region, cut, self.end))
    }

    /// Gives the pages to the host: they read as zeros from now on. False if the memory has no file.
    pub(super) fn release(&self, memory: &GuestMemoryMmap<()>) -> io::Result<bool> {
        let Some((file, start)) = memory.iter().nth(self.region).and_then(file_of) else { return Ok(false) };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(file, flags, start + self.start, self.bytes()) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The file behind a region, and where in it the region begins.
fn file_of(region: &GuestRegionMmap<()>) -> Option<(&File, u64)> {
    region.file_offset().map(|offset| (offset.file(), offset.start()))
}
