//! The description of a machine, and a machine built from it that has not started yet.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::thread;

use devices::disk::Disk;
use devices::serial::{Hold, Sink};
use devices::virtio::VirtioDevice;
use event_manager::MutEventSubscriber;
use kvm_ioctls::VcpuFd;
use net::pcap::{PcapPort, SNAPLEN_ALL};
use net::{FramePort, MacAddr};

use super::devices::Devices;
use super::error::{BuildError, StartError};
use super::events::{VcpuThreads, Worker, new_loop};
use super::exit::{End, EndOnPanic, ExitReason, reason};
use super::hardware::Hardware;
use super::running::{Remote, Running, RunningHere};
use crate::acpi;
use crate::agent::Client;
use crate::boot::{self, BootSource, Kernel, KernelFormat};
use crate::console::SerialInput;
use crate::cpuid;
use crate::folder::PrivateFolder;
use crate::kvm::{Host, KvmKind, Vm};
use crate::layout::{MAX_VIRTIO_DEVICES, VIRTIO_MMIO_SIZE, virtio_gsi, virtio_mmio_base};
use crate::memory::{self, GuestMemory};
use crate::vcpu;

/// RAM of a machine that does not say: 512 MiB.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Command line of a machine that does not say: console on the serial port, a panic ends the machine, and the kernel does not spend
/// half of its start on testing its own ciphers (docs/decisions/0007).
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 cryptomgr.notests";

/// A network interface of a machine. [`vmm::network::Network`](crate::network::Network) makes those that are behind a NAT.
///
/// ```
/// use vmm::machine::{Machine, Nic};
/// use vmm::net::MacAddr;
/// use vmm::net::switch::Switch;
///
/// // Whatever is a FramePort will do; here a wire between two machines.
/// let wire = Switch::new();
/// let mac = MacAddr::for_name("wire", "vm1");
/// let nic = Nic::new(mac, wire.plug(Some(mac))?);
/// assert!(nic.mac.to_string().starts_with("52:54:00:"));
/// let builder = Machine::builder().nic(nic);
/// # Ok::<(), vmm::net::switch::PlugError>(())
/// ```
pub struct Nic {
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// What it is plugged into.
    pub port: Box<dyn FramePort>,
}

impl Nic {
    /// An interface with this address, plugged into `port`.
    ///
    /// ```no_run
    /// use net::MacAddr;
    /// use net::tap::{TapName, TapPort};
    /// use vmm::machine::{Machine, Nic};
    ///
    /// // On the LAN, behind a bridge (docs/bridge.md), and with a capture of what passes.
    /// let tap = TapPort::open(&TapName::default(), Some("br0"))?;
    /// let nic = Nic::new(MacAddr::for_name("br0", "vm1"), tap).capture("vm1.pcap")?;
    /// let machine = Machine::builder().kernel("vmlinuz").initrd("initrd").nic(nic).build()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(mac: MacAddr, port: impl FramePort + 'static) -> Self {
        Self { mac, port: Box::new(port) }
    }

    /// Writes what passes to a capture file, whole frames, for Wireshark and tcpdump.
    ///
    /// # Errors
    /// When the file can't be created.
    pub fn capture(self, path: impl AsRef<Path>) -> io::Result<Self> {
        let port = PcapPort::create(self.port, path.as_ref(), SNAPLEN_ALL)?;
        Ok(Self::new(self.mac, port))
    }
}

/// Makes a worker, once the machine is built that it is to serve.
type MakeWorker = Box<dyn FnOnce(Remote) -> Worker + Send>;

/// Describes a machine. Every method replaces what was said before, unless it says that it adds.
///
/// ```no_run
/// use std::io::{Read, Write};
///
/// use devices::disk::{Disk, DiskMode};
/// use net::nat::NatConfig;
/// use vmm::machine::{Guest, Machine};
/// use vmm::network::Network;
///
/// let network = Network::nat(NatConfig::on_free_subnet()?)?;
/// let (builder, mut console) = Machine::builder()
///     .guest(Guest::linux("vmlinuz").initrd("initrd.img").words("root=/dev/vda1"))?
///     .cpus(2)
///     .memory(1 << 30)
///     .disk(Disk::open("base.img", DiskMode::Overlay)?)
///     .nic(network.nic("vm1")?)
///     .console()?;
/// let machine = builder.build()?.start()?;
/// console.write_all(b"root\n")?;
/// let mut said = String::new();
/// console.read_to_string(&mut said)?; // until the machine ends
/// println!("{said}\n{}", machine.wait());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MachineBuilder {
    cpus: u8,
    memory: u64,
    kernel: Option<Kernel>,
    initrd: Option<Kernel>,
    cmdline: String,
    bare_metal: bool,
    devices: Devices,
    workers: Vec<MakeWorker>,
    serial_output: Sink,
    serial_input: Option<OwnedFd>,
    escape: bool,
    hold: Option<Hold>,
}

