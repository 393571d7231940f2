//! `pontoon run`: from flags to a machine, from its end to an exit status.
//!
//! Order: decide where it runs; plug the network; build, which checks everything that the user gave; only then
//! touch the terminal; start; wait for the end, a signal or the deadline. Whatever way it ends, dropping the
//! machine stops its threads and closes its TAP and sockets, and the terminal is restored.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use devices::disk::{Disk, DiskMode};
use devices::serial::Hold;
use guest_images::initrd::{self, Console as ConsoleMode, Request};
use guest_images::{Store, store};
use serde_json::json;
use vmm::boot::Kernel;
use vmm::console::RawMode;
use vmm::kvm::{Host, KvmKind, VmError};
use vmm::machine::{BuildError, DEFAULT_CMDLINE, ExitReason, Machine, MachineBuilder};
use vmm::runtime::Scrollback;
use vmm::runtime::control::Console;

use super::args::{Accel, DiskSpec, RunArgs};
use super::detach::{self, Tether};
use super::network;
use super::registry::{self, Registered};
use super::signals::{Signals, Wake};
use super::{Failure, STATUS_MACHINE, STATUS_TIMEOUT, inlab, output};

/// The image name that means the built-in guest.
pub(crate) const PROBE: &str = "probe";

/// What there is to boot.
pub(crate) enum Boot {
    /// The built-in bare-metal guest.
    Probe,
    /// Linux: a kernel and, mostly, an initrd.
    Linux {
        /// The kernel.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The init is ours: it runs commands, and says when it is ready for input.
        our_init: bool,
        /// What the image's system is on.
        system: Option<System>,
    },
}

/// A system that an image has on a disk.
pub(crate) struct System {
    /// The disk; each machine has an overlay of its own on it.
    disk: DiskSpec,
    /// What the kernel's command line must have.
    cmdline: String,
}

impl Boot {
    /// The machine's disks, in order: the image's comes first.
    pub(crate) fn disks(&self, args: &RunArgs) -> Vec<DiskSpec> {
        let own = match self {
            Self::Linux { system: Some(system), .. } => Some(system.disk.clone()),
            _ => None,
        };
        own.into_iter().chain(args.disk.iter().cloned()).collect()
    }

    /// Words for the kernel besides the usual ones: the image's, then the user's.
    pub(crate) fn cmdline(&self, args: &RunArgs) -> String {
        let extra = args.cmdline.as_deref().unwrap_or_default();
        match self {
            // systemd.hostname: systemd(1); it comes before /etc/hostname, and networkd tells it to DHCP.
            Self::Linux { system: Some(System { cmdline, .. }), .. } => {
                format!("{cmdline} systemd.hostname={} {extra}", args.host_name()).trim_end().to_owned()
            }
            _ => extra.to_owned(),
        }
    }
}

/// Runs the machine; in the process that `run --detach` started, `detached` says so.
pub(crate) fn run(mut args: RunArgs, detached: bool) -> Result<u8, Failure> {
    let tether = detached.then(detach::leave_terminal).transpose()?;
    let boot = find_boot(&args)?;
    let in_lab = match (args.accel, &boot) {
        (Accel::Lab, _) => true,
        (Accel::Auto, Boot::Linux { .. }) => !Host::kind().runs_linux(),
        (Accel::Auto, Boot::Probe) => !Host::is_usable(),
        (Accel::Kvm, _) => false,
    };
    if !in_lab {
        return run_here(&mut args, &boot, tether);
    }
    let why = if args.accel == Accel::Lab { "asked for".to_owned() } else { why_lab(&Host::kind()) };
    if detached {
        return Err(Failure::usage(anyhow!(
            "a detached machine can't be in the lab ({why}), which ends with the command that began it; put both into the \
             lab (pontoon lab -- sh -c 'pontoon run --detach …; …', see docs/machines.md), or leave out --detach"
        )));
    }
    if args.accel == Accel::Auto {
        output::note(&format!("{why}: running in the lab, an emulated host (see docs/lab.md)"));
    }
    inlab::run(&args, &boot)
}

