//! The MMIO transport (virtio 1.3 §4.2, version 2; no legacy interface).
//!
//! 4 KiB of registers ([`MMIO_LEN`]): below 0x100 each is 32 bits wide and accessed as such, from 0x100 on lies the
//! device's configuration space, accessed in 1, 2, 4 or 8 bytes.
//!
//! **The handshake** (§3.1.1) is enforced; what comes out of order is refused, that is, the write has no effect
//! and is counted in [`MmioTransport::refused`]:
//!
//! | write | accepted |
//! |---|---|
//! | status: 0 | always: reset, complete when the write completes |
//! | status: clears a bit | never |
//! | status: DRIVER | after ACKNOWLEDGE (or with it) |
//! | status: FEATURES_OK | after DRIVER; only if the features are a subset of the offer, contain `VERSION_1` and satisfy the device |
//! | status: DRIVER_OK | after FEATURES_OK; then the device is activated |
//! | driver features | between DRIVER and FEATURES_OK |
//! | queue size, addresses | between FEATURES_OK and DRIVER_OK, while the queue is not ready |
//! | queue ready: 1 | the same, and only for a size that is a power of two up to the maximum, aligned rings, all in guest memory |
//! | queue ready: 0 | always; on a live queue it stops the whole device, which then needs a reset |
//! | queue notify | with DRIVER_OK, for an existing queue |
//!
//! **Doorbell.** [`MmioTransport::doorbell`] gives the device's eventfd, to be registered as an ioeventfd for any write at
//! [`QUEUE_NOTIFY`]. A notification that comes through the register nevertheless writes the same eventfd.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::{
    Activation, Doorbell, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt, Memory, VirtioDevice,
};
use crate::bus::BusDevice;
use crate::exit::ExitRequest;
use crate::irq::IrqLine;
use crate::once::Tally;

#[cfg(test)]
mod tests;

/// Bytes of the register block.
pub const MMIO_LEN: u64 = 0x1000;
/// Offset of the doorbell register.
pub const QUEUE_NOTIFY: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"PNTN");
const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// Why a register access had no effect.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use devices::virtio::Memory;
/// # use devices::virtio::rng::Rng;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::sync::Arc;
///
/// use devices::BusDevice;
/// use devices::virtio::mmio::{MmioTransport, Refusal};
///
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// # let (device, _worker) = Rng::new()?;
/// let mut registers = MmioTransport::new(Box::new(device), memory, Arc::new(Quiet));
/// registers.write(0x70, &4_u32.to_le_bytes()); // DRIVER_OK, without a word before
/// registers.write(0x44, &1_u32.to_le_bytes()); // queue 0 is ready, it says
/// let mut half = [0; 2];
/// registers.read(0x00, &mut half);
/// let refused = [Refusal::Status, Refusal::Order, Refusal::Width].map(|why| registers.refused(why));
/// assert_eq!(refused, [1, 1, 1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// Not 32 bits at a multiple of four, below the configuration space; or a width that does not exist.
    Width,
    /// No such register, or a write to one that is read-only.
    Register,
    /// A status that clears bits, or skips a step.
    Status,
    /// Features that were not offered, that lack `VERSION_1`, or that don't go together.
    Features,
    /// A register that can't be written in this state.
    Order,
    /// A queue that does not exist.
    QueueIndex,
    /// A queue whose size, alignment or addresses don't hold.
    QueueSetup,
    /// The device could not start.
    Activation,
}

impl Refusal {
    const COUNT: usize = Self::Activation as usize + 1;
}

/// What the driver has written about a queue. Checked when it says that the queue is ready.
#[derive(Clone, Copy, Debug, Default)]
struct QueueSetup {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    ready: bool,
}

/// A virtio device's registers. See the module's documentation.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use devices::virtio::Memory;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::sync::Arc;
///
/// use devices::BusDevice;
/// use devices::virtio::mmio::{MmioTransport, Refusal};
/// use devices::virtio::rng::Rng;
///
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// let (device, worker) = Rng::new()?;
/// let mut registers = MmioTransport::new(Box::new(device), memory, Arc::new(Quiet));
/// let mut word = [0; 4];
/// registers.read(0x00, &mut word);
/// assert_eq!(&word, b"virt");
/// // A driver that accepts no feature at all: not even VERSION_1, so it does not get FEATURES_OK.
/// for status in [1, 1 | 2, 1 | 2 | 8_u32] {
///     registers.write(0x70, &status.to_le_bytes());
/// }
/// registers.read(0x70, &mut word);
/// assert_eq!(u32::from_le_bytes(word), 1 | 2);
/// assert_eq!(registers.refused(Refusal::Features), 1);
/// # drop(worker);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    status: u32,
    offered: u64,
    features_sel: u32,
    accepted: u64,
    accepted_sel: u32,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
    refused: [Tally; Refusal::COUNT],
}

