//! Every call that the compiler can't check: mounts, modules, sessions, signals, the exit port.
#![allow(unsafe_code, reason = "system calls of PID 1 that std does not offer; each argues below")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h (since 5.17): the kernel decompresses.
const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;

/// Turns the answer of a system call into a result.
fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(io::Error::from)
}

/// mount(2).
pub(crate) fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: libc::c_ulong,
    data: &str,
) -> io::Result<()> {
    let (source, target, kind, data) =
        (c_string(source)?, c_string(target)?, c_string(kind)?, c_string(data)?);
    // SAFETY: the four strings end with NUL and outlive the call, which keeps none of them.
    check(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    })
}

/// umount2(2) without flags.
pub(crate) fn unmount(target: &str) -> io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: the string ends with NUL and outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), 0) })
}

/// finit_module(2) without parameters.
pub(crate) fn load_module(file: &File, compressed: bool) -> io::Result<()> {
    let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    // SAFETY: the descriptor is open for the call's duration, the parameter string is static and ends with NUL.
    let answer = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets IFF_UP on an interface.
pub(crate) fn interface_up(name: &str) -> io::Result<()> {
    // std's sockets would do, but bring the whole resolver of glibc with them.
    // SAFETY: takes numbers only; the descriptor that it makes is nobody else's.
    let socket = unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        check(socket)?;
        OwnedFd::from_raw_fd(socket)
    };
    // SAFETY: ifreq is plain data, for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request lives through both calls and is of the type that both read and write; the union's member is
    // the one that SIOCGIFFLAGS fills in.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request))?;
        request.ifr_ifru.ifru_flags |= libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request))
    }
}

/// Makes the descriptor standard input, output and error.
pub(crate) fn become_stdio(fd: BorrowedFd<'_>) -> io::Result<()> {
    for standard in 0..=2 {
        // SAFETY: the source is open; replacing 0..=2 takes nothing from anybody: std holds them by number.
        check(unsafe { libc::dup2(fd.as_raw_fd(), standard) })?;
    }
    Ok(())
}

/// Eight clean bits each way, no echo, no signals.
pub(crate) fn set_raw(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: termios is plain data, for which all zeros is a value; it lives through all three calls.
    unsafe {
        let mut modes: libc::termios = std::mem::zeroed();
        check(libc::tcgetattr(terminal.as_raw_fd(), &raw mut modes))?;
        libc::cfmakeraw(&raw mut modes);
        check(libc::tcsetattr(terminal.as_raw_fd(), libc::TCSADRAIN, &raw const modes))
    }
}

/// Sets the UART's user-designated output 1: the sign for the machine that input may come now.
pub(crate) fn set_out1(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // TIOCM_OUT1 of linux/tty.h (asm-generic/termios.h), which the libc crate does not name for this target.
    let bits: libc::c_int = 0x2000;
    // SAFETY: TIOCMBIS reads the one int that it is given the address of.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCMBIS, &raw const bits) })
}

/// Waits until the terminal has sent everything.
pub(crate) fn drain(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes a number only.
    check(unsafe { libc::tcdrain(terminal.as_raw_fd()) })
}

/// Makes init the leader of a session whose controlling terminal is its standard input.
pub(crate) fn lead_session() -> io::Result<()> {
    // SAFETY: takes no memory. setsid fails only for who leads a group already, and then the next call tells.
    unsafe { libc::setsid() };
    // SAFETY: takes numbers only.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 1) })
}

/// The command will start with no signal blocked: a mask is inherited over exec.
pub(crate) fn with_clean_signals(command: &mut Command) {
    let none = signal_set(&[]);
    // SAFETY: between fork and exec only an async-signal-safe call is made; the set was copied into the closure.
    unsafe {
        command.pre_exec(move || {
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))
        });
    }
}

