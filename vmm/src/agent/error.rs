//! Why something was not done in a running machine.

use std::io;
use std::path::PathBuf;

use super::wire;

/// Why the agent did not do it.
///
/// ```
/// use vmm::agent::{AgentError, Client};
///
/// let nobody = Client::vsock("/nonexistent/vsock.sock").ping();
/// assert!(matches!(nobody, Err(AgentError::Connect { .. })));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The machine's socket is not there, or nobody serves it.
    #[error("could not reach the machine at {}: {source}; `pontoon ps` shows which machines run", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The machine runs, but nobody listens on the agent's port.
    #[error(
        "no agent listens in the machine (vsock port {port}): either it is still booting, or its image has none. Images that \
         `pontoon image build` makes have it since this version (build again: `pontoon image build debian`); \
         docs/exec.md tells how to put it into another"
    )]
    Missing {
        /// The vsock port.
        port: u32,
    },
    /// The machine's kernel has not answered: its driver for vsock is not there, or not there yet.
    #[error(
        "the machine's vsock device has not answered within {seconds} s: it is still booting, or its kernel does not load \
         vmw_vsock_virtio_transport"
    )]
    NotUp {
        /// How long was waited.
        seconds: u64,
    },
    /// Nothing came back in time.
    #[error("the agent has not answered within {seconds} s; the machine is too busy, or stopped")]
    NoAnswer {
        /// How long was waited.
        seconds: u64,
    },
    /// The agent is of another version of the protocol.
    #[error(
        "the machine's agent speaks version {theirs} of the protocol and this pontoon {}; build the image again",
        wire::VERSION
    )]
    Version {
        /// The agent's.
        theirs: u8,
    },
    /// The agent, or whoever answers in its place, does not keep to the protocol.
    #[error("the machine's agent does not keep to the protocol (it sent {0}); the connection was closed")]
    Protocol(String),
    /// The connection ended before the answer was complete.
    #[error(
        "the connection to the machine's agent ended early: the machine has stopped, or somebody ended the agent in it"
    )]
    Ended,
    /// The command could not be started.
    #[error("could not run {program} in the machine: could not {reason}")]
    NotStarted {
        /// The command's name.
        program: String,
        /// The status that a shell would give: 127 when it is not there, 126 otherwise.
        status: u8,
        /// Why.
        reason: String,
    },
    /// Something went wrong in the machine.
    #[error("in the machine: {0}")]
    Guest(String),
    /// The captured output is longer than the limit.
    #[error("the command wrote more than {limit} bytes, the limit that was set; it was ended")]
    OutputLimit {
        /// The limit of each stream, in bytes.
        limit: usize,
    },
    /// The command's time is over.
    #[error("the command took longer than {seconds} s, the limit that was set; it was ended")]
    TimedOut {
        /// The limit.
        seconds: f64,
    },
    /// The request can't be sent.
    #[error("{0} cannot be asked of the agent")]
    Request(String),
    /// Something went wrong on this host.
    #[error("could not {doing}: {source}")]
    Local {
        /// What was to be done, such as `open /tmp/x`.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// What was to be copied can't be.
    #[error("could not copy {path}: {reason}")]
    Unfit {
        /// Where.
        path: String,
        /// Why.
        reason: String,
    },
}

/// A step on this host that failed.
pub(super) fn local(doing: impl Into<String>) -> impl FnOnce(io::Error) -> AgentError {
    let doing = doing.into();
    move |source| AgentError::Local { doing, source }
}

/// Text from the guest as it may be shown: a terminal's control characters are no part of a message.
pub(super) fn shown(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(1024)];
    let visible = |c: char| if c.is_control() { '?' } else { c };
    String::from_utf8_lossy(cut).chars().map(visible).collect()
}

/// A failure that the agent reports: what it could not do, and why.
pub(super) fn failure(failure: &wire::Failure<'_>) -> String {
    let doing = shown(failure.doing);
    if failure.errno == 0 {
        doing
    } else {
        format!("{doing}: {}", io::Error::from_raw_os_error(failure.errno.into()))
    }
}
