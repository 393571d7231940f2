//! TCP between guests and the host's sockets.
//!
//! **Goals, in order.** No byte is lost or invented; each side learns from the other what really happened (accepted,
//! refused, unreachable, half closed, reset); bytes are copied once, by the kernel, between the guest's memory and
//! the socket; nothing is allocated, locked or timed per segment.
//!
//! **Guest → world.** A SYN starts a connect ([`dial`]); the guest hears nothing until it has ended. A segment in order
//! goes by one `sendmsg` from the guest's memory into the socket ([`input`]); what the socket took is acknowledged,
//! once per turn. The window announced is the room in the socket's send buffer, so that a socket that can take no more stops the
//! guest. A FIN behind all data becomes `shutdown(SHUT_WR)`; a RST becomes a RST.
//!
//! **World → guest.** Data stay in the socket until the guest has acknowledged them. [`output`] peeks what the guest's
//! window takes directly into its buffers; an acknowledgement discards them from the socket; a retransmission peeks
//! them again. The socket's end becomes a FIN behind the last byte, its error a RST.
//!
//! **Options** ([`options`]): window scale, timestamps ([`stamps`]) and SACK ([`sack`], [`recovery`]), each if the
//! guest's SYN has it; all are offered in ours.
//!
//! **Published ports** ([`listen`]) are flows that begin with our SYN.
//!
//! **Invariants.** A flow is in the table exactly as long as its socket is open. A flow that has something to emit is
//! in `dirty` exactly once. Whatever happened to a flow, [`Tcp::settle`] is called: it alone queues, sets timers,
//! and removes.
//!
//! **Limits.** [`Limits::tcp_flows`](crate::nat::Limits::tcp_flows) connections: the next SYN gets a RST, and one line in
//! the log. A connection costs a descriptor, about 300 bytes here, and what the kernel charges for its socket. An
//! idle one is probed after two hours. A guest that does not answer is given up after 12 attempts, a SYN of ours after
//! four. TIME-WAIT: [`state`]. Not done: urgent data out of line (delivered in line), ECN, SACK blocks of ours
//! ([`segment`]), simultaneous open (refused).

mod dial;
mod flow;
mod input;
mod listen;
mod options;
mod output;
mod recovery;
mod rto;
mod sack;
mod segment;
mod stamps;
mod state;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddrV4;
use std::time::Instant;

use self::dial::Target;
use self::flow::{End, Flow, Marks};
use self::listen::Listeners;
use self::output::Step;
use self::segment::{Flags, Header, Segment};
use self::stamps::Stamps;
use self::state::State;
use self::table::{Key, Table};
use super::config::{NatError, Publish};
use super::cx::{Cx, ServiceStream};
use super::host::{Close, SockId};
use super::icmp;
use super::ipv4::Ipv4In;
use super::poller::{Events, Owner, Token};
use super::timers::Timers;
use crate::{DropReason, Received, RxRing};

/// A connection, for people to look at.
///
/// ```
/// # use net::{FramePort, Sent, TxFrame, VnetHdr, checksum::{Sum, checksum}};
/// # use net::nat::{Nat, NatConfig};
/// # let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// # let config = NatConfig { host_access: true, ..NatConfig::default() };
/// # let (guest, gateway, to) = (config.subnet.host(2), config.gateway(), listener.local_addr()?.port());
/// # let mut syn = [&config.gateway_mac.0[..], &[2, 0, 0, 0, 0, 1, 8, 0]].concat();
/// # let mut ip = [&[0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0], &guest.octets()[..], &gateway.octets()].concat();
/// # let sum = checksum(&ip);
/// # ip[10..12].copy_from_slice(&sum.to_be_bytes());
/// # let mut tcp = [&40_000u16.to_be_bytes()[..], &to.to_be_bytes(), &[0; 8], &[0x50, 2, 16, 0, 0, 0, 0, 0]].concat();
/// # let mut sum = Sum::pseudo_v4(guest, gateway, 6, 20);
/// # sum.add(&tcp);
/// # tcp[16..18].copy_from_slice(&sum.finish().to_be_bytes());
/// # syn.extend([ip, tcp].concat());
/// # let mut nat = Nat::new(config)?;
/// // Port 40000 of the guest says SYN to a port of the gateway, behind which a program of this host listens.
/// let sent = nat.send(&TxFrame { hdr: VnetHdr::default(), parts: &[syn.as_mut_slice().into()] });
/// assert_eq!(sent, Sent::Taken);
/// let flow = &nat.tcp_flows()[0];
/// assert_eq!(flow.guest.to_string(), "192.168.122.2:40000");
/// assert_eq!((*flow.world.ip(), flow.world.port()), (gateway, to), "not 127.0.0.1: the guest knows the gateway");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpFlow {
    /// The guest's end.
    pub guest: SocketAddrV4,
    /// The other end, as the guest sees it.
    pub world: SocketAddrV4,
    /// The state in RFC 9293's words, or DIALING while the host connects.
    pub state: &'static str,
}