impl MachineBuilder {
    fn new() -> Self {
        Self {
            cpus: 1,
            memory: DEFAULT_MEMORY,
            kernel: None,
            initrd: None,
            cmdline: DEFAULT_CMDLINE.into(),
            bare_metal: false,
            devices: Devices { entropy: true, ..Devices::default() },
            workers: Vec::new(),
            serial_output: Sink::Nowhere,
            serial_input: None,
            escape: false,
            hold: None,
        }
    }

    /// How many vCPUs: 1 to what KVM allows, at most 254. One unless said otherwise.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// RAM in bytes, a multiple of 4096 between 4 MiB and 256 GiB. [`DEFAULT_MEMORY`] unless said otherwise.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// The kernel: a bzImage or a static ELF.
    #[must_use]
    pub fn kernel(mut self, kernel: impl Into<Kernel>) -> Self {
        self.kernel = Some(kernel.into());
        self
    }

    /// The initial RAM disk.
    #[must_use]
    pub fn initrd(mut self, initrd: impl Into<Kernel>) -> Self {
        self.initrd = Some(initrd.into());
        self
    }

    /// The kernel's command line. [`DEFAULT_CMDLINE`] unless said otherwise.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// The guest reads no ACPI tables: tell it of the virtio devices on its command line, in Linux's syntax
    /// (`virtio_mmio.device=4K@0xd0000000:16`).
    #[must_use]
    pub fn bare_metal(mut self, bare_metal: bool) -> Self {
        self.bare_metal = bare_metal;
        self
    }

    /// Adds a network interface.
    #[must_use]
    pub fn nic(mut self, nic: Nic) -> Self {
        self.devices.nics.push(nic);
        self
    }

