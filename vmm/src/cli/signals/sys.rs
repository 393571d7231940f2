//! Signals that are read from a descriptor.
#![allow(unsafe_code, reason = "signal masks and signalfd have no safe interface")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Blocks `signals` on this thread and gives a non-blocking descriptor from which they can be read instead.
pub(super) fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    // SAFETY: a sigset_t is plain data, for which zeros are a valid value.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: the set is a live value of this frame.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: as above; a number that is no signal is refused.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    // SAFETY: the kernel reads the set, and writes none: the old one is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: the kernel reads the set; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call that made `fd` succeeded just now, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
