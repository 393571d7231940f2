//! A machine: built from a description, started, waited for.
//!
//! ```no_run
//! use guest_images::Store;
//! use vmm::machine::Machine;
//!
//! let image = Store::open_default()?.get("debian")?;
//! let machine = Machine::builder().guest(&image)?.memory(512 << 20).build()?;
//! let reason = machine.start()?.wait();
//! println!("{reason}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! **Threads.** One per vCPU (`vcpuN`), one for events (`io`): devices' workers, console input and the end of the machine.
//! [`Machine::start`] makes a new thread the latter, [`Machine::start_here`] the calling one.
//! A serial console whose sink may block adds one.
//!
//! **The end.** Whatever ends a machine (a device that the guest asked, a vCPU that failed, [`Running::stop`]) stores its
//! reason, the first one wins, and wakes the I/O thread. That one kicks and joins the vCPUs, serves what the guest handed
//! over before its end, drops the devices and ends itself. When [`Running::wait`] has returned, or [`Running`] is dropped, no vCPU, descriptor or mapping of the
//! machine is left; only a sink of serial output that blocks keeps the thread that waits for it.

mod builder;
mod devices;
mod error;
mod events;
mod exit;
mod guest;
mod hardware;
mod running;

#[cfg(test)]
mod tests;

pub use crate::acpi::AcpiError;
pub use crate::vcpu::{CpuState, Failure};
pub use builder::{DEFAULT_CMDLINE, DEFAULT_MEMORY, Machine, MachineBuilder, Nic};
pub use error::{BuildError, StartError};
pub use exit::ExitReason;
pub use guest::{Guest, GuestError, Init};
pub use running::{Counters, NicCounters, Remote, Running, RunningHere};
