//! Virtio 1.3 devices with split virtqueues, free of the transport.
//!
//! ```text
//!   vCPU threads                               I/O thread (event_manager)
//!   MmioTransport ── VirtioDevice ··shared··>  worker: MutEventSubscriber
//!     registers, handshake   config, activate    queues, guest memory, backend
//!        │                                          ▲           │
//!        └── ioeventfd / QueueNotify ── Doorbell ───┘           └── Interrupt ── IrqLine
//! ```
//!
//! **Two halves.** A device is made as a pair: the half that implements [`VirtioDevice`] goes into a transport and
//! is called from vCPU threads; the worker goes into the event manager and moves the data. They share one
//! mutex around what a turn of the worker needs. The worker takes it once per *turn* (a bounded batch of
//! frames or requests), never per frame, and a vCPU takes it only to activate or to reset.
//!
//! **Reset.** [`VirtioDevice::reset`] takes the queues away under that mutex. So it waits for at most one turn, which
//! is bounded, and when the guest's write of 0 to the status register completes, nothing touches the guest's
//! memory any more: Linux frees the rings at once, without reading the status back.
//!
//! **A broken queue** (a chain that loops, leaves guest memory, or has descriptors of the wrong direction; an
//! available index that jumps) stops the device: [`Interrupt::needs_reset`] sets `DEVICE_NEEDS_RESET` and sends a
//! configuration interrupt (virtio 1.3 §2.1.2). Nothing is read from or written to the queues until a reset.

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

pub mod balloon;
pub mod blk;
mod doorbell;
mod interrupt;
pub mod mmio;
pub mod net;
mod pieces;
mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;

pub use doorbell::Doorbell;
pub use interrupt::Interrupt;
pub use queue::{Direction, MAX_DESCRIPTORS, QueueError, Ring};

/// The guest's memory, as all devices share it.
///
/// ```
/// use std::sync::Arc;
///
/// use devices::virtio::Memory;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// // Below and above the hole in which the devices' registers are.
/// let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)];
/// let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges)?);
/// memory.write_obj(1_u32, GuestAddress(4 << 30))?;
/// assert!(memory.write_obj(1_u32, GuestAddress(3 << 30)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type Memory = Arc<GuestMemoryMmap<()>>;

/// `VIRTIO_F_VERSION_1`: not legacy. Offered by the transport and required of every driver.
pub const F_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// `VIRTIO_F_INDIRECT_DESC`. Offered by the transport.
pub const F_INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_F_EVENT_IDX`. Offered by the transport.
pub const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// What a device gets when its driver is ready (`DRIVER_OK`).
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use devices::virtio::Memory;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::sync::Arc;
///
/// use devices::virtio::{ActivateError, Activation, F_EVENT_IDX, F_VERSION_1, Interrupt, Ring};
/// use virtio_queue::{Queue, QueueT};
///
/// /// What a device with one queue makes of it.
/// fn start(activation: Activation) -> Result<Ring, ActivateError> {
///     let queue = activation.queues.into_iter().next();
///     queue.and_then(Ring::new).ok_or(ActivateError::QueueMissing(0))
/// }
///
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// let mut queue = Queue::new(64)?;
/// queue.set_ready(true); // by the driver, through the transport
/// let interrupt = Interrupt::new(Arc::new(Quiet));
/// let activation = Activation { memory, queues: vec![queue], features: F_VERSION_1, interrupt };
/// assert_eq!(activation.features & F_EVENT_IDX, 0, "it wants an interrupt each time");
/// assert_eq!(start(activation)?.size(), 64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// One per entry of [`VirtioDevice::queue_sizes`]. Those that the driver set up are `ready`, and all their
    /// parts lie in guest memory; the others are not `ready` and must not be used.
    pub queues: Vec<Queue>,
    /// The features that the driver accepted, those of the transport included.
    pub features: u64,
    /// How to reach the guest. Valid until the next reset.
    pub interrupt: Arc<Interrupt>,
}

/// Why a device could not start with what its driver set up.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use std::sync::Arc;
/// # use devices::virtio::{Interrupt, Memory};
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use devices::virtio::rng::Rng;
/// use devices::virtio::{ActivateError, Activation, F_VERSION_1, VirtioDevice};
/// use virtio_queue::{Queue, QueueT};
///
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// # let interrupt = Interrupt::new(Arc::new(Quiet));
/// let (mut device, _worker) = Rng::new()?;
/// // The driver says DRIVER_OK without having set its queue up.
/// let queues = vec![Queue::new(64)?];
/// let refused = device.activate(Activation { memory, queues, features: F_VERSION_1, interrupt });
/// assert!(matches!(refused, Err(ActivateError::QueueMissing(0))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue that the device can't do without.
    #[error("the driver started the device without its queue {0}")]
    QueueMissing(usize),
}

/// The transport's side of a device: identity, features, configuration space, life cycle.
///
/// All calls come from vCPU threads, one at a time. In order: any number of reads and configuration accesses;
/// `activate` at most once; `reset` at any time, after which it all begins again.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use devices::virtio::Memory;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::sync::Arc;
///
/// use devices::BusDevice;
/// use devices::virtio::mmio::MmioTransport;
/// use devices::virtio::{ActivateError, Activation, Doorbell, VirtioDevice, read_config_space};
///
/// /// A device that tells the guest who it is, and nothing else.
/// struct NamePlate(Doorbell);
///
/// impl VirtioDevice for NamePlate {
///     fn device_type(&self) -> u32 {
///         0x1_0000 // none of the standard's
///     }
///
///     fn features(&self) -> u64 {
///         0
///     }
///
///     fn queue_sizes(&self) -> &[u16] {
///         &[]
///     }
///
///     fn doorbell(&self) -> &Doorbell {
///         &self.0
///     }
///
///     fn read_config(&self, offset: u64, data: &mut [u8]) {
///         read_config_space(b"machine7", offset, data);
///     }
///
///     fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
///         Ok(())
///     }
///
///     fn reset(&mut self) {}
/// }
///
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// let plate = Box::new(NamePlate(Doorbell::new()?));
/// let mut registers = MmioTransport::new(plate, memory, Arc::new(Quiet));
/// let mut name = [0; 8];
/// registers.read(0x100, &mut name);
/// assert_eq!(&name, b"machine7");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.3 §5).
    fn device_type(&self) -> u32;

    /// The device's own feature bits on offer; the transport adds [`F_VERSION_1`] and the ring's features.
    fn features(&self) -> u64;

    /// Whether the accepted features make sense together; a driver that violates a dependency of §5 does not
    /// get `FEATURES_OK`. `accepted` is a subset of what was offered.
    fn accepts(&self, accepted: u64) -> bool {
        let _ = accepted;
        true
    }

    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Rung when the driver kicks a queue. The same for the whole life.
    fn doorbell(&self) -> &Doorbell;

    /// Reads the configuration space; bytes beyond its end are zero. `data` is 1, 2, 4 or 8 bytes.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what is read-only stays as it is.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: begin, also with buffers that are already available.
    ///
    /// # Errors
    /// When the device can't work with this; the transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Back to the state before activation. When it returns, no thread touches the queues, guest memory or
    /// the interrupt of the last activation. Waits for at most one turn of the worker.
    fn reset(&mut self);
}

/// Copies `space[offset..]` into `data`, zeros beyond the end: the body of most [`VirtioDevice::read_config`].
pub fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|at| space.get(at..)).unwrap_or(&[]);
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
