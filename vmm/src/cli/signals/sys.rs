//! Signals that are read from a descriptor.
#![allow(unsafe_code, reason = "signal masks and signalfd have no safe interface")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Blocks `signals` and `ignored` on this thread and those that it starts, and gives a non-blocking descriptor from which `signals`
/// can be read instead.
pub(super) fn signal_fd(signals: &[libc::c_int], ignored: &[libc::c_int]) -> io::Result<OwnedFd> {
    let set = set_of(signals.iter().chain(ignored));
    // SAFETY: the kernel reads the set, and writes none: the old one is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    let set = set_of(signals);
    // SAFETY: the kernel reads the set; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call that made `fd` succeeded just now, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_of<'a>(signals: impl IntoIterator<Item = &'a libc::c_int>) -> libc::sigset_t {
    // SAFETY: a sigset_t is plain data, for which zeros are a valid value.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: the set is a live value of this frame.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: as above; a number that is no signal is refused.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

/// Whether whoever started this process wants it to ignore the signal: `nohup`, or a shell's `&`. A blocked signal is kept by the kernel
/// even then.
pub(super) fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: sigaction is plain data, for which zeros are a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null action only asks; the kernel writes one sigaction to a live value of this frame.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}
