//! The client: where an agent is, and the short requests.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connect::{Address, PATIENCE};
use super::error::{AgentError, local, shown};
use super::link::Link;
use super::wire::{Kind, PORT};
use crate::deadline;
use crate::folder::PrivateFolder;

/// How long the agent may take to say that it has begun, or that it can't.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// How long a copy may make no progress: a slow disk's patience.
const COPY: Duration = Duration::from_secs(120);
/// How often a machine that is still booting is asked again.
const AGAIN: Duration = Duration::from_millis(100);

/// A way to a connection that somebody else knows.
type Connect = dyn Fn() -> io::Result<OwnedFd> + Send + Sync;

/// The agent of one machine. Cheap to clone; every call makes a connection of its own.
///
/// ```no_run
/// use std::time::Duration;
///
/// use vmm::agent::Command;
/// use vmm::machine::Machine;
///
/// # let image = guest_images::Store::open_default()?.get("debian")?;
/// // Its init starts a shell that nobody types to; what is to be done comes through the agent.
/// let (builder, agent) = Machine::builder().guest(&image)?.agent()?;
/// let machine = builder.build()?.start()?;
///
/// agent.wait_until_ready(Duration::from_secs(60))?;
/// agent.put("input.csv", "/root/input.csv")?;
/// let output = agent.output(Command::new("wc").arg("-l").arg("/root/input.csv"), 4096)?;
/// assert!(output.status.success());
/// agent.power_off()?;
/// machine.wait();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Client {
    way: Way,
    /// How long the machine may take to accept a connection.
    accept: Duration,
    /// The socket's, if nobody else looks after it.
    _folder: Option<Arc<PrivateFolder>>,
}

#[derive(Clone)]
enum Way {
    Address(Address),
    Custom(Arc<Connect>),
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.way {
            Way::Address(address) => f.debug_tuple("Client").field(address).finish(),
            Way::Custom(_) => f.write_str("Client(..)"),
        }
    }
}

impl Client {
    /// The agent behind a machine's vsock socket ([`PORT`]).
    pub fn vsock(path: impl Into<PathBuf>) -> Self {
        Self::vsock_port(path, PORT)
    }

    /// The same on another vsock port.
    pub fn vsock_port(path: impl Into<PathBuf>, port: u32) -> Self {
        Self::at(Way::Address(Address::Vsock(path.into(), port)))
    }

    /// An agent that listens on a Unix socket (`pontoon-agent --unix PATH`).
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::at(Way::Address(Address::Unix(path.into())))
    }

    /// An agent that `connect` makes connections to: stream sockets on which nothing has been said.
    pub fn with(connect: impl Fn() -> io::Result<OwnedFd> + Send + Sync + 'static) -> Self {
        Self::at(Way::Custom(Arc::new(connect)))
    }

    fn at(way: Way) -> Self {
        Self { way, accept: PATIENCE, _folder: None }
    }

    /// The same agent, whose machine may take so long to accept a connection, instead of ten seconds. It takes that long only where the
    /// guest's kernel has no driver for vsock, or has it not yet: [`AgentError::NotUp`].
    ///
    /// ```
    /// use std::os::unix::net::UnixListener;
    /// use std::time::Duration;
    ///
    /// use vmm::agent::{AgentError, Client};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// // A socket that answers no more than a guest without a driver does.
    /// let socket = folder.path().join("vsock.sock");
    /// let _listener = UnixListener::bind(&socket)?;
    /// let agent = Client::vsock(&socket).accepting_within(Duration::from_millis(1));
    /// assert!(matches!(agent.ping(), Err(AgentError::NotUp { .. })));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn accepting_within(self, patience: Duration) -> Self {
        Self { accept: patience, ..self }
    }

    /// Keeps the folder in which the socket is.
    pub(crate) fn keeping(self, folder: Arc<PrivateFolder>) -> Self {
        Self { _folder: Some(folder), ..self }
    }

    /// A new connection.
    pub(super) fn link(&self) -> Result<Link, AgentError> {
        self.link_within(self.accept)
    }

    fn link_within(&self, patience: Duration) -> Result<Link, AgentError> {
        let fd = match &self.way {
            Way::Address(address) => address.connect(patience)?,
            Way::Custom(connect) => connect().map_err(local("connect to the agent"))?,
        };
        Link::new(fd, COPY)
    }

    /// Asks for one answer of this kind; its payload.
    fn ask(&self, request: Kind, expected: Kind, patience: Duration) -> Result<Vec<u8>, AgentError> {
        let mut link = self.link_within(patience.min(self.accept))?;
        link.queue(request, &[]);
        match link.answer(patience)? {
            (kind, payload) if kind == expected => Ok(payload),
            (kind, _) => Err(AgentError::Protocol(format!("{kind:?} in answer to {request:?}"))),
        }
    }

    /// The agent's version.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn ping(&self) -> Result<String, AgentError> {
        self.ask(Kind::Ping, Kind::Pong, ANSWER).map(|version| shown(&version))
    }

    /// Pings until the agent answers, for about `patience`: a machine that has just been started has none yet.
    ///
    /// # Errors
    /// [`AgentError`] of the last attempt; at once for what waiting does not change.
    pub fn wait_until_ready(&self, patience: Duration) -> Result<String, AgentError> {
        let deadline = deadline::after(patience);
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(AGAIN);
            match self.ask(Kind::Ping, Kind::Pong, left.min(ANSWER)) {
                Err(
                    AgentError::Missing { .. }
                    | AgentError::NotUp { .. }
                    | AgentError::Ended
                    | AgentError::NoAnswer { .. },
                ) if Instant::now() + AGAIN < deadline => {
                    // Nothing tells the host that a guest's port opens.
                    std::thread::sleep(AGAIN);
                }
                answer => return answer.map(|version| shown(&version)),
            }
        }
    }

    /// Asks the guest to shut down in order. Returns when it has been asked; the machine ends a little later. Whether it does is
    /// for the caller to see.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn power_off(&self) -> Result<(), AgentError> {
        // systemctl talks to a manager that may be busy.
        match self.ask(Kind::PowerOff, Kind::Done, ANSWER) {
            // A machine may be off before its last bytes are out.
            Ok(_) | Err(AgentError::Ended) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
