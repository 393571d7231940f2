//! The door of a running network: what the owner of the machine may ask for while the network belongs to a NIC.
//!
//! ```text
//!   any thread                         whoever serves the network
//!   NatHandle ── request, bell ──────> Nat::recv: opens a connection to the guest
//!        └────── leases <───────────── Nat::recv: publishes them when DHCP changed one
//! ```
//!
//! **Connections into the guest.** A stream of this host (one end of a Unix socket pair, an accepted Unix socket) becomes a TCP
//! connection from the gateway to a port of a guest, as if the port were published for this one client. Bytes, half-closes
//! and back-pressure pass as through a published port. While no guest is known, a stream waits for [`PATIENCE`]; then, or when the
//! guest refuses, it is closed.
//!
//! **Nothing here waits.** A request is queued and an eventfd of the network's epoll is written; at most [`WAITING`] streams wait. A
//! network that nobody serves yet (the guest has not started its NIC) serves requests when it is.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::cx::Cx;
use super::dhcp::Lease;
use super::tcp::{Tcp, TcpFlow};
use crate::DropReason;

/// How long a stream waits for a guest to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// Streams and questions that wait at most.
const WAITING: usize = 64;

/// Why a stream was not taken.
///
/// ```
/// use std::os::unix::net::UnixStream;
///
/// use net::nat::{ConnectError, Nat, NatConfig};
///
/// let mut nat = Nat::new(NatConfig::default())?;
/// let handle = nat.handle()?;
/// let gateway = Some(nat.config().gateway());
/// let refused = handle.connect(gateway, 22, UnixStream::pair()?.0.into());
/// assert!(matches!(refused, Err(ConnectError::NoGuest { .. })));
/// // 64 streams may wait for a guest to appear, and no more.
/// for _ in 0..64 {
///     handle.connect(None, 22, UnixStream::pair()?.0.into())?;
/// }
/// let refused = handle.connect(None, 22, UnixStream::pair()?.0.into());
/// assert!(matches!(refused, Err(ConnectError::Busy)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The network is gone: the machine has ended.
    #[error("the network has ended with its machine")]
    Ended,
    /// Too many are waiting already.
    #[error("{WAITING} connections wait for the guest already; is it up?")]
    Busy,
    /// No guest can have this address.
    #[error("{address} is no guest's address in {subnet}")]
    NoGuest {
        /// The address that was asked for.
        address: Ipv4Addr,
        /// The network.
        subnet: super::Subnet,
    },
}

type Answer = Box<dyn FnOnce(Vec<TcpFlow>) + Send>;

/// A stream on its way into the guest.
struct Visitor {
    stream: OwnedFd,
    guest: Option<Ipv4Addr>,
    port: u16,
}

#[derive(Default)]
struct State {
    visitors: Vec<Visitor>,
    questions: Vec<Answer>,
    leases: Vec<Lease>,
    ended: bool,
}

struct Shared {
    bell: OwnedFd,
    subnet: super::Subnet,
    state: Mutex<State>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // It fails only when the counter is full, and then the bell has been heard.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

/// Reaches into a network that is in use elsewhere. See the module's documentation.
///
/// ```
/// use std::os::unix::net::UnixStream;
///
/// use net::nat::{ConnectError, Nat, NatConfig};
///
/// let mut nat = Nat::new(NatConfig::on_free_subnet()?)?;
/// let handle = nat.handle()?;
/// let (ours, theirs) = UnixStream::pair()?;
/// // `ours` is a TCP stream to port 22 of the guest, as soon as there is one.
/// handle.connect(None, 22, theirs.into())?;
/// // The handle outlives the network, and says so.
/// drop(nat);
/// let refused = handle.connect(None, 22, UnixStream::pair()?.0.into());
/// assert!(matches!(refused, Err(ConnectError::Ended)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct NatHandle(Arc<Shared>);

impl std::fmt::Debug for NatHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatHandle").field("subnet", &self.0.subnet).finish_non_exhaustive()
    }
}

