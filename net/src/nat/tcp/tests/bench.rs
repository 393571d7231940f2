//! A guest, a host and a network in between.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, VolatileSlice};

use crate::checksum::Sum;
use crate::nat::config::NatConfig;
use crate::nat::cx::{Cx, ServiceStream};
use crate::nat::host::{Close, SendSpace, SockId, StreamHost};
use crate::nat::icmp::error::Budget;
use crate::nat::ipv4::{self, DONT_FRAGMENT, Ipv4Out, protocol};
use crate::nat::neighbours::Neighbours;
use crate::nat::outbox::{Outbox, copy_into};
use crate::nat::poller::{Events, Owner, Token};
use crate::nat::tcp::Tcp;
use crate::nat::tcp::options::Options;
use crate::nat::tcp::segment::Flags;
use crate::nat::udp::DatagramHost;
use crate::{Counters, DropReason, Lent, MacAddr, Offloads, Received, RxRing, TxFrame, VnetFlags, VnetHdr};

pub(super) const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 2]);
pub(super) const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 122, 2), 40_000);
pub(super) const WORLD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(93, 184, 216, 34), 80);
/// The guest's initial sequence number: near the end of the space, so that every test wraps.
const GUEST_ISS: u32 = u32::MAX - 2;

/// A socket of the played host.
#[derive(Debug)]
pub(super) struct Sock {
    pub(super) to: Option<SocketAddrV4>,
    pub(super) token: Option<Token>,
    pub(super) received: Vec<u8>,
    /// Bytes that it still takes.
    pub(super) room: usize,
    /// From the world, from the first that was not discarded.
    pub(super) inbox: VecDeque<u8>,
    pub(super) eof: bool,
    pub(super) error: Option<i32>,
    pub(super) write_closed: bool,
    pub(super) wants_write: bool,
}

/// The host.
#[derive(Debug, Default)]
pub(super) struct SimHost {
    pub(super) open: BTreeMap<u32, Sock>,
    pub(super) closed: Vec<(u32, Close)>,
    /// What the next connect fails with at once.
    pub(super) connect_error: Option<i32>,
    /// Clients of the published port.
    pub(super) backlog: VecDeque<SocketAddrV4>,
    /// What the next accepts fail with, and whether the client is gone with it.
    pub(super) accept_errors: VecDeque<(i32, bool)>,
    next: u32,
}

impl SimHost {
    fn insert(&mut self, to: Option<SocketAddrV4>, token: Option<Token>) -> SockId {
        let sock = Sock {
            to,
            token,
            received: Vec::new(),
            room: 50_000,
            inbox: VecDeque::new(),
            eof: false,
            error: None,
            write_closed: false,
            wants_write: false,
        };
        self.open.insert(self.next, sock);
        self.next += 1;
        SockId(self.next - 1)
    }

    fn sock(&mut self, sock: SockId) -> &mut Sock {
        self.open.get_mut(&sock.0).expect("a closed socket was used")
    }
}

impl DatagramHost for SimHost {}

impl StreamHost for SimHost {
    fn connect(&mut self, to: SocketAddrV4, token: Token) -> io::Result<SockId> {
        match self.connect_error.take() {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Ok(self.insert(Some(to), Some(token))),
        }
    }

    fn stream_pair(&mut self, token: Token) -> io::Result<(SockId, SockId)> {
        Ok((self.insert(None, Some(token)), SockId(u32::MAX)))
    }

