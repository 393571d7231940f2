//! ICMP between guests and the host's sockets (RFC 792, RFC 5508).
//!
//! **Echo to the world** goes through ping sockets (`SOCK_DGRAM`, `IPPROTO_ICMP`), one per guest and identifier ([`flow`]),
//! with the guest's TTL less one. What comes back is what the world sent: its round trip, its TTL, nothing invented. Where
//! `net.ipv4.ping_group_range` forbids ping sockets, a process with `CAP_NET_RAW` uses raw ones; where neither is
//! allowed, the log says so once and the guest gets "administratively prohibited".
//!
//! **Echo to the gateway** is answered by the gateway.
//!
//! **Errors** of the world about a ping (time exceeded, unreachable, too big) come to the guest from whoever sent them,
//! quoting the guest's own packet; [`error`] makes them, and those of UDP and TCP, too.
//!
//! **Refused**: other messages. An error from a guest concerns a packet that the host's sockets answered for already.
//!
//! **Limits**: `icmp_flows` sockets, the one idle for the longest time makes room; a message of up to 64 KiB, in
//! fragments on both sides; [`TURN`] replies of one socket in a row.

pub(crate) mod error;
mod flow;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use vm_memory::VolatileSlice;

use self::error::IcmpError;
use self::flow::{ECHO, ECHO_LEN, ECHO_REPLY, Flow};
use super::cx::Cx;
use super::host::Close;
use super::ipv4::{DONT_FRAGMENT, FRAME_HEAD, IPV4_LEN, Ipv4In, Ipv4Out, TTL, protocol};
use super::outbox::{Outbox, copy_into};
use super::policy::{self, Refusal, Route};
use super::poller::{Events, Owner, Token};
use super::timers::Timers;
use super::udp::slab::Slab;
use super::udp::socket::{Incoming, Origin, Outgoing, PingKind};
use super::udp::{copy_out, refused_by_host, relayed, wire};
use crate::checksum::Sum;
use crate::{DropReason, ETHERNET_LEN, Lent, MacAddr, Received, RxRing, VnetHdr, checksum};

/// Replies of one socket in a row.
pub(crate) const TURN: usize = 16;
/// Errors of one socket in a row.
const MAX_ERRORS: usize = 32;

/// All ICMP flows.
#[derive(Debug, Default)]
pub(crate) struct Icmp {
    flows: Slab<Flow>,
    by_guest: HashMap<(Ipv4Addr, u16), u32>,
    /// Flows that may have something to receive.
    queue: VecDeque<u32>,
    timers: Timers<u32>,
    fragments: Outbox,
    rest: Vec<u8>,
    next_id: u16,
    forbidden_logged: bool,
}

/// How one attempt to receive ended.
enum Step {
    Taken,
    Nothing,
    RingFull,
}

