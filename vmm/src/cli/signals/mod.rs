//! Running a machine until its end, while signals ask for it and a deadline approaches.
//!
//! SIGINT, SIGTERM and SIGHUP stop the machine in order: the TAP goes, the terminal is restored, the exit
//! status says which signal it was. They are blocked and read from a descriptor on the machine's I/O thread, which is this
//! one: no thread waits for them, and no handler runs. SIGXFSZ is blocked as well, so that a file which may not grow any further
//! (`ulimit -f`) is an error of the call that writes, such as the guest's I/O error, rather than our death.

mod sys;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use libc::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm::machine::{ExitReason, MachineBuilder, Remote, RunningHere};

use super::Failure;

/// What a machine was ended by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// Itself, or its guest.
    Ended(ExitReason),
    /// This signal.
    Signal(i32),
    /// The deadline.
    Deadline,
}

/// The signals that end us, from now on caught on this thread and those that it starts.
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// Catches the signals. A thread that was started before would still be killed by them, and we with it.
    pub(crate) fn catch() -> io::Result<Self> {
        sys::signal_fd(&[SIGINT, SIGTERM, SIGHUP], &[SIGXFSZ]).map(Self)
    }

    /// Lets the machine be ended by a signal or when the deadline has passed.
    pub(crate) fn watch(
        self,
        builder: MachineBuilder,
        deadline: Option<Instant>,
    ) -> Result<(MachineBuilder, Watch), Failure> {
        let timer = deadline.map(timer).transpose().context("making a timer").map_err(Failure::machine)?;
        let wake = Arc::<OnceLock<Wake>>::default();
        let watch = Watch(Arc::clone(&wake));
        let builder =
            builder.worker(move |machine| Box::new(Watcher { signals: self.0, timer, machine, wake }));
        Ok((builder, watch))
    }
}

/// What the watched machine was ended by.
pub(crate) struct Watch(Arc<OnceLock<Wake>>);

impl Watch {
    /// Serves the machine until it ends, a signal comes or the deadline passes; nothing of it is left then.
    pub(crate) fn wait(self, running: RunningHere) -> Wake {
        // A guest that ended by itself just before has the say.
        match (running.wait(), self.0.get()) {
            (ExitReason::Stopped, Some(wake)) => wake.clone(),
            (reason, _) => Wake::Ended(reason),
        }
    }
}

/// A descriptor that becomes readable at this time.
fn timer(deadline: Instant) -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    // Zero would be "never".
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
    let tv_sec = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
    let it_value = Timespec { tv_sec, tv_nsec: left.subsec_nanos().into() };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
    Ok(timer)
}

/// Looks after the signals and the deadline on the machine's I/O thread.
struct Watcher {
    signals: OwnedFd,
    timer: Option<OwnedFd>,
    machine: Remote,
    wake: Arc<OnceLock<Wake>>,
}

impl MutEventSubscriber for Watcher {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let wake = if events.fd() == self.signals.as_raw_fd() {
            // struct signalfd_siginfo: 128 bytes, the signal's number in the first four.
            let mut info = [0; 128];
            if rustix::io::read(&self.signals, &mut info).is_err() {
                return;
            }
            let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if sys::is_ignored(number) {
                return;
            }
            Wake::Signal(number)
        } else {
            Wake::Deadline
        };
        // The first one is told.
        let _ = self.wake.set(wake);
        self.machine.stop();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut watch = |fd: &OwnedFd| {
            if let Err(error) = ops.add(Events::new(fd, EventSet::IN)) {
                // Without it nobody could end the machine.
                tracing::error!(%error, "signals and the time-out cannot be watched");
                self.machine.stop();
            }
        };
        watch(&self.signals);
        self.timer.iter().for_each(watch);
    }
}
