//! The DNS forwarder at the gateway (RFC 1035, RFC 5625), over UDP and TCP.
//!
//! ```text
//!   guest ── UDP 53, TCP 53 ──> own names? ── yes ──> answer          names
//!                                    └── no ──> transaction ──> a server of the host's      wire, transaction, resolver
//! ```
//!
//! Questions and answers pass as the bytes they are; see [`wire`]. Over UDP a question gets a socket of its own, so a
//! random port, and a random identifier (RFC 5452); a question that came over TCP is asked over TCP, on a connection that
//! questions share ([`upstream`]). There is no cache: the host's resolver has one, or the guest's.
//!
//! AAAA questions about the world are answered "no data" while the host has no IPv6 default route: guests would try in vain.
//!
//! **Limits**: [`MAX_INFLIGHT`] questions under way and [`MAX_STREAMS`] connections of guests; beyond that SERVFAIL, or a
//! closed connection, counted as `TableFull`. A question repeated while it is under way is passed over. Questions of more
//! than [`MAX_QUESTION`] bytes over UDP are refused (`TooBig`).

mod names;
mod resolver;
mod stream;
#[cfg(test)]
mod tests;
mod transaction;
mod upstream;
mod wire;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use vm_memory::VolatileSlice;

pub(crate) use self::names::Names;
use self::resolver::Resolver;
use self::stream::Stream;
use self::transaction::{ATTEMPT, Client, Transaction, Verdict};
use self::upstream::Upstream;
use self::wire::{BadQuery, Query, Rcode, kind};
use super::cx::{Cx, ServiceStream};
use super::host::Close;
use super::poller::{Events, Owner, Token};
use super::timers::Timers;
use super::udp::slab::Slab;
use super::udp::socket::Outgoing;
use super::udp::wire as udp;
use crate::DropReason;

/// The port.
pub(crate) const PORT: u16 = 53;
/// Questions under way.
pub(crate) const MAX_INFLIGHT: usize = 512;
/// Connections of guests.
pub(crate) const MAX_STREAMS: usize = 64;
/// Bytes of a question over UDP.
pub(crate) const MAX_QUESTION: usize = 4096;
/// Datagrams and reads of one socket in a row.
const TURN: usize = 16;

/// What a socket of the forwarder's belongs to.
#[derive(Debug)]
enum Conn {
    Ask(Box<Transaction>),
    Guest(Stream),
    Upstream(Upstream),
}

/// The forwarder.
#[derive(Debug)]
pub(crate) struct Dns {
    resolver: Resolver,
    conns: Slab<Conn>,
    streams: usize,
    upstreams: usize,
    timers: Timers<u32>,
    /// The server that answered last.
    good: Option<SocketAddrV4>,
    random: RandomState,
    asked: u64,
    buffer: Vec<u8>,
    next_packet_id: u16,
}

impl Dns {
    /// Forwards to `fixed` servers, or to the host's when there are none.
    pub(crate) fn new(fixed: Vec<SocketAddrV4>) -> Self {
        Self {
            resolver: Resolver::new(fixed),
            conns: Slab::default(),
            streams: 0,
            upstreams: 0,
            timers: Timers::default(),
            good: None,
            random: RandomState::new(),
            asked: 0,
            buffer: Vec::new(),
            next_packet_id: 0,
        }
    }

    /// The host's search domains.
    pub(crate) fn search(&mut self, now: Instant) -> &[String] {
        self.resolver.refresh(now);
        self.resolver.search()
    }

    /// Takes the payload of a datagram that a guest sent to port 53.
    pub(crate) fn datagram(
        &mut self,
        cx: &mut Cx<'_>,
        from: SocketAddrV4,
        mac: crate::MacAddr,
        payload: &[u8],
        names: &dyn Names,
    ) -> Result<(), DropReason> {
        if payload.len() > MAX_QUESTION {
            return Err(DropReason::TooBig);
        }
        self.question(cx, Client::Udp(from, mac), payload, names)
    }