impl Icmp {
    /// Takes a message from a guest.
    pub(crate) fn input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) {
        if let Err(reason) = self.try_input(cx, packet) {
            cx.drop(reason, || format!("ICMP from {} to {}", packet.src, packet.dst));
        }
    }

    pub(crate) fn ready(&mut self, cx: &mut Cx<'_>, token: Token, events: Events) {
        let Some(flow) = self.flows.by_token(token) else { return };
        if events.contains(Events::READ) && !flow.queued {
            flow.queued = true;
            self.queue.push_back(token.slot);
        }
        if events.contains(Events::ERROR) {
            self.report_errors(cx, token.slot);
        }
    }

    pub(crate) fn emit(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing) -> Received {
        let mut taken = 0;
        loop {
            if self.fragments.emit(cx.counters, ring) == Received::RingFull {
                return Received::RingFull;
            }
            let Some(slot) = self.queue.front().copied() else { return Received::Drained };
            if *cx.budget == 0 {
                return Received::Again;
            }
            if taken == TURN {
                self.queue.rotate_left(1);
                taken = 0;
                continue;
            }
            match self.receive(cx, ring, slot) {
                Step::Taken => {
                    taken += 1;
                    *cx.budget = cx.budget.saturating_sub(1);
                }
                Step::RingFull => return Received::RingFull,
                Step::Nothing => {
                    taken = 0;
                    self.queue.pop_front();
                    if let Some(flow) = self.flows.get_mut(slot) {
                        flow.queued = false;
                    }
                }
            }
        }
    }

    pub(crate) fn expire(&mut self, cx: &mut Cx<'_>) {
        while let Some(slot) = self.timers.pop(cx.now) {
            let Some(flow) = self.flows.get(slot) else { continue };
            let end = flow.used + flow::IDLE;
            if end <= cx.now { self.close(cx, slot) } else { self.timers.set(slot, end) }
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Open sockets.
    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    fn try_input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> Result<(), DropReason> {
        let head: [u8; ECHO_LEN] = *packet.payload_head().first_chunk().ok_or(DropReason::Malformed)?;
        if !packet.payload.verify(Sum::new()) {
            return Err(DropReason::BadChecksum);
        }
        match head[0] {
            ECHO if head[1] == 0 => {}
            3..=5 | 11 | 12 | ECHO_REPLY => return Err(DropReason::NoFlow),
            _ => return Err(DropReason::UnknownProtocol),
        }
        let to = match policy::route(cx.config, packet.dst) {
            Route::World(addr) => addr,
            Route::Gateway => return self.answer(cx, packet),
            Route::Refused(Refusal::Prohibited) => {
                error::post(cx, packet.src, IcmpError::Prohibited, packet.quote());
                return Err(DropReason::Policy);
            }
            Route::Refused(Refusal::HostUnreachable) => {
                error::post(cx, packet.src, IcmpError::HostUnreachable, packet.quote());
                return Err(DropReason::Unreachable);
            }
            Route::Group => return Err(DropReason::Multicast),
        };
        let id = flow::identifier(&head);
        let slot = match self.by_guest.get(&(packet.src, id)) {
            Some(slot) => *slot,
            None => self.open(cx, packet, id)?,
        };
        self.send(cx, packet, to, slot)
    }

    /// The gateway answers for itself: the same data, the same identifier (RFC 792).
    fn answer(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> Result<(), DropReason> {
        let mut message = packet.payload.to_vec();
        message[0] = ECHO_REPLY;
        message[2..4].fill(0);
        let sum = checksum::checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        self.next_id = self.next_id.wrapping_add(1);
        let out = Ipv4Out {
            src: packet.dst,
            dst: packet.src,
            protocol: protocol::ICMP,
            ttl: TTL,
            tos: packet.tos,
            id: self.next_id,
            fragment: 0,
        };
        wire::cut(cx.outbox, &out, (packet.mac, cx.config.gateway_mac), &message, cx.config.mtu)
    }

    fn open(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>, id: u16) -> Result<u32, DropReason> {
        if self.flows.len() >= cx.config.limits.icmp_flows {
            let oldest = self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(slot, _)| slot);
            cx.drop(DropReason::TableFull, || "the oldest of the ping flows was closed".to_owned());
            self.close(cx, oldest.ok_or(DropReason::TableFull)?);
        }
        let mut host_id = id;
        while self.flows.iter().any(|(_, flow)| flow.host_id == host_id) {
            host_id = host_id.wrapping_add(1); // ends: there are fewer flows than identifiers
        }
        let (sock, kind) = match cx.host.ping_open(host_id, self.flows.next_token(Owner::Icmp)) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                if !std::mem::replace(&mut self.forbidden_logged, true) {
                    tracing::warn!(
                        "guests can't ping the world: this host allows no ping sockets; allow them with \
                         `sysctl net.ipv4.ping_group_range=\"0 2147483647\"`"
                    );
                }
                error::post(cx, packet.src, IcmpError::Prohibited, packet.quote());
                return Err(DropReason::Policy);
            }
            Err(_) => return Err(DropReason::HostSocket),
        };
        let slot = self.flows.insert(Flow::new((packet.src, id), sock, kind, host_id, cx.now));
        self.by_guest.insert((packet.src, id), slot);
        Ok(slot)
    }

    fn close(&mut self, cx: &mut Cx<'_>, slot: u32) {
        let Some(flow) = self.flows.remove(slot) else { return };
        cx.host.close(flow.sock, Close::Graceful);
        self.by_guest.remove(&(flow.guest, flow.id));
        self.timers.remove(slot);
        if flow.queued {
            self.queue.retain(|queued| *queued != slot);
        }
    }

    fn send(
        &mut self,
        cx: &mut Cx<'_>,
        packet: &Ipv4In<'_>,
        to: Ipv4Addr,
        slot: u32,
    ) -> Result<(), DropReason> {
        let flow = self.flows.get_mut(slot).ok_or(DropReason::NoFlow)?;
        let header = packet.head.first_chunk().copied().ok_or(DropReason::Malformed)?;
        flow.sent(to, header, cx.now);
        self.timers.set(slot, cx.now + flow::IDLE);
        if flow.dont_fragment != packet.dont_fragment {
            flow.dont_fragment = packet.dont_fragment;
            cx.host.set_dont_fragment(flow.sock, packet.dont_fragment);
        }
        let to = SocketAddrV4::new(to, 0);
        let ttl = packet.ttl.saturating_sub(1).max(1);
        let out = Outgoing { to, from: None, ttl, tos: packet.tos, segment: 0 };
        // The header in our own memory, with the identifier of the host's side; the data out of the guest's.
        let mut head: [u8; ECHO_LEN] = *packet.payload_head().first_chunk().ok_or(DropReason::Malformed)?;
        flow::set_identifier(&mut head, flow.host_id);
        let sock = flow.sock;
        let data = packet.payload.len() - ECHO_LEN;
        let mut attempt = |cx: &mut Cx<'_>| {
            let head = VolatileSlice::from(&mut head[..]);
            let data = packet.payload.parts(ECHO_LEN, data);
            cx.host.send_datagram(sock, &out, &mut std::iter::once(head).chain(data))
        };
        let Err(error) = attempt(cx) else { return Ok(()) };
        let mtu = self.report_errors(cx, slot);
        let second = match error.raw_os_error() {
            Some(libc::EMSGSIZE | libc::EAGAIN | libc::ENOBUFS | libc::EACCES | libc::EPERM) => Err(error),
            _ => attempt(cx),
        };
        let Err(error) = second else { return Ok(()) };
        let mtu = mtu.or_else(|| self.report_errors(cx, slot));
        refused_by_host(cx, packet, &error, mtu)
    }

    /// Tells the guest what the world said about its pings. Gives the MTU of a "too big" of the host itself.
    fn report_errors(&mut self, cx: &mut Cx<'_>, slot: u32) -> Option<u16> {
        let mut too_big = None;
        for _ in 0..MAX_ERRORS {
            let flow = self.flows.get(slot)?;
            let Some(error) = cx.host.take_error(flow.sock) else { break };
            if error.origin == Origin::Local && error.errno == libc::EMSGSIZE {
                too_big = u16::try_from(error.mtu).ok();
                continue;
            }
            let quote = flow.quote(*error.to.ip(), &error.payload);
            if let Some((quote, said)) = quote.zip(relayed(&error)) {
                let by = error.offender.filter(|by| !by.is_loopback() && !by.is_unspecified());
                error::post_from(cx, by.unwrap_or(cx.config.gateway()), flow.guest, said, &quote);
            }
        }
        too_big
    }

    /// Receives one reply of a socket into the guest's memory.
    fn receive(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing, slot: u32) -> Step {
        let Some(flow) = self.flows.get_mut(slot) else { return Step::Nothing };
        let mtu = usize::from(cx.config.mtu);
        let parts = match ring.lend(ETHERNET_LEN + mtu, ETHERNET_LEN + mtu) {
            Lent::Buffers(parts) => parts,
            Lent::Empty => return Step::RingFull,
            Lent::TooSmall => &[],
        };
        // A raw socket gives the IPv4 header, too: it lands where ours will stand.
        let own_header = if flow.kind == PingKind::Raw { IPV4_LEN } else { 0 };
        let (skip, room) = (FRAME_HEAD - own_header, mtu - IPV4_LEN + own_header);
        let incoming = match cx.host.recv_datagram(flow.sock, parts, skip, room, &mut self.rest) {
            Ok(incoming) => incoming,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Step::Nothing,
            Err(_) => {
                self.report_errors(cx, slot);
                return Step::Taken;
            }
        };
        if parts.is_empty() {
            cx.drop(DropReason::RxBufferTooSmall, || format!("a ping reply from {}", incoming.from));
            return Step::Taken;
        }
        let Some(len) = incoming.len.checked_sub(own_header) else { return Step::Taken };
        let Some((out, mac)) = accept(cx, flow, &incoming, parts) else { return Step::Taken };
        if incoming.len > room {
            let mut message = vec![0; room - own_header];
            copy_out(parts, FRAME_HEAD, &mut message);
            message.append(&mut self.rest);
            self.next_id = self.next_id.wrapping_add(1);
            let out = Ipv4Out { id: self.next_id, ..out };
            *cx.budget = cx.budget.saturating_sub(message.len() / mtu);
            let macs = (mac, cx.config.gateway_mac);
            if let Err(reason) = wire::cut(&mut self.fragments, &out, macs, &message, cx.config.mtu) {
                cx.drop(reason, || format!("a ping reply of {len} bytes in fragments"));
            }
            return Step::Taken;
        }
        copy_into(parts, &out.head(mac, cx.config.gateway_mac, len));
        ring.commit(VnetHdr::default(), FRAME_HEAD + len);
        cx.counters.rx_frames += 1;
        cx.counters.rx_bytes += (FRAME_HEAD + len) as u64;
        Step::Taken
    }
}