    fn connected(&mut self, sock: SockId) -> io::Result<()> {
        self.sock(sock).error.take().map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)))
    }

    fn listen(&mut self, at: SocketAddrV4, token: Token) -> io::Result<SockId> {
        match self.connect_error.take() {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Ok(self.insert(Some(at), Some(token))),
        }
    }

    fn local_addr(&mut self, sock: SockId) -> io::Result<SocketAddrV4> {
        Ok(self.sock(sock).to.expect("it listens"))
    }

    fn accept(&mut self, _listener: SockId) -> io::Result<(SockId, SocketAddrV4)> {
        if let Some((error, gone)) = self.accept_errors.pop_front() {
            self.backlog.drain(..usize::from(gone));
            return Err(io::Error::from_raw_os_error(error));
        }
        let client = self.backlog.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        Ok((self.insert(None, None), client))
    }

    fn watch(&mut self, sock: SockId, token: Token) -> io::Result<()> {
        self.sock(sock).token = Some(token);
        Ok(())
    }

    fn want_write(&mut self, sock: SockId, _token: Token) {
        self.sock(sock).wants_write = true;
    }

    fn send(
        &mut self,
        sock: SockId,
        parts: &mut dyn Iterator<Item = VolatileSlice<'_>>,
    ) -> io::Result<usize> {
        let sock = self.sock(sock);
        if let Some(error) = sock.error.take() {
            return Err(io::Error::from_raw_os_error(error));
        }
        assert!(!sock.write_closed, "data behind a FIN");
        let mut taken = 0;
        for part in parts {
            let len = part.len().min(sock.room);
            let mut bytes = vec![0; len];
            part.read_slice(&mut bytes, 0).unwrap();
            sock.received.extend_from_slice(&bytes);
            sock.room -= len;
            taken += len;
        }
        if taken == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(taken) }
    }

    fn peek(
        &mut self,
        sock: SockId,
        offset: u32,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
    ) -> io::Result<usize> {
        let sock = self.sock(sock);
        let offset = offset as usize;
        assert!(offset <= sock.inbox.len(), "peeked at {offset} of {}", sock.inbox.len());
        let bytes: Vec<u8> = sock.inbox.iter().skip(offset).take(max).copied().collect();
        if bytes.is_empty() {
            // As Linux: the end that came in order is told for ever, an error once.
            return match sock.error.take_if(|_| !sock.eof) {
                Some(error) => Err(io::Error::from_raw_os_error(error)),
                None if sock.eof => Ok(0),
                None => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let mut frame = vec![0; skip];
        frame.extend_from_slice(&bytes);
        copy_into(parts, &frame);
        Ok(bytes.len())
    }

    fn discard(&mut self, sock: SockId, len: u32) {
        let sock = self.sock(sock);
        assert!(len as usize <= sock.inbox.len(), "discarded what was never there");
        sock.inbox.drain(..len as usize);
    }

    fn send_space(&mut self, sock: SockId) -> SendSpace {
        let room = u32::try_from(self.sock(sock).room).unwrap();
        SendSpace { free: room, size: 50_000, writable: room >= 16_000 }
    }

    fn shutdown_write(&mut self, sock: SockId) {
        self.sock(sock).write_closed = true;
    }

    fn close(&mut self, sock: SockId, how: Close) {
        if self.open.remove(&sock.0).is_some() {
            self.closed.push((sock.0, how));
        }
    }
}

/// The guest's receive ring: buffers of an odd size, so that headers are split.
pub(super) struct Ring {
    parts: Vec<VolatileSlice<'static>>,
    pub(super) frames: Vec<(VnetHdr, Vec<u8>)>,
    pub(super) free: usize,
}

impl Ring {
    fn new() -> Self {
        let memory: &'static mut [u8] = Box::leak(vec![0; 66_000].into_boxed_slice());
        Self {
            parts: memory.chunks_mut(777).map(VolatileSlice::from).collect(),
            frames: Vec::new(),
            free: usize::MAX,
        }
    }
}

impl RxRing for Ring {
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_> {
        assert!(min > 0 && min <= max && max <= 66_000);
        if self.free == 0 { Lent::Empty } else { Lent::Buffers(&self.parts[..max.div_ceil(777)]) }
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        let mut frame = vec![0; len];
        TxFrame { hdr, parts: &self.parts }.copy_out(0, &mut frame);
        self.frames.push((hdr, frame));
        self.free -= 1;
    }
}

/// A segment of the guest, relative numbers.
#[derive(Clone, Debug)]
pub(super) struct Seg {
    pub(super) flags: Flags,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) window: u16,
    pub(super) data: Vec<u8>,
    pub(super) options: Vec<u8>,
    /// A SACK option, in our relative numbers; none if empty.
    pub(super) blocks: Vec<(u32, u32)>,
    pub(super) from: SocketAddrV4,
    pub(super) to: SocketAddrV4,
}

pub(super) fn seg(flags: Flags, seq: u32, ack: u32) -> Seg {
    let (data, options, blocks) = (Vec::new(), Vec::new(), Vec::new());
    Seg { flags, seq, ack, window: 60_000, data, options, blocks, from: GUEST, to: WORLD }
}

impl Seg {
    pub(super) fn data(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self
    }

