//! The end: processes stopped, disks written back, the status handed over.

use std::fs;
use std::time::Duration;

use crate::{agent, console, say, supervise, sys};

/// The exit device: a byte written here ends the VM with that status.
const EXIT_PORT: u16 = 0xF4;
/// What processes get between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_millis(500);

/// How the guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The command ended with this status.
    Status(u8),
    /// Somebody in the guest wants the machine off.
    PowerOff,
    /// Somebody in the guest wants a reboot.
    Reboot,
}

/// Ends the machine. Never returns: when even power-off is refused, it waits for whoever is outside.
pub(crate) fn end(how: End) -> ! {
    agent::forget();
    if has_disks() {
        // Without disks nothing that still runs has anything to lose: the root file system is memory.
        stop_processes();
    }
    unmount_disks();
    console::drain();
    let refused = match how {
        End::Status(status) => {
            let refused = sys::out(EXIT_PORT, status);
            // Still here: there is no exit device. Its absence costs the status, not the end.
            sys::power_off().err().or(refused.err())
        }
        End::PowerOff => sys::power_off().err(),
        End::Reboot => sys::reboot().err(),
    };
    if let Some(error) = refused {
        say!("the machine does not turn off: {error}");
    }
    loop {
        supervise::wait_for(vec![0], Duration::from_secs(3600));
    }
}

fn stop_processes() {
    sys::signal_everyone(libc::SIGTERM);
    supervise::wait_for_all(GRACE);
    sys::signal_everyone(libc::SIGKILL);
    supervise::wait_for_all(GRACE);
}

/// Mount points whose source is a block device, innermost first.
fn disk_mounts() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut points: Vec<_> = mounts
        .lines()
        .filter(|line| line.starts_with("/dev/"))
        .filter_map(|line| line.split(' ').nth(1))
        // The kernel escapes these characters in octal.
        .map(|point| {
            point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        })
        .collect();
    points.reverse();
    points
}

fn has_disks() -> bool {
    !disk_mounts().is_empty()
}

fn unmount_disks() {
    sys::sync();
    for point in disk_mounts() {
        if let Err(error) = sys::unmount(&point) {
            say!("cannot unmount {point}: {error}; what was written is synced");
        }
    }
}
