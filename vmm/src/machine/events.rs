//! The I/O thread: devices' workers and console input until the end, then the end itself.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::signal::Killable;

use super::error::StartError;
use super::exit::{End, EndOnPanic, ExitReason};
use crate::vcpu::kick_signal;

/// What runs on the I/O thread.
pub(super) type Worker = Box<dyn MutEventSubscriber + Send>;
pub(super) type Loop = EventManager<Worker>;

/// The threads of the vCPUs. Dropping it stops and joins them; the end must have come before.
pub(super) struct VcpuThreads {
    end: Arc<End>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    pub(super) fn new(end: Arc<End>, count: usize) -> Self {
        Self { end, threads: Vec::with_capacity(count) }
    }

    pub(super) fn push(&mut self, thread: JoinHandle<()>) {
        self.threads.push(thread);
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        // Unless the end has come (a thread could not be started, a worker panicked), it comes now.
        self.end.now(ExitReason::Stopped);
        for thread in &self.threads {
            // It fails for a thread that has ended: just what we want.
            let _ = thread.kill(kick_signal());
        }
        for thread in self.threads.drain(..) {
            // A panic of the thread has been told to `end` already.
            let _ = thread.join();
        }
    }
}

/// Wakes the loop at the end.
struct EndWatcher(Arc<End>);

impl MutEventSubscriber for EndWatcher {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // The loop looks at the flag after every turn.
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new(&self.0.fd(), EventSet::IN)) {
            tracing::error!(error = %e, "the end of the machine cannot be watched");
            self.0.now(ExitReason::Crashed("io"));
        }
    }
}

/// An event loop with these workers in it.
pub(super) fn new_loop(end: &Arc<End>, workers: Vec<Worker>) -> Result<Loop, StartError> {
    /// Descriptors that are served per turn: every device has a few.
    const TURN: usize = 64;
    let mut events = EventManager::new_with_capacity(TURN).map_err(StartError::Events)?;
    events.add_subscriber(Box::new(EndWatcher(Arc::clone(end))) as Worker);
    for worker in workers {
        events.add_subscriber(worker);
    }
    Ok(events)
}

/// Turns that the workers still get when the vCPUs have stopped.
const LAST_TURNS: usize = 8;

/// Serves events until the end, then stops the vCPUs, then drops the workers.
///
/// What the guest handed over before its end is still carried out, within [`LAST_TURNS`]: a doorbell may have rung just
/// before the guest powered off, and its last frame acknowledges what a peer would repeat for minutes.
pub(super) fn serve(mut events: Loop, end: &End, vcpus: VcpuThreads) {
    // Dropped in reverse: first `end` learns of a panic, then the vCPUs are stopped, while the workers still stand.
    let vcpus = vcpus;
    let guard = EndOnPanic(end, "io");
    while !end.has_come() {
        match events.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
            Err(e) => {
                tracing::error!(error = %io::Error::other(e), "the event loop failed");
                end.now(ExitReason::Crashed("io"));
            }
        }
    }
    drop(vcpus);
    for _ in 0..LAST_TURNS {
        if events.run_with_timeout(0).is_err() {
            break;
        }
    }
    drop(guard);
    drop(events);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    /// A device whose doorbell rings.
    struct Rung {
        doorbell: EventFd,
        served: Arc<AtomicBool>,
    }

    impl MutEventSubscriber for Rung {
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            let _ = self.doorbell.read();
            self.served.store(true, Ordering::Relaxed);
        }

        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&self.doorbell, EventSet::IN)).unwrap();
        }
    }

    #[test]
    fn a_doorbell_that_rang_before_the_end_is_answered() {
        let end = Arc::new(End::new().unwrap());
        let (doorbell, served) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::new(AtomicBool::new(false)));
        doorbell.write(1).unwrap();
        let events = new_loop(&end, vec![Box::new(Rung { doorbell, served: Arc::clone(&served) })]).unwrap();
        end.now(ExitReason::PowerOff);
        serve(events, &end, VcpuThreads::new(Arc::clone(&end), 0));
        assert!(served.load(Ordering::Relaxed));
        assert_eq!(end.reason(), Some(ExitReason::PowerOff));
    }
}
