//! The I/O thread's half of the disk.
//!
//! Every event (a kick, something done, an activation) leads to the same turn: answer what is done, begin what is available,
//! hand it to the kernel at once, answer what that has done already. A turn begins at most [`TURN_REQUESTS`] requests or
//! somewhat more than [`TURN_BYTES`], then comes back behind the other events. With [`crate::disk::MAX_IN_FLIGHT`] requests
//! in flight it leaves the others in the ring, and goes on when one is done.
//!
//! Answers become visible together at the end of the turn, with one interrupt.

use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::Shared;
use super::request::{Status, Terms, Ticket, Todo, parse};
use crate::disk::Engine;
use crate::virtio::pieces::Spare;
use crate::virtio::{Interrupt, Memory, QueueError, Ring};

/// Most requests that a turn begins.
pub const TURN_REQUESTS: usize = 64;
/// A turn that has begun requests for so many bytes begins no more.
pub const TURN_BYTES: usize = 2 << 20;

/// What the mutex guards.
pub(super) struct Path {
    /// The disk; away while a reset waits for what is in flight, and when the worker has gone.
    pub(super) engine: Option<Engine<Ticket>>,
    pub(super) active: Option<Active>,
}

/// The queue between activation and reset.
pub(super) struct Active {
    pub(super) memory: Memory,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) features: u64,
    pub(super) ring: Ring,
}

/// The data path of a disk, to be added to the event manager of the I/O thread. Dropping it closes the disk.
///
/// ```
/// use devices::disk::{Disk, DiskError, DiskMode};
/// use devices::virtio::blk::Blk;
/// use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
///
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("disk.img");
/// # std::fs::File::create(&image)?.set_len(1 << 20)?;
/// let (blk, worker) = Blk::new(Disk::open(&image, DiskMode::ReadWrite)?, "disk0")?;
/// let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// events.add_subscriber(Box::new(worker));
/// assert!(matches!(Disk::open(&image, DiskMode::ReadWrite), Err(DiskError::InUse(_))));
/// // With the I/O thread's work the disk is closed, though somebody still holds the registers.
/// drop(events);
/// Disk::open(&image, DiskMode::ReadWrite)?;
/// # drop(blk);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BlkWorker {
    shared: Arc<Shared>,
    scratch: Scratch,
}

/// Allocations that outlive a turn.
#[derive(Default)]
struct Scratch {
    readable: Spare,
    writable: Spare,
    results: Vec<(Ticket, io::Result<()>)>,
}

impl BlkWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, scratch: Scratch::default() }
    }

    fn turn(&mut self) {
        let mut path = self.shared.lock();
        let Path { engine: Some(engine), active } = &mut *path else { return };
        let Some(state) = active.as_mut() else { return };
        match serve(state, engine, &self.shared, &mut self.scratch) {
            Ok(false) => {}
            Ok(true) => self.shared.doorbell.ring(),
            Err(error) => {
                if self.shared.counters.broken.first() {
                    tracing::warn!(%error, "the disk stops until its driver resets it");
                }
                state.interrupt.needs_reset();
                *active = None;
            }
        }
    }
}

impl MutEventSubscriber for BlkWorker {
    fn init(&mut self, ops: &mut EventOps) {
        self.shared.doorbell.listen(ops, 0, "disk");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.shared.doorbell.silence();
        self.turn();
    }
}

impl Drop for BlkWorker {
    fn drop(&mut self) {
        let engine = self.shared.lock().engine.take();
        // Waits for what is in flight.
        drop(engine);
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Path> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn. True when it ended with its budget.
fn serve(
    active: &mut Active,
    engine: &mut Engine<Ticket>,
    shared: &Shared,
    scratch: &mut Scratch,
) -> Result<bool, QueueError> {
    let memory = Arc::clone(&active.memory);
    let mut budget = Budget { requests: TURN_REQUESTS, bytes: TURN_BYTES };
    answer_done(active, engine, shared, scratch)?;
    active.ring.disarm(&memory)?;
    let more = loop {
        begin_available(active, engine, shared, scratch, &mut budget)?;
        engine.commit();
        // What is done by now is answered now; what is done from now on rings again. So does a kick, and one that is silenced
        // here is answered as well: the ring is looked at once more below.
        shared.doorbell.silence();
        answer_done(active, engine, shared, scratch)?;
        if budget.is_used_up() {
            break true;
        }
        if !engine.has_room() || !active.ring.arm(&memory, active.ring.position())? {
            break false;
        }
        active.ring.disarm(&memory)?;
    };
    active.ring.publish(&memory)?;
    if active.ring.needs_interrupt(&memory)? {
        active.interrupt.used();
    }
    Ok(more)
}

/// What a turn may still begin.
struct Budget {
    requests: usize,
    bytes: usize,
}

impl Budget {
    fn is_used_up(&self) -> bool {
        self.requests == 0 || self.bytes == 0
    }

    fn spend(&mut self, bytes: usize) {
        self.requests = self.requests.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// Begins what the driver has made available, while there is budget and room.
fn begin_available(
    active: &mut Active,
    engine: &mut Engine<Ticket>,
    shared: &Shared,
    scratch: &mut Scratch,
    budget: &mut Budget,
) -> Result<(), QueueError> {
    let memory = Arc::clone(&active.memory);
    let terms = Terms {
        features: active.features,
        bytes: engine.storage().bytes(),
        read_only: shared.read_only,
        id: &shared.id,
    };
    let mut lists = (scratch.readable.take(), scratch.writable.take());
    let result = loop {
        if budget.is_used_up() || !engine.has_room() {
            break Ok(());
        }
        let chain = match active.ring.pop(&memory) {
            Ok(Some(chain)) => chain,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        match parse(&memory, chain, &terms, (&mut lists.0, &mut lists.1)) {
            Ok(Todo::Begin(request, ticket)) => {
                budget.spend(request.buffers.len());
                engine.submit(request, ticket);
            }
            Ok(Todo::Answer(status, ticket)) => {
                budget.spend(0);
                if status != Status::Ok && shared.counters.refused.first() {
                    tracing::warn!(?status, "a disk request makes no sense; further ones are counted");
                }
                if let Err(error) = answer(&mut active.ring, &memory, &ticket, status) {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    scratch.readable.put(lists.0);
    scratch.writable.put(lists.1);
    result
}

/// Answers what the disk has done.
fn answer_done(
    active: &mut Active,
    engine: &mut Engine<Ticket>,
    shared: &Shared,
    scratch: &mut Scratch,
) -> Result<(), QueueError> {
    engine.reap(&mut scratch.results);
    for (ticket, result) in scratch.results.drain(..) {
        let status = match result {
            Ok(()) => {
                shared.counters.done(ticket.kind);
                Status::Ok
            }
            Err(error) => {
                if shared.counters.failed.first() {
                    tracing::error!(%error, request = ?ticket.kind, "the disk failed; the guest is told so");
                }
                Status::IoError
            }
        };
        answer(&mut active.ring, &active.memory, &ticket, status)?;
    }
    Ok(())
}

fn answer(ring: &mut Ring, memory: &Memory, ticket: &Ticket, status: Status) -> Result<(), QueueError> {
    ticket.status.put(&[status as u8]);
    ring.add_used(memory, ticket.head, ticket.written)
}
