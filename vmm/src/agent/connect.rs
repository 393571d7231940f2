//! Ways to an agent: through a machine's vsock socket, or straight to a Unix socket.
//!
//! The vsock socket speaks Firecracker's convention: the host writes `CONNECT <port>\n` and reads `OK <number>\n`; then it is the
//! stream. A port that nobody listens on is a connection that ends instead.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::error::{AgentError, local};

/// How long the machine may take to accept: its kernel answers, no program has to.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// `OK 4294967295\n`, and nothing longer.
const MAX_GREETING: usize = 32;

/// Where an agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// Behind a machine's vsock socket, on this port.
    Vsock(PathBuf, u32),
    /// On a Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// A connection on which nothing has been said.
    pub(super) fn connect(&self, patience: Duration) -> Result<OwnedFd, AgentError> {
        match self {
            Self::Unix(path) => connect_unix(path),
            Self::Vsock(path, port) => {
                let fd = connect_unix(path)?;
                shake_hands(&fd, *port, patience)?;
                Ok(fd)
            }
        }
    }
}

fn connect_unix(path: &Path) -> Result<OwnedFd, AgentError> {
    let failed = |errno: Errno| AgentError::Connect { path: path.to_path_buf(), source: errno.into() };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let fd =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    connect(&fd, &address).map_err(failed)?;
    Ok(fd)
}

fn shake_hands(fd: &OwnedFd, port: u32, patience: Duration) -> Result<(), AgentError> {
    let request = format!("CONNECT {port}\n");
    match rustix::net::send(fd, request.as_bytes(), rustix::net::SendFlags::NOSIGNAL) {
        Ok(length) if length == request.len() => {}
        _ => return Err(AgentError::Missing { port }),
    }
    let mut greeting = Vec::new();
    let deadline = Instant::now() + patience;
    // A byte at a time: what follows the line is the stream's.
    while greeting.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(AgentError::NotUp { seconds: patience.as_secs() }),
            Err(errno) if errno != Errno::INTR => return Err(local("wait for the machine")(errno.into())),
            Ok(_) | Err(_) => {}
        }
        let mut byte = [0];
        match rustix::io::read(fd, &mut byte) {
            Ok(1) if greeting.len() < MAX_GREETING => greeting.extend(byte),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Ok(0) | Err(Errno::CONNRESET) if greeting.is_empty() => return Err(AgentError::Missing { port }),
            Ok(_) => return Err(AgentError::Protocol("no greeting of a vsock socket".to_owned())),
            Err(errno) => return Err(local("read from the machine's socket")(io::Error::from(errno))),
        }
    }
    if greeting.starts_with(b"OK ") {
        Ok(())
    } else {
        Err(AgentError::Protocol(format!("{:?} instead of OK", String::from_utf8_lossy(&greeting))))
    }
}
