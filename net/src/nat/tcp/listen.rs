//! Published ports: a listener of the host, and what becomes of its clients.
//!
//! The host's kernel accepts a client before the guest was asked; what follows makes up for it. The guest gets a SYN
//! from the client's address (the gateway's, for a client that the guest could not answer). If its port is
//! closed, the client gets a RST.
//!
//! While no guest is known that the port could lead to, clients wait in the host's backlog, for [`PATIENCE`] at
//! most; then they get a RST. A guest that is known but silent is asked four times (15 s). They wait there, too, while
//! the host has no descriptor or no memory for them; it is asked again every [`RETRY`].

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::table::Key;
use super::{Tcp, dial};
use crate::DropReason;
use crate::nat::config::{NatError, Publish, PublishProtocol, PublishTo};
use crate::nat::cx::Cx;
use crate::nat::host::{Close, SockId};
use crate::nat::poller::{Owner, Token};

/// How long clients wait for a guest to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the host is left alone that could not accept.
const RETRY: Duration = Duration::from_secs(1);
/// Clients that one call accepts, so that a flood does not keep others waiting.
const ACCEPTS: usize = 64;
/// Ports that are tried for a client whose own is taken.
const PORT_TRIES: u16 = 64;

/// A published port that is open.
#[derive(Debug)]
pub(super) struct Listener {
    publish: Publish,
    sock: SockId,
    /// Clients may wait in the backlog, since then.
    since: Option<Instant>,
    /// The host could not accept them; it is asked again then.
    again: Option<Instant>,
}

/// What is left in a listener's backlog.
enum Left {
    Nobody,
    Perhaps,
    /// Those for whom the host has nothing now.
    Refused,
}

/// All of them, in the order of the configuration.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    all: Vec<Listener>,
    /// Those with clients that could not be served yet.
    waiting: VecDeque<usize>,
    /// The neighbours when they were last looked at.
    seen: u64,
}

impl Listeners {
    /// Opens every published TCP port.
    pub(super) fn open(&mut self, cx: &mut Cx<'_>) -> Result<(), NatError> {
        let tcp = cx.config.publish.iter().filter(|p| p.protocol == PublishProtocol::Tcp);
        for (at, publish) in tcp.enumerate() {
            let token = Token {
                owner: Owner::TcpListener,
                slot: u32::try_from(at).unwrap_or(u32::MAX),
                generation: 0,
            };
            let addr = SocketAddrV4::new(publish.addr, publish.host_port);
            let sock = cx.host.listen(addr, token).map_err(|error| refused(publish, error))?;
            let listener = Listener { publish: publish.clone(), sock, since: None, again: None };
            self.all.push(listener);
        }
        Ok(())
    }

    /// Where the published ports listen, in the order of the configuration.
    pub(super) fn addrs(&self, cx: &mut Cx<'_>) -> Vec<(Publish, SocketAddrV4)> {
        let addr = |l: &Listener| cx.host.local_addr(l.sock).map(|addr| (l.publish.clone(), addr));
        self.all.iter().map(addr).filter_map(Result::ok).collect()
    }

    /// A client has come.
    pub(super) fn ready(&mut self, slot: u32, now: Instant) {
        let at = slot as usize;
        if at < self.all.len() && !self.waiting.contains(&at) {
            self.all[at].since.get_or_insert(now);
            self.waiting.push_back(at);
        }
    }

    /// When somebody has waited long enough.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let due = |at: &usize| {
            let listener = &self.all[*at];
            listener.again.or_else(|| listener.since.map(|since| since + PATIENCE))
        };
        self.waiting.iter().filter_map(due).min()
    }
}

fn refused(publish: &Publish, source: io::Error) -> NatError {
    let publish = publish.clone();
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => NatError::PortInUse { publish },
        Some(libc::EACCES) => NatError::PortPrivileged { publish },
        Some(libc::EADDRNOTAVAIL) => NatError::NoSuchAddress { publish },
        _ => NatError::Publish { publish, source },
    }
}

/// Whether the host lacks what an accept needs.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

fn guest(cx: &Cx<'_>, to: PublishTo) -> Option<Ipv4Addr> {
    match to {
        PublishTo::First => cx.neighbours.first(),
        PublishTo::Mac(mac) => cx.neighbours.addr_of(mac),
        PublishTo::Addr(addr) => Some(addr),
    }
}

