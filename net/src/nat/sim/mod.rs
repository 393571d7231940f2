//! The whole NAT against a simulated host, world and guests, in virtual time.
//!
//! A seed makes a run: hundreds of TCP connections, datagrams, pings, leases and questions, with losses, stalls, resets,
//! full rings and failing calls. `recv` is called exactly when the contract of [`FramePort`] says, so that a wake-up that is lost is a
//! connection that never ends. Checked: every byte arrives once and in order on both sides; connections that nobody
//! disturbs end in an orderly way; what is idle is silent; sockets and flows agree, and none is left at the end.
//!
//! `PONTOON_SIM_SEEDS=N` runs seeds 0 to N, `PONTOON_SIM_SEED=S` only seed S. A failing run prints its seed and the
//! last that happened.

mod guest;
mod host;
mod pipe;
mod services;
mod world;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vm_memory::VolatileSlice;

use self::guest::{Endpoint, Outcome, Segment};
use self::host::SimHost;
use self::services::{Errand, Script, Services};
use self::world::{Plan, World, world_addr};
use super::{Nat, NatConfig, Publish, PublishProtocol, PublishTo, Reservation};
use crate::checksum::{Sum, checksum};
use crate::nat::ipv4::{DONT_FRAGMENT, Ipv4Out, protocol};
use crate::{
    DropReason, FramePort, Lent, MacAddr, Offloads, Received, RxRing, Sent, TxFrame, VnetFlags, VnetHdr,
};

/// Seeds of every run of the tests.
const SEEDS: u64 = 32;
/// Seeds that failed once, with what they found. They are other runs since what a run does has changed; unit tests keep the
/// cases.
const FOUND: &[u64] = &[
    2,  // a retransmission that acknowledged more left the old window in place, and its edge moved
    20, // a client of a published port waited for ever once the host had no descriptor for it
    // 279 took a minute: SYN-ACKs that waited for the guest's buffers were counted as ignored.
    231, // TCP used up every turn, and datagrams waited in their sockets until these were closed
];
/// Connections of a run; of every sixteenth run, with several hundred at once.
const FLOWS: usize = 60;
const MANY_FLOWS: usize = 2000;
const GUESTS: usize = 4;
/// Everything is over by then, and idle flows have expired.
const END: Duration = Duration::from_secs(4 * 3600);

/// SplitMix64.
pub(super) struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Less than `n`, which may be 0.
    fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.next() % n }
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

fn guest_addr(n: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 122, 10 + n as u8)
}

fn mac(addr: Ipv4Addr) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, 0, addr.octets()[3]])
}

/// A guest's frame, its transport checksum complete or partial.
fn frame(addrs: (Ipv4Addr, Ipv4Addr), protocol: u8, payload: Vec<u8>, complete: bool) -> Vec<u8> {
    frame_from(mac(addrs.0), addrs, protocol, payload, complete)
}

fn frame_from(
    own: MacAddr,
    (src, dst): (Ipv4Addr, Ipv4Addr),
    protocol: u8,
    mut payload: Vec<u8>,
    complete: bool,
) -> Vec<u8> {
    let at = match protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => 2,
    };
    let mut sum = Sum::pseudo_v4(src, dst, protocol, payload.len() as u16);
    if protocol == protocol::ICMP {
        sum = Sum::new();
    }
    let sum = if complete {
        sum.add(&payload);
        sum.finish()
    } else {
        sum.fold()
    };
    payload[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    let fragment = DONT_FRAGMENT;
    let out = Ipv4Out { src, dst, protocol, ttl: 64, tos: 0, id: 7, fragment };
    out.frame(NatConfig::default().gateway_mac, own, &payload)
}

/// The guest's receive ring.
struct Ring {
    parts: Vec<VolatileSlice<'static>>,
    chunk: usize,
    frames: Vec<(VnetHdr, Vec<u8>)>,
    free: u64,
}

impl RxRing for Ring {
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_> {
        assert!(min > 0 && min <= max && max <= 66_000);
        // The last buffers are fewer than the most that is wanted.
        let len = if self.free == 1 { min } else { max };
        let parts = &self.parts[..len.div_ceil(self.chunk)];
        if self.free == 0 { Lent::Empty } else { Lent::Buffers(parts) }
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        let mut frame = vec![0; len];
        TxFrame { hdr, parts: &self.parts }.copy_out(0, &mut frame);
        self.frames.push((hdr, frame));
        self.free -= 1;
    }
}

