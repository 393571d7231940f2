//! One TCP connection of a simulated guest: small, and strict about what it is sent.
//!
//! Out of order it keeps nothing, and goes back to what was not acknowledged at a time-out or the third duplicate. Its
//! program reads and writes in random pieces, so that the window closes and opens. Sequence numbers count from its SYN.

use std::net::SocketAddrV4;
use std::time::Duration;

use super::services::Script;
use super::world::{Plan, pattern};
use super::{Rng, frame};
use crate::nat::ipv4::protocol;
use crate::{VnetFlags, VnetHdr};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const RTO: Duration = Duration::from_millis(300);

/// How it went for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Both ends were seen and acknowledged.
    Orderly,
    /// The other side refused or reset it.
    Reset,
    /// Its own program did.
    Aborted,
    /// Nobody answered.
    TimedOut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for the SYN of a client.
    Listen,
    SynSent,
    SynReceived,
    Open,
}

/// The connection.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) flow: usize,
    pub(super) at: SocketAddrV4,
    pub(super) world: SocketAddrV4,
    pub(super) plan: Plan,
    pub(super) outcome: Option<Outcome>,
    /// Bytes that the program read.
    pub(super) got: u64,
    /// What it says and hears instead of the pattern.
    pub(super) script: Option<Script>,
    state: State,
    scaled: bool,
    mss: u16,
    iss: u32,
    irs: u32,
    una: u64,
    nxt: u64,
    max: u64,
    written: u64,
    window: u64,
    shift: u8,
    rcv: u64,
    edge: u64,
    cap: u64,
    fin: bool,
    dups: u8,
    ack: bool,
    tries: u32,
    rto_at: Option<Duration>,
    app_at: Option<Duration>,
}

/// A segment that arrived.
pub(super) struct Segment<'a> {
    pub(super) flags: u8,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) window: u16,
    pub(super) options: &'a [u8],
    pub(super) data: &'a [u8],
}

fn scale(options: &[u8]) -> Option<u8> {
    let mut rest = options;
    loop {
        match rest {
            [3, 3, shift, ..] => return Some(*shift),
            [0, ..] | [] => return None,
            [1, tail @ ..] => rest = tail,
            [_, len, ..] => rest = &rest[usize::from(*len)..],
            [_] => return None,
        }
    }
}

impl Endpoint {
    pub(super) fn new(
        flow: usize,
        (at, world): (SocketAddrV4, SocketAddrV4),
        plan: Plan,
        now: Duration,
        rng: &mut Rng,
    ) -> Self {
        let state = if plan.published { State::Listen } else { State::SynSent };
        Self {
            flow,
            at,
            world,
            outcome: None,
            got: 0,
            script: None,
            state,
            scaled: rng.chance(60),
            mss: 200 + rng.below(1260) as u16,
            iss: rng.next() as u32,
            irs: 0,
            una: 0,
            nxt: 0,
            max: 0,
            written: 0,
            window: 0,
            shift: 0,
            rcv: 0,
            edge: 0,
            cap: 2000 + rng.below(60_000),
            fin: false,
            dups: 0,
            ack: false,
            tries: 0,
            rto_at: (!plan.published).then_some(now),
            app_at: None,
            plan,
        }
    }

    /// Bytes that arrived in order.
    pub(super) fn received(&self) -> u64 {
        self.rcv.saturating_sub(1 + u64::from(self.fin))
    }

    pub(super) fn next(&self) -> Option<Duration> {
        if self.outcome.is_some() { None } else { [self.rto_at, self.app_at].into_iter().flatten().min() }
    }

    fn bytes(&self, flags: u8, seq: u64, data: &[u8], offload: bool) -> (VnetHdr, Vec<u8>) {
        let own = if self.scaled { 2 } else { 0 };
        let space = self.cap - self.received().saturating_sub(self.got);
        let shift = if flags & SYN != 0 { 0 } else { own };
        let window = (space >> shift).min(65_535) as u16;
        let mut tcp = vec![0; 20];
        tcp[0..2].copy_from_slice(&self.at.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.world.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.iss.wrapping_add(seq as u32).to_be_bytes());
        if flags & ACK != 0 {
            tcp[8..12].copy_from_slice(&self.irs.wrapping_add(self.rcv as u32).to_be_bytes());
        }
        if flags & SYN != 0 {
            tcp.extend([2, 4, (self.mss >> 8) as u8, self.mss as u8]);
            if self.scaled {
                tcp.extend([1, 3, 3, own]);
            }
        }
        tcp[12] = ((tcp.len() / 4) as u8) << 4;
        tcp[13] = flags;
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
        let headers = 34 + tcp.len() as u16;
        tcp.extend_from_slice(data);
        let mut hdr = VnetHdr::default();
        if offload {
            hdr.flags = VnetFlags::NEEDS_CSUM;
            (hdr.csum_start, hdr.csum_offset) = (34, 16);
            if data.len() > 1460 {
                (hdr.gso_type, hdr.gso_size, hdr.hdr_len) = (crate::GsoType::Tcp4, 1460, headers);
            }
        }
        (hdr, frame((*self.at.ip(), *self.world.ip()), protocol::TCP, tcp, offload.then_some(()).is_none()))
    }