    pub(super) fn window(mut self, window: u16) -> Self {
        self.window = window;
        self
    }

    pub(super) fn to(mut self, to: SocketAddrV4) -> Self {
        self.to = to;
        self
    }

    fn bytes(&self, iss: u32) -> Vec<u8> {
        let mut tcp = vec![0; 20];
        tcp[0..2].copy_from_slice(&self.from.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.to.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&GUEST_ISS.wrapping_add(self.seq).to_be_bytes());
        if self.flags.contains(Flags::ACK) {
            tcp[8..12].copy_from_slice(&iss.wrapping_add(self.ack).to_be_bytes());
        }
        tcp.extend_from_slice(&self.options);
        tcp.extend(sack(iss, &self.blocks));
        tcp[12] = u8::try_from(tcp.len() / 4).unwrap() << 4;
        tcp[13] = self.flags.bits();
        tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
        tcp.extend_from_slice(&self.data);
        let len = u16::try_from(tcp.len()).unwrap();
        let mut sum = Sum::pseudo_v4(*self.from.ip(), *self.to.ip(), protocol::TCP, len);
        sum.add(&tcp);
        tcp[16..18].copy_from_slice(&sum.finish().to_be_bytes());
        let out = Ipv4Out {
            src: *self.from.ip(),
            dst: *self.to.ip(),
            protocol: protocol::TCP,
            ttl: 64,
            tos: 0,
            id: 7,
            fragment: DONT_FRAGMENT,
        };
        out.frame(NatConfig::default().gateway_mac, MAC, &tcp)
    }
}

impl Seg {
    pub(super) fn options(mut self, options: &[&[u8]]) -> Self {
        self.options = options.concat();
        self
    }

    pub(super) fn sack(mut self, blocks: &[(u32, u32)]) -> Self {
        self.blocks = blocks.to_vec();
        self
    }
}

/// A timestamp option.
pub(super) fn stamp(value: u32, echo: u32) -> Vec<u8> {
    [&[1, 1, 8, 10], &value.to_be_bytes()[..], &echo.to_be_bytes()].concat()
}

fn sack(iss: u32, blocks: &[(u32, u32)]) -> Vec<u8> {
    if blocks.is_empty() {
        return Vec::new();
    }
    let mut option = vec![1, 1, 5, u8::try_from(2 + 8 * blocks.len()).unwrap()];
    for (start, end) in blocks {
        option.extend(iss.wrapping_add(*start).to_be_bytes());
        option.extend(iss.wrapping_add(*end).to_be_bytes());
    }
    option
}

/// What a guest agrees to in its SYN.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Talk {
    pub(super) stamps: bool,
    pub(super) sack: bool,
}

/// A segment to the guest, relative numbers.
pub(super) struct Got {
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) data: Vec<u8>,
    pub(super) options: Options,
}