impl Tcp {
    /// Serves clients that have come, as far as there are guests.
    pub(super) fn accept(&mut self, cx: &mut Cx<'_>) {
        self.listeners.seen = cx.neighbours.version();
        for _ in 0..self.listeners.waiting.len() {
            let Some(at) = self.listeners.waiting.pop_front() else { return };
            let listener = &self.listeners.all[at];
            let (sock, publish) = (listener.sock, listener.publish.clone());
            let guest = guest(cx, publish.to);
            let patient = listener.since.is_none_or(|since| cx.now < since + PATIENCE);
            if guest.is_none() && patient {
                self.listeners.waiting.push_back(at);
                continue;
            }
            let to = guest.map(|guest| SocketAddrV4::new(guest, publish.guest_port));
            let left = self.accept_some(cx, sock, to);
            let listener = &mut self.listeners.all[at];
            listener.again = None;
            match left {
                Left::Nobody => {
                    listener.since = None;
                    continue;
                }
                Left::Perhaps => self.fresh = true,
                Left::Refused => listener.again = Some(cx.now + RETRY),
            }
            self.listeners.waiting.push_back(at);
        }
    }

    /// Whether `accept` has something to do.
    pub(super) fn has_clients(&self, cx: &Cx<'_>) -> bool {
        let due = self.listeners.deadline().is_some_and(|at| at <= cx.now);
        !self.listeners.waiting.is_empty()
            && (self.fresh || due || self.listeners.seen != cx.neighbours.version())
    }

    /// Accepts clients; those that lead nowhere get a RST.
    fn accept_some(&mut self, cx: &mut Cx<'_>, listener: SockId, to: Option<SocketAddrV4>) -> Left {
        for _ in 0..ACCEPTS {
            let (sock, client) = match cx.host.accept(listener) {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Left::Nobody,
                Err(error) => {
                    let short = is_shortage(&error);
                    let reason = if short { DropReason::TableFull } else { DropReason::HostSocket };
                    cx.drop(reason, || format!("accept on a published port: {error}"));
                    if short {
                        return Left::Refused;
                    }
                    continue; // accept(2): an error of that client's connection, which is gone
                }
            };
            let opened = to.is_some_and(|guest| self.open_to(cx, sock, guest, client));
            if !opened {
                cx.drop(DropReason::NoFlow, || format!("client {client} of a published port: no guest"));
                cx.host.close(sock, Close::Reset);
            }
        }
        Left::Perhaps
    }

    /// Opens a connection from the gateway to a guest for a stream of this host; one that can't be opened is closed.
    pub(crate) fn visit(&mut self, cx: &mut Cx<'_>, stream: OwnedFd, guest: SocketAddrV4) {
        let full = self.table.len() >= cx.config.limits.tcp_flows;
        let port = self.next_visitor();
        let Some(key) = self.free_key(guest, cx.config.gateway(), port) else {
            return cx.drop(DropReason::TableFull, || {
                format!("a stream of this host to {guest}: no port is free")
            });
        };
        if full {
            return cx.drop(DropReason::TableFull, || format!("a stream of this host to {guest}"));
        }
        match cx.host.adopt_stream(stream, self.table.next_token()) {
            Ok(sock) => self.insert(cx, key, sock, None),
            Err(error) => {
                cx.drop(DropReason::HostSocket, || format!("a stream of this host to {guest}: {error}"));
            }
        }
    }

    /// A port of the dynamic range (RFC 6335 §6), another one for each visitor.
    fn next_visitor(&mut self) -> u16 {
        self.visitors = self.visitors.wrapping_add(1);
        0xc000 | self.visitors & 0x3fff
    }

    /// The first pair of addresses from `port` on that no flow has.
    fn free_key(&self, guest: SocketAddrV4, addr: Ipv4Addr, port: u16) -> Option<Key> {
        (0..PORT_TRIES)
            .map(|n| SocketAddrV4::new(addr, port.wrapping_add(n).max(1)))
            .map(|world| Key { guest, world })
            .find(|key| self.table.find(key).is_none())
    }

    /// Opens a connection to a guest for a client. Says whether that was possible.
    fn open_to(&mut self, cx: &mut Cx<'_>, sock: SockId, guest: SocketAddrV4, client: SocketAddrV4) -> bool {
        if self.table.len() >= cx.config.limits.tcp_flows {
            return false;
        }
        let addr = dial::client(cx.config, *client.ip());
        let Some(key) = self.free_key(guest, addr, client.port()) else { return false };
        let token = self.table.next_token();
        if cx.host.watch(sock, token).is_err() {
            return false;
        }
        self.insert(cx, key, sock, None);
        true
    }
}
