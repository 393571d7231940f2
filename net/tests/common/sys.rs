//! What the tests need of the kernel beyond std.
#![allow(unsafe_code, reason = "unshare for a thread, and descriptors from crates that know only raw ones")]

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

/// Moves the calling thread, and what it will spawn, into a new network namespace.
pub(crate) fn new_namespace() -> io::Result<()> {
    // SAFETY: no memory is passed; only the calling thread changes its namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The kernel's number of the calling thread, by which `ip link set … netns` can name its namespace.
pub(crate) fn thread_id() -> libc::pid_t {
    // SAFETY: gettid takes nothing and never fails.
    unsafe { libc::gettid() }
}

/// Takes the descriptor out of an object that owns it.
pub(crate) fn take_fd(owner: impl IntoRawFd) -> OwnedFd {
    // SAFETY: `into_raw_fd` gives up the ownership of an open descriptor.
    unsafe { OwnedFd::from_raw_fd(owner.into_raw_fd()) }
}

/// Waits until `fd` is readable, for at most ten seconds.
pub(crate) fn wait_readable(fd: &impl std::os::fd::AsFd) -> bool {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    unsafe { libc::poll(&raw mut poll, 1, 10_000) == 1 }
}
