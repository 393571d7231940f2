//! UDP between guests and the host's sockets (RFC 768, RFC 4787).
//!
//! ```text
//!   guest 192.168.122.2:4000 ──> endpoint ── socket 0.0.0.0:4000 ──> any peer       sendmsg out of guest memory
//!                            <──          <──                    <── peers only     recvmsg into lent buffers
//!   guest 192.168.122.2:53   <── published ── socket 127.0.0.1:5353 <── whoever sends
//! ```
//!
//! **Out.** A guest's address and port gets one socket ([`flow`]), on the same port of the host if that is at least
//! 1024 and free, on any other port if not. TTL (less one), TOS and DF go along with each datagram. A
//! super-segment of a guest (`VIRTIO_NET_F_HOST_USO`) of at most
//! [`MAX_ROW`] datagrams goes out in one call, and the host cuts it. What the host
//! refuses at once and what the world sends back later ([`IP_RECVERR`](socket)) reaches the guest as an ICMP error from
//! whoever said it, quoting the guest's own headers: a closed port, a TTL that ran out, a packet too big for the way.
//!
//! **In.** The host's socket is the queue: nothing is read before the guest has a buffer. A datagram is received straight
//! into the guest's memory; what does not fit an MTU lands behind it in a scratch buffer and goes out in fragments.
//! Checksums are left to a guest that completes them.
//!
//! **Limits**: `udp_flows` sockets; the one idle for the longest time makes room (published ports never do).
//! [`flow::MAX_PEERS`] peers each. [`TURN`] datagrams of one socket, then it is another's turn.
//!
//! **Refused**: multicast and broadcast (`Multicast`) as virbr0 does not forward them either; what [`policy`] closes; answers
//! of those whom nobody asked (`NoFlow`).

pub(crate) mod flow;
pub(crate) mod slab;
pub(crate) mod socket;
mod sys;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use self::flow::Endpoint;
use self::slab::Slab;
pub(crate) use self::socket::DatagramHost;
use self::socket::{Incoming, Origin, Outgoing, SocketError};
use self::wire::{UDP_LEN, UdpIn};
use super::config::{NatError, Publish, PublishProtocol, PublishTo};
use super::cx::Cx;
use super::host::Close;
use super::icmp::error::{self as icmp_error, IcmpError};
use super::ipv4::{DONT_FRAGMENT, FRAME_HEAD, IPV4_LEN, Ipv4In, Ipv4Out, protocol};
use super::outbox::{Outbox, copy_into};
use super::policy::{self, Refusal, Route};
use super::poller::{Events, Owner, Token};
use super::timers::Timers;
use crate::{
    DropReason, ETHERNET_LEN, GsoType, Lent, MacAddr, Offloads, Received, RxRing, VnetFlags, VnetHdr,
};

/// Datagrams of one socket in a row.
pub(crate) const TURN: usize = 16;
/// Datagrams of one super-segment: as many as Linux puts into one (`UDP_MAX_SEGMENTS`). More would be work that a guest makes
/// us do with one frame.
const MAX_ROW: usize = 128;
/// Errors of one socket in a row.
const MAX_ERRORS: usize = 32;

/// All UDP flows.
#[derive(Debug, Default)]
pub(crate) struct Udp {
    endpoints: Slab<Endpoint>,
    by_guest: HashMap<SocketAddrV4, u32>,
    published: Vec<u32>,
    /// Endpoints that may have something to receive.
    queue: VecDeque<u32>,
    timers: Timers<u32>,
    /// Fragments of a datagram that was too large for one frame.
    fragments: Outbox,
    /// What of a datagram did not fit into one frame.
    rest: Vec<u8>,
    /// Names the next packet that is cut.
    next_id: u16,
}

/// How one attempt to receive ended.
enum Step {
    /// A datagram, or an error, was taken from the socket.
    Taken,
    /// The socket has nothing.
    Nothing,
    /// The guest has no buffer.
    RingFull,
}

