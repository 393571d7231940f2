//! The entropy device (virtio 1.3 §5.4): random bytes of the host, from `getrandom(2)`.
//!
//! A chain of writable buffers is filled with at most [`MAX_BYTES`] bytes and returned with that length; the
//! driver asks again if it wants more. At most [`BUDGET`] requests are served in a turn, so a guest that does
//! nothing but ask can't keep the I/O thread from the other devices. A broken chain breaks the queue. When
//! the source fails, which the host's never does, the request is returned empty.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::GetRandomFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::{
    ActivateError, Activation, Direction, Doorbell, Interrupt, Memory, QueueError, Ring, VirtioDevice,
    read_config_space,
};

/// Most bytes given for one request.
pub const MAX_BYTES: usize = 4096;
/// Most requests served in a turn.
pub const BUDGET: usize = 16;
/// Descriptors of the queue.
pub const QUEUE_SIZE: u16 = 64;

const KICK: u32 = 0;

struct Active {
    memory: Memory,
    interrupt: Arc<Interrupt>,
    ring: Ring,
}

struct Shared {
    active: Mutex<Option<Active>>,
    doorbell: Doorbell,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `getrandom(2)`: no descriptor, and none to be closed under it.
struct HostEntropy;

impl Read for HostEntropy {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::rand::getrandom(into, GetRandomFlags::empty())?)
    }
}

/// The transport's half of the device.
///
/// ```
/// use devices::virtio::VirtioDevice;
/// use devices::virtio::rng::Rng;
///
/// let (rng, worker) = Rng::new()?;
/// assert_eq!((rng.device_type(), rng.queue_sizes()), (4, &[64][..]));
/// let mut space = [0xff; 4];
/// rng.read_config(0, &mut space);
/// assert_eq!(space, [0; 4], "there is nothing to configure");
/// # drop(worker);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Rng(Arc<Shared>);

/// The half for the event manager of the I/O thread.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use std::sync::Arc;
/// # use devices::virtio::{Activation, F_VERSION_1, Interrupt, Memory, VirtioDevice};
/// # use virtio_queue::{Queue, QueueT};
/// # use vm_memory::GuestMemoryMmap;
/// use devices::virtio::rng::Rng;
/// use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
/// use vm_memory::{Bytes, GuestAddress};
///
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// # let mut queue = Queue::new(16)?;
/// # queue.set_avail_ring_address(Some(0x1000), None);
/// # queue.set_used_ring_address(Some(0x2000), None);
/// # queue.set_ready(true);
/// let (mut rng, worker) = Rng::with_source(Box::new(std::io::repeat(7)))?;
/// let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// events.add_subscriber(Box::new(worker));
/// # let interrupt = Interrupt::new(Arc::new(Quiet));
/// # let queues = vec![queue];
/// # rng.activate(Activation { memory: memory.clone(), queues, features: F_VERSION_1, interrupt })?;
/// // The guest offers 4 bytes at 0x8000, to be written (flag 2).
/// memory.write_obj([0x8000_u64, 4 | 2 << 32], GuestAddress(0))?;
/// memory.write_obj([0_u16, 1, 0], GuestAddress(0x1000))?;
/// events.run_with_timeout(0)?;
/// assert_eq!(memory.read_obj::<[u8; 5]>(GuestAddress(0x8000))?, [7, 7, 7, 7, 0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RngWorker {
    shared: Arc<Shared>,
    source: Box<dyn Read + Send>,
    buffer: Box<[u8; MAX_BYTES]>,
}

impl Rng {
    /// An entropy device that gives the host's random bytes.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new() -> io::Result<(Self, RngWorker)> {
        Self::with_source(Box::new(HostEntropy))
    }

    /// An entropy device that gives the bytes of `source`, which must never block for long.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn with_source(source: Box<dyn Read + Send>) -> io::Result<(Self, RngWorker)> {
        let shared = Arc::new(Shared { active: Mutex::new(None), doorbell: Doorbell::new()? });
        let worker = RngWorker { shared: Arc::clone(&shared), source, buffer: Box::new([0; MAX_BYTES]) };
        Ok((Self(shared), worker))
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn doorbell(&self) -> &Doorbell {
        &self.0.doorbell
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&[], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let ring = queues.into_iter().next().and_then(Ring::new).ok_or(ActivateError::QueueMissing(0))?;
        *self.0.lock() = Some(Active { memory, interrupt, ring });
        // Buffers may be available already.
        self.0.doorbell.ring();
        Ok(())
    }

    fn reset(&mut self) {
        *self.0.lock() = None;
    }
}