fn why_lab(kind: &KvmKind) -> String {
    match kind {
        KvmKind::Hardware(_) => "asked for".to_owned(),
        KvmKind::Software(_) => "/dev/kvm has no hardware behind it".to_owned(),
        KvmKind::Absent(_) => "there is no /dev/kvm".to_owned(),
        KvmKind::Forbidden(advice) => format!("/dev/kvm may not be opened ({advice})"),
    }
}

fn find_boot(args: &RunArgs) -> Result<Boot, Failure> {
    match (&args.kernel, args.image.as_deref()) {
        (Some(kernel), _) => Ok(Boot::Linux {
            kernel: kernel.clone(),
            initrd: args.initrd.clone(),
            our_init: args.our_init || !args.command.is_empty(),
            system: None,
        }),
        (None, Some(PROBE)) => {
            if args.command.is_empty() {
                Ok(Boot::Probe)
            } else {
                Err(Failure::usage(anyhow!(
                    "the probe runs no commands; give it orders with --cmdline 'probe.do=…' (docs/probe.md)"
                )))
            }
        }
        (None, name) => find_image(args, name.unwrap_or_default()),
    }
}

fn find_image(args: &RunArgs, name: &str) -> Result<Boot, Failure> {
    let image = Store::open_default().and_then(|store| store.get(name)).map_err(|error| match error {
        store::Error::NotBuilt { ref name } if !store::KNOWN.iter().any(|(known, _)| known == name) => {
            Failure::usage(anyhow!(
                "no image is called '{name}'; there are: probe (built in), debian (pontoon image build debian), debian-rootfs \
                 (pontoon image build debian --rootfs)"
            ))
        }
        other => Failure::usage(other),
    })?;
    if image.disk.is_some() && !args.command.is_empty() {
        return Err(Failure::usage(anyhow!(
            "{name} boots its own init, which runs no command of yours; log in by ssh (-p 2222:22, docs/images.md) or on its console"
        )));
    }
    let cmdline = image.manifest.cmdline;
    let system = image.disk.map(|path| System { disk: DiskSpec { path, mode: DiskMode::Overlay }, cmdline });
    Ok(Boot::Linux {
        kernel: image.kernel,
        initrd: Some(args.initrd.clone().unwrap_or(image.initrd)),
        our_init: system.is_none(),
        system,
    })
}

fn run_here(args: &mut RunArgs, boot: &Boot, tether: Option<Tether>) -> Result<u8, Failure> {
    let detached = tether.is_some();
    let mut registered = registry::register(args, detached)?;
    let args = &*args;
    registered.limit_cpus(args)?;
    let here = !detached && args.console.is_none();
    let terminal = here && io::stdin().is_terminal() && io::stdout().is_terminal();
    let mut builder = Machine::builder().cpus(args.cpus).memory(args.memory.0);
    // Whoever attaches to a detached machine's shell is a person with a terminal.
    builder = boot_flags(builder, args, boot, terminal || detached && args.command.is_empty())?;
    let mut plugged = network::plug(args)?;
    if let Some(nic) = plugged.nic.take() {
        builder = builder.nic(nic);
    }
    for disk in boot.disks(args) {
        builder = builder.disk(Disk::open(&disk.path, disk.mode).map_err(Failure::usage)?);
    }
    if let Some(path) = args.vsock.clone().or_else(|| registered.vsock()) {
        builder = builder.vsock(path);
    }
    let (builder, background) = console(builder, args, boot, &mut registered)?;
    let builder = registered.serve(builder, background, plugged.handle.take())?;
    // Before there is any thread that would not know of it.
    let signals = Signals::catch().context("catching signals").map_err(Failure::machine)?;
    let deadline = args.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    let (builder, watch) = signals.watch(builder, deadline)?;
    let machine = builder.build().map_err(build_failure)?;
    // From here on the terminal is raw, so that ctrl-C is the guest's; the guard gives it back.
    let raw = if terminal {
        RawMode::enter(io::stdin()).context("preparing the terminal").map_err(Failure::machine)?
    } else {
        None
    };
    let running = machine.start_here().map_err(Failure::machine)?;
    registered.running(&plugged)?;
    if let (Some(claim), Some(tether)) = (registered.claim(), tether) {
        detach::tell_starter(tether, claim)?;
    }
    let wake = watch.wait(running);
    let report = Report { mac: plugged.mac, net: args.net.to_string(), network: plugged.network };
    let outcome = finish(wake, !args.command.is_empty());
    drop(raw);
    if outcome.noteworthy {
        output::note(&outcome.reason);
    }
    registered.end(outcome.status, &outcome.reason);
    if args.json {
        output::json(&report.json(outcome.status));
    }
    Ok(outcome.status)
}

