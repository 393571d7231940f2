//! The in-process NAT: a network like libvirt's virbr0 for one or more guests, made of ordinary sockets.
//!
//! ```text
//!   guest frames ── send ──> ethernet ─┬─ ARP ─────────────> arp
//!                                      └─ IPv4 ── policy ─┬─> tcp   one host socket per connection
//!                                                         ├─> udp   one per pair of addresses
//!                                                         └─> icmp  one ping socket per identifier
//!   guest frames <── recv ─┬─ outbox (ARP, DHCP, ICMP, RST)
//!                          └─ tcp, udp, icmp: from the socket into the guest's buffers
//! ```
//!
//! [`Nat`] is a [`FramePort`] without threads, and needs neither root nor a capability. Its one descriptor is that of
//! an epoll that holds all sockets (edge-triggered) and one timerfd. Nothing is done behind the caller's back: all
//! work happens in `send` and `recv`.
//!
//! **A turn.** `send` is called for a batch of frames, each of which may queue answers; then `recv` collects the
//! sockets' events, runs the timers that are due, and passes frames to the guest until nothing is left, the ring is
//! full, or [`Limits::frames_per_turn`] is used up. The clock is read once per turn.
//!
//! **Invariants.** An event that `recv` took from the epoll is remembered by its flow until it is served, so the
//! descriptor is readable whenever `recv` has something to do that it does not know of yet. When it returns
//! [`Received::Again`], the timer is set to now, so that the descriptor is readable then, too.
//!
//! **Limits** are in [`Limits`]; every frame that is refused is counted under one [`DropReason`]. Several guests may be
//! behind one port: flows are told apart by guest address, and a guest can't use an address that another one has.

mod arp;
mod config;
mod cx;
mod dhcp;
mod dns;
mod door;
mod fragment;
mod host;
mod icmp;
mod ipv4;
mod neighbours;
mod outbox;
mod policy;
mod poller;
mod services;
#[cfg(test)]
mod sim;
mod subnet;
mod sys;
mod tcp;
mod timers;
mod udp;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

pub use config::{
    BadPublish, BadSubnet, Limits, MTU_RANGE, NatConfig, NatError, Publish, PublishProtocol, PublishTo,
    Reservation, Subnet,
};
pub use dhcp::Lease;
pub use door::{ConnectError, NatHandle};
pub use subnet::{Choice, NoFreeSubnet, Taken, choose, taken_by_host};

use self::arp::Arp;
use self::cx::{Cx, ServiceStream};
use self::door::Door;
use self::fragment::{Reassembled, Reassembler};
use self::host::Machine;
use self::icmp::Icmp;
use self::icmp::error::IcmpError;
use self::ipv4::{Fragment, HEAD_MAX, Ipv4In, protocol};
use self::neighbours::Neighbours;
use self::outbox::Outbox;
use self::policy::Route;
use self::poller::{Events, Owner, Token};
use self::services::Services;
use self::sys::SysHost;
use self::tcp::Tcp;
pub use self::tcp::TcpFlow;
use self::udp::Udp;
use crate::{
    Counters, DropReason, ETHERNET_LEN, FramePort, MacAddr, Offloads, Received, RxRing, Sent, TxFrame,
    VnetHdr,
};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
/// How often one `recv` asks the epoll again when it had more events than one answer holds.
const MAX_POLLS: usize = 4;

/// The network. See the module's documentation.
///
/// ```
/// use net::FramePort;
/// use net::nat::{Nat, NatConfig};
///
/// // What a NIC is plugged into; vmm::network::Network is the comfortable way to one.
/// let nat = Nat::new(NatConfig::on_free_subnet()?)?;
/// assert_eq!((nat.mtu(), nat.leases().len()), (1500, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Nat {
    shared: Shared,
    arp: Arp,
    fragments: Reassembler,
    tcp: Tcp,
    udp: Udp,
    icmp: Icmp,
    services: Services,
    /// Made for the first handle.
    door: Option<Door>,
    /// The time of this turn, once something asked for it.
    turn: Option<Instant>,
    /// When the timer will fire.
    armed: Option<Instant>,
    events: Vec<(Token, Events)>,
    /// Whose frames come first in the next turn: TCP's (0), UDP's (1), ICMP's (2).
    first: usize,
}

/// What [`Cx`] lends out of.
struct Shared {
    config: NatConfig,
    guest: Offloads,
    neighbours: Neighbours,
    outbox: Outbox,
    counters: Counters,
    host: Box<dyn Machine>,
    streams: Vec<ServiceStream>,
    budget: usize,
    icmp_errors: icmp::error::Budget,
}