impl RngWorker {
    fn turn(&mut self) {
        let mut guard = self.shared.lock();
        let Some(active) = guard.as_mut() else { return };
        let memory = Arc::clone(&active.memory);
        let served = serve(&memory, &mut active.ring, &mut *self.source, &mut self.buffer[..]);
        let result = served.and_then(|more| Ok((more, active.ring.needs_interrupt(&memory)?)));
        match result {
            Ok((more, interrupt)) => {
                if interrupt {
                    active.interrupt.used();
                }
                if more {
                    self.shared.doorbell.ring();
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the entropy device stops until its driver resets it");
                active.interrupt.needs_reset();
                *guard = None;
            }
        }
    }
}

impl MutEventSubscriber for RngWorker {
    fn init(&mut self, ops: &mut EventOps) {
        self.shared.doorbell.listen(ops, KICK, "entropy device");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.shared.doorbell.silence();
        self.turn();
    }
}

/// Serves the requests that are available; true when there may be more.
fn serve(
    mem: &GuestMemoryMmap,
    ring: &mut Ring,
    source: &mut dyn Read,
    buffer: &mut [u8],
) -> Result<bool, QueueError> {
    let mut pieces = Vec::new();
    let mut budget = BUDGET;
    loop {
        while budget > 0 {
            let Some(chain) = ring.pop(mem)? else { break };
            budget -= 1;
            let head = chain.head_index();
            pieces.clear();
            let room = Ring::collect(mem, chain, Direction::Writable, &mut pieces)?;
            let filled = fill(&pieces, source, &mut buffer[..room.min(MAX_BYTES)]);
            ring.add_used(mem, head, filled as u32)?;
        }
        if budget == 0 || !ring.arm(mem, ring.position())? {
            break;
        }
    }
    ring.publish(mem)?;
    Ok(budget == 0)
}

/// Copies as many random bytes as `buffer` holds into the pieces, and says how many there were.
fn fill(pieces: &[VolatileSlice<'_>], source: &mut dyn Read, buffer: &mut [u8]) -> usize {
    if let Err(error) = source.read_exact(buffer) {
        tracing::warn!(%error, "reading random bytes failed; the guest gets none");
        return 0;
    }
    let mut done = 0;
    for piece in pieces {
        let here = piece.len().min(buffer.len() - done);
        piece.copy_from(&buffer[done..done + here]);
        done += here;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::F_EVENT_IDX;
    use crate::virtio::testing::{DATA, Driver, into, out};

    /// Counts up, so that a test knows its bytes.
    struct Counting(u8);

    impl Read for Counting {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            for byte in &mut *buffer {
                *byte = self.0;
                self.0 = self.0.wrapping_add(1);
            }
            Ok(buffer.len())
        }
    }

    fn guest(source: impl Read + Send + 'static) -> Driver {
        let (rng, worker) = Rng::with_source(Box::new(source)).unwrap();
        let mut guest = Driver::new(rng, worker);
        guest.start(F_EVENT_IDX);
        guest
    }

    #[test]
    fn a_request_is_filled_and_returned() {
        let mut guest = guest(Counting(0));
        let head = guest.add(0, &[into(DATA, 3), into(DATA + 0x100, 5)]);
        guest.kick_and_run(0);
        assert_eq!(guest.used(0), [(head, 8)]);
        assert_eq!(guest.bytes(DATA, 4), [0, 1, 2, 0]);
        assert_eq!(guest.bytes(DATA + 0x100, 6), [3, 4, 5, 6, 7, 0]);
        assert_eq!(guest.line.take(), 1);
    }

    #[test]
    fn a_greedy_request_gets_its_limit() {
        let mut guest = guest(Counting(1));
        let head = guest.add(0, &[into(DATA, 1 << 20)]);
        guest.kick_and_run(0);
        assert_eq!(guest.used(0), [(head, MAX_BYTES as u32)]);
        assert_eq!(guest.bytes(DATA + MAX_BYTES as u64, 4), [0; 4]);
    }

    #[test]
    fn more_requests_than_the_budget_take_more_turns_and_are_all_served() {
        let mut guest = guest(Counting(0));
        for _ in 0..BUDGET + 3 {
            guest.add(0, &[into(DATA, 16)]);
        }
        guest.kick(0);
        guest.run_once();
        assert_eq!(guest.used(0).len(), BUDGET);
        guest.run();
        assert_eq!(guest.used(0).len(), 3);
    }

    #[test]
    fn a_readable_buffer_breaks_the_queue_until_reset() {
        let mut guest = guest(Counting(0));
        guest.add(0, &[out(DATA, 16)]);
        guest.kick_and_run(0);
        guest.assert_broken();
        guest.start(0);
        guest.add(0, &[into(DATA, 16)]);
        guest.kick_and_run(0);
        assert_eq!(guest.used(0).len(), 1);
    }

    #[test]
    fn a_source_that_fails_gives_nothing() {
        let mut guest = guest(io::empty());
        let head = guest.add(0, &[into(DATA, 16)]);
        guest.kick_and_run(0);
        assert_eq!(guest.used(0), [(head, 0)]);
    }

    #[test]
    fn the_hosts_random_bytes_differ() {
        let (rng, worker) = Rng::new().unwrap();
        let mut guest = Driver::new(rng, worker);
        guest.start(0);
        guest.add(0, &[into(DATA, 64)]);
        guest.add(0, &[into(DATA + 64, 64)]);
        guest.kick_and_run(0);
        assert_ne!(guest.bytes(DATA, 64), guest.bytes(DATA + 64, 64));
    }
}
