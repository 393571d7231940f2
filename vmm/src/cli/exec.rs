//! `pontoon exec`: a command in a running machine, with this process's streams, terminal and signals.
//!
//! With a terminal, keys go through as they are, ctrl-C included. Without one, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2
//! are passed on; a second SIGINT or SIGTERM ends this process, and by that the command.

use std::ffi::OsString;
use std::io::{IsTerminal as _, stderr, stdin, stdout};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::anyhow;
use rustix::termios::{OptionalActions, OutputModes, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::{flag, low_level::pipe};
use vmm::agent::{AgentError, Client, Command, ExitStatus, Streams};
use vmm::console::RawMode;
use vmm::runtime::{MachineName, Runtime};

use super::agent_args::{ExecArgs, Patience};
use super::registry::failure;
use super::{Failure, output};

/// Signals that the command gets when it has no terminal.
const PASSED_ON: [(i32, u8); 6] =
    [(SIGHUP, 1), (SIGINT, 2), (SIGQUIT, 3), (SIGUSR1, 10), (SIGUSR2, 12), (SIGTERM, 15)];

pub(crate) fn exec(args: &ExecArgs) -> Result<u8, Failure> {
    let has_terminal =
        args.terminal || (!args.no_terminal && stdin().is_terminal() && stdout().is_terminal());
    let mut command = Command::new(args.command.first().cloned().unwrap_or_default());
    command.args(args.command.iter().skip(1));
    if has_terminal {
        // A standard input that is no terminal has no size.
        let (rows, columns) = tcgetwinsize(stdin()).map_or((24, 80), |size| (size.ws_row, size.ws_col));
        command.terminal(rows, columns);
        if let Some(term) = std::env::var_os("TERM") {
            command.env("TERM", term);
        }
    }
    for variable in &args.env {
        let (name, value) = self::variable(variable)?;
        command.env(name, value);
    }
    if let Some(folder) = &args.workdir {
        command.current_dir(folder);
    }
    if let Some(user) = &args.user {
        command.user(user);
    }
    let agent = Agent::find(&args.machine, &args.patience)?;
    let run = |client: &Client| match has_terminal {
        true => on_terminal(client, &command, args),
        false => on_streams(client, &command, args),
    };
    match agent.patiently(run) {
        Ok(status) => Ok(status.code()),
        Err(error) => failed(error),
    }
}

/// `NAME=VALUE`, or `NAME` for this shell's own.
fn variable(text: &OsString) -> Result<(OsString, OsString), Failure> {
    let bytes = text.as_bytes();
    let own = || (text.clone(), std::env::var_os(text).unwrap_or_default());
    let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) => (OsString::from_vec(bytes[..at].to_vec()), OsString::from_vec(bytes[at + 1..].to_vec())),
        None => own(),
    };
    if name.is_empty() {
        return Err(Failure::usage(anyhow!("-e {}: write NAME=VALUE or NAME", text.display())));
    }
    Ok((name, value))
}

/// How long a kernel may take to accept a connection, whatever `--wait` says: a host may be busy, and nobody waits for ever.
const ACCEPT_LEAST: Duration = Duration::from_secs(1);
const ACCEPT_MOST: Duration = Duration::from_secs(10);

/// The agent of a machine, and how long it may take until it answers.
pub(crate) struct Agent {
    pub(crate) client: Client,
    patience: Duration,
}

impl Agent {
    /// That of the machine of this name.
    pub(crate) fn find(name: &MachineName, patience: &Patience) -> Result<Self, Failure> {
        let entry = Runtime::open().and_then(|runtime| runtime.find_alive(name)).map_err(failure)?;
        // Where a kernel has the driver, it answers at once.
        let accept = Duration::from_secs(patience.wait.into()).clamp(ACCEPT_LEAST, ACCEPT_MOST);
        // One that has run for long enough will not have an agent a little later.
        let age = entry.age().unwrap_or_default();
        let patience = Duration::from_secs(patience.wait.into()).saturating_sub(age);
        let client = entry.agent().ok_or_else(|| {
            Failure::machine(anyhow!("{name} has no vsock device, so there is no way to an agent in it"))
        })?;
        Ok(Self { client: client.accepting_within(accept), patience })
    }

