//! Registers, virtqueues and guest memory: the devices of a Pontoon machine.
//!
//! What enters: port and MMIO accesses of the vCPUs through a [`Bus`], kicks through eventfds, frames through
//! [`net::FramePort`]. What leaves: interrupts through [`IrqLine`], bytes to sinks, and [`ExitRequest`]s, which
//! a device *returns*: no device ever stops the machine itself. This crate knows neither KVM nor any protocol
//! above Ethernet.
//!
//! **Threads.** Register accesses come from vCPU threads, each device behind its own mutex. The data path of
//! a virtio device is a *worker*, an `event_manager::MutEventSubscriber` that runs on the one I/O thread.
//!
//! **A guest is a stranger.** Whatever it writes is checked, refused and counted; it cannot make a device
//! panic, block, or grow without bound.

pub mod acpi;
pub mod bus;
pub mod cmos;
pub mod disk;
pub mod exit;
pub mod i8042;
pub mod serial;
pub mod virtio;

mod irq;
mod once;

pub use bus::{Bus, BusDevice, BusError};
pub use exit::ExitRequest;
pub use irq::IrqLine;
