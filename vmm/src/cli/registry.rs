//! The machine of `pontoon run` in the runtime folder, so that other commands find it.
//!
//! A machine in the foreground does without where the folder cannot be used; a detached one cannot, since nothing else would
//! lead to it.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use net::MacAddr;
use net::nat::NatHandle;
use vmm::machine::MachineBuilder;
use vmm::runtime::control::{Console, Control, ControlError, StopAsked};
use vmm::runtime::{
    CONSOLE_LOG, CONSOLE_LOG_OLD, CONTROL_SOCKET, Claim, ConsoleLog, CpuGroup, CpuLimits, LOG_MAX,
    MachineName, Phase, Runtime, RuntimeError, State,
};

use super::args::{CpuLimit, RunArgs};
use super::network::Network;
use super::outcome::Outcome;
use super::{Failure, output};

/// The machine's place in the runtime folder, if it has one.
pub(crate) struct Registered {
    /// Left before the name is given back.
    group: Option<CpuGroup>,
    claim: Option<Claim>,
    stop_asked: StopAsked,
}

/// What went wrong with the folder is mostly for the user to mend.
pub(crate) fn failure(error: RuntimeError) -> Failure {
    match error {
        RuntimeError::Io { .. } => Failure::machine(error),
        _ => Failure::usage(error),
    }
}

/// Takes the machine's name; the next free `vmN` if none was given. `args` has it then.
pub(crate) fn register(args: &mut RunArgs, detached: bool) -> Result<Registered, Failure> {
    let state = State {
        detached,
        image: args.image.clone(),
        kernel: args.kernel.clone(),
        cpus: args.cpus,
        memory: args.memory.0,
        net: args.net.to_string(),
        published: args.publish.iter().map(ToString::to_string).collect(),
        console_log: args.console.as_ref().and_then(|path| std::path::absolute(path).ok()),
        vsock: args.vsock.as_ref().and_then(|path| std::path::absolute(path).ok()),
        ..State::default()
    };
    let claimed = Runtime::open().and_then(|runtime| match &args.name {
        Some(name) => runtime.claim(name, state),
        None => runtime.claim_numbered(state),
    });
    match claimed {
        Ok(claim) => {
            let first = MachineName::numbered(1);
            if args.name.is_none() && *claim.name() != first {
                output::note(&format!("{first} is running already; this machine is {}", claim.name()));
            }
            args.name = Some(claim.name().clone());
            Ok(Registered { group: None, claim: Some(claim), stop_asked: StopAsked::default() })
        }
        Err(error @ (RuntimeError::Taken { .. } | RuntimeError::NoFreeName(_))) => Err(failure(error)),
        Err(error) if detached => Err(failure(error)),
        Err(error) => {
            output::note(&format!("{error}; until then other commands don't see this machine"));
            Ok(Registered { group: None, claim: None, stop_asked: StopAsked::default() })
        }
    }
}

/// Why a machine that was found could not be asked.
pub(crate) fn asking(name: &MachineName, error: ControlError) -> Failure {
    match error {
        ControlError::Refused(_) => Failure::usage(anyhow!("{name}: {error}")),
        _ => Failure::machine(anyhow!("{name}: {error}")),
    }
}

impl Registered {
    /// The claim, for what else lives in the machine's folder.
    pub(crate) fn claim(&self) -> Option<&Claim> {
        self.claim.as_ref()
    }

    /// Whether it is a machine without a terminal.
    pub(crate) fn is_detached(&self) -> bool {
        self.claim.as_ref().is_some_and(|claim| claim.state().detached)
    }

    /// Where the guest's vsock ports are reached, unless the user says otherwise.
    pub(crate) fn vsock(&self) -> Option<PathBuf> {
        self.claim.as_ref()?.state().vsock.clone()
    }

    /// Limits the CPU time of this process, if that was asked for and is permitted.
    pub(crate) fn limit_cpus(&mut self, args: &RunArgs) -> Result<(), Failure> {
        let limits =
            CpuLimits { millis: args.cpu_limit.map(|CpuLimit(millis)| millis), weight: args.cpu_share };
        let Some(claim) = self.claim.as_mut().filter(|_| limits != CpuLimits::default()) else {
            return Ok(());
        };
        match CpuGroup::enter(claim.name(), limits) {
            Ok(group) => {
                claim.update(|state| state.cgroup = Some(group.path().to_path_buf())).map_err(failure)?;
                self.group = Some(group);
            }
            Err(error) => output::note(&format!("--cpu-limit and --cpu-share are without effect: {error}")),
        }
        Ok(())
    }

    /// Lets the machine serve its control socket.
    pub(crate) fn serve(
        &mut self,
        builder: MachineBuilder,
        console: Option<Console>,
        nat: Option<NatHandle>,
    ) -> Result<MachineBuilder, Failure> {
        let Some(claim) = &self.claim else { return Ok(builder) };
        let path = claim.file(CONTROL_SOCKET);
        let control = Control::bind(&path).with_context(|| format!("listening at {}", path.display()));
        let control = match control {
            Ok(control) => control,
            Err(error) if self.is_detached() => return Err(Failure::machine(error)),
            Err(error) => {
                output::note(&format!("{error:#}; other commands can't ask this machine anything"));
                return Ok(builder);
            }
        };
        let control = match console {
            Some(console) => control.console(console),
            None => control,
        };
        let control = match nat {
            Some(nat) => control.nat(nat).context("making the control socket").map_err(Failure::machine)?,
            None => control,
        };
        self.stop_asked = control.stop_asked();
        Ok(builder.worker(move |remote| control.serve(remote)))
    }

    /// The log of a detached machine's console, unless that goes to a file of the user's.
    pub(crate) fn console_log(&mut self) -> Result<Option<ConsoleLog>, Failure> {
        let Some(claim) = self.claim.as_mut().filter(|claim| {
            let state = claim.state();
            state.detached && state.console_log.is_none()
        }) else {
            return Ok(None);
        };
        let path = claim.file(CONSOLE_LOG);
        let log = ConsoleLog::create(&path, &claim.file(CONSOLE_LOG_OLD), LOG_MAX)
            .with_context(|| format!("creating {}", path.display()))
            .map_err(Failure::machine)?;
        claim.update(|state| state.console_log = Some(path)).map_err(failure)?;
        Ok(Some(log))
    }

    /// Tells that the guest runs, and on what network.
    pub(crate) fn running(&mut self, network: &Network) -> Result<(), Failure> {
        let Some(claim) = &mut self.claim else { return Ok(()) };
        let updated = claim.update(|state| {
            state.state = Phase::Running;
            state.mac = network.mac.as_ref().map(MacAddr::to_string);
            state.subnet.clone_from(&network.network);
            state.interface.clone_from(&network.interface);
            state.published.clone_from(&network.published);
        });
        match updated {
            Err(error) if !claim.state().detached => {
                output::note(&error.to_string());
                Ok(())
            }
            other => other.map_err(failure),
        }
    }

    /// Whether somebody has asked for the machine's end.
    pub(crate) fn stop_asked(&self) -> bool {
        self.stop_asked.is_set()
    }

    /// Tells how the machine ended, and gives the name back.
    pub(crate) fn end(self, outcome: &Outcome) {
        drop(self.group);
        match self.claim {
            Some(claim) if outcome.stopped => claim.end_stopped(outcome.status, &outcome.reason),
            Some(claim) => claim.end(outcome.status, &outcome.reason),
            None => {}
        }
    }
}