impl Shared {
    fn cx(&mut self, now: Instant) -> Cx<'_> {
        Cx {
            now,
            config: &self.config,
            guest: self.guest,
            neighbours: &mut self.neighbours,
            outbox: &mut self.outbox,
            counters: &mut self.counters,
            host: &mut *self.host,
            streams: &mut self.streams,
            budget: &mut self.budget,
            icmp_errors: &mut self.icmp_errors,
        }
    }
}

impl Nat {
    /// Makes the network and opens its published ports.
    ///
    /// # Errors
    /// When the configuration makes no sense, a port can't be published, or the process may have no more
    /// descriptors. The error says what to do.
    pub fn new(config: NatConfig) -> Result<Self, NatError> {
        config.check()?;
        sys::raise_descriptor_limit();
        let failed = |source| NatError::System { what: "epoll, timerfd and sockets", source };
        let host = SysHost::new().map_err(failed)?;
        Self::on(config, Box::new(host))
    }

    /// The network on a host.
    fn on(config: NatConfig, host: Box<dyn Machine>) -> Result<Self, NatError> {
        let now = host.now();
        let mut nat = Self {
            arp: Arp::new(config.subnet, config.gateway_mac),
            fragments: Reassembler::default(),
            tcp: Tcp::default(),
            udp: Udp::default(),
            icmp: Icmp::default(),
            services: Services::new(&config),
            door: None,
            turn: None,
            armed: None,
            events: Vec::new(),
            first: 0,
            shared: Shared {
                neighbours: Neighbours::new(config.limits.neighbours),
                config,
                guest: Offloads::empty(),
                outbox: Outbox::default(),
                counters: Counters::default(),
                host,
                streams: Vec::new(),
                budget: 0,
                icmp_errors: icmp::error::Budget::default(),
            },
        };
        nat.tcp.open_listeners(&mut nat.shared.cx(now))?;
        nat.udp.open_published(&mut nat.shared.cx(now))?;
        Ok(nat)
    }

    /// The configuration that it was made from.
    pub fn config(&self) -> &NatConfig {
        &self.shared.config
    }

    /// Where the published ports are open, once the host has chosen those that were given as 0: TCP's, then UDP's.
    pub fn published(&mut self) -> Vec<(Publish, std::net::SocketAddrV4)> {
        let now = self.shared.host.now();
        let mut all = self.tcp.published(&mut self.shared.cx(now));
        all.extend(self.udp.published(&mut self.shared.cx(now)));
        all
    }

    /// How many sockets of the host are open for the guests, listeners and the gateway's services included.
    pub fn open_sockets(&self) -> usize {
        self.shared.host.open_sockets()
    }

