//! A machine that runs.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use devices::virtio::balloon::{BalloonHandle, BalloonTotals};
use devices::virtio::blk::BlkTotals;
use devices::virtio::net::NetTotals;
use devices::virtio::vsock::VsockTotals;

use super::exit::{End, ExitReason};
use super::hardware::Hardware;

/// What a machine's devices have seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Accesses to I/O ports that no device has.
    pub unclaimed_ports: u64,
    /// Accesses to MMIO addresses that no device has.
    pub unclaimed_mmio: u64,
    /// Bytes of serial output that a stalled or failed sink did not take.
    pub serial_lost: u64,
    /// Interrupts of each virtio device, in order.
    pub virtio_interrupts: Vec<u64>,
    /// What each network interface and its port have counted, in order.
    pub nics: Vec<NicCounters>,
    /// What each disk has counted, in order.
    pub disks: Vec<BlkTotals>,
    /// What the balloon has counted; nothing without one.
    pub balloon: BalloonTotals,
    /// What the vsock device has counted, if there is one.
    pub vsock: Option<VsockTotals>,
}

/// Both sides of a network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NicCounters {
    /// The device.
    pub device: NetTotals,
    /// What it is plugged into.
    pub port: net::Counters,
}

/// A running machine. Dropping it stops it.
pub struct Running {
    pub(super) end: Arc<End>,
    pub(super) io: Option<JoinHandle<()>>,
    pub(super) hardware: Arc<Hardware>,
}

/// Stops a machine from elsewhere, such as a thread that waits for signals.
#[derive(Clone)]
pub struct Stopper(Arc<End>);

impl Stopper {
    /// Ends the machine as if its plug were pulled. Does nothing when it has ended.
    pub fn stop(&self) {
        self.0.now(ExitReason::Stopped);
    }
}

/// The door to a machine for what serves it or watches it from elsewhere. Keeps nothing of the machine alive.
#[derive(Clone)]
pub struct Remote {
    end: Arc<End>,
    hardware: Weak<Hardware>,
}

#[cfg(test)]
impl Remote {
    /// The door to a machine that has no devices.
    pub(crate) fn to_nothing() -> Self {
        Self { end: Arc::new(End::new().expect("there are descriptors left")), hardware: Weak::new() }
    }
}

impl Remote {
    pub(super) fn new(end: &Arc<End>, hardware: &Arc<Hardware>) -> Self {
        Self { end: Arc::clone(end), hardware: Arc::downgrade(hardware) }
    }

    /// Ends the machine as if its plug were pulled. Does nothing when it has ended.
    pub fn stop(&self) {
        self.end.now(ExitReason::Stopped);
    }

    /// What the devices have seen so far; `None` when they are gone.
    pub fn counters(&self) -> Option<Counters> {
        Some(self.hardware.upgrade()?.counters())
    }

    /// Why the machine has ended, once it has.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.end.reason()
    }
}

impl Running {
    /// Waits for the end and says why it came. All threads are gone when it returns.
    pub fn wait(mut self) -> ExitReason {
        self.join();
        self.end.reason().unwrap_or(ExitReason::Crashed("io"))
    }

    /// Why the machine has ended, once it has.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.end.reason()
    }

    /// Ends the machine as if its plug were pulled; [`Self::wait`] then returns [`ExitReason::Stopped`].
    pub fn stop(&self) {
        self.end.now(ExitReason::Stopped);
    }

    /// A handle that stops the machine while another thread waits for it.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.end))
    }

    /// The door to the machine for other threads.
    pub fn remote(&self) -> Remote {
        Remote::new(&self.end, &self.hardware)
    }

    /// What the devices have seen so far.
    pub fn counters(&self) -> Counters {
        self.hardware.counters()
    }

    /// The machine's balloon, if it was built with one.
    pub fn balloon(&self) -> Option<BalloonHandle> {
        self.hardware.balloon()
    }

    fn join(&mut self) {
        if let Some(io) = self.io.take() {
            // A panic there has been told to `end`.
            let _ = io.join();
        }
    }
}

impl AsFd for Running {
    /// Becomes readable when the machine ends, and stays so: for event loops of embedders. Not to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.fd()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end.now(ExitReason::Stopped);
        self.join();
    }
}
