//! The entropy device (virtio 1.3 §5.4): random bytes of the host, from `/dev/urandom`.
//!
//! A chain of writable buffers is filled with at most [`MAX_BYTES`] bytes and returned with that length; the
//! driver asks again if it wants more. At most [`BUDGET`] requests are served in a turn, so a guest that does
//! nothing but ask can't keep the I/O thread from the other devices. A broken chain breaks the queue. When
//! the source fails, which `/dev/urandom` never does, the request is returned empty.

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    ActivateError, Activation, Direction, Interrupt, Memory, QueueError, Ring, VirtioDevice,
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
    kicks: [EventFd; 1],
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The transport's half of the device.
pub struct Rng(Arc<Shared>);

/// The half for the event manager of the I/O thread.
pub struct RngWorker {
    shared: Arc<Shared>,
    source: Box<dyn Read + Send>,
    buffer: Box<[u8; MAX_BYTES]>,
}

impl Rng {
    /// An entropy device that gives the host's random bytes.
    ///
    /// # Errors
    /// When the host has no `/dev/urandom`, or refuses an eventfd.
    pub fn new() -> io::Result<(Self, RngWorker)> {
        Self::with_source(Box::new(File::open("/dev/urandom")?))
    }

    /// An entropy device that gives the bytes of `source`, which must never block for long.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn with_source(source: Box<dyn Read + Send>) -> io::Result<(Self, RngWorker)> {
        let shared = Arc::new(Shared { active: Mutex::new(None), kicks: [EventFd::new(EFD_NONBLOCK)?] });
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

    fn kicks(&self) -> &[EventFd] {
        &self.0.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&[], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let ring = queues.into_iter().next().and_then(Ring::new).ok_or(ActivateError::QueueMissing(0))?;
        *self.0.lock() = Some(Active { memory, interrupt, ring });
        // Buffers may be available already.
        self.0.kicks[0].write(1).map_err(ActivateError::Wake)
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
                    // Continue behind the other devices' events.
                    let _ = self.shared.kicks[0].write(1);
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
        if let Err(error) = ops.add(Events::with_data(&self.shared.kicks[0], KICK, EventSet::IN)) {
            tracing::error!(%error, "the entropy device can't be polled and will not work");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.shared.kicks[0].read();
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
