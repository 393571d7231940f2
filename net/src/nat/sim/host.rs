//! The simulated host and the world behind it: sockets as the kernel has them, remote programs, a clock that jumps.
//!
//! Events are those of an edge-triggered epoll: a wake-up (data, room after a full buffer was met, an end, an error)
//! puts a socket on the ready list once, and what is reported is what it is ready for when it is asked. Data are not
//! stored: byte `n` of a direction is a function of the flow and of `n`, checked when it comes by.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, VolatileSlice};

use super::Rng;
use crate::nat::host::{Close, Machine, SendSpace, SockId, StreamHost};
use crate::nat::outbox::copy_into;
use crate::nat::poller::{Events, Owner, Token};
use crate::nat::udp::socket::{DatagramHost, Incoming, Origin, Outgoing, PingKind, SocketError};

/// What is to happen in a flow.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) to_world: u64,
    pub(super) to_guest: u64,
    /// The world's program waits with its FIN for the guest's, or the guest with its own for the world's.
    pub(super) world_last: bool,
    pub(super) guest_last: bool,
    /// Resets when so many bytes of both directions have passed.
    pub(super) world_resets: Option<u64>,
    pub(super) guest_resets: Option<u64>,
    /// How the connect ends, and when.
    pub(super) connect: Result<(), i32>,
    pub(super) delay: Duration,
    /// The client of a published port.
    pub(super) published: bool,
}

/// The world's end of a flow.
#[derive(Debug, Default)]
pub(super) struct Remote {
    /// Bytes that its program has read.
    pub(super) got: u64,
    pub(super) sent: u64,
    /// It saw the guest's end.
    pub(super) eof: bool,
    pub(super) fin: bool,
    pub(super) reset: bool,
    pub(super) connected: bool,
}

#[derive(Debug)]
enum Kind {
    Connecting,
    Stream,
    Listener,
    Datagram,
    Ping,
}

#[derive(Debug)]
struct Sock {
    /// Differs for every socket that ever had the number.
    uid: u64,
    kind: Kind,
    token: Option<Token>,
    ready: bool,
    flow: usize,
    /// The send buffer: bytes taken, bytes that left, its size; whether a full one was met.
    taken: u64,
    size: u64,
    nospace: bool,
    write_closed: bool,
    /// The receive buffer: bytes discarded; what came is `Remote::sent`.
    discarded: u64,
    eof: bool,
    dead: bool,
    error: Option<i32>,
    inbox: VecDeque<(SocketAddrV4, Vec<u8>)>,
    errors: VecDeque<SocketError>,
}

#[derive(Debug)]
enum Action {
    Connected(u32, u64),
    /// The remote program reads, writes, closes or resets; it waited so long before.
    Step(u32, u64, Duration),
    Answer(u32, u64, SocketAddrV4, Vec<u8>),
    Refuse(u32, u64, SocketAddrV4),
    Client(usize),
}

pub(super) struct World {
    base: Instant,
    pub(super) now: Duration,
    pub(super) rng: Rng,
    /// Percent of calls that fail where they may.
    pub(super) faults: u64,
    pub(super) plans: Vec<Plan>,
    pub(super) remotes: Vec<Remote>,
    socks: BTreeMap<u32, Sock>,
    ready: VecDeque<(u32, u64)>,
    schedule: BTreeMap<(Duration, u64), Action>,
    backlog: VecDeque<usize>,
    timer: Option<Duration>,
    count: u64,
    /// Datagrams that reached a socket, and those that were still there when it was closed.
    pub(super) answers: u64,
    pub(super) unread: u64,
    pub(super) trace: VecDeque<String>,
}

