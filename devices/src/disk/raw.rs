//! [`Raw`]: a file or block device whose bytes are the disk's.
//!
//! Every access is direct. A discard punches a hole into a file (on a block device the kernel discards, or says that it
//! can't, and the hint is dropped). Zeroes are the file system's or the device's own if they can, else they are written.

use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, pwritev};

use super::{Access, GuestBuffers, Storage};

/// Zeros to write, [`AT_ONCE`] times in one call: a longer row of them would be so much more of the binary.
static ZEROS: [u8; 4 << 10] = [0; 4 << 10];

/// How often [`ZEROS`] is written by one call at the most: 1 MiB.
const AT_ONCE: usize = 256;

/// A file or block device. See the module's documentation.
pub(crate) struct Raw {
    file: Arc<File>,
    bytes: u64,
}

impl Raw {
    /// The first `bytes` of `file`, which may be read-only if nobody writes to it.
    pub(crate) fn new(file: File, bytes: u64) -> Self {
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
    write_zeros(file, at, len)
}

pub(super) fn write_zeros(file: &File, at: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let left = usize::try_from(len - done).unwrap_or(usize::MAX);
        let mut rows = [IoSlice::new(&ZEROS); AT_ONCE];
        let count = left.div_ceil(ZEROS.len()).min(AT_ONCE);
        if left < count * ZEROS.len() {
            rows[count - 1] = IoSlice::new(&ZEROS[..left % ZEROS.len()]);
        }
        match pwritev(file, &rows[..count], at + done) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done += written as u64,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
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
