#![allow(
    unsafe_code,
    reason = "sockets read and write pieces of guest memory, which std's slices must not name"
)]
//! A packet's header over borrowed bytes, and a socket's bytes straight from and into guest memory.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use virtio_vsock::packet::VsockPacket;
use vm_memory::VolatileSlice;

use super::packet::HEADER_LEN;

/// Pieces of one call; what does not fit is left for the next.
const MAX_IOV: usize = 64;

/// A packet without payload whose header lies in `bytes`.
pub(super) fn packet(bytes: &mut [u8; HEADER_LEN]) -> VsockPacket<'_, ()> {
    // SAFETY: the packet borrows `bytes` for as long as it lives (the signature ties the two), so the memory is
    // there and nobody else accesses it.
    let packet = unsafe { VsockPacket::new(bytes, None) };
    packet.expect("it has the length of a header")
}

/// The first `max` bytes of `pieces` as the kernel wants them.
struct Iov {
    parts: [iovec; MAX_IOV],
    len: usize,
}

impl Iov {
    fn new(pieces: &[VolatileSlice<'_>], mut max: usize) -> Self {
        let empty = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut iov = Self { parts: [empty; MAX_IOV], len: 0 };
        for piece in pieces.iter().take(MAX_IOV) {
            if max == 0 {
                break;
            }
            let len = piece.len().min(max);
            iov.parts[iov.len] = iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: len };
            iov.len += 1;
            max -= len;
        }
        iov
    }

    fn header(&mut self) -> libc::msghdr {
        // SAFETY: a msghdr of zeros is valid: no address, no pieces, no control data.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = self.parts.as_mut_ptr();
        header.msg_iovlen = self.len;
        header
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Sends at most `max` bytes of `pieces`, without waiting and without a signal; how many were taken.
pub(super) fn send(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], max: usize) -> io::Result<usize> {
    let mut iov = Iov::new(pieces, max);
    let header = iov.header();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the header points to `iov.len` pieces of guest memory, which is mapped while `pieces` borrow it; the
    // kernel copes with a guest that changes it meanwhile.
    check(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) })
}

/// Receives at most `max` bytes into `pieces`, without waiting; how many came, 0 for the end of the stream.
pub(super) fn recv(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], max: usize) -> io::Result<usize> {
    let mut iov = Iov::new(pieces, max);
    let mut header = iov.header();
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: as in `send`; guest memory may be written by anyone at any time, and `pieces` are writable.
    check(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) })
}
