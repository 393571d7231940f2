//! [`GuestBuffers`]: pieces of guest memory that outlive a turn, and vectored file I/O on them.
#![allow(unsafe_code, reason = "preadv and pwritev over guest memory, which can't be a Rust slice")]

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use libc::{c_int, iovec, off_t};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

/// Most pieces that one system call takes (`IOV_MAX`); a transfer with more is a short one.
const MAX_IOV: usize = 1024;

/// A list of pieces of guest memory, and a hold on the mapping in which they lie.
///
/// ```
/// use std::sync::Arc;
///
/// use devices::disk::GuestBuffers;
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
///
/// let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)])?);
/// let pieces = [memory.get_slice(GuestAddress(0), 3)?, memory.get_slice(GuestAddress(0x100), 5)?];
/// let mut buffers = GuestBuffers::new(&memory, &pieces).expect("they lie in this memory");
/// assert_eq!(buffers.put(b"0123456789"), 8, "there is no room for more");
/// buffers.advance(4); // a short transfer; the next one goes on behind it
/// let mut rest = [0; 8];
/// assert_eq!(buffers.take(&mut rest), 4);
/// assert_eq!(&rest[..4], b"4567");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GuestBuffers {
    /// Invariant: each entry is not empty and lies within a region of `memory`.
    iov: Vec<iovec>,
    /// The entries before this one are done with.
    first: usize,
    /// Bytes from there on.
    len: usize,
    memory: Arc<GuestMemoryMmap<()>>,
}

// SAFETY: what keeps it from being `Send` are the addresses. They point into mappings that `memory`, which is `Send`, keeps
// alive and in place, and that any thread may access: no Rust reference to guest memory is ever made of them.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// Holds `pieces`; `None` if one of them does not lie in `memory`.
    pub fn new(memory: &Arc<GuestMemoryMmap<()>>, pieces: &[VolatileSlice<'_>]) -> Option<Self> {
        let mut iov = Vec::with_capacity(pieces.len());
        let mut len = 0_usize;
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            let guard = piece.ptr_guard_mut();
            let entry = iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
            let inside = |region: &vm_memory::GuestRegionMmap<()>| {
                let offset = entry.iov_base.addr().checked_sub(region.as_ptr().addr());
                let end = offset.and_then(|offset| offset.checked_add(entry.iov_len));
                end.is_some_and(|end| end as u64 <= region.len())
            };
            if !memory.iter().any(inside) {
                return None;
            }
            len = len.checked_add(entry.iov_len)?;
            iov.push(entry);
        }
        Some(Self { iov, first: 0, len, memory: Arc::clone(memory) })
    }

    /// No pieces.
    pub fn none(memory: &Arc<GuestMemoryMmap<()>>) -> Self {
        Self { iov: Vec::new(), first: 0, len: 0, memory: Arc::clone(memory) }
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `n` bytes are done with; `n` is at most [`Self::len`].
    pub fn advance(&mut self, n: usize) {
        let mut left = n.min(self.len);
        self.len -= left;
        while let Some(entry) = self.iov.get_mut(self.first).filter(|_| left > 0) {
            let step = left.min(entry.iov_len);
            left -= step;
            // Stays within the piece, or points just behind it, and then the piece is done with.
            entry.iov_base = entry.iov_base.wrapping_byte_add(step);
            entry.iov_len -= step;
            if entry.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// What is left, up to [`MAX_IOV`] pieces.
    pub(super) fn iovecs(&self) -> &[iovec] {
        let rest = self.iov.get(self.first..).unwrap_or_default();
        rest.get(..MAX_IOV).unwrap_or(rest)
    }

    /// The same, cut to `limit` bytes.
    fn limited(&self, limit: usize) -> Cow<'_, [iovec]> {
        if limit >= self.len {
            return Cow::Borrowed(self.iovecs());
        }
        let mut left = limit;
        let cut = self.iovecs().iter().map_while(|entry| {
            let iov_len = entry.iov_len.min(left);
            left -= iov_len;
            (iov_len > 0).then_some(iovec { iov_len, ..*entry })
        });
        Cow::Owned(cut.collect())
    }

    /// One `preadv` of at most `limit` bytes; 0 is the end of the file.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_from(&self, file: &File, at: u64, limit: usize) -> io::Result<usize> {
        let iov = self.limited(limit);
        let count = c_int::try_from(iov.len()).unwrap_or(c_int::MAX);
        // SAFETY: `count` entries, each of which lies in a mapping that `self.memory` keeps (the type's invariant; a cut one is
        // shorter). It is guest memory: the guest and devices race for it by design, and no reference to it exists.
        let n = unsafe { libc::preadv(file.as_raw_fd(), iov.as_ptr(), count, offset(at)?) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// One `pwritev` of at most `limit` bytes, which is on the medium when it returns if it is `durable`.
    ///
    /// # Errors
    /// What the system says.
    pub fn write_to(&self, file: &File, at: u64, limit: usize, durable: bool) -> io::Result<usize> {
        let iov = self.limited(limit);
        let count = c_int::try_from(iov.len()).unwrap_or(c_int::MAX);
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: as in `read_from`; the kernel only reads here.
        let n = unsafe { libc::pwritev2(file.as_raw_fd(), iov.as_ptr(), count, offset(at)?, flags) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Copies as much of `bytes` as there is room for to the front, and says how much.
    pub fn put(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for entry in self.iovecs() {
            let rest = bytes.get(done..).unwrap_or_default();
            // SAFETY: the entry lies in a mapping that `self.memory` keeps beyond this call (the type's invariant).
            let piece = unsafe { VolatileSlice::new(entry.iov_base.cast(), entry.iov_len) };
            piece.copy_from(rest);
            done += rest.len().min(entry.iov_len);
        }
        done
    }

    /// Copies as much of the front as there is room for to `bytes`, and says how much.
    pub fn take(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for entry in self.iovecs() {
            let rest = bytes.get_mut(done..).unwrap_or_default();
            // SAFETY: as in `put`.
            let piece = unsafe { VolatileSlice::new(entry.iov_base.cast(), entry.iov_len) };
            done += piece.copy_to(rest);
        }
        done
    }

    /// The memory in which the pieces lie.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap<()>> {
        &self.memory
    }
}

fn offset(at: u64) -> io::Result<off_t> {
    off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput.into())
}
