//! A command in the machine: what to run, how it ended, and the three ways to hold its streams.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Write as _};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use super::client::Client;
use super::error::{AgentError, local};
use super::pump::{Event, Order, Pump, Sink, Source};
use super::wire::{Exec, Exit, Kind, MAX_REQUEST};

/// A command to run in the machine.
///
/// ```no_run
/// use std::time::Duration;
///
/// use vmm::agent::{AgentError, Client, Command};
///
/// let agent = Client::vsock("vsock.sock");
/// let mut build = Command::new("make");
/// build.arg("-j2").current_dir("/src").user("nobody").env("CC", "gcc").timeout(Duration::from_secs(600));
/// match agent.output(&build, 1 << 20) {
///     Ok(output) => println!("status {}", output.status.code()),
///     Err(AgentError::TimedOut { .. }) => println!("it took too long"),
///     Err(error) => return Err(error),
/// }
/// # Ok(())
/// ```
#[derive(Clone, Debug)]
pub struct Command {
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    user: Option<String>,
    terminal: Option<(u16, u16)>,
    timeout: Option<Duration>,
}

impl Command {
    /// A program of the machine, by path or by name in its PATH.
    pub fn new(program: impl Into<OsString>) -> Self {
        let (argv, env) = (vec![program.into()], Vec::new());
        Self { argv, env, folder: None, user: None, terminal: None, timeout: None }
    }

    /// One more argument.
    pub fn arg(&mut self, argument: impl Into<OsString>) -> &mut Self {
        self.argv.push(argument.into());
        self
    }

    /// More arguments.
    pub fn args<A: Into<OsString>>(&mut self, arguments: impl IntoIterator<Item = A>) -> &mut Self {
        self.argv.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// A variable, over the default environment (PATH, HOME, USER, LOGNAME, SHELL, TERM).
    pub fn env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> &mut Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Its working directory in the machine instead of its user's home.
    pub fn current_dir(&mut self, folder: impl Into<PathBuf>) -> &mut Self {
        self.folder = Some(folder.into());
        self
    }

    /// Its user, by name or number, instead of root.
    pub fn user(&mut self, user: impl Into<String>) -> &mut Self {
        self.user = Some(user.into());
        self
    }

    /// A terminal of so many rows and columns; its output and errors are then one stream.
    pub fn terminal(&mut self, rows: u16, columns: u16) -> &mut Self {
        self.terminal = Some((rows, columns));
        self
    }

    /// Ends it after this time.
    pub fn timeout(&mut self, limit: Duration) -> &mut Self {
        self.timeout = Some(limit);
        self
    }

    /// The request.
    fn payload(&self) -> Result<Vec<u8>, AgentError> {
        let env: Vec<Vec<u8>> =
            self.env.iter().map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat()).collect();
        let folder = self.folder.as_deref().map(Path::as_os_str).unwrap_or_default();
        let user = self.user.as_deref().unwrap_or_default();
        let mut payload = vec![0; MAX_REQUEST];
        let length = Exec::encode(
            &mut payload,
            self.terminal,
            [folder.as_bytes(), user.as_bytes()],
            self.argv.iter().map(|argument| argument.as_bytes()),
            env.iter().map(Vec::as_slice),
        )
        .map_err(|refused| AgentError::Request(refused.to_string()))?;
        payload.truncate(length);
        Ok(payload)
    }

