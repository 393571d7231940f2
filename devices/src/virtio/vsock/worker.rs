//! The I/O thread's half: which event leads to which turn.
//!
//! | event | turn |
//! |---|---|
//! | the listening socket | accept clients, a few at a time |
//! | a connection's socket | what its state makes of it |
//! | the doorbell: a kick, or a turn that used up its budget | take packets; the guest may no longer be starved |
//! | – after activation | forget the last driver's connections, then the same |
//! | – after reset | forget them, and rest |
//!
//! After each of them, what waits for the guest is given to it while it has buffers, and sockets are polled for what
//! their connections want now. A starved guest's sockets are not polled for input once each has been found to have
//! some; neither is anything without a driver, so early clients wait in the listening socket's queue.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::Shared;
use super::counters::Refusal;
use super::host::{Accepted, Listener};
use super::queues::{RxEnd, Scratch, TxEnd, receive, transmit};
use super::table::Table;
use crate::virtio::{Interrupt, Memory, QueueError, Ring};

/// Most clients accepted in a turn.
const ACCEPT_BUDGET: usize = 16;

/// Event tokens; connection `n` has `CONNECTION + n`.
const BELL: u32 = 0;
const LISTENER: u32 = 1;
const CONNECTION: u32 = 2;

/// The queues between activation and reset.
pub(super) struct Active {
    pub(super) memory: Memory,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    /// The worker has not seen this driver yet.
    pub(super) fresh: bool,
    /// The guest has no receive buffer.
    pub(super) starved: bool,
    /// The last turn of transmission ended early, and not for want of packets.
    pub(super) tx_left: bool,
}

/// The half for the event manager of the I/O thread.
///
/// ```
/// use std::os::unix::net::UnixStream;
///
/// use devices::virtio::vsock::{GUEST_CID, Vsock};
/// use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("vsock.sock");
/// let (vsock, worker) = Vsock::new(GUEST_CID, &path)?;
/// let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// events.add_subscriber(Box::new(worker));
/// // A client that comes before the guest's driver waits in the socket's queue.
/// let client = UnixStream::connect(&path)?;
/// assert_eq!(events.run_with_timeout(0)?, 0);
/// drop(events);
/// assert!(!path.exists(), "the socket goes with the worker");
/// # drop((client, vsock));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct VsockWorker {
    shared: Arc<Shared>,
    listener: Listener,
    table: Table,
    scratch: Scratch,
    /// The listening socket is polled.
    listening: bool,
    /// It failed in this turn.
    listener_failed: bool,
    listener_fd: RawFd,
}

impl VsockWorker {
    pub(super) fn new(shared: Arc<Shared>, listener: Listener) -> Self {
        let table = Table::new(shared.cid);
        let listener_fd = listener.as_fd().as_raw_fd();
        let scratch = Scratch::default();
        Self { shared, listener, table, scratch, listening: false, listener_failed: false, listener_fd }
    }

