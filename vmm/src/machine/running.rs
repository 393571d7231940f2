//! A machine that runs.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::virtio::balloon::{BalloonHandle, BalloonTotals};
use devices::virtio::blk::BlkTotals;
use devices::virtio::net::NetTotals;
use devices::virtio::vsock::VsockTotals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::events::{Loop, VcpuThreads, serve};
use super::exit::{End, ExitReason};
use super::hardware::Hardware;
use crate::deadline;
use crate::kvm::Vm;

/// What a machine's devices have seen.
///
/// ```no_run
/// # fn of(running: &vmm::machine::Running) {
/// let counters = running.counters();
/// for (n, nic) in counters.nics.iter().enumerate() {
///     println!("eth{n}: {} frames from the guest, {} to it", nic.port.tx_frames, nic.port.rx_frames);
/// }
/// println!("{} bytes of console output lost", counters.serial_lost);
/// # }
/// ```
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
///
/// ```no_run
/// # fn of(running: &vmm::machine::Running) {
/// for nic in running.counters().nics {
///     println!("{} frames left the guest; {} of them were refused", nic.device.tx_frames, nic.port.drops().map(|(_, n)| n).sum::<u64>());
/// }
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NicCounters {
    /// The device.
    pub device: NetTotals,
    /// What it is plugged into.
    pub port: net::Counters,
}

/// A running machine. Dropping it stops it.
///
/// ```no_run
/// use std::time::Duration;
///
/// use vmm::machine::{ExitReason, Guest, Machine};
///
/// # let image = guest_images::Store::open_default()?.get("debian")?;
/// let guest = Guest::image(&image).command(["sleep", "1000"]);
/// let machine = Machine::builder().guest(guest)?.build()?.start()?;
/// // A deadline: first the guest is asked, ten seconds later the plug is pulled.
/// let reason = match machine.wait_for(Duration::from_secs(60)) {
///     Some(reason) => reason,
///     None => machine.shutdown(Duration::from_secs(10)),
/// };
/// assert!(matches!(reason, ExitReason::PowerOff | ExitReason::Stopped));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Running {
    pub(super) end: Arc<End>,
    pub(super) io: Option<JoinHandle<()>>,
    pub(super) hardware: Arc<Hardware>,
}

/// A running machine whose devices are served by the thread that waits for it. Dropping it stops it.
///
/// ```no_run
/// # let builder = vmm::machine::Machine::builder();
/// // A program whose only work is this machine: one thread less, and nothing to join.
/// let reason = builder.build()?.start_here()?.wait();
/// std::process::exit(reason.status().into());
/// # #[allow(unreachable_code)]
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RunningHere {
    // Fields drop in order: the vCPUs stop while what they talk to still stands.
    pub(super) threads: VcpuThreads,
    pub(super) events: Loop,
    pub(super) end: Arc<End>,
    pub(super) hardware: Arc<Hardware>,
    pub(super) _vm: Vm,
}

impl RunningHere {
    /// Serves the devices until the end, and says why it came. All threads are gone when it returns.
    pub fn wait(self) -> ExitReason {
        serve(self.events, &self.end, self.threads);
        self.end.reason().unwrap_or(ExitReason::Crashed("io"))
    }
}

/// The door to a machine for what serves it, watches it or ends it from elsewhere, such as a thread that waits for signals. Keeps
/// nothing of the machine alive.
///
/// ```no_run
/// # let running = vmm::machine::Machine::builder().build()?.start()?;
/// let remote = running.remote();
/// std::thread::spawn(move || {
///     let _ = std::io::stdin().read_line(&mut String::new());
///     remote.stop();
/// });
/// println!("{}", running.wait());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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

    /// Presses the power button: see [`Running::power_button`]. Does nothing when the machine has ended.
    pub fn power_button(&self) {
        if let Some(hardware) = self.hardware.upgrade() {
            hardware.power_button();
        }
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

    /// Waits at most `limit` for the end.
    pub fn wait_for(&self, limit: Duration) -> Option<ExitReason> {
        let deadline = deadline::after(limit);
        while self.end.reason().is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            let mut fd = [PollFd::from_borrowed_fd(self.end.fd(), PollFlags::IN)];
            // Otherwise it has ended, or a signal came: the loop's condition tells.
            if poll(&mut fd, Some(&left)) == Ok(0) {
                break;
            }
        }
        self.end.reason()
    }

    /// Asks the guest to shut down by its power button, and waits; pulls the plug when `patience` is at its end.
    pub fn shutdown(self, patience: Duration) -> ExitReason {
        self.power_button();
        if self.wait_for(patience).is_none() {
            self.stop();
        }
        self.wait()
    }

    /// Ends the machine as if its plug were pulled; [`Self::wait`] then returns [`ExitReason::Stopped`].
    pub fn stop(&self) {
        self.end.now(ExitReason::Stopped);
    }

    /// Presses the machine's power button, and returns at once: an operating system that listens to it (systemd-logind and our
    /// own init do) shuts down and powers off. Nothing forces it to.
    pub fn power_button(&self) {
        self.hardware.power_button();
    }

    /// A handle for another thread, while this one waits.
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
