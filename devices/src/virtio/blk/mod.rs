//! The block device (virtio 1.3 §5.2): one queue over a [`crate::disk`].
//!
//! ```text
//!   guest's driver              this module                         crate::disk
//!   requestq ── chains ──>  request: parse ── Engine::submit ──>  io_uring, or one thread
//!            <── status ──  worker: answer <── Engine::reap ────
//! ```
//!
//! [`Blk`] goes into a transport, [`BlkWorker`] into the event manager; see [`crate::virtio`] for how the two share. The
//! I/O thread never waits for a disk. Requests are answered in the order in which they are done.
//!
//! **What a guest may rely on.** A flush is answered when what was answered before it is on the disk (`fdatasync`). A driver
//! without `VIRTIO_BLK_F_FLUSH` is told of a write when that is on the disk. An error of the host, a read behind the end of a file that was
//! truncated meanwhile included, is `VIRTIO_BLK_S_IOERR`: counted, logged once, and the machine goes on.
//!
//! **Reset** waits until nothing in flight accesses guest memory: for the disk, that is, outside of the mutex, so that the
//! I/O thread goes on serving the other devices.
//!
//! **Offered**: SEG_MAX (254), BLK_SIZE (512), TOPOLOGY (4 KiB), and RO on a read-only disk, else FLUSH, DISCARD, WRITE_ZEROES. Not
//! CONFIG_WCE (a cache that the driver turns off is one that it does not negotiate), not MQ (one I/O thread). What is refused, and how:
//! see `request.rs`.
//!
//! `GET_ID` tells the name that the machine gave the disk (`disk0`, …), never the host's: udev makes `/dev/disk/by-id/virtio-disk0` of it.

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{ActivateError, Activation, Doorbell, Ring, VirtioDevice, read_config_space};
use crate::disk::{Disk, Engine};

mod config;
mod counters;
mod request;
#[cfg(test)]
mod tests;
mod worker;

pub use counters::BlkTotals;
pub use worker::{BlkWorker, TURN_BYTES, TURN_REQUESTS};

use config::CONFIG_LEN;
use counters::Counters;
use request::ID_LEN;
use worker::{Active, Path};

/// Descriptors of the request queue.
pub const QUEUE_SIZE: u16 = 256;

/// What the two halves share.
struct Shared {
    path: Mutex<Path>,
    /// Also rung when requests are done.
    doorbell: Doorbell,
    read_only: bool,
    id: [u8; ID_LEN],
    counters: Counters,
}

/// The transport's half of a disk. See the module's documentation.
///
/// ```
/// use devices::disk::{Disk, DiskMode};
/// use devices::virtio::VirtioDevice;
/// use devices::virtio::blk::Blk;
///
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("disk.img");
/// # std::fs::File::create(&image)?.set_len(1 << 20)?;
/// let (blk, worker) = Blk::new(Disk::open(&image, DiskMode::ReadOnly)?, "disk0")?;
/// let mut capacity = [0; 8];
/// blk.read_config(0, &mut capacity);
/// assert_eq!(u64::from_le_bytes(capacity), 2048, "sectors, of an image of 1 MiB");
/// assert_eq!(blk.features() >> 5 & 1, 1, "VIRTIO_BLK_F_RO");
/// # drop(worker);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Blk {
    shared: Arc<Shared>,
    config: [u8; CONFIG_LEN],
}

/// A view of a disk for whoever reports on it.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use devices::virtio::Memory;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::sync::Arc;
///
/// use devices::disk::{Disk, DiskMode};
/// use devices::virtio::blk::Blk;
/// use devices::virtio::mmio::MmioTransport;
///
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("disk.img");
/// # std::fs::File::create(&image)?.set_len(1 << 20)?;
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// let (blk, worker) = Blk::new(Disk::open(&image, DiskMode::Overlay)?, "disk0")?;
/// let monitor = blk.monitor();
/// let registers = MmioTransport::new(Box::new(blk), memory, Arc::new(Quiet));
/// // The device is the transport's now; what it counts is still in view, from any thread.
/// let totals = std::thread::spawn(move || monitor.totals()).join().expect("it only looks");
/// assert_eq!((totals.written_bytes, totals.failed), (0, 0));
/// # drop((registers, worker));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct BlkMonitor(Arc<Shared>);

impl BlkMonitor {
    /// What the disk has counted.
    pub fn totals(&self) -> BlkTotals {
        self.0.counters.totals()
    }
}

impl Blk {
    /// A block device for `disk` that calls itself `id` (20 bytes of it): the half for the transport, and the half for the event
    /// manager of the I/O thread.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new(disk: Disk, id: &str) -> io::Result<(Self, BlkWorker)> {
        Self::with_uring(disk, id, true)
    }

    /// The same; without io_uring unless `uring`.
    fn with_uring(disk: Disk, id: &str, uring: bool) -> io::Result<(Self, BlkWorker)> {
        let (read_only, doorbell) = (disk.read_only(), Doorbell::new()?);
        let engine = Engine::new(disk.into_storage(), doorbell.eventfd().try_clone()?, uring);
        let config = config::config_space(engine.storage().bytes());
        let mut name = [0; ID_LEN];
        name.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        let shared = Arc::new(Shared {
            path: Mutex::new(Path { engine: Some(engine), active: None }),
            doorbell,
            read_only,
            id: name,
            counters: Counters::default(),
        });
        let worker = BlkWorker::new(Arc::clone(&shared));
        Ok((Self { shared, config }, worker))
    }

    /// A view of the counters that outlives the disk's move into its transport.
    pub fn monitor(&self) -> BlkMonitor {
        BlkMonitor(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        config::offered(self.shared.read_only)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn doorbell(&self) -> &Doorbell {
        &self.shared.doorbell
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let ring = queues.into_iter().next().and_then(Ring::new).ok_or(ActivateError::QueueMissing(0))?;
        self.shared.lock().active = Some(Active { memory, interrupt, features, ring });
        // Requests may be available already.
        self.shared.doorbell.ring();
        Ok(())
    }

    fn reset(&mut self) {
        let mut path = self.shared.lock();
        path.active = None;
        let idle = path.engine.as_ref().is_none_or(|engine| engine.in_flight() == 0);
        if idle {
            return;
        }
        let engine = path.engine.take();
        // The worker finds no disk meanwhile and does nothing; it must not wait for us.
        drop(path);
        if let Some(mut engine) = engine {
            engine.drain();
            self.shared.lock().engine = Some(engine);
        }
    }
}