    /// Adds a disk: the guest's `/dev/vda`, then `/dev/vdb`, …, in the order in which they are added. See [`devices::disk`].
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.devices.disks.push(disk);
        self
    }

    /// A virtio-vsock device (guest CID [`devices::virtio::vsock::GUEST_CID`]) that listens on the Unix socket `path`: see [`devices::virtio::vsock`] for what
    /// clients say there, and where the guest's own connections go. The file has mode 0600 and goes with the machine.
    #[must_use]
    pub fn vsock(mut self, path: impl Into<PathBuf>) -> Self {
        self.devices.vsock = Some(path.into());
        self.devices.vsock_folder = None;
        self
    }

    /// A virtio-vsock device, and a client of the agent behind it, for a program that runs commands in its machine and has no place for
    /// a socket in mind: see [`crate::agent`]. The socket is in a folder of its own in [`std::env::temp_dir`], mode 0700, which goes
    /// with the last of the client's clones; a killed program's goes when the next one makes its own.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use vmm::agent::Command;
    /// use vmm::machine::Machine;
    ///
    /// # let image = guest_images::Store::open_default()?.get("debian")?;
    /// let (builder, agent) = Machine::builder().guest(&image)?.agent()?;
    /// let machine = builder.build()?.start()?;
    /// agent.wait_until_ready(Duration::from_secs(60))?;
    /// let output = agent.output(Command::new("uname").arg("-a"), 1 << 20)?;
    /// println!("{}: {}", output.status.code(), String::from_utf8_lossy(&output.stdout));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn agent(self) -> io::Result<(Self, Client)> {
        let folder = Arc::new(PrivateFolder::new()?);
        let socket = folder.socket();
        let client = Client::vsock(&socket).keeping(Arc::clone(&folder));
        let mut builder = self.vsock(socket);
        builder.devices.vsock_folder = Some(folder);
        Ok((builder, client))
    }

    /// Whether the machine has a memory balloon with free page reporting, by which memory that the guest has freed goes back to the
    /// host: see [`devices::virtio::balloon`]. It has none, unless said otherwise.
    #[must_use]
    pub fn balloon(mut self, balloon: bool) -> Self {
        self.devices.balloon = balloon;
        self
    }

    /// Whether the machine has a virtio entropy device. It has, unless said otherwise.
    #[must_use]
    pub fn entropy(mut self, entropy: bool) -> Self {
        self.devices.entropy = entropy;
        self
    }

    /// Adds a virtio device: the half for the transport, and the half for the I/O thread. Devices are numbered in the
    /// order: network interfaces, disks, vsock, these, balloon, entropy.
    #[must_use]
    pub fn virtio(
        mut self,
        device: Box<dyn VirtioDevice>,
        worker: Box<dyn MutEventSubscriber + Send>,
    ) -> Self {
        self.devices.others.push((device, worker));
        self
    }

    /// Adds something that is to be served on the machine's I/O thread, from its start to its end: `make` gets the door to
    /// the machine. It must never block, and do little per turn: the devices wait for it.
    #[must_use]
    pub fn worker(
        mut self,
        make: impl FnOnce(Remote) -> Box<dyn MutEventSubscriber + Send> + Send + 'static,
    ) -> Self {
        self.workers.push(Box::new(make));
        self
    }

    /// Where the guest's serial output goes. Nowhere unless said otherwise. A sink that blocks never blocks the guest for
    /// long, since it has a thread of its own: see [`devices::serial`].
    #[must_use]
    pub fn serial_output(mut self, sink: impl Write + Send + 'static) -> Self {
        self.serial_output = Sink::Blocking(Box::new(sink));
        self
    }

    /// Where the guest's serial output goes, as a descriptor: a terminal, a pipe and a socket need no thread then.
    #[must_use]
    pub fn serial_output_to(mut self, fd: OwnedFd) -> Self {
        self.serial_output = Sink::of(fd);
        self
    }

    /// Where the guest's serial input comes from: a terminal, a pipe, a socket, a file. Its end is not the machine's.
    #[must_use]
    pub fn serial_input(mut self, source: OwnedFd) -> Self {
        self.serial_input = Some(source);
        self
    }

    /// The console as a stream: what the guest writes to COM1 is read from it, what is written to it the guest reads. A
    /// reader that falls behind never blocks the guest for long: see [`devices::serial`].
    ///
    /// # Errors
    /// When the process may have no more descriptors.
    pub fn console(self) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let output = ours.try_clone()?;
        Ok((self.serial_output_to(output.into()).serial_input(ours.into()), theirs))
    }

    /// Holds serial input back until the guest is ready for it, so that bytes from a pipe are not lost to a driver that
    /// starts, nor echoed by a terminal that nobody has set up. Not unless said so; not for a guest that polls. `None`: not at all.
    #[must_use]
    pub fn hold_input(mut self, until: impl Into<Option<Hold>>) -> Self {
        self.hold = until.into();
        self
    }

    /// Whether the escape of [`crate::console`] in the serial input stops the machine. Not unless said so.
    #[must_use]
    pub fn console_escape(mut self, escape: bool) -> Self {
        self.escape = escape;
        self
    }

    /// Makes the machine: memory, devices, the kernel in its place, vCPUs. No guest instruction has run yet. A bzImage on a KVM that
    /// can't run it ([`KvmKind::Software`]) is told to `tracing`.
    ///
    /// # Errors
    /// [`BuildError`], one variant per concern.
    pub fn build(self) -> Result<Machine, BuildError> {
        let kernel = self.kernel.as_ref().ok_or(BuildError::NoKernel)?;
        let virtio_devices = self.devices.count();
        if virtio_devices > MAX_VIRTIO_DEVICES {
            return Err(BuildError::TooManyDevices { asked: virtio_devices, max: MAX_VIRTIO_DEVICES });
        }
        let cmdline = if self.bare_metal { announce(&self.cmdline, virtio_devices) } else { self.cmdline };
        let memory = memory::allocate(self.memory)?;
        let vm = Vm::new(memory.clone(), self.cpus)?;
        let source = BootSource { kernel, initrd: self.initrd.as_ref(), cmdline: &cmdline };
        let (entry, format) = boot::load(&memory, &source)?;
        if format == KernelFormat::BzImage && self.memory < memory::LINUX_FLOOR {
            let mib = self.memory >> 20;
            tracing::warn!(mib, "a distribution's kernel needs about 128 MiB of memory to reach its init");
        }
        acpi::write(&memory, acpi::Hardware { cpus: self.cpus, virtio_devices })?;
        let end = End::new().map_err(|source| BuildError::Device { what: "end signal", source })?;
        let (mut hardware, sink) = Hardware::new(&vm, self.serial_output)?;
        let mut workers = self.devices.attach(&vm, &mut hardware)?;
        workers.extend(sink.map(|sink| Box::new(sink) as Worker));
        let hardware = Arc::new(hardware);
        let end = Arc::new(end);
        if let Some(source) = self.serial_input {
            let quit = Box::new({
                let end = Arc::clone(&end);
                move || end.now(ExitReason::Stopped)
            });
            let serial = Arc::clone(&hardware.serial);
            if let Some(hold) = self.hold {
                serial.lock().unwrap_or_else(PoisonError::into_inner).hold_input(hold);
            }
            workers.push(Box::new(SerialInput::new(source, serial, self.escape, quit)));
        }
        let remote = Remote::new(&end, &hardware);
        workers.extend(self.workers.into_iter().map(|make| make(remote.clone())));
        let supported = cpuid::supported(vm.kvm())?;
        let vcpus = (0..self.cpus)
            .map(|id| vcpu::create(&vm, &supported, id, self.cpus, (id == 0).then_some(entry)))
            .collect::<Result<_, _>>()?;
        // Last, so that whatever is wrong with the machine is told alone.
        if format == KernelFormat::BzImage && matches!(Host::kind(), KvmKind::Software(_)) {
            tracing::warn!(
                "this host's KVM has no hardware behind it, and a Linux kernel comes to nothing on it: run this in the lab (vmm::lab, docs/lab.md)"
            );
        }
        Ok(Machine { vcpus, hardware, workers, end, memory, vm, format })
    }
}

