#![allow(unsafe_code, reason = "poll, and duplicating a descriptor that is known by its number only")]
//! What [`super::run`] needs of the kernel and std does not have.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Something can be received.
pub(super) const INPUT: i16 = libc::POLLIN;
/// Something can be sent again.
pub(super) const OUTPUT: i16 = libc::POLLOUT;
/// The descriptor is of no use any more; always reported.
pub(super) const BROKEN: i16 = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;

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

/// Waits until one of `fds` has one of the events that it wants, or is broken. Says what each has, in order.
///
/// # Errors
/// As poll(2) has; a signal only ends the wait.
pub(super) fn wait(fds: &[(BorrowedFd<'_>, i16)]) -> io::Result<Vec<i16>> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|(fd, events)| libc::pollfd { fd: fd.as_raw_fd(), events: *events, revents: 0 })
        .collect();
    // SAFETY: the pointer and the length are those of `polls`, which lives through the call.
    if unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, -1) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(polls.iter().map(|poll| poll.revents).collect())
}
