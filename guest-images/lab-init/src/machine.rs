//! Everything that is the same for every run, done once before the snapshot.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use std::{io, mem};

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::{Context, Error, archive, sys};

/// A kernel module and the parameters that it is loaded with.
pub(crate) struct Module {
    path: PathBuf,
    parameters: CString,
}

/// Builds the root file system, enters it, loads the early modules and returns the late ones.
pub(crate) fn prepare() -> Result<Vec<Module>, Error> {
    let early = read_modules(Path::new("/early"))?;
    let late = read_modules(Path::new("/late"))?;
    enter_root()?;
    install_busybox()?;
    rustix::system::sethostname(b"lab").context(|| "set the host name".into())?;
    sys::set_up("lo").context(|| "bring up lo".into())?;
    load(&early)?;
    for device in ["/dev/kvm", "/dev/net/tun", "/dev/vhost-vsock", "/dev/vsock"] {
        if Path::new(device).exists() {
            fs::set_permissions(device, Permissions::from_mode(0o666))
                .context(|| format!("open {device} to everybody"))?;
        }
    }
    keep_kvm_in_use()?;
    Ok(late)
}

/// Makes a virtual machine that is never run and never goes away.
///
/// With the first machine that appears and the last one that goes, Linux patches its scheduler (the static key of preemption
/// notifiers), and with each LAPIC that is enabled it may patch KVM. QEMU 7.2 translates code without holding its page: a
/// CPU that reads such an instruction while another one patches it may keep the `int3` of the patch for ever, and the whole
/// lab stands still (`docs/lab.md`). While this machine is there, nothing of that is patched.
fn keep_kvm_in_use() -> Result<(), Error> {
    let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => kvm,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(|| "open /dev/kvm".into()),
    };
    let descriptors = sys::idle_machine(&kvm).context(|| "make a virtual machine that stays".into())?;
    // PID 1 has them until the machine ends.
    mem::forget(descriptors);
    Ok(())
}

/// Loads modules in their order.
pub(crate) fn load(modules: &[Module]) -> Result<(), Error> {
    for Module { path, parameters } in modules {
        let file = File::open(path).context(|| format!("open {}", path.display()))?;
        rustix::system::finit_module(&file, parameters, 0).context(|| format!("load {}", path.display()))?;
    }
    Ok(())
}

/// Lets everybody use the disks that this run was given: whoever started it may. The slots that it does not use have no sectors.
pub(crate) fn open_disks() -> Result<(), Error> {
    for disk in ["vdb", "vdc", "vdd", "vde"] {
        let sectors = Path::new("/sys/block").join(disk).join("size");
        if fs::read_to_string(sectors).is_ok_and(|sectors| sectors.trim() != "0") {
            let device = Path::new("/dev").join(disk);
            fs::set_permissions(&device, Permissions::from_mode(0o666))
                .context(|| format!("open {} to everybody", device.display()))?;
        }
    }
    Ok(())
}

/// Sets the wall clock to nanoseconds since 1970.
pub(crate) fn set_clock(now: u64) -> Result<(), Error> {
    let seconds = i64::try_from(now / 1_000_000_000)?;
    let time = Timespec { tv_sec: seconds, tv_nsec: i64::try_from(now % 1_000_000_000)? };
    clock_settime(ClockId::Realtime, time).context(|| format!("set the clock to {seconds} s"))
}

/// Waits for a path that the kernel makes when a driver has probed.
pub(crate) fn wait_for(path: &Path) -> Result<(), Error> {
    let start = Instant::now();
    while !path.exists() {
        if start.elapsed() > Duration::from_secs(30) {
            return Err(format!("{} did not appear within 30 s", path.display()).into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Unpacks `/root.archive` into a tmpfs and makes that the root. A tmpfs, since programs that are tested
/// here may call pivot_root, which the kernel refuses on an initramfs.
fn enter_root() -> Result<(), Error> {
    let root = Path::new("/new");
    make_directory(root)?;
    mount("lab", root, "tmpfs", MountFlags::empty(), Some(c"size=80%,mode=755"))
        .context(|| "mount the root's tmpfs".into())?;
    let mut packed = File::open("/root.archive").context(|| "open /root.archive".into())?;
    archive::unpack(&mut packed, root)?;
    drop(packed);
    fs::remove_file("/root.archive").context(|| "remove /root.archive".into())?;
    for (name, kind, options) in [
        ("proc", "proc", None),
        ("sys", "sysfs", None),
        ("dev", "devtmpfs", None),
        ("dev/pts", "devpts", Some(c"ptmxmode=666,mode=620")),
        ("dev/shm", "tmpfs", Some(c"mode=1777")),
        ("sys/fs/cgroup", "cgroup2", None),
    ] {
        let target = root.join(name);
        make_directory(&target)?;
        mount(kind, &target, kind, MountFlags::NOSUID, options)
            .context(|| format!("mount {kind} on {}", target.display()))?;
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let link = root.join("dev").join(link);
        std::os::unix::fs::symlink(target, &link).context(|| format!("make {}", link.display()))?;
    }
    std::env::set_current_dir(root).context(|| "enter the new root".into())?;
    mount_move(".", "/").context(|| "move the new root".into())?;
    rustix::process::chroot(".").context(|| "chroot into the new root".into())?;
    std::env::set_current_dir("/").context(|| "enter /".into())
}

/// Makes a link for every applet whose name nothing else has taken.
fn install_busybox() -> Result<(), Error> {
    let output = Command::new("/bin/busybox").args(["--install", "-s"]).output();
    // It complains about names that are taken, which is as it should be.
    output.map(drop).context(|| "run busybox --install".into())
}

fn make_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).context(|| format!("make {}", path.display()))
}

/// A list of modules: a path and, after a space, parameters, one module a line.
fn read_modules(list: &Path) -> Result<Vec<Module>, Error> {
    let text = fs::read_to_string(list).context(|| format!("read {}", list.display()))?;
    let module = |line: &str| {
        let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
        Ok(Module { path: path.into(), parameters: CString::new(parameters)? })
    };
    text.lines().map(module).collect()
}