/// A machine that has not started. Whatever was wrong with its description has been told by then.
///
/// ```no_run
/// use vmm::boot::KernelFormat;
/// use vmm::machine::Machine;
///
/// let machine = Machine::builder().kernel("vmlinuz").initrd("initrd.img").build()?;
/// assert_eq!(machine.kernel_format(), KernelFormat::BzImage);
/// let running = machine.start()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Machine {
    vcpus: Vec<VcpuFd>,
    hardware: Arc<Hardware>,
    workers: Vec<Worker>,
    end: Arc<End>,
    memory: GuestMemory,
    vm: Vm,
    format: KernelFormat,
}

impl Machine {
    /// Begins a description: one vCPU, 512 MiB, no kernel, no network, a console that goes nowhere.
    pub fn builder() -> MachineBuilder {
        MachineBuilder::new()
    }

    /// What kind of kernel it has.
    pub fn kernel_format(&self) -> KernelFormat {
        self.format
    }

    /// Its RAM; the memfd behind it can be shared with another process.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Starts the threads: the guest runs.
    ///
    /// # Errors
    /// [`StartError`]; no thread is left then.
    pub fn start(self) -> Result<Running, StartError> {
        let here = self.start_here()?;
        let (end, hardware) = (Arc::clone(&here.end), Arc::clone(&here.hardware));
        let io = spawn("io".into(), move || drop(here.wait()))?;
        Ok(Running { end, io: Some(io), hardware })
    }

    /// Starts the vCPUs alone. The devices wait until the calling thread serves them in [`RunningHere::wait`], so that there
    /// is one thread less.
    ///
    /// # Errors
    /// [`StartError`]; no thread is left then.
    pub fn start_here(self) -> Result<RunningHere, StartError> {
        let Self { vcpus, hardware, workers, end, memory, vm, .. } = self;
        vcpu::install_kick_handler().map_err(StartError::KickSignal)?;
        let events = new_loop(&end, workers)?;
        let mut threads = VcpuThreads::new(Arc::clone(&end), vcpus.len());
        for (id, fd) in (0u8..).zip(vcpus) {
            let (hardware, memory, end) = (Arc::clone(&hardware), memory.clone(), Arc::clone(&end));
            threads.push(spawn(format!("vcpu{id}"), move || {
                let _guard = EndOnPanic(&end, "vcpu");
                let ending = vcpu::run(id, fd, &hardware.buses, &memory, end.flag());
                if let Some(reason) = reason(ending) {
                    end.now(reason);
                }
            })?);
        }
        Ok(RunningHere { threads, events, end, hardware, _vm: vm })
    }
}

fn spawn<F: FnOnce() + Send + 'static>(name: String, body: F) -> Result<thread::JoinHandle<()>, StartError> {
    thread::Builder::new()
        .name(name.clone())
        .spawn(body)
        .map_err(|source| StartError::Thread { name, source })
}

/// The command line with one `virtio_mmio.device=` per device.
fn announce(cmdline: &str, devices: usize) -> String {
    let mut line = cmdline.to_owned();
    for index in 0..devices {
        let (size, base, gsi) = (VIRTIO_MMIO_SIZE >> 10, virtio_mmio_base(index), virtio_gsi(index));
        let blank = if line.is_empty() { "" } else { " " };
        write!(line, "{blank}virtio_mmio.device={size}K@{base:#x}:{gsi}").expect("a String takes everything");
    }
    line
}