    /// A handle that reaches into the network once it is in use elsewhere.
    ///
    /// # Errors
    /// When the process may have no more descriptors.
    pub fn handle(&mut self) -> io::Result<NatHandle> {
        if self.door.is_none() {
            let (door, bell) = Door::new(self.shared.config.subnet, self.leases())?;
            self.shared.host.watch_bell(bell)?;
            self.door = Some(door);
        }
        self.door.as_ref().map(Door::handle).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    /// The guests that were heard of: their addresses, and where they are.
    pub fn neighbours(&self) -> Vec<(Ipv4Addr, MacAddr)> {
        self.shared.neighbours.iter().collect()
    }

    /// The TCP connections there are.
    pub fn tcp_flows(&self) -> Vec<TcpFlow> {
        self.tcp.flows()
    }

    /// The DHCP leases that hold, in the order of their addresses.
    pub fn leases(&self) -> Vec<Lease> {
        self.services.leases(self.shared.host.now()).collect()
    }

    /// Open UDP sockets (published ports included) and ping sockets.
    pub fn datagram_flows(&self) -> (usize, usize) {
        (self.udp.len(), self.icmp.len())
    }

    /// A machine left the network: its addresses are free, and kept for its return while others are left.
    pub fn unplug(&mut self, mac: MacAddr) {
        let now = self.now();
        for lease in self.services.leases(now).filter(|lease| lease.mac == mac).collect::<Vec<_>>() {
            self.shared.neighbours.release(lease.address);
        }
        self.services.unplug(mac, now);
    }

    fn now(&mut self) -> Instant {
        *self.turn.get_or_insert_with(|| self.shared.host.now())
    }

    fn ethernet(&mut self, frame: &TxFrame<'_>, len: usize) -> Result<(), DropReason> {
        let mut head = [0; HEAD_MAX];
        let copied = frame.copy_out(0, &mut head);
        let head = &head[..copied];
        let ethernet: &[u8; ETHERNET_LEN] = head.first_chunk().ok_or(DropReason::Malformed)?;
        let to = MacAddr([ethernet[0], ethernet[1], ethernet[2], ethernet[3], ethernet[4], ethernet[5]]);
        if to != self.shared.config.gateway_mac && !to.is_group() {
            return Err(DropReason::NotForUs);
        }
        match u16::from_be_bytes([ethernet[12], ethernet[13]]) {
            ETHERTYPE_ARP => self.arp(&head[6..]),
            ETHERTYPE_IPV4 => self.ipv4(frame, head, len),
            _ => Err(DropReason::UnknownProtocol),
        }
    }

    /// `packet` begins with the frame's source address.
    fn arp(&mut self, packet: &[u8]) -> Result<(), DropReason> {
        let now = self.now();
        let source = MacAddr(*packet.first_chunk().ok_or(DropReason::Malformed)?);
        let payload = packet.get(8..).ok_or(DropReason::Malformed)?;
        let answer = self.arp.input(&mut self.shared.neighbours, payload, source, now)?;
        if let Some(frame) = answer {
            self.shared.cx(now).post(frame.to_vec());
        }
        Ok(())
    }

    fn ipv4(&mut self, frame: &TxFrame<'_>, head: &[u8], len: usize) -> Result<(), DropReason> {
        let now = self.now();
        let (packet, fragment) = ipv4::parse(frame, head, len)?;
        if !ipv4::gso_fits(frame.hdr.gso_type, packet.protocol) {
            return Err(DropReason::BadVnetHdr);
        }
        self.check_source(&packet, now)?;
        // What is for a group says so, though it mostly has a TTL of 1; no error answers it (RFC 1122 §3.2.2).
        let passes = !matches!(policy::route(&self.shared.config, packet.dst), Route::Gateway | Route::Group);
        if packet.ttl <= 1 && passes {
            icmp::error::post(&mut self.shared.cx(now), packet.src, IcmpError::TtlExceeded, packet.quote());
            return Err(DropReason::TtlExceeded);
        }
        if fragment == Fragment::Piece {
            return self.fragment(frame, len, now);
        }
        self.packet(&packet, now);
        Ok(())
    }

    /// A guest has its address to itself; only DHCP speaks without one (RFC 2131 §4.1).
    fn check_source(&mut self, packet: &Ipv4In<'_>, now: Instant) -> Result<(), DropReason> {
        if packet.src.is_unspecified() && packet.protocol == protocol::UDP {
            return Ok(());
        }
        let allowed = self.shared.config.subnet.is_guest(packet.src)
            && !packet.mac.is_group()
            && self.shared.neighbours.check(packet.src, packet.mac, now);
        if allowed { Ok(()) } else { Err(DropReason::BadSource) }
    }

    fn fragment(&mut self, frame: &TxFrame<'_>, len: usize, now: Instant) -> Result<(), DropReason> {
        let mut bytes = vec![0; len];
        frame.copy_out(0, &mut bytes);
        let Reassembled::Whole(packet) = self.fragments.input(&bytes[ETHERNET_LEN..], now)? else {
            return Ok(());
        };
        bytes.truncate(ETHERNET_LEN);
        bytes.extend_from_slice(&packet);
        let len = bytes.len();
        let head = bytes[..len.min(HEAD_MAX)].to_vec();
        let parts = [vm_memory::VolatileSlice::from(&mut bytes[..])];
        let whole = TxFrame { hdr: VnetHdr::default(), parts: &parts };
        let (packet, _) = ipv4::parse(&whole, &head, len)?;
        self.packet(&packet, now);
        Ok(())
    }

    fn packet(&mut self, packet: &Ipv4In<'_>, now: Instant) {
        let mut cx = self.shared.cx(now);
        if self.services.input(&mut cx, packet) {
            return;
        }
        match packet.protocol {
            protocol::TCP => self.tcp.input(&mut cx, packet),
            protocol::UDP => self.udp.input(&mut cx, packet),
            protocol::ICMP => self.icmp.input(&mut cx, packet),
            other => {
                cx.drop(DropReason::UnknownProtocol, || format!("IP protocol {other} from {}", packet.src))
            }
        }
        self.serve_streams(now);
    }

    /// Asks for guests that something is to be sent to.
    fn ask(&mut self, now: Instant) {
        for addr in self.shared.neighbours.take_wanted() {
            if let Some(frame) = self.arp.ask(addr, now) {
                self.shared.cx(now).post(frame.to_vec());
            }
        }
    }

    /// Hands streams that a guest opened to the gateway to their services.
    fn serve_streams(&mut self, now: Instant) {
        while let Some(stream) = self.shared.streams.pop() {
            self.services.stream(&mut self.shared.cx(now), stream);
        }
    }

    /// Does what was asked for through the handles, and tells them of the leases.
    fn serve_door(&mut self, now: Instant) {
        let Some(door) = self.door.as_mut() else { return };
        if self.services.take_lease_news() {
            door.publish(self.services.leases(now).collect());
        }
        door.serve(&mut self.shared.cx(now), &mut self.tcp);
    }

    /// Tells the modules what the epoll has to say.
    fn poll(&mut self, now: Instant) {
        for _ in 0..MAX_POLLS {
            let mut events = std::mem::take(&mut self.events);
            let more = self.shared.host.poll(&mut events);
            for (token, events) in events.drain(..) {
                let mut cx = self.shared.cx(now);
                match token.owner {
                    Owner::Timer => self.armed = None,
                    Owner::Tcp | Owner::TcpListener => self.tcp.ready(&mut cx, token, events),
                    Owner::Udp | Owner::UdpListener => self.udp.ready(&mut cx, token, events),
                    Owner::Icmp => self.icmp.ready(&mut cx, token, events),
                    Owner::Dns => self.services.ready(&mut cx, token, events),
                    Owner::Bell => self.door.iter_mut().for_each(Door::ring),
                }
            }
            self.events = events;
            if !more {
                break;
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        if self.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        let incomplete = self.fragments.expire(now);
        let mut cx = self.shared.cx(now);
        for fragment::Expired { first } in incomplete {
            cx.drop(DropReason::Fragment, || "fragments of a packet were missing for too long".to_owned());
            // RFC 792: only whoever has the first fragment may tell.
            if let Some(quote) = first
                && let Some(&[a, b, c, d]) = quote.get(12..16).and_then(|src| src.first_chunk())
            {
                icmp::error::post(&mut cx, Ipv4Addr::new(a, b, c, d), IcmpError::ReassemblyTimeout, &quote);
            }
        }
        self.tcp.expire(&mut cx);
        self.udp.expire(&mut cx);
        self.icmp.expire(&mut cx);
        self.services.expire(&mut cx);
    }

    fn deadline(&self) -> Option<Instant> {
        let flows = [self.tcp.deadline(), self.udp.deadline(), self.icmp.deadline()];
        let door = self.door.as_ref().and_then(Door::deadline);
        let others = [self.services.deadline(), self.fragments.deadline(), door];
        flows.into_iter().chain(others).flatten().min()
    }

    fn emit(&mut self, now: Instant, ring: &mut dyn RxRing) -> Received {
        self.shared.budget = self.shared.config.limits.frames_per_turn;
        if self.shared.outbox.emit(&mut self.shared.counters, ring) == Received::RingFull {
            return Received::RingFull;
        }
        let mut cx = self.shared.cx(now);
        for turn in self.first..self.first + 3 {
            let outcome = match turn % 3 {
                0 => self.tcp.emit(&mut cx, ring),
                1 => self.udp.emit(&mut cx, ring),
                _ => self.icmp.emit(&mut cx, ring),
            };
            if outcome != Received::Drained {
                // Who used up the turn is last in the next one: bulk data do not keep datagrams waiting.
                self.first = (turn + 1) % 3;
                return outcome;
            }
        }
        Received::Drained
    }

    /// Sets the timer unless it fires early enough as it is.
    fn arm(&mut self, now: Instant, again: bool) {
        let wanted = if again { Some(now) } else { self.deadline() };
        let Some(wanted) = wanted else { return };
        if self.armed.is_none_or(|armed| wanted < armed) {
            self.shared.host.set_timer(wanted.saturating_duration_since(now));
            self.armed = Some(wanted);
        }
    }
}

impl std::fmt::Debug for Nat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nat").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

impl AsFd for Nat {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.host.as_fd()
    }
}

impl FramePort for Nat {
    fn offloads(&self) -> Offloads {
        Offloads::CSUM | Offloads::TSO4 | Offloads::USO
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        self.shared.guest = guest & self.offloads();
        Ok(())
    }

    fn mtu(&self) -> u16 {
        self.shared.config.mtu
    }

    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let len = frame.len();
        match self.ethernet(frame, len) {
            Ok(()) => {
                self.shared.counters.tx_frames += 1;
                self.shared.counters.tx_bytes += len as u64;
                Sent::Taken
            }
            Err(reason) => {
                self.shared.counters.drop_frame(reason, || format!("a frame of {len} bytes from a guest"));
                Sent::Dropped(reason)
            }
        }
    }

    fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
        let now = self.now();
        self.poll(now);
        self.expire(now);
        self.serve_streams(now);
        self.serve_door(now);
        let mut outcome = self.emit(now, ring);
        self.ask(now);
        if outcome == Received::Drained {
            // Passing data on may have ended a flow with a RST, or asked for a guest's address.
            outcome = self.shared.outbox.emit(&mut self.shared.counters, ring);
        }
        self.arm(now, outcome == Received::Again);
        self.turn = None;
        outcome
    }

    fn counters(&self) -> Counters {
        self.shared.counters.clone()
    }
}