    fn program(&self) -> String {
        self.argv.first().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// How a command ended.
///
/// ```no_run
/// # use vmm::agent::{Client, Command};
/// # let agent = Client::vsock("vsock.sock");
/// let status = agent.output(Command::new("sh").arg("-c").arg("kill -9 $$"), 4096)?.status;
/// // As a shell has it.
/// assert_eq!((status.success(), status.code(), status.signal()), (false, 137, Some(9)));
/// # Ok::<(), vmm::agent::AgentError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(Exit);

impl ExitStatus {
    pub(super) fn new(exit: Exit) -> Self {
        Self(exit)
    }

    /// Whether it exited with 0.
    pub fn success(self) -> bool {
        self.0 == Exit::Code(0)
    }

    /// As a shell says it: its own status, or 128 + N for one that signal N killed.
    pub fn code(self) -> u8 {
        match self.0 {
            Exit::Code(code) => code,
            Exit::Signal(signal) => signal.saturating_add(128),
        }
    }

    /// The signal that killed it.
    pub fn signal(self) -> Option<u8> {
        match self.0 {
            Exit::Code(_) => None,
            Exit::Signal(signal) => Some(signal),
        }
    }
}

impl fmt::Debug for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A command that has ended, with what it wrote.
///
/// ```no_run
/// # use vmm::agent::{Client, Command};
/// # let agent = Client::vsock("vsock.sock");
/// let output = agent.output_of(Command::new("sort").arg("-n"), b"10\n9\n".to_vec(), 4096)?;
/// assert_eq!((output.status.code(), output.stdout.as_slice()), (0, &b"9\n10\n"[..]));
/// # Ok::<(), vmm::agent::AgentError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

/// Descriptors of the caller's that a command is attached to.
///
/// They may block; they are only read and written when poll says that this does not.
///
/// ```no_run
/// use std::os::fd::AsFd;
///
/// use vmm::agent::{Client, Command, Streams};
///
/// let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
/// let streams = Streams {
///     stdin: Some(stdin.as_fd()),
///     stdout: stdout.as_fd(),
///     stderr: stderr.as_fd(),
///     resized: None,
///     signals: Vec::new(),
/// };
/// let status = Client::vsock("vsock.sock").attach(&Command::new("sh"), &streams)?;
/// std::process::exit(status.code().into());
/// # #[allow(unreachable_code)]
/// # Ok::<(), vmm::agent::AgentError>(())
/// ```
#[derive(Debug)]
pub struct Streams<'a> {
    /// Where its standard input comes from; without, it is empty.
    pub stdin: Option<BorrowedFd<'a>>,
    /// Where its standard output goes.
    pub stdout: BorrowedFd<'a>,
    /// Where its standard error goes.
    pub stderr: BorrowedFd<'a>,
    /// The terminal whose size the command's terminal follows, and a descriptor that becomes readable when it changes
    /// (what is read from it is thrown away).
    pub resized: Option<(BorrowedFd<'a>, BorrowedFd<'a>)>,
    /// Signals: whenever one of these descriptors has something to read, the command gets this signal.
    pub signals: Vec<(BorrowedFd<'a>, u8)>,
}

impl Client {
    /// Runs a command with empty standard input, and captures at most `limit` bytes of each of its outputs.
    ///
    /// # Errors
    /// [`AgentError`]; beyond the limit the command is ended and its output lost.
    pub fn output(&self, command: &Command, limit: usize) -> Result<Output, AgentError> {
        self.output_of(command, Vec::new(), limit)
    }

    /// The same with these bytes as standard input.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn output_of(&self, command: &Command, input: Vec<u8>, limit: usize) -> Result<Output, AgentError> {
        let capture = || Sink::Capture { bytes: Vec::new(), limit };
        let mut pump = self.start(command, Source::bytes(input), [capture(), capture()])?;
        let status = pump.run()?;
        let [stdout, stderr] = pump.captured();
        Ok(Output { status, stdout, stderr })
    }

    /// Starts a command with pipes for its streams.
    ///
    /// # Errors
    /// [`AgentError`] when it can't be started, [`AgentError::NotStarted`] for what a shell would call 126 and 127.
    pub fn exec(&self, command: &Command) -> Result<Process, AgentError> {
        let pipe = || io::pipe().map_err(local("make a pipe"));
        let ((their_in, stdin), (stdout, their_out)) = (pipe()?, pipe()?);
        let (stderr, their_err) = pipe()?;
        let (orders, control) = pipe()?;
        let source = Source::pipe(OwnedFd::from(their_in))?;
        let sinks = [Sink::pipe(OwnedFd::from(their_out))?, Sink::pipe(OwnedFd::from(their_err))?];
        let mut pump = self.start(command, source, sinks)?;
        pump.watch(OwnedFd::from(orders), Event::Orders);
        let thread = std::thread::Builder::new()
            .name("agent-exec".to_owned())
            .spawn(move || pump.run())
            .map_err(local("start a thread"))?;
        let (stdin, stdout, stderr) = (Some(stdin), Some(stdout), Some(stderr));
        Ok(Process { stdin, stdout, stderr, control: Some(control), thread: Some(thread) })
    }

    /// Runs a command on descriptors of the caller's, to its end.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn attach(&self, command: &Command, streams: &Streams<'_>) -> Result<ExitStatus, AgentError> {
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(local("duplicate a descriptor"));
        let source = match streams.stdin {
            Some(fd) => Source::shared(own(fd)?),
            None => Source::bytes(Vec::new()),
        };
        let sinks = [Sink::shared(own(streams.stdout)?), Sink::shared(own(streams.stderr)?)];
        let mut pump = self.start(command, source, sinks)?;
        if let Some((terminal, changed)) = streams.resized {
            pump.watch(own(changed)?, Event::Resized(own(terminal)?));
        }
        for (fd, signal) in &streams.signals {
            pump.watch(own(*fd)?, Event::Signal(*signal));
        }
        pump.run()
    }