/// The command will be the terminal's foreground process group: the one that ctrl-C means, and that may read.
pub(crate) fn in_foreground(command: &mut Command) {
    command.process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are made, and they touch no memory.
    unsafe {
        command.pre_exec(|| {
            // A new group is in the background until this is done; it is not stopped for doing it because init
            // has SIGTTOU blocked. Refused when there is no controlling terminal: then there is no job control.
            libc::tcsetpgrp(0, libc::getpid());
            Ok(())
        });
    }
}

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: sigset_t is plain data and sigemptyset initialises it; sigaddset writes within it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for &signal in signals {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Blocks the signals, so that [`wait_signal`] gets them.
pub(crate) fn block_signals(signals: &[i32]) -> io::Result<()> {
    let set = signal_set(signals);
    // SAFETY: the set is initialised and outlives the call; no old set is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })
}

/// Lets the kernel send `signal` to this process whenever `file` has something to read.
pub(crate) fn signal_on_input(file: &File, signal: i32) -> io::Result<()> {
    // linux/fcntl.h; libc has it for other systems only.
    const F_SETSIG: libc::c_int = 10;
    let fd = file.as_raw_fd();
    // SAFETY: these commands take numbers, and `file` is open for all of the calls.
    unsafe {
        check(libc::fcntl(fd, libc::F_SETOWN, libc::getpid()))?;
        check(libc::fcntl(fd, F_SETSIG, signal))?;
        let flags = libc::fcntl(fd, libc::F_GETFL);
        check(flags)?;
        check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_ASYNC))
    }
}

/// Waits for one of the blocked signals; `None` after `limit` or when interrupted.
pub(crate) fn wait_signal(signals: &[i32], limit: Option<Duration>) -> Option<i32> {
    let set = signal_set(signals);
    // SAFETY: set and time outlive the calls; no siginfo is asked for.
    let signal = unsafe {
        match limit {
            Some(limit) => {
                let time = libc::timespec {
                    tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
                    tv_nsec: limit.subsec_nanos().into(),
                };
                libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const time)
            }
            None => libc::sigwaitinfo(&raw const set, std::ptr::null_mut()),
        }
    };
    (signal > 0).then_some(signal)
}

/// Reaps one child that has ended: its pid and its raw wait status.
pub(crate) fn reap() -> Option<(u32, i32)> {
    let mut status = 0;
    // SAFETY: the status lives through the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    u32::try_from(pid).ok().filter(|&pid| pid > 0).map(|pid| (pid, status))
}

/// Whether init has any child, ended or not.
pub(crate) fn has_children() -> bool {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: siginfo_t is plain data and lives through the call.
    unsafe {
        let mut info = std::mem::zeroed();
        libc::waitid(libc::P_ALL, 0, &raw mut info, flags) == 0
    }
}

/// Sends a signal to every process but init.
pub(crate) fn signal_everyone(signal: i32) {
    // SAFETY: takes numbers only; -1 from PID 1 excludes PID 1 itself (kill(2)).
    unsafe { libc::kill(-1, signal) };
}

/// Writes everything back.
pub(crate) fn sync() {
    // SAFETY: has no arguments and can't fail.
    unsafe { libc::sync() };
}

/// Writes a byte to an I/O port. Where a device takes it as the machine's end, this does not return.
pub(crate) fn out(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: opens this one port to this thread, or fails.
    check(unsafe { libc::ioperm(port.into(), 1, 1) })?;
    // SAFETY: the port was opened above; the instruction touches no memory, and no device but the exit device answers at it.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
    Ok(())
}

/// Turns the machine off.
pub(crate) fn power_off() -> io::Result<()> {
    // SAFETY: takes a number only; disks are synced by the caller.
    check(unsafe { libc::reboot(libc::RB_POWER_OFF) })
}

/// Restarts the machine.
pub(crate) fn reboot() -> io::Result<()> {
    // SAFETY: takes a number only; disks are synced by the caller.
    check(unsafe { libc::reboot(libc::RB_AUTOBOOT) })
}
