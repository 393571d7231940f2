//! The memory balloon (virtio 1.3 §5.5): memory that the guest does not use goes back to the host.
//!
//! ```text
//!   guest                        this module                       host
//!   reporting ── free pages ──>  chain -> ranges of the memory's   fallocate(PUNCH_HOLE): the pages are gone;
//!   inflateq ── page numbers ─>  file, so many bytes a turn   ──>  the guest's next touch gets a zeroed one
//!   deflateq ── page numbers ─>  answered
//!   config: num_pages (ours), actual (the driver's)
//! ```
//!
//! **Free page reporting** (`VIRTIO_BALLOON_F_PAGE_REPORTING`, §5.5.6.7) needs nobody's decision: Linux reports blocks of 2 MiB and
//! more about two seconds after they were freed, and may use them again at any time after the chain has come back. **Inflating** is asked for
//! by [`BalloonHandle::set_target`]; with `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` the guest takes its memory back rather than kill a process.
//!
//! Guest memory is a memfd that is mapped shared, so holes are punched into the file; memory without a file behind it stays
//! where it is. Only whole pages within what the guest named are given back, and only in guest memory: the chain's buffers are
//! checked as any other's, page numbers are looked up, and those that lie nowhere are counted and ignored.
//!
//! **Bounded**: a turn gives back at most [`TURN_BYTES`] or [`TURN_PAGES`] single pages, then comes back behind the other events; a
//! chain is returned when all of it is done. Of a chain of page numbers the first [`MAX_NUMBERS`] count (Linux sends 256).
//!
//! **Queue numbers.** §5.5.2 numbers the reporting queue 4, whatever was negotiated; Linux counts only the queues that exist and
//! calls it 2 here. Both are offered, and whichever the driver sets up is it. Not offered: statistics, hints for migration, page
//! poison (a guest that poisons free pages then reports none).

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{ActivateError, Activation, Doorbell, Ring, VirtioDevice, read_config_space};
use crate::once::Tally;

mod release;
#[cfg(test)]
mod tests;
mod worker;

pub use worker::{BalloonWorker, MAX_NUMBERS, TURN_BYTES, TURN_PAGES};

use worker::Active;

/// Bytes of a page, as the balloon counts them (§5.5.6.1).
pub const PAGE: u64 = 4096;
/// Descriptors of a queue.
pub const QUEUE_SIZE: u16 = 128;

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` and `VIRTIO_BALLOON_F_PAGE_REPORTING` (§5.5.3); virtio-bindings has neither.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Queue indices; see the module's documentation for the two of reporting.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: [usize; 2] = [2, 4];
const QUEUE_SIZES: [u16; 5] = [QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE, 0, QUEUE_SIZE];

/// Offset of `actual` in the configuration space; `num_pages` is at 0.
const ACTUAL: u64 = 4;

/// What the two halves and the handles share.
struct Shared {
    active: Mutex<Option<Active>>,
    doorbell: Doorbell,
    /// `num_pages`: how many pages the balloon shall have.
    target: AtomicU32,
    /// `actual`: how many it has, as the driver says.
    actual: AtomicU32,
    reported: AtomicU64,
    inflated: AtomicU64,
    refused: Tally,
    failed: Tally,
    broken: Tally,
}

/// What a balloon has counted since the machine was made.
///
/// ```
/// use devices::virtio::balloon::{Balloon, BalloonTotals};
///
/// let (balloon, worker) = Balloon::new()?;
/// let handle = balloon.handle();
/// handle.set_target(64 << 20);
/// // Asking alone gives nothing back: that takes a guest with a driver.
/// assert_eq!(handle.totals(), BalloonTotals::default());
/// # drop(worker);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonTotals {
    /// Bytes of reported free pages that were given back.
    pub reported_bytes: u64,
    /// Bytes of inflated pages that were given back.
    pub inflated_bytes: u64,
    /// Page numbers outside of memory, and numbers beyond [`MAX_NUMBERS`] in a chain.
    pub refused: u64,
    /// Ranges that the host did not take.
    pub failed: u64,
    /// How often a broken queue stopped the device until its next reset.
    pub broken: u64,
}

