//! What the user may type: the clap definitions, and the small values that have a syntax of their own.
//!
//! Values are parsed here, once, into types that cannot be wrong; everything behind works with those.

use std::fmt;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};
use devices::disk::DiskMode;
use net::MacAddr;
use net::nat::{Publish, Subnet};
use net::tap::TapName;
use vmm::memory::{MAX_MEMORY, MIN_MEMORY};
use vmm::runtime::MachineName;

use super::agent_args::{CpArgs, ExecArgs};
use super::machine_args::{
    ConsoleArgs, KillArgs, LogsArgs, NcArgs, NetInspectArgs, NetLsArgs, PsArgs, StopArgs,
};

/// Lightweight virtual machines that are on the network the moment they boot.
#[derive(Debug, Parser)]
#[command(name = "pontoon", version, max_term_width = 100, arg_required_else_help = true)]
#[command(
    after_help = "Start with `pontoon check`, then `pontoon image build debian` and `pontoon run debian`."
)]
pub(crate) struct Cli {
    /// Say what the machine and its network do; twice: every frame that is refused
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub(crate) verbose: u8,

    /// Log filter in the style of RUST_LOG, such as `net=debug,vmm=info`
    #[arg(long, value_name = "FILTER", global = true)]
    pub(crate) log: Option<String>,

    // Said by `run --detach` to itself: this is the process that becomes the machine.
    #[arg(long, hide = true)]
    pub(crate) detached: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot the built-in probe guest and prove KVM, DHCP, DNS, ping, TCP and UDP on this host
    Check(CheckArgs),
    /// Boot a machine; its console is this terminal and its exit status is this command's
    Run(Box<RunArgs>),
    /// List the machines that run
    Ps(PsArgs),
    /// Let guests shut down, and end those machines that don't within a time
    Stop(StopArgs),
    /// End machines at once, as if their plugs were pulled
    Kill(KillArgs),
    /// Print what a detached machine wrote to its console
    Logs(LogsArgs),
    /// Attach this terminal to a detached machine's console; ctrl-A d leaves it
    Console(ConsoleArgs),
    /// Connect standard input and output to a TCP port of a guest behind its NAT: ssh -o ProxyCommand='pontoon nc %h %p'
    Nc(NcArgs),
    /// Run a command in a machine; its exit status becomes this command's
    Exec(ExecArgs),
    /// Copy files and folders into a machine or out of it
    Cp(CpArgs),
    /// Build and list guest images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Networks: of the machines that run, and the NAT without a machine
    #[command(subcommand)]
    Net(NetCommand),
    /// Run a command on an emulated host with hardware virtualization (needs only QEMU)
    Lab(LabArgs),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff
    Man,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// An image of `pontoon image ls`, or `probe` for the built-in bare-metal guest
    #[arg(value_name = "IMAGE")]
    pub(crate) image: Option<String>,

    /// The command to run in the guest instead of a shell; its exit status becomes this command's
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,

