//! virtio over MMIO, the driver's side (virtio 1.3 §4.2), and the network device on it (§5.1).
//!
//! [`Transport`] brings a device through §3.1.1: reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK, queues,
//! DRIVER_OK. It checks what it is told (magic, version, FEATURES_OK, queue limits) because the device is
//! what is being probed; [`Refused`] says which step failed. [`net`] is the NIC, [`queue`] the rings,
//! [`offload`] the checksums that are left to the device, [`sys`] the memory and register access.

pub mod abuse;
pub mod net;
pub mod offload;
pub mod queue;
pub mod sys;

use core::fmt;
use queue::Queue;
use sys::Window;

/// Register offsets (§4.2.2).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (§2.1).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Feature bits (§5.1.3, §6).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    /// What the probe knows, by the names that `probe.without` takes.
    pub const KNOWN: [(&str, u64); 9] = [
        ("csum", CSUM),
        ("guest-csum", GUEST_CSUM),
        ("mtu", MTU),
        ("mac", MAC),
        ("guest-tso4", GUEST_TSO4),
        ("host-tso4", HOST_TSO4),
        ("mrg", MRG_RXBUF),
        ("status", STATUS),
        ("event-idx", EVENT_IDX),
    ];
}

const MAGIC: u32 = 0x7472_6976;
/// The device ID of a network device.
pub const NETWORK: u32 = 1;

/// Why a device was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The magic value isn't "virt": no virtio-mmio device here.
    Magic(u32),
    /// The version isn't 2.
    Version(u32),
    /// The status didn't read 0 after a reset.
    Reset(u32),
    /// VIRTIO_F_VERSION_1 isn't offered; the features that are.
    Legacy(u64),
    /// FEATURES_OK didn't stick; the features that were asked for.
    Features(u64),
    /// This queue has no room.
    Queue(u32),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(value) => write!(f, "magic is {value:#x}, expected {MAGIC:#x}"),
            Self::Version(value) => write!(f, "virtio-mmio version is {value}, expected 2"),
            Self::Reset(value) => write!(f, "status is {value:#x} after a reset, expected 0"),
            Self::Legacy(offered) => write!(f, "VERSION_1 isn't among the offered features {offered:#x}"),
            Self::Features(asked) => write!(f, "FEATURES_OK was refused for {asked:#x}"),
            Self::Queue(index) => write!(f, "queue {index} isn't available"),
        }
    }
}

/// A virtio-mmio device's registers.
#[derive(Debug, Clone, Copy)]
pub struct Transport {
    registers: Window,
}

impl Transport {
    /// Looks at a register window: the device's ID, or why it is none. An ID of 0 is an empty slot.
    pub fn identify(registers: Window) -> Result<(Self, u32), Refused> {
        let magic = registers.get(register::MAGIC);
        if magic != MAGIC {
            return Err(Refused::Magic(magic));
        }
        let version = registers.get(register::VERSION);
        if version != 2 {
            return Err(Refused::Version(version));
        }
        Ok((Self { registers }, registers.get(register::DEVICE_ID)))
    }

    /// The register window.
    #[must_use]
    pub fn registers(&self) -> &Window {
        &self.registers
    }

    /// Resets the device (§4.2.3.1 wants the status read back as 0).
    pub fn reset(&self) -> Result<(), Refused> {
        self.registers.set(register::STATUS, 0);
        match self.registers.get(register::STATUS) {
            0 => Ok(()),
            other => Err(Refused::Reset(other)),
        }
    }

    /// Adds status bits.
    pub fn add_status(&self, bits: u32) {
        let now = self.registers.get(register::STATUS);
        self.registers.set(register::STATUS, now | bits);
    }

    /// The features that the device offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.registers.set(register::DEVICE_FEATURES_SEL, select);
            u64::from(self.registers.get(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Resets and negotiates up to FEATURES_OK: those of `wanted` that are offered.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, Refused> {
        self.reset()?;
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        let offered = self.offered();
        if offered & feature::VERSION_1 == 0 {
            return Err(Refused::Legacy(offered));
        }
        let features = offered & (wanted | feature::VERSION_1);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.registers.set(register::DRIVER_FEATURES_SEL, select);
            self.registers.set(register::DRIVER_FEATURES, half);
        }
        self.add_status(status::FEATURES_OK);
        if self.registers.get(register::STATUS) & status::FEATURES_OK == 0 {
            self.add_status(status::FAILED);
            return Err(Refused::Features(features));
        }
        Ok(features)
    }

    /// The size that the device allows for queue `index`.
    pub fn queue_limit(&self, index: u32) -> Result<u16, Refused> {
        self.registers.set(register::QUEUE_SEL, index);
        let ready = self.registers.get(register::QUEUE_READY);
        let limit = self.registers.get(register::QUEUE_NUM_MAX).min(u32::from(queue::MAX_SIZE)) as u16;
        if ready != 0 || limit == 0 {
            return Err(Refused::Queue(index));
        }
        // The largest power of two below the limit.
        Ok(1 << limit.ilog2())
    }

    /// Tells the device where queue `index` lies.
    pub fn enable_queue(&self, index: u32, queue: &Queue) {
        self.registers.set(register::QUEUE_SEL, index);
        self.registers.set(register::QUEUE_NUM, u32::from(queue.size()));
        let places = [register::QUEUE_DESC, register::QUEUE_DRIVER, register::QUEUE_DEVICE];
        for (place, address) in places.into_iter().zip(queue.addresses()) {
            self.registers.set(place, address as u32);
            self.registers.set(place + 4, (address >> 32) as u32);
        }
        self.registers.set(register::QUEUE_READY, 1);
    }

    /// Rings the doorbell of queue `index`.
    pub fn notify(&self, index: u32) {
        self.registers.set(register::QUEUE_NOTIFY, index);
    }
}