    /// Does it, and if the machine is still booting, waits for its agent and does it then.
    pub(crate) fn patiently<T>(
        &self,
        mut run: impl FnMut(&Client) -> Result<T, AgentError>,
    ) -> Result<T, AgentError> {
        match run(&self.client) {
            // Nothing has been asked of it yet.
            Err(AgentError::Missing { .. } | AgentError::NotUp { .. }) if !self.patience.is_zero() => {
                self.client.wait_until_ready(self.patience)?;
                run(&self.client)
            }
            outcome => outcome,
        }
    }
}

/// What the user is told, and the exit status.
pub(crate) fn failed(error: AgentError) -> Result<u8, Failure> {
    match error {
        AgentError::NotStarted { status, .. } => {
            output::error(&anyhow::Error::new(error));
            Ok(status)
        }
        AgentError::Request(_) => Err(Failure::usage(error)),
        error => Err(Failure::machine(error)),
    }
}

/// A socket that gets a byte whenever the signal comes.
fn caught(signal: i32) -> Result<UnixStream, AgentError> {
    let pair = || {
        let (ours, handlers) = UnixStream::pair()?;
        pipe::register(signal, handlers)?;
        ours.set_nonblocking(true)?;
        Ok(ours)
    };
    pair().map_err(|source| AgentError::Local { doing: format!("catch signal {signal}"), source })
}

fn on_terminal(client: &Client, command: &Command, args: &ExecArgs) -> Result<ExitStatus, AgentError> {
    let changed = caught(SIGWINCH)?;
    let local = |source: std::io::Error| AgentError::Local { doing: "use this terminal".to_owned(), source };
    // Dropped, and so restored, before anything is printed.
    let raw = RawMode::enter(stdin()).map_err(|error| local(std::io::Error::other(error)))?;
    if raw.is_some() {
        // The machine's terminal makes the ends of lines; a second one would garble what draws on the whole screen.
        let mut modes = tcgetattr(stdin()).map_err(|errno| local(errno.into()))?;
        modes.output_modes.remove(OutputModes::OPOST);
        tcsetattr(stdin(), OptionalActions::Now, &modes).map_err(|errno| local(errno.into()))?;
    }
    let (stdin, stdout, stderr) = (stdin(), stdout(), stderr());
    let streams = Streams {
        stdin: input(&stdin, args),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        resized: raw.as_ref().map(|_| (stdin.as_fd(), changed.as_fd())),
        signals: Vec::new(),
    };
    client.attach(command, &streams)
}

fn on_streams(client: &Client, command: &Command, args: &ExecArgs) -> Result<ExitStatus, AgentError> {
    let again = Arc::new(AtomicBool::new(false));
    for (signal, status) in [(SIGINT, 128 + SIGINT), (SIGTERM, 128 + SIGTERM)] {
        // In this order: the first one sets what makes the second one end us.
        flag::register_conditional_shutdown(signal, status, Arc::clone(&again))
            .and_then(|_| flag::register(signal, Arc::clone(&again)))
            .map_err(|source| AgentError::Local { doing: format!("catch signal {signal}"), source })?;
    }
    let mut sockets = Vec::new();
    for (signal, number) in PASSED_ON {
        sockets.push((caught(signal)?, number));
    }
    let (stdin, stdout, stderr) = (stdin(), stdout(), stderr());
    let streams = Streams {
        stdin: input(&stdin, args),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        resized: None,
        signals: sockets.iter().map(|(socket, number)| (socket.as_fd(), *number)).collect(),
    };
    client.attach(command, &streams)
}

fn input<'a>(stdin: &'a std::io::Stdin, args: &ExecArgs) -> Option<BorrowedFd<'a>> {
    (!args.no_stdin).then(|| stdin.as_fd())
}
