//! What these tests need of the kernel beyond std.
#![allow(unsafe_code, reason = "poll of several descriptors")]

use std::os::fd::{AsRawFd, BorrowedFd};

/// Waits until one of `fds` is readable, for at most `millis`; says which are.
pub(crate) fn wait<const N: usize>(fds: [BorrowedFd<'_>; N], millis: i32) -> [bool; N] {
    let mut polls = fds.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: the array has N elements and lives through the call.
    unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, millis) };
    polls.map(|poll| poll.revents != 0)
}