    /// Sends the request and waits until the command runs.
    fn start(&self, command: &Command, source: Source, sinks: [Sink; 2]) -> Result<Pump, AgentError> {
        let payload = command.payload()?;
        let mut link = self.link()?;
        link.queue(Kind::Exec, &payload);
        Pump::start(link, source, sinks, command.timeout, &command.program())
    }
}

/// A command under way. Dropping it ends the command: SIGHUP, and SIGKILL two seconds later.
///
/// ```no_run
/// use std::io::{BufRead, BufReader, Write};
///
/// use vmm::agent::{Client, Command};
///
/// let mut shell = Client::vsock("vsock.sock").exec(&Command::new("sh"))?;
/// let mut input = shell.stdin.take().expect("it was not taken yet");
/// let mut lines = BufReader::new(shell.stdout.take().expect("it was not taken yet")).lines();
/// input.write_all(b"uname -r\n")?;
/// println!("{}", lines.next().transpose()?.unwrap_or_default());
/// drop(input); // its end is the shell's
/// println!("status {}", shell.wait()?.code());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Process {
    /// Its standard input; dropping it is the input's end.
    pub stdin: Option<PipeWriter>,
    /// Its standard output.
    pub stdout: Option<PipeReader>,
    /// Its standard error; with a terminal nothing comes here.
    pub stderr: Option<PipeReader>,
    control: Option<PipeWriter>,
    thread: Option<JoinHandle<Result<ExitStatus, AgentError>>>,
}

impl Process {
    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// [`AgentError::Ended`] when it has ended.
    pub fn signal(&mut self, signal: u8) -> Result<(), AgentError> {
        self.order(Order::Signal(signal))
    }

    /// Tells the command's terminal its size.
    ///
    /// # Errors
    /// [`AgentError::Ended`] when it has ended.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<(), AgentError> {
        self.order(Order::Resize(rows, columns))
    }

    fn order(&mut self, order: Order) -> Result<(), AgentError> {
        let control = self.control.as_mut().ok_or(AgentError::Ended)?;
        control.write_all(&order.encode()).map_err(|_| AgentError::Ended)
    }

    /// Closes what is left of standard input and waits for the command's end. Outputs that nobody reads must have been
    /// dropped, or hold the command up when they are full.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn wait(mut self) -> Result<ExitStatus, AgentError> {
        self.stdin = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            // It does not panic, and is taken only here and by drop.
            Some(Err(_)) | None => Err(AgentError::Ended),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The thread sees the orders end, closes the connection and ends.
        self.control = None;
        (self.stdin, self.stdout, self.stderr) = (None, None, None);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl AsRef<OsStr> for Command {
    fn as_ref(&self) -> &OsStr {
        self.argv.first().map(OsString::as_os_str).unwrap_or_default()
    }
}
