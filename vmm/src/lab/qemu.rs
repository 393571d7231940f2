//! The emulator: its command line, its process and the ends of its sockets.
//!
//! Both the boot and each resume get the same devices, or the state would not fit. What may differ are the
//! things behind them: the memory file's sharing, the files of the disks, forwarded ports.
//!
//! No path of a run appears on the command line: sockets and disks are inherited descriptors.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::error::{LabError, emulator};
use super::qmp::Qmp;
use super::{DiskAccess, Forward, MAX_DISKS, sys};

/// The emulator's name on PATH.
const PROGRAM: &str = "qemu-system-x86_64";

/// The outer kernel's command line. Mitigations, tests of crypto code and audit cost time and prove nothing in an emulator;
/// `random.trust_cpu` gives it entropy, `panic=-1` ends it at once.
const KERNEL_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check \
                           init_on_alloc=0 audit=0 apparmor=0 random.trust_cpu=on nmi_watchdog=0 cryptomgr.notests";

/// How long an emulator may take to read the next piece of the state.
const STATE_PATIENCE: Duration = Duration::from_secs(60);

/// How much of the console is kept for messages, in bytes.
const CONSOLE_TAIL: usize = 16 << 10;

/// Where the emulator is installed.
pub(super) fn find() -> Result<PathBuf, LabError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)).find(|file| file.is_file());
    found.ok_or(LabError::QemuMissing)
}

/// What stays the same from the boot to every resume.
#[derive(Debug)]
pub(super) struct Hardware<'a> {
    pub(super) program: &'a Path,
    pub(super) kernel: &'a Path,
    pub(super) initrd: &'a Path,
    /// The file that is the machine's memory.
    pub(super) memory: &'a Path,
    pub(super) memory_mib: u32,
    pub(super) cpus: u8,
}

/// What is behind the devices this time.
#[derive(Debug)]
pub(super) enum Purpose<'a> {
    /// Boot, with memory changes written to the memory file.
    Boot,
    /// Resume from a state, with memory changes kept private.
    Resume { files: &'a File, publish: &'a [Forward], disks: &'a [OpenDisk] },
}

/// A disk of the run's.
#[derive(Debug)]
pub(super) struct OpenDisk {
    /// Open for reading, and once more for writing if it may be written: the emulator takes the one, then the other.
    pub(super) files: Vec<File>,
    pub(super) access: DiskAccess,
}

impl OpenDisk {
    fn end(&self) -> DiskEnd {
        DiskEnd { fds: self.files.iter().map(AsRawFd::as_raw_fd).collect(), access: self.access }
    }
}

/// An emulator under way; killed when dropped.
#[derive(Debug)]
pub(super) struct Machine {
    child: Child,
    /// The other end of the virtio-serial port, non-blocking.
    pub(super) port: UnixStream,
    /// Its serial console and its own messages.
    pub(super) console: Console,
    /// Its monitor, until the state has gone over.
    monitor: Option<UnixStream>,
}