/// Byte `at` of a direction of a flow.
pub(super) fn pattern(flow: usize, to_guest: bool, at: u64) -> u8 {
    let mixed = (at ^ (flow as u64) << 17 ^ u64::from(to_guest) << 50).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

pub(super) fn world_addr(flow: usize) -> SocketAddrV4 {
    let flow = u32::try_from(flow).unwrap();
    SocketAddrV4::new(Ipv4Addr::from_bits(0x0a00_0001 + flow), 8000)
}

fn flow_of(addr: SocketAddrV4) -> usize {
    (addr.ip().to_bits() - 0x0a00_0001) as usize
}

fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            base: Instant::now(),
            now: Duration::ZERO,
            rng: Rng(seed ^ 0xabcd),
            faults: 0,
            plans: Vec::new(),
            remotes: Vec::new(),
            socks: BTreeMap::new(),
            ready: VecDeque::new(),
            schedule: BTreeMap::new(),
            backlog: VecDeque::new(),
            timer: None,
            count: 0,
            answers: 0,
            unread: 0,
            trace: VecDeque::new(),
        }
    }

    pub(super) fn log(&mut self, line: impl FnOnce() -> String) {
        if self.trace.len() == 200 {
            self.trace.pop_front();
        }
        let line = format!("{:>12.6} {}", self.now.as_secs_f64(), line());
        self.trace.push_back(line);
    }

    fn at(&mut self, after: Duration, action: Action) {
        self.count += 1;
        self.schedule.insert((self.now + after, self.count), action);
    }

    pub(super) fn client(&mut self, flow: usize) {
        self.at(Duration::ZERO, Action::Client(flow));
    }

    /// Whether the NAT's descriptor is readable.
    pub(super) fn readable(&mut self) -> bool {
        let mut ready = std::mem::take(&mut self.ready);
        ready.retain(|(num, uid)| self.get(*num, *uid).is_some());
        self.ready = ready;
        let levels = self.ready.iter().any(|(num, _)| !self.levels(*num).is_empty());
        levels || self.timer.is_some_and(|at| at <= self.now)
    }

    /// When something happens by itself. While nobody polls, the timer does not count.
    pub(super) fn next(&self, polled: bool) -> Option<Duration> {
        let action = self.schedule.keys().next().map(|(at, _)| *at);
        [action, self.timer.filter(|_| polled)].into_iter().flatten().min()
    }

    /// Does what is due.
    pub(super) fn run(&mut self) {
        while let Some(entry) = self.schedule.first_entry().filter(|e| e.key().0 <= self.now) {
            let action = entry.remove();
            self.act(action);
        }
    }

    fn get(&mut self, num: u32, uid: u64) -> Option<&mut Sock> {
        self.socks.get_mut(&num).filter(|sock| sock.uid == uid)
    }

    fn wake(&mut self, num: u32) {
        let Some(sock) = self.socks.get_mut(&num) else { return };
        if sock.token.is_some() && !std::mem::replace(&mut sock.ready, true) {
            self.ready.push_back((num, sock.uid));
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Connected(num, uid) => {
                let Some(flow) = self.get(num, uid).map(|sock| sock.flow) else { return };
                let outcome = self.plans[flow].connect;
                self.log(|| format!("flow {flow}: connect {outcome:?}"));
                let sock = self.get(num, uid).expect("it was there");
                sock.kind = Kind::Stream;
                if let Err(errno) = outcome {
                    sock.error = Some(errno);
                    sock.dead = true;
                } else {
                    self.remotes[flow].connected = true;
                    self.at(Duration::ZERO, Action::Step(num, uid, Duration::from_micros(100)));
                }
                self.wake(num);
            }
            Action::Step(num, uid, waited) => self.step(num, uid, waited),
            Action::Answer(num, uid, from, data) => {
                if let Some(sock) = self.get(num, uid) {
                    sock.inbox.push_back((from, data));
                    self.answers += 1;
                    self.wake(num);
                }
            }
            Action::Refuse(num, uid, to) => {
                if let Some(sock) = self.get(num, uid) {
                    sock.error = Some(libc::ECONNREFUSED);
                    let offender = Some(*to.ip());
                    let origin = Origin::Icmp(3, 3);
                    let (errno, mtu, payload) = (libc::ECONNREFUSED, 0, Vec::new());
                    sock.errors.push_back(SocketError { errno, origin, mtu, offender, to, payload });
                    self.wake(num);
                }
            }
            Action::Client(flow) => {
                self.backlog.push_back(flow);
                let listener = self.socks.iter().find(|(_, sock)| matches!(sock.kind, Kind::Listener));
                if let Some(num) = listener.map(|(num, _)| *num) {
                    self.wake(num);
                }
            }
        }
    }

    fn step(&mut self, num: u32, uid: u64, waited: Duration) {
        let Some(sock) = self.socks.get_mut(&num).filter(|s| s.uid == uid && !s.dead) else { return };
        let (plan, remote) = (&self.plans[sock.flow], &mut self.remotes[sock.flow]);
        let before = (remote.got, remote.sent, remote.eof, remote.fin);
        let rng = &mut self.rng;
        let read = (sock.taken - remote.got).min(1 + rng.below(30_000));
        remote.got += read;
        let room = sock.nospace && writable(sock, remote);
        remote.eof = sock.write_closed && remote.got == sock.taken;
        let unread = remote.sent - sock.discarded;
        let write =
            (plan.to_guest - remote.sent).min(rng.below(20_000)).min(60_000u64.saturating_sub(unread));
        remote.sent += write;
        if remote.sent == plan.to_guest && !remote.fin && (!plan.world_last || remote.eof) {
            remote.fin = true;
            sock.eof = true;
        }
        let moved = before != (remote.got, remote.sent, remote.eof, remote.fin);
        let wake = room || write > 0 || remote.fin != before.3;
        if room {
            sock.nospace = false;
        }
        let resets = plan.world_resets.is_some_and(|at| remote.got + remote.sent >= at);
        if resets && !(remote.fin && remote.eof) {
            remote.reset = true;
            sock.dead = true;
            sock.error = Some(libc::ECONNRESET);
            let flow = sock.flow;
            self.log(|| format!("flow {flow}: the world resets"));
            return self.wake(num);
        }
        let over = remote.fin && remote.eof;
        let flow = sock.flow;
        if wake {
            self.wake(num);
        }
        if moved {
            let (got, sent, eof, fin) = {
                let remote = &self.remotes[flow];
                (remote.got, remote.sent, remote.eof, remote.fin)
            };
            self.log(|| format!("flow {flow}: world got {got} sent {sent} eof {eof} fin {fin}"));
        }
        if !over {
            let pause = if self.rng.chance(1) { 2_000_000 } else { self.rng.below(8000) };
            let next = if moved { Duration::from_micros(100 + pause) } else { waited * 2 };
            let next = next.min(Duration::from_secs(2));
            self.at(next, Action::Step(num, uid, next.max(Duration::from_micros(100))));
        }
    }

    fn levels(&self, num: u32) -> Events {
        let sock = self.socks.get(&num).expect("open");
        let mut events = Events::empty();
        match sock.kind {
            Kind::Connecting => return events,
            Kind::Listener => events.set(Events::READ, !self.backlog.is_empty()),
            Kind::Datagram | Kind::Ping => {
                events.set(Events::READ, !sock.inbox.is_empty());
                events.set(Events::WRITE, true);
            }
            Kind::Stream => {
                let remote = &self.remotes[sock.flow];
                let writable = writable(sock, remote);
                events.set(Events::READ, remote.sent > sock.discarded || sock.eof || sock.dead);
                events.set(Events::WRITE, writable || sock.dead);
                events.set(Events::READ_CLOSED, sock.eof || sock.dead);
                events.set(Events::CLOSED, sock.dead || sock.eof && sock.write_closed);
            }
        }
        events.set(Events::ERROR, sock.error.is_some() || !sock.errors.is_empty());
        events
    }

    fn insert(&mut self, kind: Kind, token: Option<Token>, flow: usize) -> io::Result<u32> {
        if self.rng.chance(self.faults) {
            return Err(os(libc::EMFILE));
        }
        // As the kernel: the lowest free number.
        let num = (3..).find(|num| !self.socks.contains_key(num)).expect("a free number");
        self.count += 1;
        let size = 4_000 + self.rng.below(60_000);
        let sock = Sock {
            uid: self.count,
            kind,
            token,
            ready: false,
            flow,
            taken: 0,
            size,
            nospace: false,
            write_closed: false,
            discarded: 0,
            eof: false,
            dead: false,
            error: None,
            inbox: VecDeque::new(),
            errors: VecDeque::new(),
        };
        self.socks.insert(num, sock);
        Ok(num)
    }

    fn sock(&mut self, sock: SockId) -> &mut Sock {
        self.socks.get_mut(&sock.0).expect("a closed socket was used")
    }
}