impl Udp {
    /// Opens the published ports.
    ///
    /// # Errors
    /// When one is in use, or not for this process.
    pub(crate) fn open_published(&mut self, cx: &mut Cx<'_>) -> Result<(), NatError> {
        let config = cx.config;
        for publish in config.publish.iter().filter(|p| p.protocol == PublishProtocol::Udp) {
            let at = SocketAddrV4::new(publish.addr, publish.host_port);
            let token = self.endpoints.next_token(Owner::UdpListener);
            let sock = cx.host.udp_open(at, true, token).map_err(|source| cannot_publish(publish, source))?;
            let nobody = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, publish.guest_port);
            let slot = self.endpoints.insert(Endpoint::new(nobody, sock, Some(publish.clone()), cx.now));
            self.published.push(slot);
        }
        Ok(())
    }

    /// Where the published ports are bound, in the order of the configuration.
    pub(crate) fn published(&self, cx: &mut Cx<'_>) -> Vec<(Publish, SocketAddrV4)> {
        let endpoints = self.published.iter().filter_map(|slot| self.endpoints.get(*slot));
        let bound = endpoints.map(|e| Some((e.publish.clone()?, cx.host.local_addr(e.sock).ok()?)));
        bound.flatten().collect()
    }

    /// Takes a datagram from a guest.
    pub(crate) fn input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) {
        if let Err(reason) = self.try_input(cx, packet) {
            cx.drop(reason, || format!("UDP from {} to {}", packet.src, packet.dst));
        }
    }

    pub(crate) fn ready(&mut self, cx: &mut Cx<'_>, token: Token, events: Events) {
        let Some(endpoint) = self.endpoints.by_token(token) else { return };
        if events.intersects(Events::READ) && !endpoint.queued {
            endpoint.queued = true;
            self.queue.push_back(token.slot);
        }
        if events.contains(Events::ERROR) {
            self.report_errors(cx, token.slot);
        }
    }

    pub(crate) fn emit(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing) -> Received {
        loop {
            if self.fragments.emit(cx.counters, ring) == Received::RingFull {
                return Received::RingFull;
            }
            let Some(slot) = self.queue.front().copied() else { return Received::Drained };
            for taken in 0.. {
                if *cx.budget == 0 {
                    return Received::Again;
                }
                if taken == TURN {
                    self.queue.rotate_left(1);
                    break;
                }
                let before = *cx.budget;
                let step = self.receive(cx, ring, slot);
                if matches!(step, Step::Taken) && *cx.budget == before {
                    *cx.budget -= 1; // a refused datagram costs time, too
                }
                match step {
                    Step::Taken if self.fragments.is_empty() => {}
                    Step::Taken => break,
                    Step::RingFull => return Received::RingFull,
                    Step::Nothing => {
                        self.queue.pop_front();
                        if let Some(endpoint) = self.endpoints.get_mut(slot) {
                            endpoint.queued = false;
                        }
                        break;
                    }
                }
            }
        }
    }

    pub(crate) fn expire(&mut self, cx: &mut Cx<'_>) {
        while let Some(slot) = self.timers.pop(cx.now) {
            let Some(endpoint) = self.endpoints.get_mut(slot) else { continue };
            match endpoint.expire(cx.config.limits.udp_idle, cx.now) {
                Some(next) => self.timers.set(slot, next),
                None if endpoint.publish.is_none() => self.close(cx, slot),
                None => {}
            }
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Open sockets, published ports included.
    pub(crate) fn len(&self) -> usize {
        self.endpoints.len()
    }

    fn try_input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> Result<(), DropReason> {
        let datagram = UdpIn::parse(packet)?;
        if packet.src.is_unspecified() {
            return Err(DropReason::BadSource);
        }
        if let Some(slot) = self.answers_published(&datagram) {
            return self.send(cx, packet, &datagram, slot, None);
        }
        let real = match policy::route(cx.config, packet.dst) {
            Route::World(addr) => addr,
            Route::Gateway => match policy::gateway_port(cx.config) {
                Some(addr) => addr,
                None => {
                    return refuse(cx, packet, IcmpError::PortUnreachable, DropReason::NoFlow);
                }
            },
            Route::Refused(Refusal::Prohibited) => {
                return refuse(cx, packet, IcmpError::Prohibited, DropReason::Policy);
            }
            Route::Refused(Refusal::HostUnreachable) => {
                return refuse(cx, packet, IcmpError::HostUnreachable, DropReason::Unreachable);
            }
            Route::Group => return Err(DropReason::Multicast),
        };
        let slot = match self.by_guest.get(&datagram.from) {
            Some(slot) => *slot,
            None => self.open(cx, datagram.from)?,
        };
        self.send(cx, packet, &datagram, slot, Some(SocketAddrV4::new(real, datagram.to.port())))
    }

    /// The published port that this datagram is an answer of.
    fn answers_published(&self, datagram: &UdpIn) -> Option<u32> {
        self.published.iter().copied().find(|slot| {
            let endpoint = self.endpoints.get(*slot);
            endpoint.is_some_and(|e| e.guest == datagram.from && e.peer(datagram.to).is_some())
        })
    }

    /// Opens a socket for an address and port of a guest.
    fn open(&mut self, cx: &mut Cx<'_>, guest: SocketAddrV4) -> Result<u32, DropReason> {
        if self.endpoints.len() >= cx.config.limits.udp_flows {
            self.evict(cx)?;
        }
        let sock = match self.bind(cx, guest.port()) {
            // Descriptors ran out before the table did.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                self.evict(cx)?;
                self.bind(cx, guest.port()).map_err(|_| DropReason::TableFull)?
            }
            Err(_) => return Err(DropReason::HostSocket),
            Ok(sock) => sock,
        };
        let slot = self.endpoints.insert(Endpoint::new(guest, sock, None, cx.now));
        self.by_guest.insert(guest, slot);
        Ok(slot)
    }

    fn bind(&self, cx: &mut Cx<'_>, port: u16) -> io::Result<super::host::SockId> {
        let token = self.endpoints.next_token(Owner::Udp);
        let any = |port| SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
        if port >= 1024 {
            match cx.host.udp_open(any(port), false, token) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EACCES)) => {}
                outcome => return outcome,
            }
        }
        cx.host.udp_open(any(0), false, token)
    }

    /// Closes the socket that was idle for the longest time.
    fn evict(&mut self, cx: &mut Cx<'_>) -> Result<(), DropReason> {
        let own = self.endpoints.iter().filter(|(_, e)| e.publish.is_none());
        let (slot, _) = own.min_by_key(|(_, e)| e.used()).ok_or(DropReason::TableFull)?;
        cx.counters.drop_frame(DropReason::TableFull, || {
            "the table of UDP flows is full; the one idle for the longest time was closed".to_owned()
        });
        self.close(cx, slot);
        Ok(())
    }

    fn close(&mut self, cx: &mut Cx<'_>, slot: u32) {
        let Some(endpoint) = self.endpoints.remove(slot) else { return };
        cx.host.close(endpoint.sock, Close::Graceful);
        self.by_guest.remove(&endpoint.guest);
        self.timers.remove(slot);
        if endpoint.queued {
            self.queue.retain(|queued| *queued != slot);
        }
    }

    /// Sends a guest's datagram to `real`, or to the client of a published port that it answers.
    fn send(
        &mut self,
        cx: &mut Cx<'_>,
        packet: &Ipv4In<'_>,
        datagram: &UdpIn,
        slot: u32,
        real: Option<SocketAddrV4>,
    ) -> Result<(), DropReason> {
        let endpoint = self.endpoints.get_mut(slot).ok_or(DropReason::NoFlow)?;
        let real = real.or_else(|| endpoint.peer(datagram.to).map(|p| p.real)).ok_or(DropReason::NoFlow)?;
        endpoint.sent(datagram.to, real, datagram.quote(packet), cx.now);
        let from = endpoint.peer(datagram.to).and_then(|peer| peer.local);
        self.timers.set(slot, cx.now + flow::UNREPLIED.min(cx.config.limits.udp_idle));
        if endpoint.dont_fragment != packet.dont_fragment {
            endpoint.dont_fragment = packet.dont_fragment;
            cx.host.set_dont_fragment(endpoint.sock, packet.dont_fragment);
        }
        let ttl = packet.ttl.saturating_sub(1).max(1);
        let out = Outgoing { to: real, from, ttl, tos: packet.tos, segment: 0 };
        let sock = endpoint.sock;
        let step = match packet.vnet.gso_type {
            GsoType::UdpL4 => usize::from(packet.vnet.gso_size),
            GsoType::None | GsoType::Udp | GsoType::Tcp4 | GsoType::Tcp6 => datagram.len,
        };
        if datagram.len > step.saturating_mul(MAX_ROW) {
            return Err(DropReason::BadVnetHdr);
        }
        if step > 0 && step < datagram.len {
            let row = Outgoing { segment: packet.vnet.gso_size, ..out };
            if cx.host.send_datagram(sock, &row, &mut packet.payload.parts(UDP_LEN, datagram.len)).is_ok() {
                return Ok(());
            }
            // Too many of them, a device that can't, an error of an earlier one: each by itself says which it is.
        }
        for at in (0..datagram.len.max(1)).step_by(step.max(1)) {
            let len = step.min(datagram.len - at);
            let mut attempt =
                || cx.host.send_datagram(sock, &out, &mut packet.payload.parts(UDP_LEN + at, len));
            let Err(error) = attempt() else { continue };
            let mtu = self.report_errors(cx, slot);
            // A pending error of an earlier datagram came in the way of this one; it is gone now.
            let second = match error.raw_os_error() {
                Some(libc::EMSGSIZE | libc::EAGAIN | libc::ENOBUFS | libc::EACCES | libc::EPERM) => {
                    Err(error)
                }
                _ => cx.host.send_datagram(sock, &out, &mut packet.payload.parts(UDP_LEN + at, len)),
            };
            if let Err(error) = second {
                let mtu = mtu.or_else(|| self.report_errors(cx, slot));
                return refused_by_host(cx, packet, &error, mtu);
            }
        }
        Ok(())
    }

    /// Tells the guest what the world said about its datagrams. Gives the MTU of a "too big" of the host itself, which
    /// is about the datagram that was sent last.
    fn report_errors(&mut self, cx: &mut Cx<'_>, slot: u32) -> Option<u16> {
        let mut too_big = None;
        for _ in 0..MAX_ERRORS {
            let endpoint = self.endpoints.get(slot)?;
            let Some(error) = cx.host.take_error(endpoint.sock) else { break };
            if error.origin == Origin::Local && error.errno == libc::EMSGSIZE {
                too_big = u16::try_from(error.mtu).ok();
                continue;
            }
            let gateway = cx.config.gateway();
            let quote = endpoint.by_real(error.to, gateway).and_then(|peer| peer.quote);
            if let Some((quote, said)) = quote.zip(relayed(&error)) {
                let by = error.offender.filter(|by| !by.is_loopback() && !by.is_unspecified());
                icmp_error::post_from(cx, by.unwrap_or(gateway), *endpoint.guest.ip(), said, &quote);
            }
        }
        too_big
    }

    /// Receives one datagram of a socket into the guest's memory.
    fn receive(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing, slot: u32) -> Step {
        let Some(endpoint) = self.endpoints.get_mut(slot) else { return Step::Nothing };
        let mtu = usize::from(cx.config.mtu);
        let (head, room) = (FRAME_HEAD + UDP_LEN, mtu - IPV4_LEN - UDP_LEN);
        let parts = match ring.lend(ETHERNET_LEN + mtu, ETHERNET_LEN + mtu) {
            Lent::Buffers(parts) => parts,
            Lent::Empty => return Step::RingFull,
            Lent::TooSmall => &[],
        };
        let fits = !parts.is_empty();
        let incoming = match cx.host.recv_datagram(endpoint.sock, parts, head, room, &mut self.rest) {
            Ok(incoming) => incoming,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Step::Nothing,
            Err(_) => {
                self.report_errors(cx, slot);
                return Step::Taken;
            }
        };
        if !fits {
            cx.drop(DropReason::RxBufferTooSmall, || format!("a datagram from {}", incoming.from));
            return Step::Taken;
        }
        let Some((seen, guest, mac)) = addressee(cx, endpoint, &incoming) else {
            cx.drop(DropReason::NoFlow, || format!("a datagram from {}, whom nobody asked", incoming.from));
            return Step::Taken;
        };
        if endpoint.publish.is_some() {
            self.timers.set(slot, cx.now + flow::UNREPLIED.min(cx.config.limits.udp_idle));
        }
        let out = Ipv4Out {
            src: *seen.ip(),
            dst: *guest.ip(),
            protocol: protocol::UDP,
            ttl: incoming.ttl.saturating_sub(1).max(1),
            tos: incoming.tos,
            id: 0,
            fragment: DONT_FRAGMENT,
        };
        if incoming.len > room {
            let mut payload = vec![0; room];
            copy_out(parts, head, &mut payload);
            payload.append(&mut self.rest);
            self.next_id = self.next_id.wrapping_add(1);
            let out = Ipv4Out { id: self.next_id, ..out };
            let bytes = wire::datagram(seen, guest, &payload);
            *cx.budget = cx.budget.saturating_sub(bytes.len() / mtu);
            if let Err(reason) =
                wire::cut(&mut self.fragments, &out, (mac, cx.config.gateway_mac), &bytes, cx.config.mtu)
            {
                cx.drop(reason, || format!("{} bytes in fragments", incoming.len));
            }
            return Step::Taken;
        }
        let len = head + incoming.len;
        let hdr = write_head(cx, parts, &out, mac, (seen, guest), incoming.len);
        ring.commit(hdr, len);
        cx.emitted(len);
        Step::Taken
    }
}

