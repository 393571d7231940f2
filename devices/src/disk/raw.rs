//! [`Raw`]: a file or block device whose bytes are the disk's.
//!
//! Every access is direct. A discard punches a hole into a file (on a block device the kernel discards, or says that it
//! can't, and the hint is dropped). Zeroes are the file system's or the device's own if they can, else they are written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{Access, GuestBuffers, Storage};

/// Zeros that are written at once.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file or block device. See the module's documentation.
pub struct Raw {
    file: Arc<File>,
    bytes: u64,
}

impl Raw {
    /// The first `bytes` of `file`, which may be read-only if nobody writes to it.
    pub fn new(file: File, bytes: u64) -> Self {
        Self { file: Arc::new(file), bytes }
    }
}

impl Storage for Raw {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, buffers: &GuestBuffers, at: u64) -> io::Result<usize> {
        buffers.read_from(&self.file, at, buffers.len())
    }

    fn write(&self, buffers: &GuestBuffers, at: u64, durable: bool) -> io::Result<usize> {
        buffers.write_to(&self.file, at, buffers.len(), durable)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        punch(&self.file, at, len).map(drop)
    }

    fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        zero(&self.file, at, len, unmap)
    }

    fn direct(&self, _: Access, _: u64, _: u64) -> Option<Arc<File>> {
        Some(Arc::clone(&self.file))
    }
}

/// Gives the space of a range back; it reads as zeros then. False if this file can't.
pub(super) fn punch(file: &File, at: u64, len: u64) -> io::Result<bool> {
    allocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len)
}

/// Lets a range read as zeros.
pub(super) fn zero(file: &File, at: u64, len: u64, unmap: bool) -> io::Result<()> {
    if unmap && punch(file, at, len)? {
        return Ok(());
    }
    if allocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, at, len)? {
        return Ok(());
    }
    let mut done = 0;
    while done < len {
        let n = ZEROS.len().min(usize::try_from(len - done).unwrap_or(ZEROS.len()));
        file.write_all_at(&ZEROS[..n], at + done)?;
        done += n as u64;
    }
    Ok(())
}

/// False when the file system or device has no such operation, or not at this granularity.
fn allocate(file: &File, flags: FallocateFlags, at: u64, len: u64) -> io::Result<bool> {
    if len == 0 {
        return Ok(true);
    }
    loop {
        match fallocate(file, flags, at, len) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}