    /// A kernel of your own: a bzImage (vmlinuz) or an ELF vmlinux
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "image", required_unless_present = "image")]
    pub(crate) kernel: Option<PathBuf>,

    /// The initial RAM disk to boot with (replaces the image's)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) initrd: Option<PathBuf>,

    /// Words to append to the kernel command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,

    /// The machine's name: its host name, and what its MAC address is made from [default: vm1, or the next one that is free]
    #[arg(long)]
    pub(crate) name: Option<MachineName>,

    /// Print the machine's name as soon as it runs and leave it running; see `pontoon ps`, `logs`, `stop`
    #[arg(short, long)]
    pub(crate) detach: bool,

    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) cpus: u8,

    /// CPU time at most, in CPUs, such as 0.5 or 2; by a cgroup, where that is permitted
    #[arg(long, value_name = "CPUS")]
    pub(crate) cpu_limit: Option<CpuLimit>,

    /// Share of the CPU time where it is short, 1 to 10000; 100 is everybody's
    #[arg(long, value_name = "WEIGHT", value_parser = clap::value_parser!(u16).range(1..=10000))]
    pub(crate) cpu_share: Option<u16>,

    /// Memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = machine_memory)]
    pub(crate) memory: MemorySize,

    /// A disk, raw image or block device: the guest's /dev/vda, the next one /dev/vdb. With ,ro the guest only reads; with ,overlay what
    /// it writes is kept apart from the image and goes with the machine
    #[arg(long, value_name = "FILE[,ro][,overlay]", value_hint = ValueHint::FilePath)]
    pub(crate) disk: Vec<DiskSpec>,

    /// The network: nat (own subnet, DHCP, DNS, no root), tap:BRIDGE (on the LAN, needs root) or none
    #[arg(long, value_name = "NET", default_value = "nat")]
    pub(crate) net: NetSpec,

    /// The NIC's MAC address [default: 52:54:00:… made from the name]
    #[arg(long, value_name = "MAC")]
    pub(crate) mac: Option<MacAddr>,

    /// Publish a guest port on this host: [ADDR:]HOSTPORT:GUESTPORT[/udp], on 127.0.0.1 unless ADDR says otherwise
    #[arg(short = 'p', long = "publish", value_name = "PORT")]
    pub(crate) publish: Vec<Publish>,

    /// Let the guest reach this host's 127.0.0.1 at the gateway's address
    #[arg(long)]
    pub(crate) host_access: bool,

    /// The NAT's subnet [default: 192.168.122.0/24, or the next one that this host does not route]
    #[arg(long, value_name = "CIDR")]
    pub(crate) subnet: Option<Subnet>,

    /// Forward DNS questions to this server instead of the host's resolver
    #[arg(long, value_name = "ADDR")]
    pub(crate) dns: Vec<DnsServer>,

    /// Write what crosses the NIC to a pcap file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) pcap: Option<PathBuf>,

    /// Give the guest virtio-vsock (CID 3), reached through this Unix socket; see docs/vsock.md
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) vsock: Option<PathBuf>,

    /// Write the console to a file instead of the terminal
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) console: Option<PathBuf>,

    /// Where to run: on this host's KVM, or in the lab (emulated) where KVM has no hardware behind it
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub(crate) accel: Accel,

    /// End the machine after so many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) timeout: Option<u32>,

    // Said by `run` to itself in the lab: the initrd is of an image of ours, whose init says when it is ready for input.
    #[arg(long, hide = true)]
    pub(crate) our_init: bool,

    /// Print, after the guest's console, one line of JSON: exit status, network, MAC address, subnet; with --detach, when it runs
    #[arg(long)]
    pub(crate) json: bool,
}

