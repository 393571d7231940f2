//! The I/O thread's half of the NIC: which event leads to which turn.
//!
//! | event | turn |
//! |---|---|
//! | port writable | transmit, then receive what the sending caused |
//! | port readable | receive |
//! | the doorbell: a kick, or a turn that used up its budget | serve commands, transmit, receive |
//! | – after activation or reset | first tell the port the guest's offloads; or rest |
//!
//! A kick does not say of which queue it is, and the other rings have little to say when it comes: they are asked all the same.
//!
//! The port is polled for input unless the guest has no buffers (`starved`), for output only while it is full, and
//! not at all without a driver. All of it happens under [`Path`]'s mutex, which a vCPU takes to activate or to reset.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::{FramePort, Received};

use super::config::{F_MRG_RXBUF, guest_offloads};
use super::counters::Turn;
use super::rx::{RxScratch, RxTurn};
use super::tx::{TxEnd, transmit};
use super::{Shared, ctrl};
use crate::virtio::pieces::Spare;
use crate::virtio::{Interrupt, Memory, QueueError, Ring};

/// How often a turn asks the port again after the guest has refilled an exhausted ring.
const REFILLS: usize = 8;
/// How many times the port may report an error or a hang-up before it counts as dead.
const PORT_ERRORS: u32 = 16;

/// Event tokens.
const BELL: u32 = 0;
const PORT: u32 = 1;

/// What the mutex guards: the port, and the driver's queues while there is a driver.
pub(super) struct Path {
    pub(super) port: Box<dyn FramePort>,
    pub(super) active: Option<Active>,
}

/// The data path between activation and reset.
pub(super) struct Active {
    pub(super) memory: Memory,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) features: u64,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) ctrl: Option<Ring>,
    /// The port knows the guest's offloads.
    pub(super) started: bool,
    /// The guest has no buffer for the port's next frame.
    pub(super) starved: bool,
    /// The port has no room for the guest's next frame.
    pub(super) port_full: bool,
    /// A queue's turn ended with its budget.
    pub(super) unfinished: bool,
}

/// Why the device stops until it is reset.
#[derive(Debug, thiserror::Error)]
enum Stop {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("setting the port's offloads failed: {0}")]
    Offloads(std::io::Error),
}

/// Allocations that outlive a turn.
#[derive(Default)]
struct Scratch {
    tx: Spare,
    rx: RxScratch,
}

/// The data path of a NIC, to be added to the event manager of the I/O thread.
///
/// ```
/// use devices::virtio::VirtioDevice;
/// use devices::virtio::net::Net;
/// use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
/// use net::MacAddr;
/// use net::switch::Switch;
///
/// let mac = MacAddr::for_name("network", "vm1");
/// let (nic, worker) = Net::new(mac, Box::new(Switch::new().plug(Some(mac))?))?;
/// let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// events.add_subscriber(Box::new(worker));
/// nic.doorbell().ring();
/// assert_eq!(events.run_with_timeout(0)?, 1, "a turn");
/// assert_eq!(events.run_with_timeout(0)?, 0, "without a driver there is nothing to do");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct NetWorker {
    shared: Arc<Shared>,
    scratch: Scratch,
    port_fd: RawFd,
    /// What the port is polled for; `None` when it is not registered.
    watched: Option<EventSet>,
    port_errors: u32,
}

impl NetWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let port_fd = shared.lock().port.as_fd().as_raw_fd();
        Self { shared, scratch: Scratch::default(), port_fd, watched: None, port_errors: 0 }
    }

    /// One event's work; afterwards, what the port is to be polled for.
    fn handle(&mut self, token: u32, set: EventSet) -> Option<EventSet> {
        let shared = Arc::clone(&self.shared);
        let mut path = shared.lock();
        let Path { port, active } = &mut *path;
        let state = active.as_mut()?;
        if !state.started {
            // A new driver: the port gets another chance.
            self.port_errors = 0;
        }
        let mut turn = Turn::default();
        let result = dispatch(state, port.as_mut(), &shared, &mut self.scratch, &mut turn, (token, set));
        shared.counters.add(&turn);
        let interrupt = Arc::clone(&state.interrupt);
        if let Err(stop) = result {
            if shared.counters.stopped() {
                tracing::warn!(reason = %stop, "the NIC stops until its driver resets it");
            }
            *active = None;
            interrupt.needs_reset();
            return None;
        }
        if shared.config.set_link(port.link_up()) {
            interrupt.config_changed();
        }
        let wants = |wanted: bool, set: EventSet| if wanted { set } else { EventSet::empty() };
        Some(wants(!state.starved, EventSet::IN) | wants(state.port_full, EventSet::OUT))
            .filter(|s| !s.is_empty())
    }

    /// Registers the port for `wanted`, when that is a change.
    fn watch(&mut self, wanted: Option<EventSet>, ops: &mut EventOps) {
        let wanted = wanted.filter(|_| self.port_errors < PORT_ERRORS);
        let events = |set: EventSet| Events::with_data_raw(self.port_fd, PORT, set);
        let result = match (self.watched, wanted) {
            (old, new) if old == new => return,
            (None, Some(new)) => ops.add(events(new)),
            (Some(_), Some(new)) => ops.modify(events(new)),
            (Some(old), None) => ops.remove(events(old)),
            (None, None) => return,
        };
        match result {
            Ok(()) => self.watched = wanted,
            Err(error) => {
                tracing::error!(%error, "polling the NIC's port failed; its frames wait for a kick")
            }
        }
    }

    /// A port in error is always ready: after some rounds it is no longer polled.
    fn note_port_event(&mut self, set: EventSet) {
        if !set.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            self.port_errors = 0;
            return;
        }
        self.port_errors = self.port_errors.saturating_add(1);
        if self.port_errors == PORT_ERRORS {
            tracing::warn!("the NIC's port keeps reporting an error; nothing more is received from it");
        }
    }
}

