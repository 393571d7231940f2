//! The terminal's settings, restored from a signal handler or at exit.
#![allow(unsafe_code, reason = "signal handlers and atexit have no safe interface that may kill the process")]

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

use super::TtyError;

/// Signals whose default is to kill the process.
const FATAL: [libc::c_int; 10] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGPIPE,
];
const NOBODY: RawFd = -1;
/// Being written by [`arm`].
const CLAIMED: RawFd = -2;

/// The descriptor to restore, or [`NOBODY`].
static TERMINAL: AtomicI32 = AtomicI32::new(NOBODY);
static SAVED: Saved = Saved(UnsafeCell::new(MaybeUninit::uninit()));

struct Saved(UnsafeCell<MaybeUninit<libc::termios>>);

// SAFETY: written only by `arm` between the claim of TERMINAL (compare-exchange from NOBODY to CLAIMED) and the store of
// the descriptor; read only after a load has seen that descriptor. So no read meets a write.
unsafe impl Sync for Saved {}

/// Remembers the settings of the terminal `fd` and restores them at exit or by a fatal signal, until [`disarm`].
pub(super) fn arm(fd: RawFd) -> Result<(), TtyError> {
    if TERMINAL.compare_exchange(NOBODY, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        return Err(TtyError::Busy);
    }
    // SAFETY: this thread has claimed TERMINAL, so nobody reads or writes SAVED now; tcgetattr writes one termios.
    if unsafe { libc::tcgetattr(fd, (*SAVED.0.get()).as_mut_ptr()) } != 0 {
        let source = io::Error::last_os_error();
        TERMINAL.store(NOBODY, Ordering::Release);
        return Err(TtyError::System { what: "read the terminal's settings", source });
    }
    TERMINAL.store(fd, Ordering::Release);
    static HOOKED: Once = Once::new();
    HOOKED.call_once(|| {
        // SAFETY: the function may be called at any time from now on; it fails only for lack of memory, and then the
        // guard's drop is what remains.
        unsafe { libc::atexit(restore) };
    });
    for signal in FATAL {
        handle_if_default(signal);
    }
    Ok(())
}

/// Forgets the terminal.
pub(super) fn disarm() {
    TERMINAL.store(NOBODY, Ordering::Release);
}

/// Puts the terminal back if one is remembered. Async-signal-safe.
extern "C" fn restore() {
    let fd = TERMINAL.load(Ordering::Acquire);
    if fd >= 0 {
        // SAFETY: a descriptor in TERMINAL says that SAVED was filled before; tcsetattr only reads it.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, (*SAVED.0.get()).as_ptr()) };
    }
}

/// Lets `signal` restore the terminal before it kills the process, unless the program does something else with it.
fn handle_if_default(signal: libc::c_int) {
    // SAFETY: sigaction is plain data for which zeros are the default action, no flags, an empty mask.
    let (mut action, mut old) = unsafe { std::mem::zeroed::<(libc::sigaction, libc::sigaction)>() };
    // SAFETY: the pointers are to live values of this frame; a null action only asks.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) };
    if asked != 0 || old.sa_sigaction != libc::SIG_DFL {
        return;
    }
    action.sa_sigaction = on_fatal as *const () as libc::sighandler_t;
    // The default is back before the handler runs, so that raising the signal again kills.
    action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY: as above; the handler only calls async-signal-safe functions.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
}

extern "C" fn on_fatal(signal: libc::c_int) {
    restore();
    // SAFETY: raise is async-signal-safe; its default action ends the process with the right status.
    unsafe { libc::raise(signal) };
}