impl RunArgs {
    /// The machine's name, once it has one.
    pub(crate) fn host_name(&self) -> &str {
        self.name.as_ref().map_or("vm1", MachineName::as_str)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make an image from Debian packages, without root
    Build(ImageBuildArgs),
    /// List the images that are ready to run
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ImageBuildArgs {
    /// The image: debian, or debian-rootfs (which is debian --rootfs)
    pub(crate) image: String,

    /// The Debian release: bookworm or trixie [default: this host's]
    #[arg(long)]
    pub(crate) suite: Option<String>,

    /// Ask the archive for newer packages even if the image is whole
    #[arg(long)]
    pub(crate) refresh: bool,

    /// Print one JSON object when done
    #[arg(long)]
    pub(crate) json: bool,

    /// A whole Debian on a disk of its own: systemd, ssh, apt (needs mmdebstrap)
    #[arg(long)]
    pub(crate) rootfs: bool,

    #[command(flatten)]
    pub(crate) disk: RootfsArgs,
}

/// What only an image with a disk has; each flag is refused without `--rootfs`.
#[derive(Debug, Args)]
#[group(id = "of_rootfs", multiple = true)]
pub(crate) struct RootfsArgs {
    /// With --rootfs: the image's name in the store [default: debian-rootfs]
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) name: Option<String>,

    /// With --rootfs: the kernel, the suite's own or the one of its backports (6.12 for bookworm), or both
    #[arg(long = "kernel", value_enum, value_name = "KERNEL")]
    pub(crate) kernel: Option<KernelChoice>,

    /// With --rootfs: the disk's size, such as 2G (the default) or 20G; the file is sparse
    #[arg(long = "size", value_name = "SIZE")]
    pub(crate) size: Option<MemorySize>,

    /// With --rootfs: a public key that logs in as root [default: ~/.ssh/id_*.pub, or a pair made for it]
    #[arg(long = "ssh-key", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ssh_key: Vec<PathBuf>,

    /// With --rootfs: a Debian package more
    #[arg(long = "package", value_name = "PACKAGE")]
    pub(crate) package: Vec<String>,
}

/// Which kernel an image with a disk boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KernelChoice {
    /// The suite's own
    Suite,
    /// The one of the suite's backports
    Backports,
    /// Both; the newer one boots, the other is in the image's /boot
    Both,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// List the networks that machines are on
    Ls(NetLsArgs),
    /// Show a machine's interface, lease, counters and connections
    Inspect(NetInspectArgs),
    /// Serve the NAT network on a TAP, for a container or a network namespace
    #[command(
        after_help = "Ends with SIGINT or SIGTERM, or when the TAP is gone. Recipes are in docs/attach.md."
    )]
    Attach(AttachArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The TAP as an open descriptor, such as 3; with or without IFF_VNET_HDR
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["tap", "pid"], required_unless_present = "tap")]
    pub(crate) tap_fd: Option<i32>,

    /// The TAP by name; made if it does not exist (takes CAP_NET_ADMIN in its namespace)
    #[arg(long, value_name = "NAME")]
    pub(crate) tap: Option<TapName>,

    /// The process in whose network namespace the TAP is
    #[arg(long, value_name = "PID", requires = "tap")]
    pub(crate) pid: Option<u32>,

    /// Largest IP packet towards the guest, 576 to 65520; DHCP tells it (option 26)
    #[arg(long, value_name = "BYTES", default_value_t = 1500)]
    pub(crate) mtu: u16,

    /// Publish a guest port on this host: [ADDR:]HOSTPORT:GUESTPORT[/udp], on 127.0.0.1 unless ADDR says otherwise
    #[arg(short = 'p', long = "publish", value_name = "PORT")]
    pub(crate) publish: Vec<Publish>,

    /// Let the guest reach this host's 127.0.0.1 at the gateway's address
    #[arg(long)]
    pub(crate) host_access: bool,

    /// The network's subnet [default: 192.168.122.0/24, or the next one that this host does not route]
    #[arg(long, value_name = "CIDR")]
    pub(crate) subnet: Option<Subnet>,

    /// Forward DNS questions to this server instead of the host's resolver
    #[arg(long, value_name = "ADDR")]
    pub(crate) dns: Vec<DnsServer>,

    /// Print one line of JSON when the network is up, and one with the counters at its end
    #[arg(long)]
    pub(crate) json: bool,

    /// Send the TAP's descriptor through standard input and end
    #[arg(long, hide = true, requires = "tap")]
    pub(crate) hand_over: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// Carry a file or folder into the lab, into /lab or to DEST
    #[arg(long, value_name = "SRC[:DEST]")]
    pub(crate) put: Vec<String>,

    /// Carry a file or folder out when the command has ended
    #[arg(long, value_name = "THERE:HERE")]
    pub(crate) get: Vec<String>,

    /// Let a port of this host lead into the lab: [ADDR:]HOSTPORT:LABPORT[/udp], on 127.0.0.1 unless ADDR says otherwise
    #[arg(short = 'p', long = "publish", value_name = "PORT")]
    pub(crate) publish: Vec<Publish>,

    /// A file of this host as a disk of the lab: /dev/vdb, the next one /dev/vdc, up to four. What is written goes with the run; with
    /// ,rw it goes to the file, with ,ro there is only reading
    #[arg(long, value_name = "FILE[,ro|,rw]", value_hint = ValueHint::FilePath)]
    pub(crate) disk: Vec<String>,

    /// Run as an ordinary user (uid 1000) who may open /dev/kvm, instead of root
    #[arg(long)]
    pub(crate) user: bool,

    /// Memory of the emulated host, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    pub(crate) memory: u32,

    /// CPUs of the emulated host
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) cpus: u8,

    /// Install a Debian package on the emulated host
    #[arg(long, value_name = "NAME")]
    pub(crate) package: Vec<String>,

    /// Give up after so many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u32,

    /// The command, and its arguments, as on this host
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// Where a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accel {
    /// This host's KVM where hardware is behind it, else the lab for Linux guests
    Auto,
    /// This host's KVM, whatever it is
    Kvm,
    /// An emulated host
    Lab,
}

