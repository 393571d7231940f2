#![allow(unsafe_code, reason = "duplicating a descriptor that is known by its number only")]
//! What [`super::run`] needs of the kernel and std does not have.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A descriptor that the process was started with, such as 3 in `--tap-fd 3`, for oneself.
///
/// It is a duplicate, closed on exec; the number itself stays open as long as the process lives.
///
/// # Errors
/// `EBADF` when there is no such descriptor.
pub fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes a number, and touches no memory; a number that is not open is refused.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if own < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made `own` just now, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(own) })
}
