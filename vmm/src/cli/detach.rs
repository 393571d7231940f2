//! `pontoon run --detach`: a machine that outlives the command and the terminal that started it.
//!
//! The command starts itself once more (`--detached`), in a session of its own, without a terminal, with its standard output
//! a pipe to us and its standard error still ours: what keeps the machine from starting is told where the user looks, and ends with
//! that status. When the guest runs, one line comes through the pipe; from then on nothing of ours is the machine's: its
//! output goes to files of its runtime folder, its working directory is `/`.
//!
//! A machine whose starter has gone before that line could be written ends itself: nobody has learned its name.

mod sys;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use vmm::runtime::{Claim, VMM_LOG};

use super::args::RunArgs;
use super::{Failure, STATUS_MACHINE, output};

/// The flag that the second process gets.
const FLAG: &str = "--detached";
/// More than any line that the second process writes.
const LINE_MAX: u64 = 64 << 10;
/// Most bytes that a detached machine's process logs.
const LOG_BUDGET: u64 = 1 << 20;

/// The line that says that the guest runs.
#[derive(Debug, Serialize, Deserialize)]
struct Started {
    name: String,
    pid: u32,
    net: String,
    mac: Option<String>,
    subnet: Option<String>,
}

/// Starts the machine in a process of its own and waits until it runs.
pub(crate) fn start(args: &RunArgs) -> Result<u8, Failure> {
    let program = std::env::current_exe().context("finding our own program").map_err(Failure::machine)?;
    let mut child = Command::new(program)
        .arg(FLAG)
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the machine's process")
        .map_err(Failure::machine)?;
    let mut line = String::new();
    if let Some(pipe) = child.stdout.take() {
        // What cannot be read is no line, and how the process ends says why.
        let _ = BufReader::new(pipe.take(LINE_MAX)).read_line(&mut line);
    }
    if let Ok(started) = serde_json::from_str::<Started>(&line) {
        if args.json {
            output::json(&started);
        } else {
            output::line(&started.name);
        }
        return Ok(0);
    }
    let status = child.wait().context("waiting for the machine's process").map_err(Failure::machine)?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(0) => Err(Failure::machine(anyhow!("the machine ended before it ran"))),
        Some(code) => Ok(code),
        None => {
            output::note(&format!("the machine's process ended before the guest ran: {status}"));
            Ok(STATUS_MACHINE)
        }
    }
}

/// What this process still has of whoever started it.
pub(crate) struct Tether {
    /// Descriptors beside the standard streams: a lock, a pipe of a shell. They may be named by a flag (`/dev/fd/63`), so they
    /// are kept until the guest runs.
    inherited: Vec<RawFd>,
}

/// Leaves the terminal and the session of whoever started us. To be called before anything is opened.
pub(crate) fn leave_terminal() -> Result<Tether, Failure> {
    let inherited = sys::inherited();
    rustix::process::setsid().context("making a session of our own").map_err(Failure::machine)?;
    Ok(Tether { inherited })
}

/// Tells the starter that the guest runs, and lets go of everything that is the starter's.
pub(crate) fn tell_starter(tether: Tether, claim: &Claim) -> Result<(), Failure> {
    let path = claim.file(VMM_LOG);
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("creating {}", path.display()))
        .map_err(Failure::machine)?;
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.context("opening /dev/null").map_err(Failure::machine)?;
    let state = claim.state();
    let started = Started {
        name: state.name.clone(),
        pid: state.pid,
        net: state.net.clone(),
        mac: state.mac.clone(),
        subnet: state.subnet.clone(),
    };
    let mut line = serde_json::to_vec(&started).map_err(Failure::machine)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).map_err(|error| {
        Failure::machine(anyhow!(error).context("the command that started this machine is gone, so it ends"))
    })?;
    let let_go = rustix::stdio::dup2_stdout(&null)
        .and_then(|()| rustix::stdio::dup2_stderr(&log))
        .and_then(|()| rustix::process::chdir("/"));
    let_go.context("letting go of the terminal").map_err(Failure::machine)?;
    sys::close(tether.inherited);
    output::limit_log(LOG_BUDGET);
    Ok(())
}