/// How a machine ended.
struct Outcome {
    status: u8,
    reason: String,
    /// Whether the status alone does not tell.
    noteworthy: bool,
}

/// What the end means to a shell.
fn finish(wake: Wake, command: bool) -> Outcome {
    match wake {
        Wake::Ended(reason) => {
            let status = match (&reason, command) {
                // The command's status never came: the guest crashed or was told to reboot by something else.
                (ExitReason::PowerOff | ExitReason::Reset, true) => STATUS_MACHINE,
                _ => reason.status(),
            };
            let in_order = matches!(reason, ExitReason::PowerOff | ExitReason::Reset);
            let noteworthy = command && in_order || !(in_order || matches!(reason, ExitReason::Status(_)));
            let reason = match reason {
                _ if command && in_order => {
                    format!("{reason} without telling the command's exit status; see its console")
                }
                ExitReason::Stopped => "stopped".to_owned(),
                _ => reason.to_string(),
            };
            Outcome { status, reason, noteworthy }
        }
        Wake::Deadline => {
            let reason = "the time-out has passed; the machine was stopped".to_owned();
            Outcome { status: STATUS_TIMEOUT, reason, noteworthy: true }
        }
        Wake::Signal(number) => {
            // As a shell reports a process that a signal ended.
            let status = u8::try_from(128 + number).unwrap_or(u8::MAX);
            Outcome { status, reason: format!("ended by signal {number}"), noteworthy: false }
        }
    }
}

fn boot_flags(
    builder: MachineBuilder,
    args: &RunArgs,
    boot: &Boot,
    terminal: bool,
) -> Result<MachineBuilder, Failure> {
    let extra = boot.cmdline(args);
    match boot {
        Boot::Probe => Ok(builder
            .kernel(Kernel::Bytes(Cow::Borrowed(guest_images::PROBE)))
            .bare_metal(true)
            .cmdline(extra)),
        Boot::Linux { kernel, initrd, system, .. } => {
            let mut builder =
                builder.kernel(Kernel::Path(kernel.clone())).cmdline(linux_cmdline(&extra)).balloon(true);
            if let Some(path) = initrd {
                builder = builder.initrd(match system {
                    Some(_) => Kernel::Path(path.clone()),
                    None => initrd_with_request(args, path, terminal)?,
                });
            }
            Ok(builder)
        }
    }
}

/// The kernel is asked to say nothing below "critical" (loglevel 3; "quiet" would let it complain that there is no PCI
/// bus): the console belongs to the command or the shell. `--cmdline loglevel=7`, which comes later and therefore
/// counts, shows a boot in full.
fn linux_cmdline(extra: &str) -> String {
    format!("{DEFAULT_CMDLINE} loglevel=3 {extra}").trim_end().to_owned()
}

