//! The simulated world: sockets as the kernel has them, remote programs, a clock that jumps.
//!
//! Events are those of an edge-triggered epoll: a wake-up (data, room after a full buffer was met, an end, an error)
//! puts a socket on the ready list once, and what is reported is what it is ready for when it is asked. Data are not
//! stored: byte `n` of a direction is a function of the flow and of `n`, checked when it comes by.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use super::Rng;
use super::pipe::Far;
use crate::nat::host::SockId;
use crate::nat::poller::{Events, Owner, Token};
use crate::nat::udp::socket::{Origin, SocketError};

/// What a call fails with where a socket cannot be had.
const SHORTAGES: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];

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

impl Default for Plan {
    fn default() -> Self {
        Self {
            to_world: 0,
            to_guest: 0,
            world_last: false,
            guest_last: false,
            world_resets: None,
            guest_resets: None,
            connect: Ok(()),
            delay: Duration::ZERO,
            published: false,
        }
    }
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
    /// The host failed it: what becomes of it is not its own doing.
    pub(super) failed: bool,
}

#[derive(Debug)]
pub(super) enum Kind {
    Connecting,
    Stream,
    Listener,
    Datagram,
    Ping,
    Bytes(Far),
}

#[derive(Debug)]
pub(super) struct Sock {
    /// Differs for every socket that ever had the number.
    pub(super) uid: u64,
    pub(super) kind: Kind,
    pub(super) token: Option<Token>,
    pub(super) ready: bool,
    pub(super) flow: usize,
    /// The send buffer: bytes taken, bytes that left, its size; whether a full one was met.
    pub(super) taken: u64,
    pub(super) size: u64,
    pub(super) nospace: bool,
    pub(super) write_closed: bool,
    /// The receive buffer: bytes discarded; what came is `Remote::sent`.
    pub(super) discarded: u64,
    pub(super) eof: bool,
    pub(super) dead: bool,
    pub(super) error: Option<i32>,
    pub(super) inbox: VecDeque<(SocketAddrV4, Vec<u8>)>,
    /// What a stream of real bytes has received.
    pub(super) bytes: VecDeque<u8>,
    pub(super) errors: VecDeque<SocketError>,
}

#[derive(Debug)]
pub(super) enum Action {
    Connected(u32, u64),
    /// The remote program reads, writes, closes or resets; it waited so long before.
    Step(u32, u64, Duration),
    Answer(u32, u64, SocketAddrV4, Vec<u8>),
    Refuse(u32, u64, SocketAddrV4),
    Client(usize),
    /// A connect to a DNS server ends; it sends something, and perhaps its end; a writer may go on.
    Server(u32, u64),
    Bytes(u32, u64, Vec<u8>, bool),
    Room(u32, u64),
    /// The memory for send buffers is back.
    Calm,
}

pub(super) struct World {
    pub(super) base: Instant,
    pub(super) now: Duration,
    pub(super) rng: Rng,
    /// Percent of calls that fail where they may.
    pub(super) faults: u64,
    pub(super) plans: Vec<Plan>,
    pub(super) remotes: Vec<Remote>,
    pub(super) socks: BTreeMap<u32, Sock>,
    pub(super) ready: VecDeque<(u32, u64)>,
    schedule: BTreeMap<(Duration, u64), Action>,
    pub(super) backlog: VecDeque<usize>,
    pub(super) timer: Option<Duration>,
    count: u64,
    /// Until then no send buffer takes anything.
    storm: Duration,
    /// Datagrams that reached a socket, and those that were still there when it was closed.
    pub(super) answers: u64,
    pub(super) unread: u64,
    /// Datagrams of guests to clients of a published port: those that left, and those that the host failed.
    pub(super) echoes: BTreeSet<u16>,
    pub(super) failed_echoes: BTreeSet<u16>,
    pub(super) trace: VecDeque<String>,
}