impl Machine {
    /// Starts the emulator.
    pub(super) fn start(hardware: &Hardware<'_>, purpose: &Purpose<'_>) -> Result<Self, LabError> {
        Self::try_start(hardware, purpose).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => LabError::QemuMissing,
            _ => emulator("start qemu-system-x86_64")(error),
        })
    }

    fn try_start(hardware: &Hardware<'_>, purpose: &Purpose<'_>) -> io::Result<Self> {
        let (port, port_theirs) = UnixStream::pair()?;
        let (console, console_theirs) = UnixStream::pair()?;
        let (monitor, monitor_theirs) = UnixStream::pair()?;
        let files = match purpose {
            Purpose::Resume { files, .. } => read_only(files)?,
            // The disk's driver is not loaded yet, so that anything of some size will do.
            Purpose::Boot => {
                let nothing = tempfile::tempfile()?;
                nothing.set_len(1 << 20)?;
                read_only(&nothing)?
            }
        };
        let mut command = Command::new(hardware.program);
        command.args(machine_arguments(hardware, matches!(purpose, Purpose::Boot)));
        let disks: &[OpenDisk] = match purpose {
            Purpose::Boot => &[],
            Purpose::Resume { disks, .. } => disks,
        };
        let ends = Ends {
            port: port_theirs.as_raw_fd(),
            console: console_theirs.as_raw_fd(),
            files: files.as_raw_fd(),
            disks: disks.iter().map(OpenDisk::end).collect(),
        };
        command.args(device_arguments(&ends, purpose));
        let monitor_fd = monitor_theirs.as_raw_fd();
        command.args(["-chardev", &format!("socket,id=monitor,fd={monitor_fd}")]);
        command.args(["-mon", "chardev=monitor,mode=control"]);
        if matches!(purpose, Purpose::Resume { .. }) {
            command.args(["-incoming", "defer"]);
        }
        command.stdin(Stdio::null());
        command.stdout(Stdio::from(std::os::fd::OwnedFd::from(console_theirs.try_clone()?)));
        command.stderr(Stdio::from(std::os::fd::OwnedFd::from(console_theirs.try_clone()?)));
        let inherited = [ends.port, ends.console, ends.files, monitor_fd].into_iter();
        sys::tie(
            &mut command,
            inherited.chain(ends.disks.iter().flat_map(|disk| disk.fds.clone())).collect(),
        );
        let child = command.spawn()?;
        port.set_nonblocking(true)?;
        console.set_nonblocking(true)?;
        let console = Console { socket: console, tail: Vec::new() };
        Ok(Self { child, port, console, monitor: Some(monitor) })
    }

    /// Takes the state of a booted machine; its memory is in the memory file then. The emulator ends.
    pub(super) fn save(mut self) -> Result<Vec<u8>, LabError> {
        let (mut qmp, mut state) = self.migration()?;
        qmp.execute("migrate", &json!({ "uri": "fd:state" }))?;
        let mut bytes = Vec::new();
        state.set_read_timeout(Some(STATE_PATIENCE)).map_err(emulator("prepare the state's socket"))?;
        state.read_to_end(&mut bytes).map_err(emulator("read the machine's state"))?;
        let status = qmp.execute("query-migrate", &json!({}))?;
        if status.get("status").and_then(Value::as_str) != Some("completed") {
            return Err(LabError::Qmp { command: "migrate", answer: status.to_string() });
        }
        qmp.execute("quit", &json!({}))?;
        self.child.wait().map_err(emulator("wait for the emulator's end"))?;
        Ok(bytes)
    }

    /// Gives the state to an emulator that was started for it. The machine goes on by itself.
    pub(super) fn restore(&mut self, state: &[u8]) -> Result<(), LabError> {
        let (mut qmp, mut socket) = self.migration()?;
        qmp.execute("migrate-incoming", &json!({ "uri": "fd:state" }))?;
        socket.set_write_timeout(Some(STATE_PATIENCE)).map_err(emulator("prepare the state's socket"))?;
        socket.write_all(state).map_err(emulator("write the machine's state"))
    }

    /// The monitor and the state's socket, with memory declared as shared: the memory file holds it, and the
    /// state needs none of it.
    fn migration(&mut self) -> Result<(Qmp, UnixStream), LabError> {
        let monitor = self.monitor.take().ok_or(LabError::StateTwice)?;
        let mut qmp = Qmp::new(monitor)?;
        let capability = json!({ "capability": "x-ignore-shared", "state": true });
        qmp.execute("migrate-set-capabilities", &json!({ "capabilities": [capability] }))?;
        // Both ends are ours until the emulator has taken its own.
        let (state, theirs) =
            UnixStream::pair().map_err(emulator("make a socket for the machine's state"))?;
        qmp.give("state", theirs.as_fd())?;
        Ok((qmp, state))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The same file, opened again for reading: the emulator insists on the mode that it asked for.
fn read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The emulator's ends of what is inherited.
#[derive(Debug)]
struct Ends {
    port: RawFd,
    console: RawFd,
    files: RawFd,
    /// At most [`MAX_DISKS`].
    disks: Vec<DiskEnd>,
}

/// The emulator's ends of a disk.
#[derive(Debug)]
struct DiskEnd {
    fds: Vec<RawFd>,
    access: DiskAccess,
}

/// Everything about the emulated machine that a state depends on, as text to be hashed.
pub(super) fn identity(hardware: &Hardware<'_>) -> String {
    let nowhere = Ends { port: 0, console: 0, files: 0, disks: Vec::new() };
    format!("{:?} {:?}", machine_arguments(hardware, true), device_arguments(&nowhere, &Purpose::Boot))
}

/// Without cmpxchg16b: the emulator leaves garbage in the flags behind it (seen with 7.2), which becomes real when a nested guest is left and
/// entered again just there. Linux 6.12, whose allocator lives on it, then dies of a double fault.
fn machine_arguments(hardware: &Hardware<'_>, boot: bool) -> Vec<OsString> {
    let Hardware { kernel, initrd, memory, memory_mib, cpus, .. } = hardware;
    let share = if boot { "on" } else { "off" };
    let mut backend =
        OsString::from(format!("memory-backend-file,id=ram,size={memory_mib}M,share={share},mem-path="));
    backend.push(escape_commas(memory));
    let mut arguments: Vec<OsString> = [
        "-nodefaults -no-user-config -no-reboot -display none -accel tcg,thread=multi,tb-size=512",
        "-M pc,memory-backend=ram -cpu EPYC,+svm,+npt,-cx16",
    ]
    .into_iter()
    .flat_map(str::split_whitespace)
    .map(OsString::from)
    .collect();
    arguments.extend(["-m".into(), format!("{memory_mib}M").into(), "-smp".into(), cpus.to_string().into()]);
    arguments.extend(["-object".into(), backend]);
    arguments.extend(["-kernel".into(), kernel.into(), "-initrd".into(), initrd.into()]);
    arguments.extend(["-append".into(), KERNEL_LINE.into()]);
    arguments
}

fn device_arguments(ends: &Ends, purpose: &Purpose<'_>) -> Vec<String> {
    let Ends { port, console, files, disks } = ends;
    let mut network = "user,id=net,ipv6=off".to_owned();
    if let Purpose::Resume { publish, .. } = purpose {
        for Forward { udp, address, host, lab } in *publish {
            let protocol = if *udp { "udp" } else { "tcp" };
            network.push_str(&format!(",hostfwd={protocol}:{address}:{host}-:{lab}"));
        }
    }
    let devices = [
        ("-chardev", format!("socket,id=console,fd={console}")),
        ("-serial", "chardev:console".to_owned()),
        ("-chardev", format!("socket,id=port,fd={port}")),
        ("-device", "virtio-serial-pci,max_ports=2".to_owned()),
        ("-device", "virtserialport,chardev=port,nr=1,name=lab".to_owned()),
        ("-add-fd", format!("fd={files},set=1")),
        ("-drive", "if=none,id=files,file=/dev/fdset/1,format=raw,readonly=on".to_owned()),
        ("-device", "virtio-blk-pci,drive=files".to_owned()),
        ("-netdev", network),
        ("-device", "virtio-net-pci,netdev=net,romfile=".to_owned()),
    ];
    let words = devices.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
    words.chain((0..MAX_DISKS).flat_map(|slot| disk_arguments(slot, disks.get(slot)))).collect()
}

/// One slot for a disk. Every machine has all of them, or the state would not fit; one that is not used has no sectors. Their driver is
/// loaded after the resume, and asks then.
fn disk_arguments(slot: usize, disk: Option<&DiskEnd>) -> Vec<String> {
    let mut words = Vec::new();
    let backend = match disk {
        None => "driver=null-co,size=0".to_owned(),
        Some(DiskEnd { fds, access }) => {
            // Set 1 is that of the run's files.
            let set = slot + 2;
            words.extend(fds.iter().flat_map(|fd| ["-add-fd".to_owned(), format!("fd={fd},set={set}")]));
            let access = match access {
                DiskAccess::ReadOnly => "readonly=on",
                DiskAccess::Private => "snapshot=on",
                DiskAccess::ReadWrite => "discard=unmap",
            };
            format!("file=/dev/fdset/{set},format=raw,{access}")
        }
    };
    words.extend(["-drive".to_owned(), format!("if=none,id=disk{slot},{backend}")]);
    words.extend(["-device".to_owned(), format!("virtio-blk-pci,drive=disk{slot}")]);
    words
}

/// QEMU's option syntax: a comma in a value is written twice.
pub(super) fn escape_commas(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut escaped = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        escaped.push(*byte);
        if *byte == b',' {
            escaped.push(b',');
        }
    }
    OsString::from_vec(escaped)
}

/// The machine's serial console, of which the end is remembered.
#[derive(Debug)]
pub(super) struct Console {
    socket: UnixStream,
    tail: Vec<u8>,
}

impl Console {
    /// Takes what there is; false when the emulator has closed it.
    pub(super) fn drain(&mut self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => return false,
                Ok(length) => {
                    self.tail.extend_from_slice(buffer.get(..length).unwrap_or_default());
                    let surplus = self.tail.len().saturating_sub(CONSOLE_TAIL);
                    self.tail.drain(..surplus);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    /// The last lines, for a message.
    pub(super) fn tail(&mut self) -> String {
        self.drain();
        let text = String::from_utf8_lossy(&self.tail);
        // Every start brings a dozen of these: the emulated EPYC lacks what nobody here needs.
        let telling = |line: &&str| !line.is_empty() && !line.contains("warning: TCG doesn't support");
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(telling).collect();
        let start = lines.len().saturating_sub(15);
        let lines = lines.get(start..).unwrap_or_default();
        if lines.is_empty() { "  (nothing)".to_owned() } else { format!("  {}", lines.join("\n  ")) }
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
