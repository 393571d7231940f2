#![allow(unsafe_code, reason = "poll, and taking over a descriptor that was passed by number")]
//! What the example needs of the kernel and std does not have.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Takes over a descriptor that the parent process left open for us.
///
/// # Errors
/// When there is no such descriptor.
pub(crate) fn take_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no argument and changes nothing.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and whoever started this program gave it to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until one of the descriptors is ready: for input, and the first for output as well if `output` is set.
///
/// # Errors
/// As `poll` does, `EINTR` apart.
pub(crate) fn wait(fds: [BorrowedFd<'_>; 2], input: [bool; 2], output: bool) -> io::Result<[bool; 2]> {
    let mut polls = [0, 1].map(|i| libc::pollfd {
        fd: fds[i].as_raw_fd(),
        events: if input[i] { libc::POLLIN } else { 0 } | if output && i == 0 { libc::POLLOUT } else { 0 },
        revents: 0,
    });
    // SAFETY: the array has as many elements as are passed.
    if unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok([0, 1].map(|i| polls[i].revents != 0))
}