    /// Takes a segment.
    pub(super) fn input(&mut self, s: &Segment<'_>, now: Duration) {
        if self.outcome.is_some() && self.outcome != Some(Outcome::Orderly) {
            return;
        }
        if s.flags & RST != 0 {
            // Where both ends are acknowledged, only the program has something left to do.
            if self.fin && self.una == self.plan.to_world + 2 {
                return;
            }
            if s.flags & ACK == 0 || self.state != State::SynSent || s.ack == self.iss.wrapping_add(1) {
                self.outcome.get_or_insert(Outcome::Reset);
            }
            return;
        }
        if s.flags & SYN != 0 {
            return self.input_syn(s, now);
        }
        if matches!(self.state, State::Listen | State::SynSent) || s.flags & ACK == 0 {
            return;
        }
        let ack = self.una.wrapping_add_signed(i64::from(
            s.ack.wrapping_sub(self.iss.wrapping_add(self.una as u32)).cast_signed(),
        ));
        assert!(ack <= self.max, "flow {}: ack {ack} of {}", self.flow, self.max);
        self.tries = 0;
        if ack > self.una {
            self.una = ack;
            self.nxt = self.nxt.max(ack);
            self.dups = 0;
            self.rto_at = None;
            if self.state == State::SynReceived {
                self.state = State::Open;
            }
        } else if ack == self.una && s.data.is_empty() && s.flags & FIN == 0 && self.una < self.max {
            self.dups = self.dups.saturating_add(1);
            if self.dups == 3 {
                self.nxt = self.una;
            }
        }
        if ack >= self.una {
            self.window = u64::from(s.window) << self.shift;
        }
        let seq = self.rcv.wrapping_add_signed(i64::from(
            s.seq.wrapping_sub(self.irs.wrapping_add(self.rcv as u32)).cast_signed(),
        ));
        let end = seq.wrapping_add(s.data.len() as u64 + u64::from(s.flags & FIN));
        if end == seq {
            // A probe of a guest that is there, or something from far away. An answer to all that is ahead would be answered.
            self.ack |= seq.cast_signed() < self.rcv.cast_signed() || seq > self.edge;
            return;
        }
        self.ack = true;
        let last = seq.wrapping_add(s.data.len() as u64);
        assert!(last <= self.edge, "flow {}: {last} is beyond the window's edge {}", self.flow, self.edge);
        for (n, byte) in s.data.iter().enumerate().filter(|_| self.script.is_none()) {
            let at = seq + n as u64 - 1;
            assert_eq!(*byte, pattern(self.flow, true, at), "flow {}: byte {at} to the guest", self.flow);
        }
        if seq <= self.rcv && end > self.rcv {
            if let Some(script) = &mut self.script {
                script.received.extend(s.data.iter().skip((self.rcv - seq) as usize));
            }
            self.rcv = end;
            self.fin |= s.flags & FIN != 0;
            self.app_at.get_or_insert(now);
        }
    }

    fn input_syn(&mut self, s: &Segment<'_>, now: Duration) {
        match self.state {
            State::Listen => {
                self.state = State::SynReceived;
                self.rto_at = Some(now);
            }
            State::SynSent if s.flags & ACK != 0 && s.ack == self.iss.wrapping_add(1) => {
                self.state = State::Open;
                (self.una, self.nxt, self.max, self.rto_at) = (1, 1, 1, None);
                self.tries = 0;
            }
            _ => {
                self.ack = true;
                return;
            }
        }
        self.irs = s.seq;
        (self.rcv, self.ack) = (1, true);
        let theirs = scale(s.options);
        self.scaled &= theirs.is_some();
        self.shift = if self.scaled { theirs.unwrap_or(0) } else { 0 };
        self.window = u64::from(s.window);
        self.app_at = Some(now);
    }