fn free(sock: &Sock, remote: &Remote) -> u64 {
    sock.size.saturating_sub(sock.taken - remote.got)
}

fn writable(sock: &Sock, remote: &Remote) -> bool {
    free(sock, remote) >= (sock.taken - remote.got) / 2
}

/// The host that the NAT gets.
pub(super) struct SimHost {
    pub(super) world: Arc<Mutex<World>>,
    pub(super) fd: std::fs::File,
}

impl SimHost {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("nobody panicked with it")
    }
}

impl AsFd for SimHost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Machine for SimHost {
    fn now(&self) -> Instant {
        let world = self.world();
        world.base + world.now
    }

    fn poll(&mut self, into: &mut Vec<(Token, Events)>) -> bool {
        let mut world = self.world();
        let now = world.now;
        if world.timer.is_some_and(|at| at <= now) {
            world.timer = None;
            into.push((Token { owner: Owner::Timer, slot: 0, generation: 0 }, Events::READ));
        }
        for _ in 0..=world.rng.below(16) {
            let Some((num, uid)) = world.ready.pop_front() else { return false };
            let Some(sock) = world.get(num, uid) else { continue };
            sock.ready = false;
            let token = sock.token.expect("it is watched");
            let events = world.levels(num);
            if !events.contains(Events::WRITE) {
                world.sock(SockId(num)).nospace = true;
            }
            if !events.is_empty() {
                into.push((token, events));
            }
        }
        // As an answer that was full.
        true
    }