/// What `--net` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NetSpec {
    /// The in-process NAT.
    Nat,
    /// A TAP that is a port of this bridge.
    Tap(String),
    /// No NIC at all.
    None,
}

impl fmt::Display for NetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nat => f.write_str("nat"),
            Self::Tap(bridge) => write!(f, "tap:{bridge}"),
            Self::None => f.write_str("none"),
        }
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "nat" => Ok(Self::Nat),
            None if text == "none" => Ok(Self::None),
            None if text == "tap" => Err("which bridge? write tap:br0".to_owned()),
            Some(("tap", bridge)) if (1..=15).contains(&bridge.len()) && !bridge.contains(['/', ' ']) => {
                Ok(Self::Tap(bridge.to_owned()))
            }
            Some(("tap", _)) => {
                Err("a bridge's name has 1 to 15 characters without '/' or space, such as tap:br0".to_owned())
            }
            _ => Err("write nat, tap:BRIDGE (such as tap:br0) or none".to_owned()),
        }
    }
}

/// Guest memory in bytes: a whole number of MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemorySize(pub(crate) u64);

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.0 >> 20)
    }
}

/// What a machine may have of it.
fn machine_memory(text: &str) -> Result<MemorySize, String> {
    let size = text.parse().ok().filter(|MemorySize(bytes)| (MIN_MEMORY..=MAX_MEMORY).contains(bytes));
    size.ok_or_else(|| {
        let (least, most) = (MIN_MEMORY >> 20, MAX_MEMORY >> 30);
        format!("write a size from {least}M to {most}G, such as 512M or 2G (a number alone is MiB)")
    })
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || "write a size such as 512M or 2G (a number alone is MiB)".to_owned();
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match &text[digits.len()..] {
            "" | "M" | "m" | "MiB" | "MB" => 20,
            "G" | "g" | "GiB" | "GB" => 30,
            _ => return Err(usage()),
        };
        let number: u64 = digits.parse().map_err(|_| usage())?;
        let bytes = number.checked_mul(1 << shift).filter(|b| *b > 0 && *b <= 1 << 44);
        bytes.map(Self).ok_or_else(|| format!("{text} is not between 1M and 16384G"))
    }
}

/// An image and how it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    /// The image.
    pub(crate) path: PathBuf,
    /// Read-write, read-only, or the base of an overlay.
    pub(crate) mode: DiskMode,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Words are taken off the end, so a comma may be in the path as long as none of them is behind it.
        let known = [(",ro", DiskMode::ReadOnly), (",overlay", DiskMode::Overlay)];
        let (mut path, mut mode) = (text, DiskMode::ReadWrite);
        while let Some((rest, found)) =
            known.iter().find_map(|(word, m)| Some((path.strip_suffix(word)?, *m)))
        {
            if mode != DiskMode::ReadWrite && mode != found {
                return Err("an overlay is there to be written: leave out ,ro or ,overlay".to_owned());
            }
            (path, mode) = (rest, found);
        }
        if path.is_empty() {
            return Err("name a raw image or a block device, such as disk.img or disk.img,overlay".to_owned());
        }
        Ok(Self { path: path.into(), mode })
    }
}

/// CPU time in thousandths of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuLimit(pub(crate) u32);

impl fmt::Display for CpuLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

impl FromStr for CpuLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || "write a number of CPUs from 0.01 to 1024, such as 0.5 or 2".to_owned();
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(part) || part.len() > 3 {
            return Err(usage());
        }
        let whole: u32 = whole.parse().map_err(|_| usage())?;
        let part: u32 = format!("{part:0<3}").parse().map_err(|_| usage())?;
        let millis = whole.checked_mul(1000).and_then(|millis| millis.checked_add(part));
        millis.filter(|millis| (10..=1_024_000).contains(millis)).map(Self).ok_or_else(usage)
    }
}

/// A DNS server: an address, with or without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DnsServer(pub(crate) SocketAddrV4);