/// All TCP flows.
#[derive(Debug, Default)]
pub(crate) struct Tcp {
    table: Table,
    timers: Timers<u32>,
    /// Slots of flows that have something to emit, each at most once.
    dirty: VecDeque<u32>,
    listeners: Listeners,
    /// A listener has become ready since clients were last accepted.
    fresh: bool,
    /// Streams of this host that were led into a guest so far.
    visitors: u16,
    /// The secret of the initial sequence numbers (RFC 6528) and timestamps (RFC 7323 §7.1).
    secret: RandomState,
    epoch: Option<Instant>,
}

impl Tcp {
    /// Opens the published ports.
    pub(crate) fn open_listeners(&mut self, cx: &mut Cx<'_>) -> Result<(), NatError> {
        self.listeners.open(cx)
    }

    /// Where the published ports listen.
    pub(crate) fn published(&self, cx: &mut Cx<'_>) -> Vec<(Publish, SocketAddrV4)> {
        self.listeners.addrs(cx)
    }

    /// The connections there are.
    pub(crate) fn flows(&self) -> Vec<TcpFlow> {
        let flow = |f: &Flow| TcpFlow { guest: f.key.guest, world: f.key.world, state: f.state.name() };
        self.table.iter().map(flow).collect()
    }

    /// How many connections there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// A packet from a guest.
    pub(crate) fn input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) {
        let segment = match Segment::parse(packet) {
            Ok(segment) => segment,
            Err(reason) => {
                cx.drop(reason, || format!("TCP from {} to {}", packet.src, packet.dst));
                return;
            }
        };
        let key = Key { guest: segment.guest, world: segment.world };
        let Some(slot) = self.table.find(&key) else {
            return self.input_without_flow(cx, packet, &key, &segment);
        };
        if let Some(flow) = self.table.get(slot)
            && let Err(reason) = flow.input(cx, packet, &segment)
        {
            let state = flow.state;
            cx.drop(reason, || {
                format!("TCP {} -> {} in {}: {:?}", key.guest, key.world, state.name(), segment)
            });
        }
        self.settle(cx, slot);
    }

    /// RFC 9293 §3.10.7.1: a SYN may open a flow, everything else that is not a RST is answered with one.
    fn input_without_flow(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>, key: &Key, segment: &Segment) {
        if segment.flags.contains(Flags::SYN) && !segment.flags.contains(Flags::ACK) {
            return self.dial(cx, packet, key, segment);
        }
        cx.drop(DropReason::NoFlow, || format!("TCP {} -> {}", key.guest, key.world));
        refuse(cx, key, segment);
    }

    fn dial(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>, key: &Key, segment: &Segment) {
        let detail = || format!("TCP {} -> {}", key.guest, key.world);
        let target = match dial::target(cx.config, key.world) {
            Target::Connect(_) | Target::Service(_) if self.table.len() >= cx.config.limits.tcp_flows => {
                Target::Closed(DropReason::TableFull)
            }
            target => target,
        };
        let token = self.table.next_token();
        let outcome = match target {
            Target::Connect(to) => cx.host.connect(to, token),
            Target::Service(port) => cx.host.stream_pair(token).map(|(ours, theirs)| {
                cx.streams.push(ServiceStream { guest: *key.guest.ip(), port, sock: theirs });
                ours
            }),
            Target::Closed(reason) => {
                cx.drop(reason, detail);
                return refuse(cx, key, segment);
            }
            Target::Unreachable(error, reason) => {
                cx.drop(reason, detail);
                return icmp::error::post(cx, packet.src, error, packet.quote());
            }
            Target::Silence(reason) => return cx.drop(reason, detail),
        };
        match outcome {
            Ok(sock) => self.insert(cx, *key, sock, Some(segment)),
            Err(error) => {
                let (end, reason) = dial::failure(&error);
                cx.drop(reason, || format!("TCP {} -> {}: {error}", key.guest, key.world));
                match end {
                    End::Reset(_) => refuse(cx, key, segment),
                    End::Unreachable(error) => icmp::error::post(cx, packet.src, error, packet.quote()),
                    End::Quiet(_) => {}
                }
            }
        }
    }

    /// Puts a flow into the slot whose token its socket has.
    fn insert(&mut self, cx: &mut Cx<'_>, key: Key, sock: SockId, syn: Option<&Segment>) {
        let clocks = self.clocks(cx.now, &key);
        let flow = Flow::new(key, self.table.next_token(), sock, clocks, syn, cx);
        let slot = self.table.insert(flow);
        self.settle(cx, slot);
    }

    /// The initial sequence number (RFC 6528 §3: a clock of 4 µs ticks, and a secret function of the addresses) and the
    /// clock of the timestamps, which is another such function.
    fn clocks(&mut self, now: Instant, key: &Key) -> (u32, Stamps) {
        let epoch = *self.epoch.get_or_insert(now);
        let ticks = now.saturating_duration_since(epoch).as_micros() / 4;
        let iss = (self.secret.hash_one(key) as u32).wrapping_add(ticks as u32);
        (iss, Stamps::new(epoch, self.secret.hash_one((key, "timestamps")) as u32))
    }

    /// A socket is ready.
    pub(crate) fn ready(&mut self, cx: &mut Cx<'_>, token: Token, events: Events) {
        if token.owner == Owner::TcpListener {
            self.listeners.ready(token.slot, cx.now);
            self.fresh = true;
            return;
        }
        let Some(flow) = self.table.by_token(token) else { return };
        let broken = events.intersects(Events::ERROR | Events::CLOSED);
        if flow.state == State::Dialing {
            let ended = broken || events.contains(Events::WRITE);
            if ended {
                let outcome = if broken { cx.host.connected(flow.sock) } else { Ok(()) };
                flow.dialed(cx, outcome);
            }
        } else if events.contains(Events::ERROR) {
            flow.marks |= Marks::DEAD | Marks::READABLE;
        }
        if events.intersects(Events::READ | Events::READ_CLOSED | Events::CLOSED) {
            flow.marks |= Marks::READABLE;
        }
        if events.intersects(Events::READ_CLOSED | Events::CLOSED) {
            flow.marks |= Marks::READ_CLOSED;
        }
        if events.contains(Events::WRITE) {
            flow.writable();
        }
        self.settle(cx, token.slot);
    }

    /// Passes what is due to the guest.
    pub(crate) fn emit(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing) -> Received {
        if self.has_clients(cx) {
            self.fresh = false;
            self.accept(cx);
        }
        while let Some(slot) = self.dirty.pop_front() {
            let Some(flow) = self.table.get(slot) else { continue };
            if *cx.budget == 0 {
                self.dirty.push_front(slot);
                return Received::Again;
            }
            match flow.emit(cx, ring) {
                Step::RingFull => {
                    self.dirty.push_front(slot);
                    return Received::RingFull;
                }
                Step::More => self.dirty.push_back(slot),
                Step::Done => {
                    flow.marks -= Marks::QUEUED;
                    self.settle_quiet(cx, slot);
                }
            }
        }
        if self.fresh { Received::Again } else { Received::Drained }
    }

    /// Looks at every flow whose time has come.
    pub(crate) fn expire(&mut self, cx: &mut Cx<'_>) {
        while let Some(slot) = self.timers.pop(cx.now) {
            if let Some(flow) = self.table.get(slot) {
                flow.timer_at = None;
                flow.expire(cx);
            }
            self.settle(cx, slot);
        }
    }

    /// When [`Self::expire`] or [`Self::emit`] has something to do by itself.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        [self.timers.next(), self.listeners.deadline()].into_iter().flatten().min()
    }

    /// After anything happened to a flow: queues it if something is due, and the rest.
    fn settle(&mut self, cx: &mut Cx<'_>, slot: u32) {
        if let Some(flow) = self.table.get(slot)
            && flow.end.is_none()
            && flow.is_due()
            && !flow.marks.contains(Marks::QUEUED)
        {
            flow.marks |= Marks::QUEUED;
            self.dirty.push_back(slot);
        }
        self.settle_quiet(cx, slot);
    }

    /// Sets the flow's timer, or removes it when it has ended.
    fn settle_quiet(&mut self, cx: &mut Cx<'_>, slot: u32) {
        let Some(flow) = self.table.get(slot) else { return };
        if flow.end.is_some() {
            return self.remove(cx, slot);
        }
        if let Some(deadline) = flow.deadline(cx)
            && flow.timer_at.is_none_or(|at| deadline < at)
        {
            flow.timer_at = Some(deadline);
            self.timers.set(slot, deadline);
        }
    }

    fn remove(&mut self, cx: &mut Cx<'_>, slot: u32) {
        self.timers.remove(slot);
        let Some(mut flow) = self.table.remove(slot) else { return };
        if flow.marks.contains(Marks::QUEUED) {
            self.dirty.retain(|queued| *queued != slot);
        }
        flow.discard(cx);
        let how = match flow.end {
            Some(End::Reset(how)) => {
                post(cx, &flow.reset_header(cx.now));
                how
            }
            Some(End::Unreachable(error)) => {
                let quote = dial::quote(&flow.key, flow.rcv_nxt.wrapping_sub(1));
                icmp::error::post(cx, *flow.key.guest.ip(), error, &quote);
                Close::Graceful
            }
            Some(End::Quiet(how)) => how,
            None => Close::Reset,
        };
        cx.host.close(flow.sock, how);
    }
}

/// Answers a segment that belongs to nothing with a RST, unless it is one.
fn refuse(cx: &mut Cx<'_>, key: &Key, segment: &Segment) {
    if segment.flags.contains(Flags::RST) {
        return;
    }
    let acked = segment.flags.contains(Flags::ACK);
    let header = Header {
        guest: key.guest,
        world: key.world,
        seq: if acked { segment.ack } else { 0 },
        ack: if acked { 0 } else { segment.seq.wrapping_add(segment.seq_len()) },
        flags: if acked { Flags::RST } else { Flags::RST | Flags::ACK },
        window: 0,
        offer: None,
        stamp: None,
    };
    post(cx, &header);
}

fn post(cx: &mut Cx<'_>, header: &Header) {
    if let Some(mac) = cx.neighbours.mac_of(*header.guest.ip()) {
        let frame = output::frame(mac, cx, header);
        cx.post(frame);
    }
}