/// Whether a reply is one to the flow; then its identifier is made the guest's, in place, and this is its header.
fn accept(
    cx: &Cx<'_>,
    flow: &mut Flow,
    incoming: &Incoming,
    parts: &[VolatileSlice<'_>],
) -> Option<(Ipv4Out, MacAddr)> {
    let peer = *incoming.from.ip();
    let mut first = [0; FRAME_HEAD + ECHO_LEN];
    copy_out(parts, 0, &mut first);
    let raw = flow.kind == PingKind::Raw;
    // Options in a raw reply's header would shift what is behind it.
    if raw && first[ETHERNET_LEN] != 0x45 {
        return None;
    }
    let mut echo: [u8; ECHO_LEN] = *first.last_chunk()?;
    let ours = !raw || flow::identifier(&echo) == flow.host_id;
    if echo[0] != ECHO_REPLY || !ours || !flow.expects(peer) {
        return None;
    }
    flow::set_identifier(&mut echo, flow.id);
    first[FRAME_HEAD..].copy_from_slice(&echo);
    copy_into(parts, &first);
    flow.used = cx.now;
    let out = Ipv4Out {
        src: peer,
        dst: flow.guest,
        protocol: protocol::ICMP,
        ttl: incoming.ttl.saturating_sub(1).max(1),
        tos: incoming.tos,
        id: 0,
        fragment: DONT_FRAGMENT,
    };
    Some((out, cx.neighbours.mac_of(flow.guest)?))
}