impl MutEventSubscriber for NetWorker {
    fn init(&mut self, ops: &mut EventOps) {
        self.shared.doorbell.listen(ops, BELL, "network interface");
        let wanted = self.handle(BELL, EventSet::IN);
        self.watch(wanted, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let token = events.data();
        if token == PORT {
            self.note_port_event(events.event_set());
        } else {
            self.shared.doorbell.silence();
        }
        let wanted = self.handle(token, events.event_set());
        self.watch(wanted, ops);
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Path> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turns that an event calls for.
fn dispatch(
    active: &mut Active,
    port: &mut dyn FramePort,
    shared: &Shared,
    scratch: &mut Scratch,
    turn: &mut Turn,
    (token, set): (u32, EventSet),
) -> Result<(), Stop> {
    let starting = !active.started;
    if starting {
        port.set_offloads(guest_offloads(active.features)).map_err(Stop::Offloads)?;
        active.started = true;
    }
    let rung = starting || token == BELL;
    if rung {
        if !starting && !std::mem::take(&mut active.unfinished) {
            shared.counters.kicked();
        }
        serve_commands(active, port, shared)?;
    }
    let writable = token == PORT && set.contains(EventSet::OUT);
    // A full port is asked again when it is writable, not at every kick.
    let sends = writable || (rung && !active.port_full);
    if sends {
        send_turn(active, port, shared, scratch, turn)?;
    }
    let readable = token == PORT && set.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
    if rung || (!active.starved && (sends || readable)) {
        receive_turn(active, port, shared, scratch, turn)?;
    }
    if active.unfinished {
        shared.doorbell.ring();
    }
    Ok(())
}

fn serve_commands(active: &mut Active, port: &mut dyn FramePort, shared: &Shared) -> Result<(), Stop> {
    let memory = Arc::clone(&active.memory);
    let Some(ring) = &mut active.ctrl else { return Ok(()) };
    active.unfinished |= ctrl::serve(&memory, ring, active.features, port)?;
    interrupt_for(ring, &memory, &active.interrupt, shared)
}

fn send_turn(
    active: &mut Active,
    port: &mut dyn FramePort,
    shared: &Shared,
    scratch: &mut Scratch,
    turn: &mut Turn,
) -> Result<(), Stop> {
    let memory = Arc::clone(&active.memory);
    let mut pieces = scratch.tx.take();
    let end = transmit(&memory, &mut active.tx, active.features, port, &mut pieces, turn);
    scratch.tx.put(pieces);
    let end = end?;
    active.port_full = end == TxEnd::PortFull;
    active.unfinished |= end == TxEnd::More;
    interrupt_for(&mut active.tx, &memory, &active.interrupt, shared)
}

fn receive_turn(
    active: &mut Active,
    port: &mut dyn FramePort,
    shared: &Shared,
    scratch: &mut Scratch,
    turn: &mut Turn,
) -> Result<(), Stop> {
    let memory = Arc::clone(&active.memory);
    let mergeable = active.features & F_MRG_RXBUF != 0;
    active.starved = false;
    active.rx.disarm(&memory)?;
    for _ in 0..REFILLS {
        let mut ring = RxTurn::new(&memory, &mut active.rx, mergeable, &mut scratch.rx, turn);
        let received = port.recv(&mut ring);
        let left = ring.finish(&mut scratch.rx)?;
        let (Received::RingFull, Some(seen)) = (received, left.exhausted_at) else {
            return interrupt_for(&mut active.rx, &memory, &active.interrupt, shared);
        };
        if !active.rx.arm(&memory, seen)? {
            active.starved = true;
            return interrupt_for(&mut active.rx, &memory, &active.interrupt, shared);
        }
        active.rx.disarm(&memory)?;
    }
    // The guest refills as fast as the port fills: let the others have a turn.
    active.unfinished = true;
    interrupt_for(&mut active.rx, &memory, &active.interrupt, shared)
}

fn interrupt_for(
    ring: &mut Ring,
    memory: &Memory,
    interrupt: &Interrupt,
    shared: &Shared,
) -> Result<(), Stop> {
    if ring.needs_interrupt(memory)? {
        shared.counters.interrupted();
        interrupt.used();
    }
    Ok(())
}
