//! The machines that there are, seen from another process.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::CONTROL_SOCKET;
use super::claim::is_half_removed;
use super::control::{Client, ControlError};
use super::error::RuntimeError;
use super::lock::{self, Outer};
use super::name::MachineName;
use super::place::Runtime;
use super::state::{Phase, State, StateError, monotonic};
use crate::agent;
use crate::deadline;

/// What a machine is doing, by its lock and its state together.
///
/// ```no_run
/// use vmm::runtime::{Condition, Runtime};
///
/// let machines = Runtime::open()?.list()?;
/// let running = machines.iter().filter(|machine| machine.condition() == Condition::Running).count();
/// println!("{running} of {} are running", machines.len());
/// # Ok::<(), vmm::runtime::RuntimeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Alive; its guest does not run yet.
    Starting,
    /// Alive.
    Running,
    /// Dead, and it was detached: what is left says how it ended.
    Ended,
    /// The same, and somebody had asked for its end.
    Stopped,
    /// Alive, or dead, with a state that this program cannot read.
    Unreadable,
}

impl Condition {
    /// As a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ended => "ended",
            Self::Stopped => "stopped",
            Self::Unreadable => "unreadable",
        }
    }
}

/// A machine as its folder shows it.
///
/// ```no_run
/// use std::time::Duration;
///
/// use vmm::runtime::Runtime;
///
/// // What `pontoon stop web` does, without its patience.
/// let machine = Runtime::open()?.find_alive(&"web".parse()?)?;
/// let process = machine.process()?;
/// machine.control()?.power_button()?;
/// if !process.wait(Duration::from_secs(10)) {
///     process.kill()?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Entry {
    runtime: Runtime,
    name: MachineName,
    dir: PathBuf,
    alive: bool,
    state: Result<State, StateError>,
}

impl Runtime {
    /// The machines that there are, by name; those that have ended and left something are among them. Tidies up after
    /// machines that were killed.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, RuntimeError> {
        let reading = || RuntimeError::io("reading", self.path());
        let (mut found, mut removals) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(self.path()).map_err(reading())? {
            let name = entry.map_err(reading())?.file_name();
            match name.to_str().and_then(|name| name.parse().ok()) {
                Some(name) => found.extend(self.look(&name)),
                None if is_half_removed(&name) => removals.push(name),
                None => {}
            }
        }
        // If it is being removed right now, its remover has the lock, and nothing is there afterwards.
        if !removals.is_empty()
            && let Ok(outer) = Outer::take(self.path())
        {
            self.finish_removals(&outer, &removals);
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The machine of that name, alive or ended.
    ///
    /// # Errors
    /// [`RuntimeError::Unknown`] when there is none.
    pub fn find(&self, name: &MachineName) -> Result<Entry, RuntimeError> {
        self.look(name).ok_or_else(|| RuntimeError::Unknown(name.clone()))
    }

    /// The living machine of that name.
    ///
    /// # Errors
    /// [`RuntimeError::NotRunning`] when it has ended, [`RuntimeError::Unknown`] when there is none.
    pub fn find_alive(&self, name: &MachineName) -> Result<Entry, RuntimeError> {
        let entry = self.find(name)?;
        if entry.alive { Ok(entry) } else { Err(RuntimeError::NotRunning(name.clone())) }
    }

    /// What is there of that name; nothing, if it vanishes meanwhile.
    fn look(&self, name: &MachineName) -> Option<Entry> {
        let dir = self.machine(name);
        if !fs::symlink_metadata(&dir).is_ok_and(|meta| meta.is_dir()) {
            return None;
        }
        let held = lock::is_held(&dir.join("lock")).unwrap_or(false);
        let (alive, state) = match (held, State::read(&dir)) {
            (false, Ok(state)) if state.state == Phase::Ended => (false, Ok(state)),
            (true, Ok(state)) => (true, Ok(state)),
            // Dead without a word, or just being made or removed.
            (_, state) => match self.look_closely(name) {
                Ok(seen) => seen?,
                Err(error) => {
                    tracing::info!(%name, %error, "what a dead machine left stays");
                    (held, state)
                }
            },
        };
        Some(Entry { runtime: self.clone(), name: name.clone(), dir, alive, state })
    }
}

impl Entry {
    /// Its name.
    pub fn name(&self) -> &MachineName {
        &self.name
    }

