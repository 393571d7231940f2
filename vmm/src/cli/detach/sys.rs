//! Descriptors that this process was started with and that nothing in it knows.
#![allow(unsafe_code, reason = "inherited descriptors have no owner in this process that could close them")]

use std::os::fd::RawFd;

/// The descriptors beside the standard streams that are open now. To be called before this process opens any.
pub(super) fn inherited() -> Vec<RawFd> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let found: Vec<RawFd> = numbers.filter(|fd| *fd > libc::STDERR_FILENO).collect();
    // The folder's own descriptor was among them, and is closed now.
    found.into_iter().filter(|fd| std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()).collect()
}

/// Closes what [`inherited`] has found.
pub(super) fn close(fds: Vec<RawFd>) {
    for fd in fds {
        // SAFETY: it was open before this process opened anything, so no value in it owns or borrows it, and it was
        // never closed, so its number is not anybody else's by now.
        unsafe { libc::close(fd) };
    }
}
