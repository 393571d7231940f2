//! The other end: asks a machine, and gets streams from it.

use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use serde_json::Value;

use super::protocol::{Flow, Request, Status};

/// How long a machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of an answer.
const ANSWER_MAX: usize = 1 << 20;

/// Why a machine could not be asked.
///
/// ```
/// use vmm::runtime::control::{Client, ControlError};
///
/// let nobody = Client::connect("/no/such/control.sock".as_ref()).err();
/// assert!(matches!(nobody, Some(ControlError::Connect(_))));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("its control socket does not answer: {0}; has the machine just ended? `pontoon ps -a` tells")]
    Connect(io::Error),
    /// It took too long, or hung up.
    #[error(
        "it did not answer in time, or hung up: {0}; is it stopped, or its host busy? try again, or end it: pontoon kill"
    )]
    Io(#[from] io::Error),
    /// The answer makes no sense.
    #[error("it answers in a way that this program does not know: {0}; use the pontoon that started it")]
    Malformed(String),
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a machine's control socket.
///
/// ```no_run
/// use vmm::runtime::Runtime;
///
/// let mut control = Runtime::open()?.find_alive(&"web".parse()?)?.control()?;
/// let status = control.status()?;
/// println!("up for {} s", status.uptime_ms / 1000);
/// for lease in status.leases {
///     println!("{} has {}", lease.mac, lease.address);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`ControlError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        Self::connect_within(path, PATIENCE)
    }

    /// The same, with a limit of your own on every answer instead of five seconds.
    ///
    /// # Errors
    /// [`ControlError::Connect`].
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self, ControlError> {
        let failed = |e: rustix::io::Errno| ControlError::Connect(e.into());
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket: OwnedFd =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(failed)?;
        // It bounds the connect, too, which waits while the machine does not take connections.
        for which in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&socket, which, Some(patience)).map_err(failed)?;
        }
        connect(&socket, &address).map_err(failed)?;
        Ok(Self { stream: socket.into() })
    }

    /// Asks for what the machine is doing.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn status(&mut self) -> Result<Status, ControlError> {
        let answer = self.ask(&Request::Status)?;
        Status::deserialize_from(answer["status"].clone())
    }

    /// Asks for the TCP connections through the machine's NAT.
    ///
    /// # Errors
    /// [`ControlError`]; it does not answer while the guest has not started its NIC.
    pub fn flows(&mut self) -> Result<Vec<Flow>, ControlError> {
        let answer = self.ask(&Request::Flows)?;
        serde_json::from_value(answer["flows"].clone()).map_err(|e| ControlError::Malformed(e.to_string()))
    }

    /// Presses the machine's power button. It is the guest's to do something about it.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn power_button(&mut self) -> Result<(), ControlError> {
        self.ask(&Request::PowerButton).map(drop)
    }

    /// Tells the machine that its guest is being asked to shut down, so that it has been stopped when it ends.
    ///
    /// # Errors
    /// [`ControlError`]; a machine of an older version refuses.
    pub fn stopping(&mut self) -> Result<(), ControlError> {
        self.ask(&Request::Stopping).map(drop)
    }

    /// Ends the machine at once.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn kill(&mut self) -> Result<(), ControlError> {
        self.ask(&Request::Kill).map(drop)
    }

    /// The console as a stream, which begins with its recent output. Says whether what is written to it is typed to the guest:
    /// not when somebody else types, nor without `write`.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn console(mut self, write: bool) -> Result<(UnixStream, bool), ControlError> {
        let answer = self.ask(&Request::Console { write })?;
        let writer = answer["writer"].as_bool().unwrap_or(false);
        Ok((self.into_stream()?, writer))
    }

    /// A TCP connection to a port of the guest, or of one of several guests.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn open(mut self, guest: Option<Ipv4Addr>, port: u16) -> Result<UnixStream, ControlError> {
        self.ask(&Request::Connect { port, guest })?;
        self.into_stream()
    }

    fn into_stream(self) -> Result<UnixStream, ControlError> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)?;
        Ok(self.stream)
    }

    fn ask(&mut self, request: &Request) -> Result<Value, ControlError> {
        let mut line = serde_json::to_vec(request).map_err(|e| ControlError::Malformed(e.to_string()))?;
        line.push(b'\n');
        self.stream.write_all(&line)?;
        let line = self.line()?;
        let answer: Value =
            serde_json::from_slice(&line).map_err(|e| ControlError::Malformed(e.to_string()))?;
        match (&answer["ok"], &answer["error"]) {
            (Value::Bool(true), _) => Ok(answer),
            (_, Value::String(why)) => Err(ControlError::Refused(why.clone())),
            _ => Err(ControlError::Malformed("neither ok nor an error".to_owned())),
        }
    }

    /// One line, and nothing of what is behind it: that may be a stream already.
    fn line(&self) -> Result<Vec<u8>, ControlError> {
        let mut line = Vec::new();
        let mut chunk = [0; 4096];
        while line.len() < ANSWER_MAX {
            let (seen, _) = recv(&self.stream, &mut chunk, RecvFlags::PEEK).map_err(io::Error::from)?;
            if seen == 0 {
                return Err(ControlError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            let end = chunk[..seen].iter().position(|b| *b == b'\n');
            let take = end.map_or(seen, |end| end + 1);
            let (taken, _) =
                recv(&self.stream, &mut chunk[..take], RecvFlags::empty()).map_err(io::Error::from)?;
            line.extend_from_slice(&chunk[..taken]);
            if end.is_some() && taken == take {
                return Ok(line);
            }
        }
        Err(ControlError::Malformed("an answer without end".to_owned()))
    }
}

impl Status {
    fn deserialize_from(value: Value) -> Result<Self, ControlError> {
        serde_json::from_value(value).map_err(|e| ControlError::Malformed(e.to_string()))
    }
}