    /// Whether its process was alive when it was looked at.
    pub fn is_alive(&self) -> bool {
        self.alive
    }

    /// What it says of itself.
    pub fn state(&self) -> Result<&State, &StateError> {
        self.state.as_ref()
    }

    /// What it is doing.
    pub fn condition(&self) -> Condition {
        match (&self.state, self.alive) {
            (Err(_), _) => Condition::Unreadable,
            (Ok(State { exit: Some(exit), .. }), false) if exit.stopped => Condition::Stopped,
            (Ok(_), false) => Condition::Ended,
            (Ok(state), true) if state.state == Phase::Starting => Condition::Starting,
            (Ok(_), true) => Condition::Running,
        }
    }

    /// For how long it has been alive, by a clock that nobody sets; `None` when it has ended or does not tell. The time that the host
    /// slept does not count.
    pub fn age(&self) -> Option<Duration> {
        let started = self.state().ok().filter(|_| self.alive)?.started_monotonic?;
        Some(Duration::from_secs(monotonic().saturating_sub(started)))
    }

    /// The path of a file in its folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// The agent of its guest, if the machine has a way to it. Whether there is an agent only asking tells.
    pub fn agent(&self) -> Option<agent::Client> {
        self.state().ok()?.vsock.as_ref().map(agent::Client::vsock)
    }

    /// A connection to its control socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn control(&self) -> Result<Client, ControlError> {
        Client::connect(&self.file(CONTROL_SOCKET))
    }

    /// Its process, for sure: not one that has got its number since.
    ///
    /// # Errors
    /// [`RuntimeError::NotRunning`] when it is not alive any more.
    pub fn process(&self) -> Result<Process, RuntimeError> {
        let dead = || RuntimeError::NotRunning(self.name.clone());
        let path = self.dir.join("lock");
        let held = || lock::is_held(&path).map_err(RuntimeError::io("looking at", &path));
        // Nobody claims a name now: a lock that is held is held by the process that wrote the state.
        let _outer = Outer::take(self.runtime.path())?;
        let state = State::read(&self.dir).map_err(|_| dead())?;
        let pid = i32::try_from(state.pid).ok().and_then(Pid::from_raw).ok_or_else(dead)?;
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Err(dead()),
            Err(e) => return Err(RuntimeError::io("opening the process of", &self.dir)(e)),
        };
        // Held still, so the process lived while its number was looked up.
        if held()? { Ok(Process { pid: state.pid, fd }) } else { Err(dead()) }
    }
}

/// A machine's process.
///
/// ```no_run
/// use std::time::Duration;
///
/// use vmm::runtime::Runtime;
///
/// // A descriptor, not a number: never another process that got the number since.
/// let process = Runtime::open()?.find_alive(&"web".parse()?)?.process()?;
/// process.terminate()?;
/// assert!(process.wait(Duration::from_secs(10)), "{} still lives", process.pid());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: OwnedFd,
}

impl Process {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end, for at most `limit`; false when it still lives.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = deadline::after(limit);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return ready > 0,
                Err(Errno::INTR) => {}
                Err(e) => {
                    tracing::warn!(pid = self.pid, error = %e, "waiting for the process failed");
                    return false;
                }
            }
        }
    }

    /// Asks it to end in order (SIGTERM): as if the machine's plug were pulled. One that is gone already is no error.
    ///
    /// # Errors
    /// When we may not.
    pub fn terminate(&self) -> std::io::Result<()> {
        self.signal(Signal::TERM)
    }

    /// Kills it (SIGKILL). One that is gone already is no error.
    ///
    /// # Errors
    /// When we may not.
    pub fn kill(&self) -> std::io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> std::io::Result<()> {
        match pidfd_send_signal(&self.fd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Process {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
