//! The I/O thread's half of the balloon.
//!
//! Every event leads to the same turn: go on with the chain that is under way, else take the next one, deflating first, since a guest
//! that deflates is short of memory. A chain becomes a list of pages; the list is worked off within the turn's budget, and the
//! chain is returned when nothing of it is left.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::VolatileSlice;

use super::release::Pages;
use super::{DEFLATE, INFLATE, PAGE, Shared};
use crate::virtio::{Direction, Interrupt, Memory, QueueError, Ring};

/// Most bytes that are given back in a turn: a millisecond of the host's kernel, or a few where pages are costly (7 us each under a
/// KVM in software).
pub const TURN_BYTES: u64 = 2 << 20;
/// Most separate ranges that are given back in a turn, and most chains that are answered.
pub const TURN_PAGES: usize = 128;
/// Most page numbers that are read of one chain.
pub const MAX_NUMBERS: usize = 4096;

/// The third ring, whatever number the driver knows it by.
const REPORT: usize = 2;
/// Deflate first.
const ORDER: [usize; 3] = [DEFLATE, INFLATE, REPORT];

/// The queues between activation and reset.
pub(super) struct Active {
    memory: Memory,
    pub(super) interrupt: Arc<Interrupt>,
    rings: [Option<Ring>; 3],
    /// The chain under way.
    current: Option<Chain>,
}

/// A chain that has not been returned.
struct Chain {
    ring: usize,
    head: u16,
    left: VecDeque<Pages>,
}

impl Active {
    pub(super) fn new(memory: Memory, interrupt: Arc<Interrupt>, rings: [Option<Ring>; 3]) -> Self {
        Self { memory, interrupt, rings, current: None }
    }
}

/// The data path of a balloon, to be added to the event manager of the I/O thread.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use std::sync::Arc;
/// # use devices::virtio::{Activation, F_VERSION_1, Interrupt, Memory, VirtioDevice};
/// # use rustix::fs::{MemfdFlags, memfd_create};
/// # use virtio_queue::{Queue, QueueT};
/// # use vm_memory::{FileOffset, GuestMemoryMmap};
/// use devices::virtio::balloon::Balloon;
/// use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
/// use vm_memory::{Bytes, GuestAddress};
///
/// # let ram = std::fs::File::from(memfd_create("ram", MemfdFlags::CLOEXEC)?);
/// # ram.set_len(1 << 16)?;
/// # let range = (GuestAddress(0), 1 << 16, Some(FileOffset::new(ram, 0)));
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges_with_files([range])?);
/// # let ring = |at: u32| {
/// #     let mut queue = Queue::new(16).expect("a power of two");
/// #     queue.set_desc_table_address(Some(at), None);
/// #     queue.set_avail_ring_address(Some(at + 0x1000), None);
/// #     queue.set_used_ring_address(Some(at + 0x2000), None);
/// #     queue.set_ready(true);
/// #     queue
/// # };
/// let (mut balloon, worker) = Balloon::new()?;
/// let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// events.add_subscriber(Box::new(worker));
/// # let interrupt = Interrupt::new(Arc::new(Quiet));
/// # let queues = vec![ring(0), ring(0x4000)];
/// # balloon.activate(Activation { memory: memory.clone(), queues, features: F_VERSION_1, interrupt })?;
/// // The guest puts its page 9 into the balloon, the one at 0x9000.
/// memory.write_obj(7_u64, GuestAddress(0x9000))?;
/// memory.write_obj(9_u32, GuestAddress(0x8000))?;
/// memory.write_obj([0x8000_u64, 4], GuestAddress(0))?;
/// memory.write_obj([0_u16, 1, 0], GuestAddress(0x1000))?;
/// events.run_with_timeout(0)?;
/// assert_eq!(balloon.handle().totals().inflated_bytes, 4096);
/// assert_eq!(memory.read_obj::<u64>(GuestAddress(0x9000))?, 0, "the host has it back");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BalloonWorker {
    shared: Arc<Shared>,
}

impl BalloonWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn turn(&mut self) {
        let mut guard = self.shared.lock();
        let Some(active) = guard.as_mut() else { return };
        match serve(active, &self.shared) {
            Ok(false) => {}
            Ok(true) => self.shared.doorbell.ring(),
            Err(error) => {
                if self.shared.broken.first() {
                    tracing::warn!(%error, "the balloon stops until its driver resets it");
                }
                active.interrupt.needs_reset();
                *guard = None;
            }
        }
    }
}

impl MutEventSubscriber for BalloonWorker {
    fn init(&mut self, ops: &mut EventOps) {
        self.shared.doorbell.listen(ops, 0, "balloon");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.shared.doorbell.silence();
        self.turn();
    }
}