impl FromStr for DnsServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .or_else(|_| text.parse().map(|ip| SocketAddrV4::new(ip, 53)))
            .map(Self)
            .map_err(|_| "write an IPv4 address such as 9.9.9.9 or 127.0.0.1:5353".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn networks_are_named_as_the_help_says() {
        assert_eq!("nat".parse(), Ok(NetSpec::Nat));
        assert_eq!("none".parse(), Ok(NetSpec::None));
        assert_eq!("tap:br0".parse(), Ok(NetSpec::Tap("br0".into())));
        for bad in ["", "tap", "tap:", "bridge", "nat:", "tap:a-name-that-is-too-long", "tap:a/b"] {
            assert!(bad.parse::<NetSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_read_in_the_usual_units() {
        assert_eq!("512M".parse(), Ok(MemorySize(512 << 20)));
        assert_eq!("512".parse(), Ok(MemorySize(512 << 20)));
        assert_eq!("2G".parse(), Ok(MemorySize(2 << 30)));
        for bad in ["", "M", "0", "-1M", "1T", "1.5G", "99999999999999999999G", "18446744073709551615M", "é"]
        {
            assert!(bad.parse::<MemorySize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_bounds_of_a_machines_memory_are_told_as_they_are() {
        assert_eq!(machine_memory("4M"), Ok(MemorySize(MIN_MEMORY)));
        assert_eq!(machine_memory("256G"), Ok(MemorySize(MAX_MEMORY)));
        for bad in ["0", "3M", "257G", "lots"] {
            let told = machine_memory(bad).unwrap_err();
            assert!(told.contains("from 4M to 256G") && told.contains("512M"), "{bad}: {told}");
        }
    }

    #[test]
    fn a_disk_is_a_path_and_what_may_be_done_with_it() {
        let disk = |path: &str, mode| Ok(DiskSpec { path: path.into(), mode });
        assert_eq!("a.img".parse(), disk("a.img", DiskMode::ReadWrite));
        assert_eq!("a.img,ro".parse(), disk("a.img", DiskMode::ReadOnly));
        assert_eq!("/x/a,b.img,overlay".parse(), disk("/x/a,b.img", DiskMode::Overlay));
        for bad in ["", ",ro", ",overlay", "a,ro,overlay", "a,overlay,ro"] {
            assert!(bad.parse::<DiskSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn cpu_time_is_a_number_of_cpus() {
        for (text, millis) in [("0.5", 500), ("2", 2000), ("1.25", 1250), ("0.01", 10), ("1024", 1_024_000)] {
            assert_eq!(text.parse(), Ok(CpuLimit(millis)), "{text}");
            assert_eq!(CpuLimit(millis).to_string().parse(), Ok(CpuLimit(millis)));
        }
        for bad in ["", ".", "1.", ".5", "0", "0.001", "-1", "1e3", "1025", "0.0001", "99999999999", "1.2.3"]
        {
            assert!(bad.parse::<CpuLimit>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_command_after_two_dashes_is_taken_whole() {
        let cli =
            Cli::try_parse_from(["pontoon", "run", "debian", "--net", "nat", "--", "ping", "-c", "3", "x"])
                .expect("it is the README's own line");
        let Command::Run(run) = cli.command else { panic!("run was typed") };
        assert_eq!(run.command, ["ping", "-c", "3", "x"]);
        assert_eq!(run.image.as_deref(), Some("debian"));
    }

    #[test]
    fn exec_takes_a_command_with_and_without_two_dashes() {
        for words in
            [&["exec", "-e", "A=b", "vm1", "--", "ls", "-l"][..], &["exec", "-e", "A=b", "vm1", "ls", "-l"]]
        {
            let cli = Cli::try_parse_from([&["pontoon"], words].concat()).expect("docs/exec.md has both");
            let Command::Exec(exec) = cli.command else { panic!("exec was typed") };
            assert_eq!(exec.command, ["ls", "-l"]);
            assert_eq!(exec.machine.as_str(), "vm1");
        }
        assert!(Cli::try_parse_from(["pontoon", "exec", "vm1"]).is_err());
        assert!(Cli::try_parse_from(["pontoon", "exec", "-t", "-T", "vm1", "ls"]).is_err());
        assert!(Cli::try_parse_from(["pontoon", "exec", "no/name", "ls"]).is_err());
    }

    #[test]
    fn run_needs_something_to_boot() {
        assert!(Cli::try_parse_from(["pontoon", "run"]).is_err());
        assert!(Cli::try_parse_from(["pontoon", "run", "debian", "--kernel", "x"]).is_err());
    }
}