impl Sock {
    /// Whether it is the gateway's own, and not a guest's.
    pub(super) fn is_of_a_service(&self) -> bool {
        self.token.is_some_and(|token| token.owner == Owner::Dns)
    }
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

pub(super) fn flow_of(addr: SocketAddrV4) -> usize {
    (addr.ip().to_bits() - 0x0a00_0001) as usize
}

pub(super) fn os(errno: i32) -> io::Error {
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
            storm: Duration::ZERO,
            answers: 0,
            unread: 0,
            echoes: BTreeSet::new(),
            failed_echoes: BTreeSet::new(),
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

    pub(super) fn at(&mut self, after: Duration, action: Action) {
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

    pub(super) fn get(&mut self, num: u32, uid: u64) -> Option<&mut Sock> {
        self.socks.get_mut(&num).filter(|sock| sock.uid == uid)
    }

    pub(super) fn wake(&mut self, num: u32) {
        let Some(sock) = self.socks.get_mut(&num) else { return };
        if sock.token.is_some() && !std::mem::replace(&mut sock.ready, true) {
            self.ready.push_back((num, sock.uid));
        }
    }

    fn find(&self, wanted: impl Fn(&Sock) -> bool) -> Option<u32> {
        self.socks.iter().find(|(_, sock)| wanted(sock)).map(|(num, _)| *num)
    }

    /// A client of the published UDP port sends.
    pub(super) fn datagram(&mut self, from: SocketAddrV4, data: Vec<u8>) {
        let published = |sock: &Sock| sock.token.is_some_and(|token| token.owner == Owner::UdpListener);
        let num = self.find(published).expect("it is published");
        let uid = self.socks[&num].uid;
        self.at(Duration::ZERO, Action::Answer(num, uid, from, data));
    }

    /// One of `errors`, now and then.
    pub(super) fn fault(&mut self, errors: &[i32]) -> io::Result<()> {
        if !self.rng.chance(self.faults) {
            return Ok(());
        }
        let at = self.rng.below(errors.len() as u64) as usize;
        Err(os(errors[at]))
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
                    let service = sock.is_of_a_service();
                    self.answers += u64::from(!service);
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
                if let Some(num) = self.find(|sock| matches!(sock.kind, Kind::Listener)) {
                    self.wake(num);
                }
            }
            Action::Server(num, uid) => self.server(num, uid),
            Action::Bytes(num, uid, bytes, end) => self.arrive(num, uid, &bytes, end),
            Action::Room(num, uid) => self.room_again(num, uid),
            Action::Calm => {
                let waiting =
                    |(num, sock): (&u32, &Sock)| (sock.nospace && self.writable(sock)).then_some(*num);
                for num in self.socks.iter().filter_map(waiting).collect::<Vec<_>>() {
                    self.sock(SockId(num)).nospace = false;
                    self.wake(num);
                }
            }
        }
    }

    fn step(&mut self, num: u32, uid: u64, waited: Duration) {
        let Some(sock) = self.socks.get_mut(&num).filter(|s| s.uid == uid && !s.dead) else { return };
        let (plan, remote) = (&self.plans[sock.flow], &mut self.remotes[sock.flow]);
        let before = (remote.got, remote.sent, remote.eof, remote.fin);
        let calm = self.now >= self.storm;
        let rng = &mut self.rng;
        let read = (sock.taken - remote.got).min(1 + rng.below(30_000));
        remote.got += read;
        let room = calm && sock.nospace && has_room(sock, remote);
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
        if self.rng.chance(self.faults) && self.rng.chance(20) {
            self.storm();
        }
        if !over {
            let pause = if self.rng.chance(1) { 2_000_000 } else { self.rng.below(8000) };
            let next = if moved { Duration::from_micros(100 + pause) } else { waited * 2 };
            let next = next.min(Duration::from_secs(2));
            self.at(next, Action::Step(num, uid, next.max(Duration::from_micros(100))));
        }
    }

    /// For a while there is no memory for send buffers.
    fn storm(&mut self) {
        if self.now >= self.storm {
            let length = Duration::from_micros(self.rng.below(3_000_000));
            self.storm = self.now + length;
            self.log(|| format!("no memory to send for {length:?}"));
            self.at(length, Action::Calm);
        }
    }

    /// Bytes that a stream's send buffer takes.
    pub(super) fn room(&self, sock: &Sock) -> u64 {
        match sock {
            // What was in it went with the connection.
            Sock { dead: true, .. } => sock.size,
            _ if self.now < self.storm => 0,
            _ => free(sock, &self.remotes[sock.flow]),
        }
    }

    /// Whether the kernel calls a stream writable.
    pub(super) fn writable(&self, sock: &Sock) -> bool {
        matches!(sock.kind, Kind::Stream)
            && self.now >= self.storm
            && has_room(sock, &self.remotes[sock.flow])
    }

    pub(super) fn levels(&self, num: u32) -> Events {
        let sock = self.socks.get(&num).expect("open");
        let mut events = Events::empty();
        match sock.kind {
            Kind::Bytes(_) => return self.bytes_levels(sock),
            Kind::Connecting => return events,
            Kind::Listener => events.set(Events::READ, !self.backlog.is_empty()),
            Kind::Datagram | Kind::Ping => {
                events.set(Events::READ, !sock.inbox.is_empty());
                events.set(Events::WRITE, true);
            }
            Kind::Stream => {
                let remote = &self.remotes[sock.flow];
                let writable = self.writable(sock);
                events.set(Events::READ, remote.sent > sock.discarded || sock.eof || sock.dead);
                events.set(Events::WRITE, writable || sock.dead);
                events.set(Events::READ_CLOSED, sock.eof || sock.dead);
                events.set(Events::CLOSED, sock.dead || sock.eof && sock.write_closed);
            }
        }
        events.set(Events::ERROR, sock.error.is_some() || !sock.errors.is_empty());
        events
    }

    pub(super) fn insert(&mut self, kind: Kind, token: Option<Token>, flow: usize) -> io::Result<u32> {
        self.fault(&SHORTAGES)?;
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
            bytes: VecDeque::new(),
            errors: VecDeque::new(),
        };
        self.socks.insert(num, sock);
        Ok(num)
    }

    pub(super) fn sock(&mut self, sock: SockId) -> &mut Sock {
        self.socks.get_mut(&sock.0).expect("a closed socket was used")
    }
}

pub(super) fn free(sock: &Sock, remote: &Remote) -> u64 {
    sock.size.saturating_sub(sock.taken - remote.got)
}

fn has_room(sock: &Sock, remote: &Remote) -> bool {
    free(sock, remote) >= (sock.taken - remote.got) / 2
}