    /// Takes a guest's connection to port 53.
    pub(crate) fn stream(&mut self, cx: &mut Cx<'_>, stream: ServiceStream) {
        let token = self.conns.next_token(Owner::Dns);
        if self.streams >= MAX_STREAMS || cx.host.watch(stream.sock, token).is_err() {
            cx.drop(DropReason::TableFull, || format!("a DNS connection of {}", stream.guest));
            cx.host.close(stream.sock, Close::Graceful);
            return;
        }
        self.streams += 1;
        let slot = self.conns.insert(Conn::Guest(Stream::new(stream.sock, cx.now)));
        self.timers.set(slot, cx.now + stream::IDLE);
    }

    pub(crate) fn ready(&mut self, cx: &mut Cx<'_>, token: Token, events: Events, names: &dyn Names) {
        match self.conns.by_token(token) {
            Some(Conn::Ask(_)) => self.answers(cx, token.slot, events),
            Some(Conn::Upstream(_)) => self.upstream(cx, token, events),
            Some(Conn::Guest(stream)) => {
                stream.ended |= events.intersects(Events::CLOSED);
                self.serve(cx, token, names);
            }
            None => {}
        }
    }

    pub(crate) fn expire(&mut self, cx: &mut Cx<'_>) {
        while let Some(slot) = self.timers.pop(cx.now) {
            match self.conns.get(slot) {
                Some(Conn::Ask(ask)) => {
                    if let Some(token) = ask.via {
                        self.retire(token);
                    }
                    self.try_next(cx, slot);
                }
                Some(Conn::Upstream(_)) => drop(self.hang_up(cx, self.conns.token(slot, Owner::Dns))),
                Some(Conn::Guest(stream)) => {
                    let end = stream.used + stream::IDLE;
                    if end > cx.now { self.timers.set(slot, end) } else { self.close(cx, slot) }
                }
                None => {}
            }
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Sockets that are open: a question by datagram has one, a connection is one.
    #[cfg(test)]
    pub(crate) fn sockets(&self) -> usize {
        self.conns.iter().filter(|(_, conn)| !matches!(conn, Conn::Ask(ask) if ask.sock.is_none())).count()
    }

    /// Questions under way.
    fn inflight(&self) -> usize {
        self.conns.len() - self.streams - self.upstreams
    }

    fn question(
        &mut self,
        cx: &mut Cx<'_>,
        client: Client,
        bytes: &[u8],
        names: &dyn Names,
    ) -> Result<(), DropReason> {
        let query = match Query::parse(bytes) {
            Ok(query) => query,
            Err(BadQuery::Silence) => return Err(DropReason::Malformed),
            Err(BadQuery::Answer(answer)) => {
                self.reply(cx, client, &answer);
                return Ok(());
            }
        };
        self.resolver.refresh(cx.now);
        let config = cx.config;
        let ours = names::answer(&query, config.subnet, &config.domain, names);
        let no_ipv6 = query.kind == kind::AAAA && !self.resolver.has_ipv6();
        if let Some(answer) = ours.or_else(|| no_ipv6.then(|| query.answer(Rcode::NoError, false, &[]))) {
            self.reply(cx, client, &answer);
            return Ok(());
        }
        if self.conns.iter().any(|(_, conn)| matches!(conn, Conn::Ask(ask) if ask.is(client, &query))) {
            return Ok(());
        }
        if self.inflight() >= MAX_INFLIGHT {
            self.reply(cx, client, &query.answer(Rcode::ServFail, false, &[]));
            return Err(DropReason::TableFull);
        }
        let id = self.new_id();
        let ask = Transaction::new(client, query, bytes, id, self.resolver.servers(), self.good);
        let slot = self.conns.insert(Conn::Ask(Box::new(ask)));
        if let Client::Stream(token) = client
            && let Some(Conn::Guest(stream)) = self.conns.by_token(token)
        {
            stream.pending += 1;
        }
        self.attempt(cx, slot);
        Ok(())
    }

    /// An identifier that no question under way has.
    fn new_id(&mut self) -> u16 {
        loop {
            let id = self.random_id();
            if !self.conns.iter().any(|(_, conn)| matches!(conn, Conn::Ask(ask) if ask.id == id)) {
                return id; // at the latest after MAX_INFLIGHT others, of 65,536
            }
        }
    }

    /// Sixteen bits that nobody outside can foresee: SipHash under a key from the system.
    fn random_id(&mut self) -> u16 {
        self.asked += 1;
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(self.asked);
        (hasher.finish() & 0xffff) as u16
    }

    /// Asks the next server, and the ones behind it if the host can't even send.
    fn attempt(&mut self, cx: &mut Cx<'_>, slot: u32) {
        // A transaction's attempts are bounded, so the loop is.
        while let Some(Conn::Ask(ask)) = self.conns.get(slot) {
            let Some(server) = ask.server() else { return self.give_up(cx, slot) };
            let asked = match ask.client {
                Client::Udp(..) => self.ask_by_datagram(cx, slot, server),
                Client::Stream(_) => self.ask_over_stream(cx, slot, server),
            };
            if asked.is_ok() {
                return;
            }
            if let Some(Conn::Ask(ask)) = self.conns.get_mut(slot) {
                ask.next();
            }
        }
    }

    fn ask_by_datagram(&mut self, cx: &mut Cx<'_>, slot: u32, server: SocketAddrV4) -> std::io::Result<()> {
        // The slot is filled already; its token is that of its socket.
        let token = self.conns.token(slot, Owner::Dns);
        let Some(Conn::Ask(ask)) = self.conns.get_mut(slot) else { return Ok(()) };
        let sock = cx.host.udp_open(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0), false, token)?;
        let out = Outgoing { to: server, from: None, ttl: 64, tos: 0, segment: 0 };
        let message = VolatileSlice::from(&mut ask.message[..]);
        if let Err(error) = cx.host.send_datagram(sock, &out, &mut std::iter::once(message)) {
            cx.host.close(sock, Close::Graceful);
            return Err(error);
        }
        ask.sock = Some(sock);
        self.timers.set(slot, cx.now + ATTEMPT);
        Ok(())
    }

    /// The server that was asked was no help: asks the next one.
    fn try_next(&mut self, cx: &mut Cx<'_>, slot: u32) {
        let Some(Conn::Ask(ask)) = self.conns.get_mut(slot) else { return };
        if let Some(sock) = ask.sock.take() {
            cx.host.close(sock, Close::Graceful);
        }
        let via = ask.via.take();
        ask.next();
        if let Some(token) = via {
            self.leave(cx, slot, token);
        }
        self.timers.remove(slot);
        // Events of the socket that was closed must not pass for those of the next one.
        self.conns.renew(slot);
        self.attempt(cx, slot);
    }

    fn give_up(&mut self, cx: &mut Cx<'_>, slot: u32) {
        let Some(Conn::Ask(ask)) = self.conns.get_mut(slot) else { return };
        let answer = ask.give_up();
        self.finish(cx, slot, &answer);
    }

    /// Answers the client; the question is done.
    fn finish(&mut self, cx: &mut Cx<'_>, slot: u32, answer: &[u8]) {
        let Some(Conn::Ask(ask)) = self.conns.remove(slot) else { return };
        self.timers.remove(slot);
        if let Some(sock) = ask.sock {
            cx.host.close(sock, Close::Graceful);
        }
        if let Some(token) = ask.via {
            self.leave(cx, slot, token);
        }
        if let Client::Stream(token) = ask.client
            && let Some(Conn::Guest(stream)) = self.conns.by_token(token)
        {
            stream.pending -= 1;
        }
        self.reply(cx, ask.client, answer);
    }

    fn reply(&mut self, cx: &mut Cx<'_>, client: Client, answer: &[u8]) {
        match client {
            Client::Udp(to, mac) => {
                self.next_packet_id = self.next_packet_id.wrapping_add(1);
                let from = SocketAddrV4::new(cx.config.gateway(), PORT);
                udp::post(cx, mac, from, to, answer, self.next_packet_id);
            }
            Client::Stream(token) => {
                if let Some(Conn::Guest(stream)) = self.conns.by_token(token) {
                    stream.answer(answer);
                    stream.used = cx.now;
                    self.flush(cx, token.slot);
                    self.resume(cx, token);
                }
            }
        }
    }

    /// Datagrams from servers.
    fn answers(&mut self, cx: &mut Cx<'_>, slot: u32, events: Events) {
        for _ in 0..TURN {
            let Some(Conn::Ask(ask)) = self.conns.get_mut(slot) else { return };
            let (Some(sock), Some(server)) = (ask.sock, ask.server()) else { return };
            let Ok(incoming) = cx.host.recv_datagram(sock, &[], 0, 0, &mut self.buffer) else { break };
            if incoming.from != server {
                continue;
            }
            match ask.judge(&self.buffer) {
                Verdict::Foreign => {}
                Verdict::Failure => return self.try_next(cx, slot),
                Verdict::Final(answer) => {
                    self.good = Some(server);
                    return self.finish(cx, slot, &answer);
                }
            }
        }
        if events.contains(Events::ERROR) {
            self.try_next(cx, slot); // nobody listens there, or there is no way
        }
    }

    /// Reads and answers what a guest sent on its stream.
    fn serve(&mut self, cx: &mut Cx<'_>, token: Token, names: &dyn Names) {
        self.flush(cx, token.slot);
        for _ in 0..TURN {
            let Some(Conn::Guest(stream)) = self.conns.by_token(token) else { return };
            if let Some(question) = stream.may_ask().then(|| stream.question()).flatten() {
                stream.used = cx.now;
                if let Err(reason) = self.question(cx, Client::Stream(token), &question, names) {
                    cx.drop(reason, || "a question over TCP".to_owned());
                }
                continue;
            }
            if !stream.wants_input() {
                break;
            }
            let mut bytes = Vec::new();
            let ended = read_some(cx, stream.sock, &mut bytes, usize::from(u16::MAX));
            stream.push(&bytes);
            stream.ended |= ended;
            if bytes.is_empty() {
                break;
            }
        }
        self.close_if_done(cx, token.slot);
    }

    /// An answered question may let a stream go on that had too many: its event is asked for again.
    fn resume(&mut self, cx: &mut Cx<'_>, token: Token) {
        if let Some(Conn::Guest(stream)) = self.conns.by_token(token) {
            if stream.wants_turn() {
                cx.host.want_write(stream.sock, token);
            }
            self.close_if_done(cx, token.slot);
        }
    }

    /// Sends what a stream's guest takes.
    fn flush(&mut self, cx: &mut Cx<'_>, slot: u32) {
        let Some(Conn::Guest(stream)) = self.conns.get_mut(slot) else { return };
        while !stream.out().is_empty() {
            let mut out = stream.out().to_vec();
            let piece = VolatileSlice::from(&mut out[..]);
            match cx.host.send(stream.sock, &mut std::iter::once(piece)) {
                Ok(sent @ 1..) => stream.sent(sent),
                Ok(0) => break,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    stream.ended = true;
                    stream.sent(usize::MAX);
                }
            }
        }
    }