    /// One event's work. Whether there is a driver.
    fn turn(&mut self, token: u32, set: EventSet) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut guard = shared.lock();
        let Some(active) = guard.as_mut() else {
            self.table.clear();
            return false;
        };
        if let Err(error) = self.serve(active, token, set) {
            if shared.counters.stopped() {
                tracing::warn!(%error, "the vsock device stops until its driver resets it");
            }
            active.interrupt.needs_reset();
            *guard = None;
            self.table.clear();
            return false;
        }
        true
    }

    fn serve(&mut self, active: &mut Active, token: u32, set: EventSet) -> Result<(), QueueError> {
        let fresh = std::mem::take(&mut active.fresh);
        if fresh {
            self.table.clear();
        }
        match token {
            LISTENER => self.accept(),
            token => {
                // A driver's first turn may be caused by an event for the last driver's connection.
                if let Some(slot) = token.checked_sub(CONNECTION).filter(|_| !fresh) {
                    self.table.host_event(slot as u16, set, &self.shared.counters);
                }
            }
        }
        if fresh || token == BELL {
            active.starved = false;
            self.take_packets(active)?;
        }
        if !active.starved && self.table.has_work() {
            self.give_packets(active)?;
        }
        // Halted by RSTs that have gone meanwhile, or out of budget.
        if active.tx_left && !self.table.is_full_of_resets() {
            self.shared.doorbell.ring();
        }
        Ok(())
    }

    fn take_packets(&mut self, active: &mut Active) -> Result<(), QueueError> {
        let (memory, counters) = (Arc::clone(&active.memory), &self.shared.counters);
        let (table, scratch) = (&mut self.table, &mut self.scratch);
        let end = transmit(&memory, &mut active.tx, table, &self.listener, counters, scratch)?;
        active.tx_left = end != TxEnd::Idle;
        interrupt_for(&mut active.tx, &memory, &active.interrupt)
    }

    fn give_packets(&mut self, active: &mut Active) -> Result<(), QueueError> {
        let (memory, counters) = (Arc::clone(&active.memory), &self.shared.counters);
        let end = receive(&memory, &mut active.rx, &mut self.table, counters, &mut self.scratch)?;
        active.starved = end == RxEnd::Starved;
        if end == RxEnd::More {
            self.shared.doorbell.ring();
        }
        interrupt_for(&mut active.rx, &memory, &active.interrupt)
    }

    fn accept(&mut self) {
        let counters = &self.shared.counters;
        for _ in 0..ACCEPT_BUDGET {
            match self.listener.accept() {
                Accepted::Client(socket) => self.table.client(socket, counters),
                Accepted::Refused => counters.refuse(Refusal::NoResources),
                Accepted::Nobody => return,
                Accepted::Broken(error) => {
                    tracing::warn!(%error, "vsock: accepting a client failed");
                    self.listener_failed = true;
                    return;
                }
            }
        }
    }

    /// Polls sockets for what is wanted of them now.
    fn settle(&mut self, active: bool, ops: &mut EventOps) {
        // Those that are over first: a new connection may have the descriptor's number next time.
        while let Some(connection) = self.table.pop_over() {
            if let Some(set) = connection.polled {
                // It can't fail for what was added and is still open.
                let _ = ops.remove(Events::with_data_raw(connection.raw_fd(), 0, set));
            }
        }
        while let Some(slot) = self.table.pop_touched() {
            let Some(connection) = self.table.get_mut(slot) else { continue };
            let wanted = connection.interest();
            let events = |set| Events::with_data_raw(connection.raw_fd(), CONNECTION + u32::from(slot), set);
            let result = match (connection.polled, wanted) {
                (old, new) if old == new => continue,
                (None, Some(new)) => ops.add(events(new)),
                (Some(_), Some(new)) => ops.modify(events(new)),
                (Some(old), None) => ops.remove(events(old)),
                (None, None) => continue,
            };
            match result {
                Ok(()) => connection.polled = wanted,
                Err(error) => {
                    tracing::warn!(%error, "vsock: polling a connection failed");
                    self.table.abort(slot, &self.shared.counters);
                    self.shared.doorbell.ring();
                }
            }
        }
        self.watch_listener(active, ops);
        self.shared.counters.set_open(self.table.open());
    }

    fn watch_listener(&mut self, active: bool, ops: &mut EventOps) {
        // After a failure it is tried again with the next event, whatever that is.
        let wanted = active && !std::mem::take(&mut self.listener_failed);
        if wanted == self.listening {
            return;
        }
        let events = Events::with_data_raw(self.listener_fd, LISTENER, EventSet::IN);
        let result = if wanted { ops.add(events) } else { ops.remove(events) };
        match result {
            Ok(()) => self.listening = wanted,
            Err(error) => tracing::error!(%error, "polling the vsock's listening socket failed"),
        }
    }
}

impl MutEventSubscriber for VsockWorker {
    fn init(&mut self, ops: &mut EventOps) {
        self.shared.doorbell.listen(ops, BELL, "vsock device");
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let token = events.data();
        if token == BELL {
            self.shared.doorbell.silence();
        }
        let active = self.turn(token, events.event_set());
        self.settle(active, ops);
    }
}

fn interrupt_for(ring: &mut Ring, memory: &Memory, interrupt: &Interrupt) -> Result<(), QueueError> {
    if ring.needs_interrupt(memory)? {
        interrupt.used();
    }
    Ok(())
}
