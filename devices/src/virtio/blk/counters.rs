//! What a disk counts, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::once::Tally;

/// Totals of a disk since the machine was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    trims: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    pub(super) failed: Tally,
    pub(super) refused: Tally,
    pub(super) broken: Tally,
}

/// The values of a disk's counters at one moment.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use std::sync::Arc;
/// # use devices::virtio::{Activation, F_VERSION_1, Interrupt, Memory, VirtioDevice};
/// # use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
/// # use virtio_queue::{Queue, QueueT};
/// # use vm_memory::GuestMemoryMmap;
/// use devices::disk::{Disk, DiskMode};
/// use devices::virtio::blk::{Blk, BlkTotals};
/// use vm_memory::{Bytes, GuestAddress};
///
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("disk.img");
/// # std::fs::File::create(&image)?.set_len(1 << 20)?;
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// # let mut queue = Queue::new(16)?;
/// # queue.set_avail_ring_address(Some(0x1000), None);
/// # queue.set_used_ring_address(Some(0x2000), None);
/// # queue.set_ready(true);
/// let (mut blk, worker) = Blk::new(Disk::open(&image, DiskMode::ReadOnly)?, "disk0")?;
/// let monitor = blk.monitor();
/// # let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// # events.add_subscriber(Box::new(worker));
/// # let interrupt = Interrupt::new(Arc::new(Quiet));
/// # let queues = vec![queue];
/// # blk.activate(Activation { memory: memory.clone(), queues, features: F_VERSION_1, interrupt })?;
/// // The guest sends a request of type 99, which is none, and gives a byte for the status.
/// memory.write_obj(99_u32, GuestAddress(0x8000))?;
/// memory.write_obj([0x8000_u64, 16 | 1 << 32 | 1 << 48, 0x9000, 1 | 2 << 32], GuestAddress(0))?;
/// memory.write_obj([0_u16, 1, 0], GuestAddress(0x1000))?;
/// events.run_with_timeout(0)?;
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x9000))?, 2, "VIRTIO_BLK_S_UNSUPP");
/// assert_eq!(monitor.totals(), BlkTotals { refused: 1, ..BlkTotals::default() });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkTotals {
    /// Reads that succeeded.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Flushes that reached the disk.
    pub flushes: u64,
    /// Discards and zeroes that succeeded.
    pub trims: u64,
    /// Requests that failed on the host: the guest got an I/O error.
    pub failed: u64,
    /// Requests that make no sense, and were answered so.
    pub refused: u64,
    /// How often a broken queue stopped the device until its next reset.
    pub broken: u64,
}

/// What a request was, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A read of so many bytes.
    Read(u64),
    /// A write of so many bytes.
    Write(u64),
    Flush,
    Trim,
}

impl Counters {
    /// A request of this kind succeeded.
    pub(super) fn done(&self, kind: Kind) {
        let add = |counter: &AtomicU64, n| counter.fetch_add(n, Ordering::Relaxed);
        match kind {
            Kind::Read(bytes) => {
                add(&self.reads, 1);
                add(&self.read_bytes, bytes);
            }
            Kind::Write(bytes) => {
                add(&self.writes, 1);
                add(&self.written_bytes, bytes);
            }
            Kind::Flush => {
                add(&self.flushes, 1);
            }
            Kind::Trim => {
                add(&self.trims, 1);
            }
        }
    }

    pub(super) fn totals(&self) -> BlkTotals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkTotals {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            flushes: get(&self.flushes),
            trims: get(&self.trims),
            failed: self.failed.get(),
            refused: self.refused.get(),
            broken: self.broken.get(),
        }
    }
}