    fn close_if_done(&mut self, cx: &mut Cx<'_>, slot: u32) {
        if matches!(self.conns.get(slot), Some(Conn::Guest(stream)) if stream.is_done()) {
            self.close(cx, slot);
        }
    }

    /// Closes a guest's stream. Questions of it that are under way find nobody when they are answered.
    fn close(&mut self, cx: &mut Cx<'_>, slot: u32) {
        if let Some(Conn::Guest(stream)) = self.conns.remove(slot) {
            self.streams -= 1;
            self.timers.remove(slot);
            cx.host.close(stream.sock, Close::Graceful);
        }
    }
}

/// Reads at most about `max` bytes of a stream. Says whether it has ended, well or badly.
fn read_some(cx: &mut Cx<'_>, sock: super::host::SockId, into: &mut Vec<u8>, max: usize) -> bool {
    let mut chunk = [0; 4096];
    for _ in 0..TURN {
        let parts = [VolatileSlice::from(&mut chunk[..])];
        match cx.host.peek(sock, 0, &parts, 0, 4096) {
            Ok(0) => return true,
            Ok(n) => {
                cx.host.discard(sock, u32::try_from(n).unwrap_or(u32::MAX)); // at most 4096
                into.extend_from_slice(&chunk[..n]);
                if into.len() >= max {
                    return false;
                }
            }
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
    false
}
