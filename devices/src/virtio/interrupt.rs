//! [`Interrupt`]: what a device tells its driver, and the registers in which the driver finds it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::irq::IrqLine;

/// The interrupt of a virtio device: a status word, `DEVICE_NEEDS_RESET`, the configuration's generation, a line.
///
/// Shared by the transport (vCPU threads) and the worker (I/O thread). Every notification is an edge of its own,
/// sent after its status bit: an edge that finds the bit still set may meet a driver that has already looked.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// use std::sync::Arc;
///
/// use devices::virtio::Interrupt;
///
/// let interrupt = Interrupt::new(Arc::new(Quiet));
/// interrupt.used(); // after the used index has been written
/// interrupt.config_changed(); // after the configuration space has
/// assert_eq!(interrupt.sent(), 2, "each is an edge of its own");
/// ```
pub struct Interrupt {
    line: Arc<dyn IrqLine>,
    status: AtomicU32,
    needs_reset: AtomicBool,
    generation: AtomicU32,
    sent: AtomicU64,
}

impl Interrupt {
    /// A quiet interrupt on `line`.
    pub fn new(line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            line,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            sent: AtomicU64::new(0),
        })
    }

    fn notify(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.line.raise();
    }

    /// Tells the driver that used buffers are there. Call it after the used index has been written.
    pub fn used(&self) {
        self.notify(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration space has changed. Call it after the change.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.notify(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device can't go on: `DEVICE_NEEDS_RESET` with a configuration interrupt (virtio 1.3 §2.1.2).
    pub fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.notify(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Edges sent since the machine was made.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// The interrupt status register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen `bits`.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Whether `DEVICE_NEEDS_RESET` is set.
    pub(super) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The configuration's generation.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The device was reset; nobody else sends now.
    pub(super) fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}