/// A turn. True when it ended with its budget.
fn serve(active: &mut Active, shared: &Shared) -> Result<bool, QueueError> {
    let memory = Arc::clone(&active.memory);
    let (mut bytes, mut steps) = (TURN_BYTES, TURN_PAGES);
    let more = loop {
        if bytes == 0 || steps == 0 {
            break true;
        }
        steps -= 1;
        let Some(chain) = &mut active.current else {
            match next_chain(active, shared)? {
                Some(chain) => active.current = Some(chain),
                None => break false,
            }
            continue;
        };
        match chain.left.pop_front() {
            Some(pages) => {
                let (now, later) = pages.split(bytes);
                if let Some(later) = later {
                    chain.left.push_front(later);
                }
                bytes -= now.bytes();
                give_back(&memory, &now, chain.ring, shared);
            }
            None => {
                let (ring, head) = (chain.ring, chain.head);
                active.current = None;
                if let Some(ring) = active.rings.get_mut(ring).and_then(Option::as_mut) {
                    ring.add_used(&memory, head, 0)?;
                }
            }
        }
    };
    let mut interrupt = false;
    for ring in active.rings.iter_mut().flatten() {
        ring.publish(&memory)?;
        interrupt |= ring.needs_interrupt(&memory)?;
    }
    if interrupt {
        active.interrupt.used();
    }
    Ok(more)
}

fn give_back(memory: &Memory, pages: &Pages, ring: usize, shared: &Shared) {
    match pages.release(memory) {
        Ok(true) => {
            let counter = if ring == REPORT { &shared.reported } else { &shared.inflated };
            counter.fetch_add(pages.bytes(), Ordering::Relaxed);
        }
        Ok(false) => {}
        Err(error) => {
            if shared.failed.first() {
                tracing::warn!(%error, "the host does not take free memory back; it stays with the machine");
            }
        }
    }
}

/// The next chain of any queue; `None` when kicks will tell of more.
fn next_chain(active: &mut Active, shared: &Shared) -> Result<Option<Chain>, QueueError> {
    let memory = Arc::clone(&active.memory);
    for index in ORDER {
        let Some(ring) = active.rings.get_mut(index).and_then(Option::as_mut) else { continue };
        loop {
            if let Some(chain) = ring.pop(&memory)? {
                let head = chain.head_index();
                let direction = if index == REPORT { Direction::Writable } else { Direction::Readable };
                let mut pieces = Vec::new();
                Ring::collect(&memory, chain, direction, &mut pieces)?;
                let left = match index {
                    REPORT => reported(&memory, &pieces),
                    INFLATE => inflated(&memory, &pieces, shared),
                    // The guest's next touch brings a page back; there is nothing to be done.
                    _ => VecDeque::new(),
                };
                return Ok(Some(Chain { ring: index, head, left }));
            }
            if !ring.arm(&memory, ring.position())? {
                break;
            }
            ring.disarm(&memory)?;
        }
    }
    Ok(None)
}

/// A chain of free memory.
fn reported(memory: &Memory, pieces: &[VolatileSlice<'_>]) -> VecDeque<Pages> {
    pieces.iter().filter_map(|piece| Pages::within(memory, piece)).collect()
}

/// A chain of page numbers, 32 bits each. Neighbours are joined.
fn inflated(memory: &Memory, pieces: &[VolatileSlice<'_>], shared: &Shared) -> VecDeque<Pages> {
    const NUMBER: usize = size_of::<u32>();
    let total: usize = pieces.iter().map(VolatileSlice::len).fold(0, usize::saturating_add);
    let mut bytes = vec![0; total.min(MAX_NUMBERS * NUMBER)];
    let mut filled = 0;
    for piece in pieces {
        filled += piece.copy_to(bytes.get_mut(filled..).unwrap_or_default());
    }
    let refuse = |what: &str| {
        if shared.refused.first() {
            tracing::warn!(what, "a balloon's pages are refused; further ones are counted");
        }
    };
    if total > bytes.len() {
        refuse("a chain with too many page numbers");
    }
    let mut left: VecDeque<Pages> = VecDeque::new();
    for number in bytes.as_chunks::<NUMBER>().0 {
        let Some(page) = Pages::numbered(memory, u32::from_le_bytes(*number)) else {
            refuse("a page outside of memory");
            continue;
        };
        let rest = match left.back_mut() {
            Some(last) => last.join(page),
            None => Some(page),
        };
        left.extend(rest);
    }
    debug_assert!(left.iter().all(|pages| pages.bytes().is_multiple_of(PAGE)));
    left
}