pub(super) struct Bench {
    pub(super) tcp: Tcp,
    pub(super) host: SimHost,
    pub(super) config: NatConfig,
    pub(super) neighbours: Neighbours,
    pub(super) outbox: Outbox,
    pub(super) counters: Counters,
    pub(super) streams: Vec<ServiceStream>,
    pub(super) guest: Offloads,
    pub(super) now: Instant,
    pub(super) ring: Ring,
    /// Our initial sequence number, once the guest knows it.
    pub(super) iss: u32,
    /// The last window that the guest was told, in bytes.
    pub(super) window: u32,
    /// Data of the last turn, in order of arrival.
    pub(super) data: Vec<u8>,
    pub(super) hdrs: Vec<VnetHdr>,
    /// Options of the last turn's segments.
    pub(super) options: Vec<Options>,
    /// The length of the last turn's longest frame.
    pub(super) longest: usize,
    /// How the last `emit` ended.
    pub(super) received: Received,
    /// Our clock when the connection began.
    pub(super) clock: u32,
    shift: u8,
    budget: usize,
    icmp_errors: Budget,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(NatConfig::default())
    }

    pub(super) fn with(config: NatConfig) -> Self {
        let now = Instant::now();
        let mut neighbours = Neighbours::new(8);
        assert!(neighbours.check(*GUEST.ip(), MAC, now));
        Self {
            tcp: Tcp::default(),
            host: SimHost::default(),
            config,
            neighbours,
            outbox: Outbox::default(),
            counters: Counters::default(),
            streams: Vec::new(),
            guest: Offloads::empty(),
            now,
            ring: Ring::new(),
            iss: 0,
            window: 0,
            data: Vec::new(),
            hdrs: Vec::new(),
            options: Vec::new(),
            longest: 0,
            received: Received::Drained,
            clock: 0,
            shift: 0,
            budget: 0,
            icmp_errors: Budget::default(),
        }
    }

    /// A connection that the guest opened, with window scale 0 on its side and an MSS of 1000.
    pub(super) fn established() -> Self {
        let mut bench = Self::new();
        bench.open();
        bench
    }

    pub(super) fn open(&mut self) {
        self.open_with(Talk::default());
    }

    /// As [`Self::established`], with the options that a modern guest sends.
    pub(super) fn talking(talk: Talk) -> Self {
        let mut bench = Self::new();
        bench.open_with(talk);
        bench
    }

    /// The guest's clock shows 1000 at the beginning.
    pub(super) fn open_with(&mut self, talk: Talk) {
        let options = |echo| if talk.stamps { stamp(1000, echo) } else { Vec::new() };
        let mut syn = seg(Flags::SYN, 0, 0).options(&[&[2, 4, 0x03, 0xe8, 3, 3, 0, 1], &options(0)]);
        if talk.sack {
            syn.options.extend([1, 1, 4, 2]);
        }
        self.send(&syn);
        self.event(Events::WRITE);
        assert_eq!(self.turn(), ["SYN ACK 0+0 ack 1"]);
        self.clock = self.options[0].stamp.map_or(0, |stamp| stamp.value);
        self.send(&seg(Flags::ACK, 1, 1).options(&[&options(self.clock)]));
        assert_eq!(self.turn(), [""; 0]);
    }

    pub(super) fn syn(&mut self) {
        let mut syn = seg(Flags::SYN, 0, 0);
        syn.options = vec![2, 4, 0x03, 0xe8, 3, 3, 0, 1];
        self.send(&syn);
    }

    pub(super) fn cx<T>(&mut self, f: impl FnOnce(&mut Tcp, &mut Cx<'_>, &mut Ring) -> T) -> T {
        self.budget = self.config.limits.frames_per_turn;
        let mut cx = Cx {
            now: self.now,
            config: &self.config,
            guest: self.guest,
            neighbours: &mut self.neighbours,
            outbox: &mut self.outbox,
            counters: &mut self.counters,
            host: &mut self.host,
            streams: &mut self.streams,
            budget: &mut self.budget,
            icmp_errors: &mut self.icmp_errors,
        };
        f(&mut self.tcp, &mut cx, &mut self.ring)
    }

    /// The guest sends a segment.
    pub(super) fn send(&mut self, segment: &Seg) {
        let bytes = segment.bytes(self.iss);
        self.send_bytes(bytes);
    }

    pub(super) fn send_bytes(&mut self, mut bytes: Vec<u8>) {
        let len = bytes.len();
        let head = bytes[..len.min(ipv4::HEAD_MAX)].to_vec();
        let (first, second) = bytes.split_at_mut(len.min(61));
        let parts: Vec<_> =
            [first, second].into_iter().filter(|p| !p.is_empty()).map(VolatileSlice::from).collect();
        let frame = TxFrame { hdr: VnetHdr::default(), parts: &parts };
        let (packet, _) = ipv4::parse(&frame, &head, len).unwrap();
        self.cx(|tcp, cx, _| tcp.input(cx, &packet));
    }

    /// Something happens to the only socket (the last one opened).
    pub(super) fn event(&mut self, events: Events) {
        let token = self.host.open.values().rev().find_map(|sock| sock.token);
        self.event_for(token.expect("a socket is open"), events);
    }

    pub(super) fn event_for(&mut self, token: Token, events: Events) {
        self.cx(|tcp, cx, _| tcp.ready(cx, token, events));
    }

    pub(super) fn listener_event(&mut self) {
        self.event_for(Token { owner: Owner::TcpListener, slot: 0, generation: 0 }, Events::READ);
    }

    /// The world sends data.
    pub(super) fn world_sends(&mut self, data: &[u8]) {
        self.sock().inbox.extend(data);
        self.event(Events::READ);
    }

    /// The world sends its FIN.
    pub(super) fn world_closes(&mut self) {
        self.sock().eof = true;
        self.event(Events::READ | Events::READ_CLOSED);
    }

    pub(super) fn sock(&mut self) -> &mut Sock {
        self.host.open.values_mut().next_back().expect("a socket is open")
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.cx(|tcp, cx, _| tcp.expire(cx));
    }

    /// Time passes until the next timer.
    pub(super) fn pass_to_deadline(&mut self) {
        let deadline = self.tcp.deadline().expect("a timer runs");
        self.pass(deadline.saturating_duration_since(self.now));
    }

    /// What the guest receives now.
    pub(super) fn turn(&mut self) -> Vec<String> {
        let _ = self.outbox.emit(&mut self.counters, &mut self.ring);
        self.received = self.cx(|tcp, cx, ring| tcp.emit(cx, ring));
        let _ = self.outbox.emit(&mut self.counters, &mut self.ring);
        self.data.clear();
        self.hdrs.clear();
        self.options.clear();
        self.longest = 0;
        let frames = std::mem::take(&mut self.ring.frames);
        frames.into_iter().map(|(hdr, frame)| self.show(hdr, &frame)).collect()
    }

    /// What the guest receives now, in numbers.
    pub(super) fn turn_frames(&mut self) -> Vec<Got> {
        self.received = self.cx(|tcp, cx, ring| tcp.emit(cx, ring));
        let frames = std::mem::take(&mut self.ring.frames);
        let got = |frame: &[u8]| {
            let long =
                |at: usize| u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
            let (seq, ack) = (long(38).wrapping_sub(self.iss), long(42).wrapping_sub(GUEST_ISS));
            let behind = 34 + usize::from(frame[46] >> 4) * 4;
            Got { seq, ack, data: frame[behind..].to_vec(), options: Options::read(&frame[54..behind]) }
        };
        frames.iter().map(|(_, frame)| got(frame)).collect()
    }

    fn show(&mut self, hdr: VnetHdr, frame: &[u8]) -> String {
        assert_eq!(&frame[..6], &MAC.octets());
        assert!(crate::checksum::is_valid(&frame[14..34]), "IPv4 header checksum");
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        assert_eq!(total + 14, frame.len());
        let tcp = &frame[34..];
        if frame[23] == protocol::ICMP {
            return format!("ICMP {}/{}", tcp[0], tcp[1]);
        }
        let addr = |at: usize| Ipv4Addr::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3]);
        let long = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let pseudo = Sum::pseudo_v4(addr(26), addr(30), protocol::TCP, u16::try_from(tcp.len()).unwrap());
        if hdr.flags.contains(VnetFlags::NEEDS_CSUM) {
            assert_eq!(u16::from_be_bytes([tcp[16], tcp[17]]), pseudo.fold(), "partial checksum");
        } else {
            let mut sum = pseudo;
            sum.add(tcp);
            assert_eq!(sum.finish(), 0, "checksum");
        }
        let flags = Flags::from_bits_truncate(tcp[13]);
        let header = usize::from(tcp[12] >> 4) * 4;
        let options = Options::read(&tcp[20..header]);
        if flags.contains(Flags::SYN) {
            self.iss = long(4);
            self.shift = options.shift.unwrap_or(0);
        }
        self.options.push(options);
        self.longest = self.longest.max(frame.len());
        let shift = if flags.contains(Flags::SYN) { 0 } else { self.shift };
        self.window = u32::from(u16::from_be_bytes([tcp[14], tcp[15]])) << shift;
        self.data.extend_from_slice(&tcp[header..]);
        self.hdrs.push(hdr);
        let names = (flags - Flags::PSH).iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(" ");
        let seq =
            if flags == Flags::RST | Flags::ACK && long(4) == 0 { 0 } else { long(4).wrapping_sub(self.iss) };
        let ack = if flags.contains(Flags::ACK) { long(8).wrapping_sub(GUEST_ISS) } else { 0 };
        format!("{names} {seq}+{} ack {ack}", tcp.len() - header)
    }

    pub(super) fn dropped(&self, reason: DropReason) -> u64 {
        self.counters.dropped(reason)
    }

    /// The state of the only flow.
    pub(super) fn state(&self) -> &'static str {
        let flows = self.tcp.flows();
        assert!(flows.len() <= 1);
        flows.first().map_or("none", |flow| flow.state)
    }
}