impl MmioTransport {
    /// Registers for `device`, with queues in `memory` and an interrupt through `line`.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, line: Arc<dyn IrqLine>) -> Self {
        let offered = device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        let queues = vec![QueueSetup::default(); device.queue_sizes().len()];
        Self {
            device,
            memory,
            interrupt: Interrupt::new(line),
            status: 0,
            offered,
            features_sel: 0,
            accepted: 0,
            accepted_sel: 0,
            queue_sel: 0,
            queues,
            refused: Default::default(),
        }
    }

    /// What the driver's kicks ring.
    pub fn doorbell(&self) -> &Doorbell {
        self.device.doorbell()
    }

    /// How many accesses were refused for `why`.
    pub fn refused(&self, why: Refusal) -> u64 {
        self.refused[why as usize].get()
    }

    /// Interrupts sent to the guest.
    pub fn interrupts(&self) -> u64 {
        self.interrupt.sent()
    }

    fn refuse(&self, why: Refusal, detail: impl FnOnce() -> String) {
        if self.refused[why as usize].first() {
            let (device, detail) = (self.device.device_type(), detail());
            tracing::warn!(device, ?why, detail, "virtio register access refused; further ones are counted");
        }
    }

    fn has(&self, status: u32) -> bool {
        self.status & status == status
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(self.queue_sel as usize)
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, self.features_sel),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.device.queue_sizes().get(self.queue_sel as usize).copied().unwrap_or(0).into()
            }
            reg::VIRTIO_MMIO_QUEUE_READY => self.queue().is_some_and(|q| q.ready).into(),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS if self.interrupt.is_reset_needed() => self.status | NEEDS_RESET,
            reg::VIRTIO_MMIO_STATUS => self.status,
            // There is no shared memory region, whichever is selected (§4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            other => {
                self.refuse(Refusal::Register, || format!("read at {other:#x}"));
                0
            }
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.accepted_sel = value,
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NUM => self.set_up_queue(|q| q.size = value),
            reg::VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value),
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => self.set_up_queue(|q| set_low(&mut q.descriptors, value)),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => self.set_up_queue(|q| set_high(&mut q.descriptors, value)),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.set_up_queue(|q| set_low(&mut q.available, value)),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.set_up_queue(|q| set_high(&mut q.available, value)),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => self.set_up_queue(|q| set_low(&mut q.used, value)),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_up_queue(|q| set_high(&mut q.used, value)),
            reg::VIRTIO_MMIO_SHM_SEL => {}
            other => self.refuse(Refusal::Register, || format!("write of {value:#x} at {other:#x}")),
        }
    }

    fn accept_features(&mut self, value: u32) {
        if !self.has(DRIVER) || self.has(FEATURES_OK) {
            let status = self.status;
            return self.refuse(Refusal::Order, || format!("features written in status {status:#x}"));
        }
        match self.accepted_sel {
            0 => set_low(&mut self.accepted, value),
            1 => set_high(&mut self.accepted, value),
            // Features beyond bit 63: none is offered, so only none can be accepted.
            sel if value != 0 => {
                self.refuse(Refusal::Features, || format!("{value:#x} in features word {sel}"));
            }
            _ => {}
        }
    }

    fn set_up_queue(&mut self, set: impl FnOnce(&mut QueueSetup)) {
        let (sel, status) = (self.queue_sel, self.status);
        let open = self.has(FEATURES_OK) && !self.has(DRIVER_OK);
        match self.queues.get_mut(sel as usize) {
            None => self.refuse(Refusal::QueueIndex, || format!("queue {sel} set up")),
            Some(queue) if open && !queue.ready => set(queue),
            Some(_) => {
                self.refuse(Refusal::Order, || {
                    format!("queue {sel} set up in status {status:#x} or when ready")
                });
            }
        }
    }

    fn set_queue_ready(&mut self, value: u32) {
        let (sel, status) = (self.queue_sel as usize, self.status);
        let Some(setup) = self.queues.get(sel).copied() else {
            return self.refuse(Refusal::QueueIndex, || format!("queue {sel} ready"));
        };
        if value == 0 {
            self.queues[sel].ready = false;
            if setup.ready && self.has(DRIVER_OK) {
                // The driver may reuse the ring's memory from now on, and there is no way back but a reset.
                self.device.reset();
                self.interrupt.needs_reset();
            }
        } else if !self.has(FEATURES_OK) || self.has(DRIVER_OK) {
            self.refuse(Refusal::Order, || format!("queue {sel} made ready in status {status:#x}"));
        } else if self.make_queue(sel, &setup).is_none() {
            self.refuse(Refusal::QueueSetup, || format!("queue {sel}: {setup:x?}"));
        } else {
            self.queues[sel].ready = true;
        }
    }

    /// The queue that the driver described, if every part of it holds.
    fn make_queue(&self, index: usize, setup: &QueueSetup) -> Option<Queue> {
        let mut queue = Queue::new(self.device.queue_sizes()[index]).ok()?;
        queue.try_set_size(setup.size.try_into().ok()?).ok()?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(setup.used)).ok()?;
        queue.set_event_idx(self.accepted & F_EVENT_IDX != 0);
        queue.set_ready(true);
        queue.is_valid(&*self.memory).then_some(queue)
    }

    fn kick(&mut self, index: u32) {
        if !self.has(DRIVER_OK) {
            return self.refuse(Refusal::Order, || format!("queue {index} kicked before DRIVER_OK"));
        }
        if index as usize >= self.queues.len() {
            return self.refuse(Refusal::QueueIndex, || format!("queue {index} kicked"));
        }
        self.device.doorbell().ring();
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let (old, new) = (self.status, value & !NEEDS_RESET);
        let added = new & !old;
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        let in_order = old & !new == 0
            && added & !known == 0
            && (added & DRIVER == 0 || new & ACKNOWLEDGE != 0)
            && (added & FEATURES_OK == 0 || old & DRIVER != 0)
            && (added & DRIVER_OK == 0 || old & FEATURES_OK != 0);
        if !in_order {
            return self.refuse(Refusal::Status, || format!("status {old:#x} -> {value:#x}"));
        }
        self.status |= added & (ACKNOWLEDGE | DRIVER | FAILED);
        if added & FEATURES_OK != 0 {
            self.check_features();
        }
        if added & DRIVER_OK != 0 {
            self.status |= DRIVER_OK;
            self.activate();
        }
    }

    fn check_features(&mut self) {
        let (offered, accepted) = (self.offered, self.accepted);
        if accepted & !offered == 0 && accepted & F_VERSION_1 != 0 && self.device.accepts(accepted) {
            self.status |= FEATURES_OK;
        } else {
            self.refuse(Refusal::Features, || format!("accepted {accepted:#x} of {offered:#x}"));
        }
    }

    fn activate(&mut self) {
        let queues = (0..).zip(&self.queues).map(|(index, setup)| {
            // Checked when it became ready; memory regions never go away.
            let made = if setup.ready { self.make_queue(index, setup) } else { None };
            made.unwrap_or_default()
        });
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues: queues.collect(),
            features: self.accepted,
            interrupt: Arc::clone(&self.interrupt),
        };
        if let Err(error) = self.device.activate(activation) {
            self.refuse(Refusal::Activation, || error.to_string());
            self.interrupt.needs_reset();
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        // From here on nobody else sends interrupts.
        self.interrupt.clear();
        self.status = 0;
        self.features_sel = 0;
        self.accepted = 0;
        self.accepted_sel = 0;
        self.queue_sel = 0;
        self.queues.fill(QueueSetup::default());
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            if matches!(data.len(), 1 | 2 | 4 | 8) {
                return self.device.read_config(offset - CONFIG, data);
            }
        } else if let (true, Ok(word)) = (offset.is_multiple_of(4), <&mut [u8; 4]>::try_from(&mut *data)) {
            *word = self.read_register(offset as u32).to_le_bytes();
            return;
        }
        self.refuse(Refusal::Width, || format!("read of {} bytes at {offset:#x}", data.len()));
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitRequest> {
        if offset >= CONFIG {
            if !matches!(data.len(), 1 | 2 | 4 | 8) {
                self.refuse(Refusal::Width, || format!("write of {} bytes at {offset:#x}", data.len()));
            } else if self.has(DRIVER) {
                self.device.write_config(offset - CONFIG, data);
            } else {
                self.refuse(Refusal::Order, || {
                    format!("configuration written at {offset:#x} without a driver")
                });
            }
        } else if let (true, Ok(word)) = (offset.is_multiple_of(4), <[u8; 4]>::try_from(data)) {
            self.write_register(offset as u32, u32::from_le_bytes(word));
        } else {
            self.refuse(Refusal::Width, || format!("write of {} bytes at {offset:#x}", data.len()));
        }
        None
    }
}

/// Bits 0–31 or 32–63 of `value`; zero for any other selection.
fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !u64::from(u32::MAX) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & u64::from(u32::MAX) | u64::from(high) << 32;
}