/// The transport's half of the balloon. See the module's documentation.
///
/// ```
/// use devices::virtio::VirtioDevice;
/// use devices::virtio::balloon::Balloon;
///
/// let (balloon, worker) = Balloon::new()?;
/// balloon.handle().set_target(3 << 20);
/// // The driver reads at the start of the configuration space how many pages are wanted.
/// let mut pages = [0; 4];
/// balloon.read_config(0, &mut pages);
/// assert_eq!(u32::from_le_bytes(pages), 768);
/// # drop(worker);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Balloon(Arc<Shared>);

/// Reads and sets a machine's balloon from anywhere.
///
/// ```
/// use devices::virtio::balloon::Balloon;
///
/// let (balloon, worker) = Balloon::new()?;
/// let handle = balloon.handle();
/// // `balloon` goes into a transport, `worker` to the I/O thread (`MachineBuilder::balloon` does both). Then:
/// handle.set_target(64 << 20);
/// assert_eq!((handle.target(), handle.actual()), (64 << 20, 0));
/// # drop(worker);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to keep `bytes` of its memory unused, in pages of 4 KiB. It does so as far, and as soon, as it can, and
    /// takes it back when it would run out of memory.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.0.target.store(pages, Ordering::SeqCst);
        if let Some(active) = self.0.lock().as_ref() {
            active.interrupt.config_changed();
        }
    }

    /// What [`Self::set_target`] was told, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.0.target.load(Ordering::SeqCst)) * PAGE
    }

    /// How much the guest says that it keeps unused, in bytes. A hint: the guest may say anything.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::SeqCst)) * PAGE
    }

    /// What the balloon has counted.
    pub fn totals(&self) -> BalloonTotals {
        BalloonTotals {
            reported_bytes: self.0.reported.load(Ordering::Relaxed),
            inflated_bytes: self.0.inflated.load(Ordering::Relaxed),
            refused: self.0.refused.get(),
            failed: self.0.failed.get(),
            broken: self.0.broken.get(),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Balloon {
    /// An empty balloon: the half for the transport, and the half for the event manager of the I/O thread.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new() -> io::Result<(Self, BalloonWorker)> {
        let shared = Arc::new(Shared {
            active: Mutex::new(None),
            doorbell: Doorbell::new()?,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            reported: AtomicU64::new(0),
            inflated: AtomicU64::new(0),
            refused: Tally::default(),
            failed: Tally::default(),
            broken: Tally::default(),
        });
        let worker = BalloonWorker::new(Arc::clone(&shared));
        Ok((Self(shared), worker))
    }

    /// A handle that outlives the balloon's move into its transport.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.0))
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn doorbell(&self) -> &Doorbell {
        &self.0.doorbell
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let words = [&self.0.target, &self.0.actual].map(|word| word.load(Ordering::SeqCst).to_le_bytes());
        read_config_space(words.as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `actual` is the driver's, and it is written whole (§5.5.6).
        if let (ACTUAL, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0.actual.store(u32::from_le_bytes(word), Ordering::SeqCst);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let mut rings = queues.into_iter().map(Ring::new).collect::<Vec<_>>();
        let mut take = |index: usize| rings.get_mut(index).and_then(Option::take);
        let inflate = take(INFLATE).ok_or(ActivateError::QueueMissing(INFLATE))?;
        let deflate = take(DEFLATE).ok_or(ActivateError::QueueMissing(DEFLATE))?;
        let reporting = REPORTING.into_iter().find_map(take).filter(|_| features & F_PAGE_REPORTING != 0);
        *self.0.lock() = Some(Active::new(memory, interrupt, [Some(inflate), Some(deflate), reporting]));
        // Chains may be available already.
        self.0.doorbell.ring();
        Ok(())
    }

    fn reset(&mut self) {
        *self.0.lock() = None;
        // The balloon of a driver that is gone is empty (§5.5.5).
        self.0.actual.store(0, Ordering::SeqCst);
    }
}