/// Writes the headers of a datagram whose `len` bytes of payload are in place already.
fn write_head(
    cx: &Cx<'_>,
    parts: &[vm_memory::VolatileSlice<'_>],
    out: &Ipv4Out,
    mac: MacAddr,
    (from, to): (SocketAddrV4, SocketAddrV4),
    len: usize,
) -> VnetHdr {
    let mut head = [0; FRAME_HEAD + UDP_LEN];
    head[..FRAME_HEAD].copy_from_slice(&out.head(mac, cx.config.gateway_mac, UDP_LEN + len));
    let mut udp = wire::header(from, to, len);
    let mut sum = wire::pseudo(from, to, len);
    let hdr = if cx.guest.contains(Offloads::CSUM) {
        udp[6..8].copy_from_slice(&sum.fold().to_be_bytes());
        VnetHdr {
            flags: VnetFlags::NEEDS_CSUM,
            csum_start: FRAME_HEAD as u16,
            csum_offset: 6,
            ..VnetHdr::default()
        }
    } else {
        sum.add(&udp);
        let (mut skip, mut left) = (FRAME_HEAD + UDP_LEN, len);
        sum.add_parts(parts.iter().filter_map(|part| {
            let here = skip.min(part.len());
            skip -= here;
            let take = (part.len() - here).min(left);
            left -= take;
            // `here + take <= part.len()`, so the piece is within the slice.
            part.subslice(here, take).ok()
        }));
        udp[6..8].copy_from_slice(&sum.finish_udp().to_be_bytes());
        VnetHdr::default()
    };
    head[FRAME_HEAD..].copy_from_slice(&udp);
    copy_into(parts, &head);
    hdr
}

/// Copies lent memory from `skip` bytes on into `buf`.
pub(crate) fn copy_out(parts: &[vm_memory::VolatileSlice<'_>], skip: usize, buf: &mut [u8]) {
    let frame = crate::TxFrame { hdr: VnetHdr::default(), parts };
    frame.copy_out(skip, buf);
}

/// Who gets a datagram, and where it seems to come from; nothing when it is for nobody.
fn addressee(
    cx: &Cx<'_>,
    endpoint: &mut Endpoint,
    incoming: &Incoming,
) -> Option<(SocketAddrV4, SocketAddrV4, MacAddr)> {
    let gateway = cx.config.gateway();
    let seen = match &endpoint.publish {
        None => endpoint.received(incoming.from, gateway, cx.now)?,
        Some(publish) => {
            let addr = match publish.to {
                PublishTo::First => cx.neighbours.first()?,
                PublishTo::Mac(mac) => cx.neighbours.addr_of(mac)?,
                PublishTo::Addr(addr) => addr,
            };
            endpoint.redirect(SocketAddrV4::new(addr, publish.guest_port));
            endpoint.admit(incoming.from, incoming.to, gateway, cx.now)
        }
    };
    let mac = cx.neighbours.mac_of(*endpoint.guest.ip())?;
    Some((seen, endpoint.guest, mac))
}

/// What a guest is told about an error that came back.
pub(crate) fn relayed(error: &SocketError) -> Option<IcmpError> {
    let mtu = u16::try_from(error.mtu).unwrap_or(u16::MAX);
    match (error.origin, error.errno) {
        (Origin::Icmp(kind @ (3 | 11 | 12), code), _) => Some(IcmpError::Relayed(kind, code, mtu)),
        (Origin::Local, libc::EHOSTUNREACH) => Some(IcmpError::HostUnreachable),
        (Origin::Local, libc::ENETUNREACH) => Some(IcmpError::NetUnreachable),
        (Origin::Local | Origin::Icmp(..), _) => None,
    }
}

fn refuse(
    cx: &mut Cx<'_>,
    packet: &Ipv4In<'_>,
    error: IcmpError,
    reason: DropReason,
) -> Result<(), DropReason> {
    icmp_error::post(cx, packet.src, error, packet.quote());
    Err(reason)
}

/// The host would not send a packet: tells the guest why, as a router would.
pub(crate) fn refused_by_host(
    cx: &mut Cx<'_>,
    packet: &Ipv4In<'_>,
    error: &io::Error,
    mtu: Option<u16>,
) -> Result<(), DropReason> {
    let (said, reason) = match error.raw_os_error() {
        Some(libc::EMSGSIZE) => (IcmpError::FragmentationNeeded(mtu.unwrap_or(576)), DropReason::TooBig),
        Some(libc::ENETUNREACH) => (IcmpError::NetUnreachable, DropReason::Unreachable),
        Some(libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ENETDOWN) => {
            (IcmpError::HostUnreachable, DropReason::Unreachable)
        }
        Some(libc::EACCES | libc::EPERM) => (IcmpError::Prohibited, DropReason::Policy),
        Some(libc::EAGAIN | libc::ENOBUFS) => return Err(DropReason::QueueFull),
        _ => return Err(DropReason::HostSocket),
    };
    refuse(cx, packet, said, reason)
}

fn cannot_publish(publish: &Publish, source: io::Error) -> NatError {
    let publish = publish.clone();
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => NatError::PortInUse { publish },
        Some(libc::EACCES) => NatError::PortPrivileged { publish },
        Some(libc::EADDRNOTAVAIL) => NatError::NoSuchAddress { publish },
        _ => NatError::Publish { publish, source },
    }
}
