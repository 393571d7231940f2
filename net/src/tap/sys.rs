//! The system calls behind [`super::TapPort`]: the tun ioctls, and scatter-gather I/O over lent memory.
#![allow(
    unsafe_code,
    reason = "ioctls of /dev/net/tun, and readv/writev over guest memory that can't be a Rust slice"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_int, c_short, c_uint, iovec};
use vm_memory::VolatileSlice;
use vm_memory::volatile_memory::{PtrGuard, PtrGuardMut};

use crate::bridge::sys::{IfName, name_from_raw};

/// Most pieces of lent memory that one call takes; a frame in more is copied together first.
pub(super) const MAX_PARTS: usize = 64;
/// Pieces plus a header in front and a spill buffer behind.
const MAX_IOV: usize = MAX_PARTS + 2;
const NO_IOV: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// What `TUNGETIFF` says of an open TAP.
pub(super) struct TapInfo {
    pub(super) name: String,
    /// `IFF_TAP`, `IFF_VNET_HDR`, …
    pub(super) flags: c_int,
}

fn request(name: IfName, flags: c_int) -> libc::ifreq {
    // SAFETY: an `ifreq` of zeros is valid: integers, byte arrays and a null pointer.
    let mut req: libc::ifreq = unsafe { std::mem::zeroed() };
    req.ifr_name = name.raw();
    // The flags of TUNSETIFF fill 16 bits, IFF_TUN_EXCL being the top one.
    req.ifr_ifru.ifru_flags = flags as c_short;
    req
}

fn check(rc: c_int) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `TUNSETIFF`: makes or attaches to the interface.
pub(super) fn set_iff(fd: &OwnedFd, name: IfName, flags: c_int) -> io::Result<()> {
    let mut req = request(name, flags);
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut req) })
}

/// `TUNGETIFF`: name and flags; fails on a file that is no tun device.
pub(super) fn get_iff(fd: BorrowedFd<'_>) -> io::Result<TapInfo> {
    // SAFETY: an `ifreq` of zeros is valid: integers, byte arrays and a null pointer.
    let mut req: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one `ifreq`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut req) })?;
    // SAFETY: TUNGETIFF has filled this member.
    let flags = unsafe { req.ifr_ifru.ifru_flags };
    Ok(TapInfo { name: name_from_raw(&req.ifr_name), flags: c_int::from(flags.cast_unsigned()) })
}

/// `TUNSETVNETHDRSZ`: bytes of the header in front of each frame.
pub(super) fn set_vnet_hdr_len(fd: &OwnedFd, len: usize) -> io::Result<()> {
    let len = c_int::try_from(len).unwrap_or(c_int::MAX);
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const len) })
}

/// `TUNSETOFFLOAD`: what frames that are read may contain, as `TUN_F_*`.
pub(super) fn set_offload(fd: BorrowedFd<'_>, features: c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(features)) })
}

/// Sets `O_NONBLOCK` on a descriptor that was handed over.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: F_SETFL takes its argument by value.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

/// Writes one frame: `head`, then the pieces. At most [`MAX_PARTS`] pieces.
pub(super) fn write_frame(fd: BorrowedFd<'_>, head: &[u8], parts: &[VolatileSlice<'_>]) -> io::Result<usize> {
    const NO_GUARD: Option<PtrGuard> = None;
    let mut guards = [NO_GUARD; MAX_PARTS];
    let mut iov = [NO_IOV; MAX_IOV];
    let mut count = 0;
    if !head.is_empty() {
        // writev only reads through `iov_base`.
        iov[0] = iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
        count = 1;
    }
    for (part, guard) in parts.iter().zip(&mut guards) {
        let pinned = guard.insert(part.ptr_guard());
        iov[count] = iovec { iov_base: pinned.as_ptr().cast_mut().cast(), iov_len: pinned.len() };
        count += 1;
    }
    // SAFETY: the first `count` entries describe `head` and the pieces, which are borrowed, and whose mappings the
    // guards hold, until the call returns. The guest may write to them meanwhile: only the kernel reads them here.
    let n = unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), c_int::try_from(count).unwrap_or(0)) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Reads one frame into `head`, then the pieces, then `spill`. At most [`MAX_PARTS`] pieces.
pub(super) fn read_frame(
    fd: BorrowedFd<'_>,
    head: &mut [u8],
    parts: &[VolatileSlice<'_>],
    spill: &mut [u8],
) -> io::Result<usize> {
    const NO_GUARD: Option<PtrGuardMut> = None;
    let mut guards = [NO_GUARD; MAX_PARTS];
    let mut iov = [NO_IOV; MAX_IOV];
    let mut count = 0;
    if !head.is_empty() {
        iov[0] = iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
        count = 1;
    }
    for (part, guard) in parts.iter().zip(&mut guards) {
        let pinned = guard.insert(part.ptr_guard_mut());
        iov[count] = iovec { iov_base: pinned.as_ptr().cast(), iov_len: pinned.len() };
        count += 1;
    }
    if !spill.is_empty() {
        iov[count] = iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() };
        count += 1;
    }
    // SAFETY: the first `count` entries describe `head` and `spill`, borrowed mutably, and the pieces, whose mappings
    // the guards hold, until the call returns. Lent pieces are raw memory that the guest may touch as well; no Rust
    // reference to it exists.
    let n = unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), c_int::try_from(count).unwrap_or(0)) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
