//! `pontoon run`: from flags to a machine, from its end to an exit status.
//!
//! Order: decide where it runs; plug the network; build, which checks everything that the user gave; only then
//! touch the terminal; start; wait for the end, a signal or the deadline. Whatever way it ends, dropping the
//! machine stops its threads and closes its TAP and sockets, and the terminal is restored.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use devices::disk::Disk;
use guest_images::initrd::Console as Mode;
use guest_images::{Image, Store, store};
use serde_json::json;
use vmm::console::RawMode;
use vmm::kvm::{Host, KvmKind, VmError};
use vmm::machine::{BuildError, Guest, Init, Machine, MachineBuilder};
use vmm::runtime::Scrollback;
use vmm::runtime::control::Console;

use super::args::{Accel, RunArgs};
use super::detach::{self, Tether};
use super::network;
use super::outcome::Outcome;
use super::registry::{self, Registered};
use super::signals::Signals;
use super::{Failure, inlab, output};

/// The image name that means the built-in guest.
pub(crate) const PROBE: &str = "probe";

/// Runs the machine; in the process that `run --detach` started, `detached` says so.
pub(crate) fn run(mut args: RunArgs, detached: bool) -> Result<u8, Failure> {
    let tether = detached.then(detach::leave_terminal).transpose()?;
    let guest = find_guest(&args)?;
    let in_lab = match (args.accel, guest.init()) {
        (Accel::Lab, _) => true,
        (Accel::Auto, Init::Absent) => !Host::is_usable(),
        (Accel::Auto, Init::Ours | Init::Other) => !Host::kind().runs_linux(),
        (Accel::Kvm, _) => false,
    };
    if !in_lab {
        return run_here(&mut args, guest, tether);
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
    inlab::run(&args, &guest.hostname(args.host_name()))
}

fn why_lab(kind: &KvmKind) -> String {
    match kind {
        KvmKind::Hardware(_) => "asked for".to_owned(),
        KvmKind::Software(_) => "/dev/kvm has no hardware behind it".to_owned(),
        KvmKind::Absent(_) => "there is no /dev/kvm".to_owned(),
        KvmKind::Forbidden(advice) => format!("/dev/kvm may not be opened ({advice})"),
    }
}

/// What there is to boot; which name it is told is known later.
fn find_guest(args: &RunArgs) -> Result<Guest, Failure> {
    let guest = match (&args.kernel, args.image.as_deref()) {
        (Some(kernel), _) => {
            let guest = Guest::linux(kernel);
            if args.our_init || !args.command.is_empty() { guest.our_init() } else { guest }
        }
        (None, Some(PROBE)) if args.command.is_empty() => Guest::probe(),
        (None, Some(PROBE)) => {
            return Err(Failure::usage(anyhow!(
                "the probe runs no commands; give it orders with --cmdline 'probe.do=…' (docs/probe.md)"
            )));
        }
        (None, name) => Guest::image(&find_image(args, name.unwrap_or_default())?),
    };
    let guest = guest.words(args.cmdline.clone().unwrap_or_default()).command(args.command.clone());
    Ok(match &args.initrd {
        Some(initrd) => guest.initrd(initrd),
        None => guest,
    })
}

fn find_image(args: &RunArgs, name: &str) -> Result<Image, Failure> {
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
    Ok(image)
}

fn run_here(args: &mut RunArgs, guest: Guest, tether: Option<Tether>) -> Result<u8, Failure> {
    let detached = tether.is_some();
    // Before there is anything that would be left behind, and any thread that would not know of it.
    let signals = Signals::catch().context("catching signals").map_err(Failure::machine)?;
    let mut registered = registry::register(args, detached)?;
    let args = &*args;
    registered.limit_cpus(args)?;
    let here = !detached && args.console.is_none();
    let terminal = here && io::stdin().is_terminal() && io::stdout().is_terminal();
    // Whoever attaches to a detached machine's shell is a person with a terminal.
    let people = terminal || detached && args.command.is_empty();
    let guest = guest.hostname(args.host_name()).console(if people { Mode::Terminal } else { Mode::Bytes });
    let builder = Machine::builder().cpus(args.cpus).memory(args.memory.0);
    let mut builder = builder.guest(guest).map_err(Failure::usage)?;
    let mut plugged = network::plug(args)?;
    if let Some(nic) = plugged.nic.take() {
        builder = builder.nic(nic);
    }
    for disk in &args.disk {
        builder = builder.disk(Disk::open(&disk.path, disk.mode).map_err(Failure::usage)?);
    }
    if let Some(path) = args.vsock.clone().or_else(|| registered.vsock()) {
        builder = builder.vsock(path);
    }
    let (builder, background) = console(builder, args, &mut registered)?;
    let builder = registered.serve(builder, background, plugged.handle.take())?;
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
    let outcome = Outcome::of(wake, !args.command.is_empty(), registered.stop_asked());
    drop(raw);
    if outcome.noteworthy {
        output::note(&outcome.reason);
    }
    registered.end(&outcome);
    if args.json {
        output::json(&report.json(outcome.status));
    }
    Ok(outcome.status)
}

/// The console: this terminal or a file, or for a detached machine one to attach to.
fn console(
    builder: MachineBuilder,
    args: &RunArgs,
    registered: &mut Registered,
) -> Result<(MachineBuilder, Option<Console>), Failure> {
    let file = match &args.console {
        Some(path) => {
            let file = File::create(path).map_err(|error| {
                let path = path.display();
                anyhow!("could not create the console's file {path}: {error}; name one in a folder that you may write to")
            });
            Some(file.map_err(Failure::usage)?)
        }
        None => None,
    };
    if registered.is_detached() {
        return background_console(builder, registered, file);
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
    // A person types again, and wants the escape at any time; a pipe's bytes come once, and wait until the guest is ready.
    let person = io::stdin().is_terminal();
    Ok((if person { builder.console_escape(true).hold_input(None) } else { builder }, None))
}

/// The console of a detached machine: to its log, and to whoever attaches.
fn background_console(
    builder: MachineBuilder,
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
    Ok((builder.serial_input(input), Some(console)))
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
