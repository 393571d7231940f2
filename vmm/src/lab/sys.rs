//! The one thing about the emulator's process that has no safe wrapper: what happens between fork and exec.
#![allow(unsafe_code, reason = "pre_exec: the child's death signal and inherited descriptors")]

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::FdFlags;
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Lets the child die with the thread that spawns it, and keep the descriptors `inherited` (numbers that are
/// open in the parent until the spawn has returned) under the same numbers.
pub(super) fn tie(command: &mut Command, inherited: Vec<RawFd>) {
    let parent = getpid();
    let set_up = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the line above.
        if getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        for &number in &inherited {
            // SAFETY: the caller keeps the descriptor open until the spawn returns, and this is a copy of its table.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec; it makes system calls only, allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(set_up) };
}
