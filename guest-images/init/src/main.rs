//! PID 1 of Pontoon's Linux images: from the kernel's hand-over to the exit status of one command.
//!
//! # What enters
//!
//! - The initramfs: busybox, `/etc/udhcpc.script`, and the modules below `/lib/modules/$(uname -r)` with their `modules.alias`
//!   and `modules.dep` (depmod's formats).
//! - The request, files below `/pontoon` that the VMM appends to the initramfs (see `request.rs`): the command, its
//!   environment, the host name, how the console behaves.
//! - The kernel command line: `pontoon.modules=a,b` (loaded besides those of the hardware), `pontoon.dhcp=off`.
//!
//! # What happens, in order
//!
//! 1. Mount /proc, /sys, /dev, /dev/pts, /dev/shm, /run, /tmp; take the active console as standard streams.
//! 2. Load the modules that the hardware's modaliases ask for, until no new hardware appears.
//! 3. Start the agent in the background, if there is a vsock device and the image has one (see `agent.rs`).
//! 4. Bring up lo; for every NIC start udhcpc, which keeps the lease in the background; print the address.
//!    Without a NIC nothing is waited for; without an answer at most [`net::DHCP_LIMIT`].
//! 5. Run the command, or a login shell, in the foreground of the console, which is its controlling terminal; reap
//!    orphans meanwhile.
//! 6. Stop everything, write disks back, and hand the status to the VMM through the exit device (one byte to I/O port
//!    0xF4); power off where there is none.
//!
//! # Statuses
//!
//! The command's own; 128+N when signal N ended it; 127 when it does not exist, 126 when it cannot be executed: what a
//! shell says. `poweroff` and `reboot` in the guest, and the machine's power button, end it without a status.
//!
//! Nothing here may panic: PID 1's death is a kernel panic. What fails is said on the console, and the boot goes on.

mod agent;
mod button;
mod console;
mod modules;
mod net;
mod power;
mod request;
mod supervise;
mod sys;

/// Says something to whoever watches the console.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::console::say(format_args!($($arg)*)) };
}

use std::os::unix::fs::PermissionsExt as _;

use request::{Options, Request};

fn main() {
    mount_all();
    console::take();
    let options = Options::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default());
    let request = Request::read(std::path::Path::new("/pontoon"));
    console::prepare(request.console);
    supervise::block_signals();
    modules::load(&options.modules);
    agent::start();
    let button = button::Button::find();
    let hostname = set_hostname(request.hostname.as_deref());
    net::up(&hostname, options.dhcp);
    power::end(supervise::run(&request, &button));
}

/// The kernel's own file systems. One that is mounted already is no failure.
fn mount_all() {
    // The kernel's root file system is a tmpfs that everybody may write to; no archive's entry has changed that.
    let _ = std::fs::set_permissions("/", std::fs::Permissions::from_mode(0o755));
    let nodev = libc::MS_NOSUID | libc::MS_NODEV;
    let mounts = [
        ("proc", "/proc", "proc", nodev | libc::MS_NOEXEC, ""),
        ("sysfs", "/sys", "sysfs", nodev | libc::MS_NOEXEC, ""),
        ("devtmpfs", "/dev", "devtmpfs", libc::MS_NOSUID, "mode=0755"),
        ("devpts", "/dev/pts", "devpts", libc::MS_NOSUID | libc::MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
        ("shm", "/dev/shm", "tmpfs", nodev, "mode=1777"),
        ("run", "/run", "tmpfs", nodev, "mode=0755"),
        ("tmp", "/tmp", "tmpfs", nodev, "mode=1777"),
    ];
    for (source, target, kind, flags, data) in mounts {
        // It exists unless the image is somebody's own; then the mount says what is wrong.
        let _ = std::fs::create_dir_all(target);
        match sys::mount(source, target, kind, flags, data) {
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => say!("cannot mount {target}: {error}"),
            Ok(()) | Err(_) => {}
        }
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, format!("/dev/{link}"));
    }
}

/// Takes the request's host name, or the image's own, and makes it resolvable.
fn set_hostname(requested: Option<&str>) -> String {
    let own = || std::fs::read_to_string("/etc/hostname").ok().map(|name| name.trim().to_owned());
    let name = requested.map(str::to_owned).or_else(own).unwrap_or_default();
    let name = if name.is_empty() { "pontoon".to_owned() } else { name };
    if let Err(error) = std::fs::write("/proc/sys/kernel/hostname", &name) {
        say!("cannot set the host name {name}: {error}");
    }
    let _ = std::fs::write("/etc/hostname", format!("{name}\n"));
    let _ = std::fs::write(
        "/etc/hosts",
        format!("127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost\n"),
    );
    name
}