    /// What it sends now.
    pub(super) fn output(&mut self, now: Duration, offload: bool, rng: &mut Rng) -> Vec<(VnetHdr, Vec<u8>)> {
        let mut out = Vec::new();
        if matches!(self.outcome, Some(Outcome::Orderly)) && std::mem::take(&mut self.ack) {
            self.push(&mut out, ACK, self.max, &[], offload);
        }
        if self.outcome.is_some() {
            return out;
        }
        if self.app_at.is_some_and(|at| at <= now) {
            self.program(now, rng);
            if self.outcome == Some(Outcome::Aborted) {
                self.push(&mut out, RST | ACK, self.nxt, &[], false);
                return out;
            }
        }
        let fired = self.rto_at.is_some_and(|at| at <= now);
        if fired {
            self.tries += 1;
            self.rto_at = None;
            if self.tries > 12 {
                self.outcome = Some(Outcome::TimedOut);
                return out;
            }
            self.nxt = self.una;
        }
        match self.state {
            State::Listen => return out,
            State::SynSent | State::SynReceived => {
                if fired {
                    let flags = if self.state == State::SynSent { SYN } else { SYN | ACK };
                    (self.nxt, self.max) = (1, 1);
                    self.push(&mut out, flags, 0, &[], false);
                }
            }
            State::Open => self.data(&mut out, fired, offload, rng),
        }
        if self.ack {
            self.push(&mut out, ACK, self.max, &[], offload);
        }
        let fin_acked = self.una == self.plan.to_world + 2;
        if self.fin && fin_acked && self.got == self.rcv - 2 {
            self.outcome = Some(Outcome::Orderly);
        }
        let wants = self.una < self.nxt || self.nxt < 1 + self.written;
        if self.rto_at.is_none() && wants && self.state != State::Listen {
            let pause = RTO.saturating_mul(1 << self.tries.min(6));
            self.rto_at = Some(now + pause);
        }
        out
    }

    /// The program reads and writes.
    fn program(&mut self, now: Duration, rng: &mut Rng) {
        let unread = self.rcv - 1 - u64::from(self.fin) - self.got;
        let read = unread.min(1 + rng.below(20_000));
        self.got += read;
        // A window that opens is announced.
        self.ack |= !self.fin && read > 0 && self.edge < self.rcv + self.cap / 2;
        self.written = (self.written + rng.below(20_000)).min(self.plan.to_world);
        let passed = self.got + self.written;
        if self.plan.guest_resets.is_some_and(|at| passed >= at) {
            self.outcome = Some(Outcome::Aborted);
            return;
        }
        let more = self.written < self.plan.to_world || read < unread;
        let pause = if rng.chance(1) { 3_000_000 } else { rng.below(10_000) };
        self.app_at = more.then(|| now + Duration::from_micros(1 + pause));
    }

    fn data(&mut self, out: &mut Vec<(VnetHdr, Vec<u8>)>, probe: bool, offload: bool, rng: &mut Rng) {
        let ends = self.written == self.plan.to_world && (!self.plan.guest_last || self.fin);
        loop {
            let mut window = (self.una + self.window).saturating_sub(self.nxt);
            if probe && window == 0 && out.is_empty() {
                window = 1;
            }
            let left = (1 + self.written).saturating_sub(self.nxt);
            let largest = if offload { 1 + rng.below(20_000) } else { 1 + rng.below(1460) };
            let len = left.min(window).min(largest);
            let fin = ends && len == left && self.nxt + len == 1 + self.plan.to_world;
            if len == 0 && !fin {
                return;
            }
            let byte = |at: u64| match &self.script {
                Some(script) => script.out[at as usize],
                None => pattern(self.flow, false, at),
            };
            let bytes: Vec<u8> = (0..len).map(|n| byte(self.nxt - 1 + n)).collect();
            let flags = if fin { ACK | FIN } else { ACK };
            self.push(out, flags, self.nxt, &bytes, offload);
            self.nxt += len + u64::from(fin);
            self.max = self.max.max(self.nxt);
            if fin {
                return;
            }
        }
    }

    fn push(&mut self, out: &mut Vec<(VnetHdr, Vec<u8>)>, flags: u8, seq: u64, data: &[u8], offload: bool) {
        out.push(self.bytes(flags, seq, data, offload));
        let space = self.cap - self.received().saturating_sub(self.got);
        self.edge = self.edge.max(self.rcv + space);
        self.ack = false;
    }
}