impl NatHandle {
    /// Makes `stream`, a connected Unix stream socket, a TCP connection to `port` of a guest: the one with that
    /// address, or the first that was heard of. A refusal is the stream's end.
    ///
    /// # Errors
    /// [`ConnectError`]; the stream is closed then.
    pub fn connect(&self, guest: Option<Ipv4Addr>, port: u16, stream: OwnedFd) -> Result<(), ConnectError> {
        if let Some(address) = guest.filter(|address| !self.0.subnet.is_guest(*address)) {
            return Err(ConnectError::NoGuest { address, subnet: self.0.subnet });
        }
        let mut state = self.0.lock();
        if state.ended {
            return Err(ConnectError::Ended);
        }
        if state.visitors.len() >= WAITING {
            return Err(ConnectError::Busy);
        }
        state.visitors.push(Visitor { stream, guest, port });
        drop(state);
        self.0.ring();
        Ok(())
    }

    /// The DHCP leases that hold, in the order of their addresses.
    pub fn leases(&self) -> Vec<Lease> {
        let now = Instant::now();
        self.0.lock().leases.iter().filter(|lease| lease.until > now).cloned().collect()
    }

    /// The network's subnet.
    pub fn subnet(&self) -> super::Subnet {
        self.0.subnet
    }

    /// Asks for the TCP connections there are; `answer` is called, once, by whoever serves the network, and must not block. It
    /// is dropped uncalled when the network ends or [`WAITING`] questions wait already.
    pub fn flows(&self, answer: impl FnOnce(Vec<TcpFlow>) + Send + 'static) {
        let mut state = self.0.lock();
        if state.ended || state.questions.len() >= WAITING {
            return;
        }
        state.questions.push(Box::new(answer));
        drop(state);
        self.0.ring();
    }
}

/// The network's side.
pub(super) struct Door {
    shared: Arc<Shared>,
    /// Streams for which there is no guest yet, and until when they wait.
    waiting: VecDeque<(Instant, Visitor)>,
    rung: bool,
    /// The neighbours when they were last looked at.
    seen: u64,
}

impl Door {
    /// A door, and its bell for the network's epoll.
    pub(super) fn new(subnet: super::Subnet, leases: Vec<Lease>) -> io::Result<(Self, OwnedFd)> {
        let bell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let ours = bell.as_fd().try_clone_to_owned()?;
        let state = Mutex::new(State { leases, ..State::default() });
        let shared = Arc::new(Shared { bell, subnet, state });
        Ok((Self { shared, waiting: VecDeque::new(), rung: false, seen: 0 }, ours))
    }

    pub(super) fn handle(&self) -> NatHandle {
        NatHandle(Arc::clone(&self.shared))
    }

    /// The bell rang.
    pub(super) fn ring(&mut self) {
        self.rung = true;
    }

    /// The leases have changed.
    pub(super) fn publish(&self, leases: Vec<Lease>) {
        self.shared.lock().leases = leases;
    }

    /// When somebody has waited long enough.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.front().map(|(until, _)| *until)
    }

    /// Serves what was asked for, as far as there are guests.
    pub(super) fn serve(&mut self, cx: &mut Cx<'_>, tcp: &mut Tcp) {
        let news = self.seen != cx.neighbours.version() || self.deadline().is_some_and(|at| at <= cx.now);
        if !self.rung && (self.waiting.is_empty() || !news) {
            return;
        }
        let mut questions = Vec::new();
        if std::mem::take(&mut self.rung) {
            let mut state = self.shared.lock();
            questions.append(&mut state.questions);
            let until = cx.now + PATIENCE;
            self.waiting.extend(state.visitors.drain(..).map(|visitor| (until, visitor)));
        }
        self.seen = cx.neighbours.version();
        for _ in 0..self.waiting.len() {
            let Some((until, visitor)) = self.waiting.pop_front() else { break };
            match visitor.guest.or_else(|| cx.neighbours.first()) {
                Some(guest) => {
                    tcp.visit(cx, visitor.stream, SocketAddrV4::new(guest, visitor.port));
                }
                None if cx.now < until && self.waiting.len() < WAITING => {
                    self.waiting.push_back((until, visitor));
                }
                None => cx.drop(DropReason::NoFlow, || "a stream of this host: no guest".to_owned()),
            }
        }
        // What was asked for before the question is in the answer.
        questions.into_iter().for_each(|answer| answer(tcp.flows()));
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        // Closing the streams tells whoever waits at their other ends.
        state.visitors.clear();
        state.questions.clear();
    }
}