/// The initrd with what this boot is to do behind it: our init reads it, another one ignores it.
fn initrd_with_request(args: &RunArgs, path: &PathBuf, terminal: bool) -> Result<Kernel, Failure> {
    let bytes = std::fs::read(path)
        .with_context(|| format!("reading the initrd {}", path.display()))
        .map_err(Failure::usage)?;
    let request = Request {
        argv: args.command.clone(),
        env: Vec::new(),
        hostname: Some(args.host_name().to_owned()),
        console: if terminal { ConsoleMode::Terminal } else { ConsoleMode::Bytes },
    };
    let whole = initrd::with_request(&bytes, &request).map_err(Failure::usage)?;
    Ok(Kernel::Bytes(Cow::Owned(whole)))
}

/// The console: this terminal or a file, or for a detached machine one to attach to.
fn console(
    builder: MachineBuilder,
    args: &RunArgs,
    boot: &Boot,
    registered: &mut Registered,
) -> Result<(MachineBuilder, Option<Console>), Failure> {
    let file = match &args.console {
        Some(path) => {
            let file =
                File::create(path).with_context(|| format!("creating the console file {}", path.display()));
            Some(file.map_err(Failure::usage)?)
        }
        None => None,
    };
    if registered.is_detached() {
        return background_console(builder, boot, registered, file);
    }
    if let Some(file) = file {
        return Ok((builder.serial_output(file), None));
    }
    let stdin =
        io::stdin().as_fd().try_clone_to_owned().context("using standard input").map_err(Failure::machine)?;
    let stdout = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .context("using standard output")
        .map_err(Failure::machine)?;
    let builder = builder.serial_output_to(stdout).serial_input(stdin);
    // A person types again, and wants the escape at any time; a pipe's bytes come once.
    let person = io::stdin().is_terminal();
    Ok((if person { builder.console_escape(true) } else { hold_input(builder, boot) }, None))
}

/// The console of a detached machine: to its log, and to whoever attaches.
fn background_console(
    builder: MachineBuilder,
    boot: &Boot,
    registered: &mut Registered,
    file: Option<File>,
) -> Result<(MachineBuilder, Option<Console>), Failure> {
    let made = Scrollback::new().and_then(|scrollback| Ok((Console::new(scrollback.clone())?, scrollback)));
    let ((console, input), scrollback) =
        made.context("making the machine's console").map_err(Failure::machine)?;
    let builder = match (file, registered.console_log()?) {
        (Some(file), _) => builder.serial_output(scrollback.tee(file)),
        (None, Some(log)) => builder.serial_output(scrollback.tee(log)),
        (None, None) => builder,
    };
    Ok((hold_input(builder.serial_input(input), boot), Some(console)))
}

/// Input that nobody types again waits until the guest is ready for it.
fn hold_input(builder: MachineBuilder, boot: &Boot) -> MachineBuilder {
    match boot {
        Boot::Probe => builder,
        Boot::Linux { our_init: true, .. } => builder.hold_input(Hold::Out1),
        Boot::Linux { .. } => builder.hold_input(Hold::Interrupt),
    }
}

/// What the user gave or this host lacks is for the user to mend; what goes wrong beyond that is not.
fn build_failure(error: BuildError) -> Failure {
    match error {
        BuildError::NoKernel
        | BuildError::TooManyDevices { .. }
        | BuildError::Memory(_)
        | BuildError::Boot(_)
        | BuildError::Vsock(_)
        | BuildError::Vm(VmError::Host(_) | VmError::Cpus { .. }) => Failure::usage(error),
        BuildError::Vm(_) | BuildError::Acpi(_) | BuildError::Device { .. } | BuildError::Layout(_) => {
            Failure::machine(error)
        }
    }
}

/// What `--json` prints at the end.
struct Report {
    mac: Option<net::MacAddr>,
    net: String,
    network: Option<String>,
}

impl Report {
    fn json(&self, status: u8) -> serde_json::Value {
        let mac = self.mac.map(|mac| mac.to_string());
        json!({ "exit_status": status, "net": self.net, "mac": mac, "subnet": self.network })
    }
}