/// One run.
struct Sim {
    seed: u64,
    rng: Rng,
    nat: Nat,
    world: Arc<Mutex<World>>,
    ring: Ring,
    /// Frames on their way into the guests.
    wire: BTreeMap<(Duration, u64), (VnetHdr, Vec<u8>)>,
    out: Vec<(VnetHdr, Vec<u8>)>,
    ends: Vec<Endpoint>,
    /// Those that may have something to do.
    live: Vec<usize>,
    most: usize,
    by_port: HashMap<(Ipv4Addr, u16, SocketAddrV4), usize>,
    starts: BTreeMap<Duration, usize>,
    errands: BTreeMap<Duration, (usize, Errand)>,
    services: Services,
    refill_at: Option<Duration>,
    loss: u64,
    offload: bool,
    tight: bool,
    committed: u64,
    taken: u64,
    answers: u64,
    turns: u64,
    count: u64,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed.wrapping_mul(77));
        let world = Arc::new(Mutex::new(World::new(seed)));
        let fd = std::fs::File::open("/dev/null").unwrap();
        let mut config = NatConfig::default();
        config.limits.tcp_idle = Duration::from_secs(300);
        config.limits.frames_per_turn = 4 + rng.below(200) as usize;
        let (echo, port) = services::ECHO;
        for (protocol, guest, guest_port) in
            [(PublishProtocol::Tcp, 0, 80), (PublishProtocol::Udp, echo, port)]
        {
            let (addr, to) = (Ipv4Addr::LOCALHOST, PublishTo::Addr(guest_addr(guest)));
            config.publish.push(Publish { addr, host_port: 8080, guest_port, protocol, to });
        }
        for n in 0..GUESTS {
            let (mac, addr) = (mac(guest_addr(n)), guest_addr(n));
            config.reservations.push(Reservation { mac, addr, name: Some(format!("g{n}")) });
        }
        config.dns = services::servers();
        let host = SimHost { world: Arc::clone(&world), fd };
        let mut nat = Nat::on(config, Box::new(host)).unwrap();
        let offload = rng.chance(50);
        if offload {
            nat.set_offloads(Offloads::CSUM | Offloads::TSO4).unwrap();
        }
        let memory: &'static mut [u8] = Box::leak(vec![0; 70_000].into_boxed_slice());
        let chunk = 600 + rng.below(4000) as usize;
        let parts = memory.chunks_mut(chunk).map(VolatileSlice::from).collect();
        let loss = if rng.chance(50) { 0 } else { 1 + rng.below(4) };
        let tight = rng.chance(50);
        world.lock().unwrap().faults = if rng.chance(50) { 0 } else { 2 };
        let mut sim = Self {
            seed,
            nat,
            world,
            ring: Ring { parts, chunk, frames: Vec::new(), free: 100 },
            wire: BTreeMap::new(),
            out: Vec::new(),
            ends: Vec::new(),
            live: Vec::new(),
            most: 0,
            by_port: HashMap::new(),
            starts: BTreeMap::new(),
            errands: BTreeMap::new(),
            services: Services::default(),
            refill_at: None,
            loss,
            offload,
            tight,
            committed: 0,
            taken: 0,
            answers: 0,
            turns: 0,
            count: 0,
            rng,
        };
        sim.plan();
        sim
    }

    fn plan(&mut self) {
        let flows = if self.seed % 16 == 7 { MANY_FLOWS } else { FLOWS };
        for flow in 0..flows {
            let rng = &mut self.rng;
            let connect = match rng.below(20) {
                0 => Err(libc::ECONNREFUSED),
                1 => Err(libc::EHOSTUNREACH),
                2 => Err(libc::ETIMEDOUT),
                _ => Ok(()),
            };
            let most = if rng.chance(10) { 400_000 } else { 20_000 };
            let last = rng.below(3);
            let plan = Plan {
                to_world: rng.below(most),
                to_guest: rng.below(most),
                world_last: last == 0,
                guest_last: last == 1,
                world_resets: rng.chance(10).then(|| rng.below(most)),
                guest_resets: rng.chance(10).then(|| rng.below(most)),
                connect,
                delay: match connect {
                    Err(libc::ETIMEDOUT) => Duration::from_secs(130),
                    _ => Duration::from_micros(rng.below(200_000)),
                },
                published: rng.chance(20),
            };
            let start = Duration::from_nanos(rng.below(2_000_000) * 1000 + flow as u64 % 1000);
            self.starts.insert(start, flow);
            let mut world = self.world.lock().unwrap();
            world.plans.push(plan);
            world.remotes.push(world::Remote::default());
        }
        for (errand, count) in [
            (Errand::Datagram, 40),
            (Errand::Ping, 20),
            (Errand::Arp, 10),
            (Errand::Question, 40),
            (Errand::Lease, 20),
            (Errand::Stream, 12),
            (Errand::Client, 20),
        ] {
            for n in 0..count {
                // By then everybody has said something.
                let at = Duration::from_nanos(3_000_000_000 + self.rng.below(20_000_000_000));
                self.errands.insert(at, (n % GUESTS, errand));
            }
        }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("nobody panicked with it")
    }

    fn start(&mut self, flow: usize, now: Duration) {
        let plan = self.world().plans[flow].clone();
        let guest = if plan.published { 0 } else { flow % GUESTS };
        let port = if plan.published { 80 } else { 20_000 + flow as u16 };
        let at = SocketAddrV4::new(guest_addr(guest), port);
        let published = plan.published;
        let end = Endpoint::new(flow, (at, world_addr(flow)), plan, now, &mut self.rng);
        self.by_port.insert((*at.ip(), port, world_addr(flow)), self.ends.len());
        self.live.push(self.ends.len());
        self.ends.push(end);
        if published {
            self.world().client(flow);
        }
    }

    fn errand(&mut self, guest: usize, errand: Errand) {
        let frame = match errand {
            Errand::Datagram | Errand::Ping => self.datagram(guest, matches!(errand, Errand::Ping)),
            Errand::Client => {
                let (from, data) = self.services.client(&mut self.rng);
                return self.world().datagram(from, data);
            }
            Errand::Stream => return self.stream(guest),
            _ => self.services.errand(errand, guest_addr(guest), &mut self.rng),
        };
        self.out.push((VnetHdr::default(), frame));
    }

    /// A guest asks the gateway over TCP.
    fn stream(&mut self, guest: usize) {
        let now = self.world().now;
        let script = Script::new(&mut self.rng);
        let plan = Plan { to_world: script.out.len() as u64, ..Plan::default() };
        let flow = {
            let mut world = self.world();
            world.plans.push(plan.clone());
            world.remotes.push(world::Remote::default());
            world.plans.len() - 1
        };
        let at = SocketAddrV4::new(guest_addr(guest), 40_000 + flow as u16);
        let gateway = SocketAddrV4::new(services::GATEWAY, 53);
        let mut end = Endpoint::new(flow, (at, gateway), plan, now, &mut self.rng);
        end.script = Some(script);
        self.by_port.insert((*at.ip(), at.port(), gateway), self.ends.len());
        self.live.push(self.ends.len());
        self.ends.push(end);
    }

    fn datagram(&mut self, guest: usize, ping: bool) -> Vec<u8> {
        let to = Ipv4Addr::new(10, 200, 0, self.rng.below(8) as u8);
        let data = vec![0; self.rng.below(1000) as usize];
        let port = 5000 + self.rng.below(20) as u16;
        if !ping {
            return frame((guest_addr(guest), to), protocol::UDP, services::udp(port, 9000, &data), true);
        }
        let echo = [&[8, 0, 0, 0][..], &port.to_be_bytes(), &[0, 0], &data].concat();
        frame((guest_addr(guest), to), protocol::ICMP, echo, true)
    }

    /// What the guests do now.
    fn guests(&mut self, now: Duration) {
        while let Some(entry) = self.starts.first_entry().filter(|e| *e.key() <= now) {
            let flow = entry.remove();
            self.start(flow, now);
        }
        while let Some(entry) = self.errands.first_entry().filter(|e| *e.key() <= now) {
            let (guest, errand) = entry.remove();
            self.errand(guest, errand);
        }
        while let Some(entry) = self.wire.first_entry().filter(|e| e.key().0 <= now) {
            let (hdr, frame) = entry.remove();
            self.arrived(hdr, &frame, now);
        }
        let (ends, out) = (&mut self.ends, &mut self.out);
        self.live.retain(|at| {
            out.extend(ends[*at].output(now, self.offload, &mut self.rng));
            ends[*at].outcome.is_none()
        });
    }

    /// A frame arrives in a guest.
    fn arrived(&mut self, hdr: VnetHdr, frame: &[u8], now: Duration) {
        if frame[12..14] == [8, 6] {
            let answer = self.services.arp(frame);
            return self.out.extend(answer.map(|frame| (VnetHdr::default(), frame)));
        }
        assert_eq!(checksum(&frame[14..34]), 0, "an IPv4 header");
        let addr = |at: usize| Ipv4Addr::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3]);
        let (src, dst, payload) = (addr(26), addr(30), &frame[34..]);
        assert_eq!(usize::from(u16::from_be_bytes([frame[16], frame[17]])) + 14, frame.len());
        let mut sum = Sum::pseudo_v4(src, dst, frame[23], payload.len() as u16);
        match frame[23] {
            protocol::ICMP => {
                assert_eq!(checksum(payload), 0, "ICMP");
                self.answers += u64::from(payload[0] == 0);
                return;
            }
            _ if hdr.flags.contains(VnetFlags::NEEDS_CSUM) => {
                let at = usize::from(hdr.csum_offset);
                assert_eq!(u16::from_be_bytes([payload[at], payload[at + 1]]), sum.fold());
            }
            _ => {
                sum.add(payload);
                assert_eq!(sum.finish(), 0, "a transport checksum");
            }
        }
        let word = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
        if frame[23] == protocol::UDP {
            let (from, to) = (SocketAddrV4::new(src, word(0)), SocketAddrV4::new(dst, word(2)));
            self.answers += u64::from(src != self.nat.config().gateway());
            let answer = self.services.datagram(from, to, &payload[8..]);
            return self.out.extend(answer.map(|frame| (VnetHdr::default(), frame)));
        }
        let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let header = usize::from(payload[12] >> 4) * 4;
        let (options, data) = (&payload[20..header], &payload[header..]);
        let segment =
            Segment { flags: payload[13], seq: long(4), ack: long(8), window: word(14), options, data };
        let key = (dst, word(2), SocketAddrV4::new(src, word(0)));
        let end = &mut self.ends[self.by_port[&key]];
        let (flow, before) = (end.flow, end.outcome);
        end.input(&segment, now);
        if before.is_some() {
            // It has ended, and answers only.
            self.out.extend(end.output(now, self.offload, &mut self.rng));
        }
        let outcome = end.outcome;
        let (flags, len) = (segment.flags, data.len());
        self.world().log(|| format!("flow {flow}: guest got flags {flags:#x} +{len} {before:?} {outcome:?}"));
    }

    /// The NIC's side of a turn.
    fn turn(&mut self, now: Duration) -> bool {
        let sent = !self.out.is_empty();
        for (hdr, mut bytes) in std::mem::take(&mut self.out) {
            if self.rng.chance(self.loss) {
                continue;
            }
            let middle = (14 + self.rng.below(80) as usize).min(bytes.len());
            let (a, b) = bytes.split_at_mut(middle);
            let parts: Vec<_> =
                [a, b].into_iter().filter(|p| !p.is_empty()).map(VolatileSlice::from).collect();
            let twice = self.rng.chance(self.loss);
            for _ in 0..=u64::from(twice) {
                let outcome = self.nat.send(&TxFrame { hdr, parts: &parts });
                self.taken += u64::from(outcome == Sent::Taken);
            }
        }
        let refilled = self.refill_at.is_some_and(|at| at <= now);
        if refilled {
            self.refill_at = None;
            self.ring.free = if self.tight { 1 + self.rng.below(30) } else { 1000 };
        }
        let readable = self.refill_at.is_none() && self.world().readable();
        if !(sent || refilled || readable) {
            return false;
        }
        self.turns += 1;
        let outcome = self.nat.recv(&mut self.ring);
        match outcome {
            Received::RingFull => {
                assert!(self.ring.free <= 1, "the ring is not full");
                let pause = Duration::from_micros(self.rng.below(20_000));
                self.refill_at.get_or_insert(now + pause);
            }
            Received::Again => {
                self.world().now += Duration::from_nanos(1);
                assert!(self.world().readable(), "Again, and the descriptor is not readable");
            }
            Received::Drained => {
                if !self.tight {
                    self.ring.free = 1000;
                }
            }
        }
        self.deliver(now);
        self.check();
        true
    }

    fn deliver(&mut self, now: Duration) {
        for frame in std::mem::take(&mut self.ring.frames) {
            self.committed += 1;
            if self.rng.chance(self.loss) {
                continue;
            }
            // A wire that loses changes the order, too.
            let delay = if self.loss > 0 { self.rng.below(3000) } else { 500 };
            self.count += 1;
            self.wire.insert((now + Duration::from_micros(delay), self.count), frame);
        }
    }

    /// What holds after every turn.
    fn check(&mut self) {
        let (udp, icmp) = self.nat.datagram_flows();
        let flows = self.nat.tcp_flows().len();
        self.most = self.most.max(flows);
        let services = self.nat.services.sockets();
        assert_eq!(self.nat.open_sockets(), flows + udp + icmp + services + 1, "sockets and flows");
        let counters = self.nat.counters();
        assert_eq!((counters.rx_frames, counters.tx_frames), (self.committed, self.taken));
    }

    fn next(&self) -> Option<Duration> {
        let wire = self.wire.keys().next().map(|(at, _)| *at);
        let ends = self.live.iter().filter_map(|at| self.ends[*at].next()).min();
        let starts = self.starts.keys().next().copied();
        let errands = self.errands.keys().next().copied();
        let world = self.world().next(self.refill_at.is_none());
        [wire, ends, starts, errands, self.refill_at, world].into_iter().flatten().min()
    }

    fn run(&mut self) {
        let (mut instant, mut rounds) = (Duration::ZERO, 0u32);
        loop {
            let now = self.world().now;
            if now.as_millis() != instant.as_millis() {
                (instant, rounds) = (now, 0);
            }
            rounds += 1;
            assert!(rounds < 20_000, "a storm");
            self.world().run();
            self.guests(now);
            if self.turn(now) {
                continue;
            }
            let Some(next) = self.next().filter(|at| *at <= END) else { break };
            let mut world = self.world();
            world.now = next.max(now + Duration::from_nanos(1));
        }
        self.finish();
    }

    /// What holds when all is over.
    fn finish(&mut self) {
        assert_eq!(self.nat.tcp_flows(), [], "flows are left");
        assert_eq!(self.nat.datagram_flows(), (1, 0), "the published port");
        assert_eq!(self.nat.open_sockets(), 2, "the published ports");
        assert!(self.ends.len() < MANY_FLOWS || self.most > 200, "{} at once", self.most);
        let world = self.world();
        let refused = self.nat.counters().dropped(DropReason::TableFull) > 0;
        for end in &self.ends {
            let remote = &world.remotes[end.flow];
            let (plan, outcome) = (&end.plan, end.outcome);
            if let Some(script) = &end.script {
                let faults = world.faults > 0;
                assert!(faults || self.loss > 0 || outcome == Some(Outcome::Orderly), "{end:?}");
                if outcome == Some(Outcome::Orderly) && self.loss == 0 {
                    script.finish(faults);
                }
                continue;
            }
            let detail = || format!("flow {}: {outcome:?}, {remote:?}, {end:?}", end.flow);
            assert!(end.got <= remote.sent && remote.got <= plan.to_world, "{}", detail());
            let disturbed = plan.world_resets.is_some()
                || plan.guest_resets.is_some()
                || plan.connect.is_err() && !plan.published
                || remote.failed;
            if outcome == Some(Outcome::Orderly) && !remote.reset {
                assert_eq!((end.got, remote.got), (plan.to_guest, plan.to_world), "{}", detail());
                assert!(remote.eof && remote.fin, "{}", detail());
            }
            // Our last ACK is not sent again (see `tcp::state`): where it is lost, a guest may see a RST for its FIN.
            let complete =
                (end.received(), remote.got) == (plan.to_guest, plan.to_world) && remote.eof && remote.fin;
            let lost_ack = self.loss > 0 && complete && outcome == Some(Outcome::Reset);
            if !disturbed && !lost_ack {
                assert_eq!((outcome, remote.reset), (Some(Outcome::Orderly), false), "{}", detail());
            }
        }
        if self.loss == 0 {
            self.services.finish();
            let echoes: BTreeSet<u16> = world.echoes.union(&world.failed_echoes).copied().collect();
            assert_eq!(echoes, self.services.sent, "what came to the published port");
        }
        if self.loss == 0 && !refused {
            let drops: Vec<_> = self.nat.counters().drops().map(|(why, n)| format!("{why:?} {n}")).collect();
            assert_eq!(
                self.answers + world.unread,
                world.answers,
                "answers to datagrams; dropped: {drops:?}"
            );
            assert_eq!(world.unread, 0, "answers were left in their sockets");
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let world = self.world.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let trace: Vec<_> = world.trace.iter().map(String::as_str).collect();
            let (seed, loss, offload, tight) = (self.seed, self.loss, self.offload, self.tight);
            let trace = trace.join("\n");
            println!("{trace}\nseed {seed} (loss {loss}%, offload {offload}, tight ring {tight}) failed");
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number of seeds"))
}

#[test]
fn every_byte_arrives_once_whatever_the_world_does() {
    if let Some(seed) = number("PONTOON_SIM_SEED") {
        return Sim::new(seed).run();
    }
    let seeds = number("PONTOON_SIM_SEEDS").unwrap_or(SEEDS);
    for seed in FOUND.iter().copied().chain(0..seeds) {
        Sim::new(seed).run();
    }
}