    fn set_timer(&mut self, after: Duration) {
        let mut world = self.world();
        world.timer = Some(world.now + after.max(Duration::from_nanos(1)));
    }

    fn open_sockets(&self) -> usize {
        self.world().socks.len()
    }
}

impl StreamHost for SimHost {
    fn connect(&mut self, to: SocketAddrV4, token: Token) -> io::Result<SockId> {
        let mut world = self.world();
        let flow = flow_of(to);
        let num = world.insert(Kind::Connecting, Some(token), flow)?;
        let uid = world.socks[&num].uid;
        world.remotes[flow] = Remote::default();
        let delay = world.plans[flow].delay;
        world.at(delay, Action::Connected(num, uid));
        Ok(SockId(num))
    }

    fn stream_pair(&mut self, _token: Token) -> io::Result<(SockId, SockId)> {
        Err(os(libc::EMFILE))
    }

    fn connected(&mut self, sock: SockId) -> io::Result<()> {
        self.world().sock(sock).error.take().map_or(Ok(()), |errno| Err(os(errno)))
    }

    fn listen(&mut self, _at: SocketAddrV4, token: Token) -> io::Result<SockId> {
        self.world().insert(Kind::Listener, Some(token), 0).map(SockId)
    }

    fn local_addr(&mut self, _sock: SockId) -> io::Result<SocketAddrV4> {
        Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080))
    }

    fn accept(&mut self, _listener: SockId) -> io::Result<(SockId, SocketAddrV4)> {
        let mut world = self.world();
        let flow = *world.backlog.front().ok_or(io::ErrorKind::WouldBlock)?;
        let num = world.insert(Kind::Stream, None, flow)?;
        world.backlog.pop_front();
        let uid = world.socks[&num].uid;
        world.remotes[flow].connected = true;
        world.at(Duration::ZERO, Action::Step(num, uid, Duration::from_micros(100)));
        Ok((SockId(num), world_addr(flow)))
    }

    fn watch(&mut self, sock: SockId, token: Token) -> io::Result<()> {
        let mut world = self.world();
        world.sock(sock).token = Some(token);
        if !world.levels(sock.0).is_empty() {
            world.wake(sock.0);
        }
        Ok(())
    }

    fn want_write(&mut self, sock: SockId, _token: Token) {
        let mut world = self.world();
        let levels = world.levels(sock.0);
        if !levels.contains(Events::WRITE) {
            world.sock(sock).nospace = true;
        }
        if !levels.is_empty() {
            world.wake(sock.0);
        }
    }

    fn send(&mut self, id: SockId, parts: &mut dyn Iterator<Item = VolatileSlice<'_>>) -> io::Result<usize> {
        let mut guard = self.world();
        let world = &mut *guard;
        let sock = world.socks.get_mut(&id.0).expect("open");
        if sock.dead {
            return Err(os(sock.error.take().unwrap_or(libc::EPIPE)));
        }
        assert!(!sock.write_closed, "flow {}: data behind a FIN", sock.flow);
        let mut room = free(sock, &world.remotes[sock.flow]);
        if world.rng.chance(10) {
            room = world.rng.below(room + 1);
        }
        let mut sent = 0;
        for part in parts {
            let len = part.len().min(usize::try_from(room).unwrap());
            let mut bytes = vec![0; len];
            part.read_slice(&mut bytes, 0).unwrap();
            for byte in bytes {
                assert_eq!(
                    byte,
                    pattern(sock.flow, false, sock.taken),
                    "flow {} at {}",
                    sock.flow,
                    sock.taken
                );
                sock.taken += 1;
            }
            room -= len as u64;
            sent += len;
            if len < part.len() {
                sock.nospace = true;
                break;
            }
        }
        assert!(sock.taken <= world.plans[sock.flow].to_world);
        if sent == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(sent) }
    }

    fn peek(
        &mut self,
        id: SockId,
        offset: u32,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
    ) -> io::Result<usize> {
        let mut guard = self.world();
        let world = &mut *guard;
        let sock = world.socks.get_mut(&id.0).expect("open");
        let sent = world.remotes[sock.flow].sent;
        let from = sock.discarded + u64::from(offset);
        assert!(from <= sent, "flow {}: peeked at {from} of {sent}", sock.flow);
        let len = (sent - from).min(max as u64);
        if len == 0 {
            return match sock.error.take() {
                Some(errno) => Err(os(errno)),
                None if sock.eof || sock.dead => Ok(0),
                None => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let mut bytes = vec![0; skip];
        bytes.extend((from..from + len).map(|at| pattern(sock.flow, true, at)));
        copy_into(parts, &bytes);
        Ok(usize::try_from(len).unwrap())
    }

    fn discard(&mut self, id: SockId, len: u32) {
        let mut guard = self.world();
        let world = &mut *guard;
        let sock = world.socks.get_mut(&id.0).expect("open");
        sock.discarded += u64::from(len);
        assert!(sock.discarded <= world.remotes[sock.flow].sent, "discarded what was never there");
    }

    fn send_space(&mut self, id: SockId) -> SendSpace {
        let mut guard = self.world();
        let world = &mut *guard;
        let sock = world.socks.get_mut(&id.0).expect("open");
        let remote = &world.remotes[sock.flow];
        let free = free(sock, remote);
        let number = |n: u64| u32::try_from(n).unwrap();
        SendSpace { free: number(free - free / 8), size: number(sock.size), writable: writable(sock, remote) }
    }

    fn shutdown_write(&mut self, id: SockId) {
        self.world().sock(id).write_closed = true;
    }

    fn close(&mut self, id: SockId, how: Close) {
        let mut world = self.world();
        let sock = world.socks.remove(&id.0).expect("closed twice");
        world.unread += sock.inbox.len() as u64;
        if !matches!(sock.kind, Kind::Stream) || sock.dead {
            return;
        }
        let flow = sock.flow;
        let remote = &mut world.remotes[flow];
        // The kernel resets a connection whose data nobody will read.
        let unread = remote.sent > sock.discarded;
        if how == Close::Reset || unread || !remote.fin {
            remote.reset = true;
        } else {
            remote.got = sock.taken;
            remote.eof = true;
        }
        let line = format!("flow {flow}: closed {how:?}, unread {unread}: {remote:?}");
        world.log(|| line);
    }
}

impl DatagramHost for SimHost {
    fn udp_open(&mut self, _at: SocketAddrV4, _tell_local: bool, token: Token) -> io::Result<SockId> {
        self.world().insert(Kind::Datagram, Some(token), 0).map(SockId)
    }

    fn ping_open(&mut self, _id: u16, token: Token) -> io::Result<(SockId, PingKind)> {
        Ok((SockId(self.world().insert(Kind::Ping, Some(token), 0)?), PingKind::Datagram))
    }

    fn send_datagram(
        &mut self,
        id: SockId,
        out: &Outgoing,
        parts: &mut dyn Iterator<Item = VolatileSlice<'_>>,
    ) -> io::Result<()> {
        let mut world = self.world();
        let sock = world.sock(id);
        let uid = sock.uid;
        if let Some(errno) = sock.error.take() {
            return Err(os(errno));
        }
        let ping = matches!(sock.kind, Kind::Ping);
        let mut data = Vec::new();
        for part in parts {
            let at = data.len();
            data.resize(at + part.len(), 0);
            part.read_slice(&mut data[at..], 0).unwrap();
        }
        if ping {
            data[0] = 0;
            data[2..4].fill(0);
            let sum = crate::checksum::checksum(&data);
            data[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let delay = Duration::from_micros(world.rng.below(100_000));
        match world.rng.below(10) {
            0 => {}
            1 if !ping => world.at(delay, Action::Refuse(id.0, uid, out.to)),
            _ => world.at(delay, Action::Answer(id.0, uid, out.to, data)),
        }
        Ok(())
    }

    fn recv_datagram(
        &mut self,
        id: SockId,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
        rest: &mut Vec<u8>,
    ) -> io::Result<Incoming> {
        let mut world = self.world();
        let sock = world.sock(id);
        if let Some(errno) = sock.error.take() {
            return Err(os(errno));
        }
        let (from, data) = sock.inbox.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        rest.clear();
        let fits = data.len().min(max);
        rest.extend_from_slice(&data[fits..]);
        let mut frame = vec![0; skip];
        frame.extend_from_slice(&data[..fits]);
        copy_into(parts, &frame);
        Ok(Incoming { from, len: data.len(), ttl: 60, tos: 0, to: None })
    }

    fn take_error(&mut self, id: SockId) -> Option<SocketError> {
        let mut world = self.world();
        let sock = world.sock(id);
        sock.error = None;
        sock.errors.pop_front()
    }
}
