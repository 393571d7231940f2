//! Why a machine ended, and the one place where that is decided.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use devices::ExitRequest;
use rustix::event::{EventfdFlags, eventfd};

use crate::vcpu::{CpuState, Ending, Failure};

/// Why a machine ended.
///
/// ```
/// use vmm::machine::ExitReason;
///
/// // What a shell would make of it, and what a person reads.
/// assert_eq!(ExitReason::Status(3).status(), 3);
/// assert_eq!(ExitReason::PowerOff.status(), 0);
/// assert_eq!(ExitReason::Stopped.to_string(), "the machine was stopped");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset: by ACPI, or by the keyboard controller.
    Reset,
    /// The guest wrote this status to the exit device.
    Status(u8),
    /// [`super::Running::stop`], a drop, or the console's escape.
    Stopped,
    /// A triple fault: the last resort of a kernel that reboots, or a crash.
    TripleFault(Box<CpuState>),
    /// KVM could not run the guest any further.
    Failed(Failure),
    /// A thread of the machine panicked: a mistake in this program.
    Crashed(&'static str),
}

impl ExitReason {
    /// The exit status that this is to a shell: the guest's own, 0 for power-off and reset, 124 when it was stopped,
    /// 125 when the machine failed, 126 for a triple fault.
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reset => 0,
            Self::Status(status) => *status,
            Self::Stopped => 124,
            Self::Failed(_) | Self::Crashed(_) => 125,
            Self::TripleFault(_) => 126,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Status(status) => write!(f, "the guest ended with status {status}"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::TripleFault(state) => write!(f, "the guest's CPU shut down (triple fault): {state}"),
            Self::Failed(failure) => failure.fmt(f),
            Self::Crashed(thread) => write!(f, "the thread {thread} panicked; please report this"),
        }
    }
}

/// Maps what a vCPU says to why the machine ended; `None` when it ended because it was told to.
pub(super) fn reason(ending: Ending) -> Option<ExitReason> {
    Some(match ending {
        Ending::Stopped => return None,
        Ending::Asked(ExitRequest::PowerOff) => ExitReason::PowerOff,
        Ending::Asked(ExitRequest::Reset) => ExitReason::Reset,
        Ending::Asked(ExitRequest::Status(status)) => ExitReason::Status(status),
        Ending::Shutdown(state) => ExitReason::TripleFault(state),
        Ending::Failed(failure) => ExitReason::Failed(failure),
    })
}

/// The end of a machine: whether it has come, and why. Shared by all of its threads.
pub(super) struct End {
    stop: AtomicBool,
    reason: Mutex<Option<ExitReason>>,
    wake: OwnedFd,
}

impl End {
    pub(super) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { stop: AtomicBool::new(false), reason: Mutex::new(None), wake })
    }

    /// Ends the machine, unless it has ended already: the first reason stays.
    pub(super) fn now(&self, reason: ExitReason) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        self.stop.store(true, Ordering::Release);
        // It fails only when the counter is full, and then the reader has been woken.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Set when the machine has ended; vCPUs look at it before they run.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.stop
    }

    pub(super) fn has_come(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Readable from the end on.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn reason(&self) -> Option<ExitReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Ends the machine when the thread that owns it unwinds.
pub(super) struct EndOnPanic<'a>(pub(super) &'a End, pub(super) &'static str);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.now(ExitReason::Crashed(self.1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays_and_the_descriptor_tells() {
        let end = End::new().unwrap();
        let readable = || rustix::io::read(end.fd(), &mut [0u8; 8]).is_ok();
        assert!(!end.has_come() && !readable());
        end.now(ExitReason::Status(3));
        end.now(ExitReason::Stopped);
        assert_eq!(end.reason(), Some(ExitReason::Status(3)));
        assert!(end.has_come() && readable());
    }

    #[test]
    fn a_panicking_thread_ends_the_machine() {
        let end = End::new().unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _guard = EndOnPanic(&end, "io");
            panic!("on purpose");
        }));
        assert!(caught.is_err());
        assert_eq!(end.reason(), Some(ExitReason::Crashed("io")));
    }
}
