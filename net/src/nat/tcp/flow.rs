//! One TCP connection: a socket of the host on one side, our half of a TCP towards the guest on the other.
//!
//! There is no buffer. What the guest sent is in the socket's send buffer when it is acknowledged; what the world
//! sent stays in the socket's receive buffer until the guest has acknowledged it. So a flow is a handful of sequence
//! numbers:
//!
//! ```text
//!   guest → world   rcv_nxt                     rcv_edge
//!   ──── in the socket ───┼──── announced ─────────┼──> as far as the send buffer has room
//!
//!   world → guest   snd_una - undiscarded    snd_una        snd_nxt       snd_max       snd_una + snd_wnd
//!   ─ discarded ─────────┼──── acknowledged ────┼── in flight ──┼─ sent before ─┼── unsent ────┼──>
//!                        └ offset 0 of the socket's receive buffer
//! ```
//!
//! `snd_nxt` is behind `snd_max` only while everything is sent again ([`super::recovery`]). `fin` is the sequence
//! number of our FIN once the socket's end was seen.

use std::time::{Duration, Instant};

use super::options::STAMP_LEN;
use super::recovery::Recovery;
use super::rto::Rto;
use super::sack::Scoreboard;
use super::segment::{Flags, HEADERS, Header, Segment, before};
use super::stamps::Stamps;
use super::state::State;
use super::table::Key;
use crate::nat::cx::Cx;
use crate::nat::host::{Close, SockId};
use crate::nat::icmp::error::IcmpError;
use crate::nat::poller::Token;

/// What a guest takes that does not say (RFC 9293 §3.7.1).
pub(super) const DEFAULT_MSS: u16 = 536;
/// Smallest segment that we cut for a guest, whatever it asks for: smaller ones are a way to make us work.
const MIN_MSS: u16 = 88;
/// Our window scale: windows up to 16 MiB in steps of 256 bytes.
pub(super) const SHIFT: u8 = 8;
/// Times that a SYN of ours is sent, 1, 2, 4 and 8 seconds apart: a closed guest port is told to the client after 15 s.
const SYN_ATTEMPTS: u8 = 4;
/// Times that anything else is sent without a word from the guest.
const ATTEMPTS: u8 = 12;
/// Between probes of an idle guest (RFC 9293 §3.8.4).
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(75);

bitflags::bitflags! {
    /// What is to be remembered about a flow between calls.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Marks: u16 {
        /// The socket may have data, or its end, behind what was sent.
        const READABLE = 1;
        /// The world has sent its FIN; its data may still be unread.
        const READ_CLOSED = 2;
        /// The socket has failed; what it still has is delivered before the guest is told.
        const DEAD = 4;
        /// Our SYN is to be sent.
        const SYN = 8;
        /// The guest is to be asked for a sign of life or a new window.
        const PROBE = 16;
        /// In the queue of those that have something to emit.
        const QUEUED = 32;
        /// The socket took less than the guest sent: the guest must send it again.
        const REFUSED = 64;
        /// The socket's buffer is nearly full; its event was asked for.
        const WAIT_WRITE = 128;
        /// Something was lost on the way to the guest.
        const RECOVERING = 256;
        /// The guest agreed to window scales.
        const SCALED = 512;
        /// The guest has had no answer to its SYN.
        const SILENT = 1024;
        /// The guest agreed to SACK.
        const SACK = 2048;
        /// Only holes are sent again.
        const SELECTIVE = 4096;
        /// The socket has told its error to us, which it does once.
        const TOLD = 8192;
    }
}

/// How a flow ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The guest knows; the socket goes like this.
    Quiet(Close),
    /// The guest gets a RST.
    Reset(Close),
    /// The guest gets an ICMP error about its SYN.
    Unreachable(IcmpError),
}

/// The connection.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) key: Key,
    pub(super) token: Token,
    pub(super) sock: SockId,
    pub(super) state: State,
    pub(super) marks: Marks,
    pub(super) end: Option<End>,
    /// ACKs to be sent; more than one only to make a guest count duplicates.
    pub(super) acks: u8,
    pub(super) attempts: u8,
    pub(super) guest_shift: u8,
    /// Data of one segment at most: what the guest takes, less our timestamp.
    pub(super) mss: u16,

    pub(super) rcv_nxt: u32,
    pub(super) rcv_edge: u32,
    /// The socket's send buffer when it was last looked at.
    pub(super) space: u32,

    pub(super) snd_una: u32,
    pub(super) snd_nxt: u32,
    pub(super) snd_max: u32,
    pub(super) snd_wnd: u32,
    pub(super) snd_wl1: u32,
    pub(super) snd_wl2: u32,
    pub(super) undiscarded: u32,
    pub(super) fin: Option<u32>,
    /// What the guest has behind `snd_una`.
    pub(super) sacked: Scoreboard,
    pub(super) recovery: Recovery,

    pub(super) stamps: Stamps,
    pub(super) rto: Rto,
    pub(super) rto_at: Option<Instant>,
    /// When the guest was last heard of, or later by what we were late in asking.
    pub(super) heard: Instant,
    /// What the table's timers know.
    pub(super) timer_at: Option<Instant>,
}

impl Flow {
    /// A flow whose first word was the guest's (`syn`) or is to be ours.
    pub(super) fn new(
        key: Key,
        token: Token,
        sock: SockId,
        (iss, stamps): (u32, Stamps),
        syn: Option<&Segment>,
        cx: &Cx<'_>,
    ) -> Self {
        let mut flow = Self {
            key,
            token,
            sock,
            state: if syn.is_some() { State::Dialing } else { State::SynSent },
            marks: Marks::empty(),
            end: None,
            acks: 0,
            attempts: 0,
            guest_shift: 0,
            mss: DEFAULT_MSS,
            rcv_nxt: 0,
            rcv_edge: 0,
            space: 0,
            snd_una: iss,
            snd_nxt: iss,
            snd_max: iss,
            snd_wnd: 0,
            snd_wl1: 0,
            snd_wl2: 0,
            undiscarded: 0,
            fin: None,
            sacked: Scoreboard::default(),
            recovery: Recovery::new(iss),
            stamps,
            rto: Rto::new(),
            rto_at: None,
            heard: cx.now,
            timer_at: None,
        };
        match syn {
            Some(syn) => {
                flow.marks |= Marks::SILENT;
                flow.greet(syn, cx);
            }
            None => flow.marks |= Marks::SYN,
        }
        flow
    }

    /// Takes what the guest's SYN says.
    pub(super) fn greet(&mut self, syn: &Segment, cx: &Cx<'_>) {
        self.rcv_nxt = syn.seq.wrapping_add(1);
        self.rcv_edge = self.rcv_nxt;
        let largest = cx.config.mtu.saturating_sub(40);
        let said = &syn.options;
        self.mss = said.mss.unwrap_or(DEFAULT_MSS).clamp(MIN_MSS, largest);
        if let Some(shift) = said.shift {
            self.marks |= Marks::SCALED;
            self.guest_shift = shift;
        }
        self.marks.set(Marks::SACK, said.sack_permitted);
        if let Some(stamp) = said.stamp {
            self.stamps.agree(stamp, self.rcv_nxt);
            self.rto.use_stamps();
            // An MSS does not count options (RFC 6691 §2).
            self.mss -= STAMP_LEN as u16;
        }
        // The window of a SYN is never scaled (RFC 7323 §2.2).
        self.snd_wnd = u32::from(syn.window);
        self.snd_wl1 = syn.seq;
        self.snd_wl2 = syn.ack;
    }

    /// Ends the flow; the table removes it.
    pub(super) fn finish(&mut self, end: End) {
        self.state = State::Closed;
        self.end.get_or_insert(end);
    }

    /// Bytes (and FIN) that were sent and not acknowledged.
    pub(super) fn in_flight(&self) -> u32 {
        self.snd_nxt.wrapping_sub(self.snd_una)
    }

    /// Bytes that may be sent now.
    pub(super) fn room(&self) -> u32 {
        let path = self.recovery.cwnd.saturating_sub(self.pipe());
        self.snd_wnd.saturating_sub(self.in_flight()).min(path)
    }

    /// Whether there is something for the guest in the socket, as far as we know.
    pub(super) fn has_data(&self) -> bool {
        let again = before(self.snd_nxt, self.snd_max);
        let unsent_fin = self.fin == Some(self.snd_nxt);
        self.state.world_may_send()
            && (again || unsent_fin || self.fin.is_none() && self.marks.contains(Marks::READABLE))
    }

    /// Whether the guest's window is what keeps us from sending, with nothing on its way that would open it.
    fn is_blocked(&self) -> bool {
        self.has_data() && self.snd_una == self.snd_max && self.room() == 0 && self.fin != Some(self.snd_nxt)
    }

    /// Whether `emit` has something to do.
    pub(super) fn is_due(&self) -> bool {
        self.acks > 0
            || self.marks.intersects(Marks::SYN | Marks::PROBE | Marks::DEAD)
            || self.has_data() && (self.room() > 0 || self.fin == Some(self.snd_nxt))
            || self.undiscarded > 0
            || self.state.world_may_send() && self.hole().is_some()
            || self.state == State::TimeWait
    }

    /// When [`Self::expire`] wants to be called.
    pub(super) fn deadline(&mut self, cx: &Cx<'_>) -> Option<Instant> {
        if matches!(self.state, State::Dialing | State::Closed) {
            return None;
        }
        let opens = matches!(self.state, State::SynSent | State::SynReceived);
        let waits = opens || self.snd_una != self.snd_max || self.is_blocked();
        if !waits {
            self.rto_at = None;
        } else if self.rto_at.is_none() {
            self.rto_at = Some(cx.now + self.rto.current());
        }
        let idle = self.idle_at(cx);
        Some(self.rto_at.map_or(idle, |at| at.min(idle)))
    }

    fn idle_at(&self, cx: &Cx<'_>) -> Instant {
        self.heard + cx.config.limits.tcp_idle + KEEPALIVE_INTERVAL.saturating_mul(self.attempts.into())
    }

    /// The timer ran out.
    pub(super) fn expire(&mut self, cx: &mut Cx<'_>) {
        if self.rto_at.is_some_and(|at| at <= cx.now) {
            self.rto_at = None;
            self.retransmit(cx);
        } else if self.state.is_synchronized() && self.idle_at(cx) <= cx.now {
            // We may be late by hours, if this process was stopped: the guest has its time for each probe nevertheless.
            self.heard += cx.now - self.idle_at(cx);
            self.attempts += 1;
            self.marks |= Marks::PROBE;
            self.give_up_after(ATTEMPTS);
        }
    }

    fn retransmit(&mut self, cx: &Cx<'_>) {
        if self.marks.intersects(Marks::SYN | Marks::PROBE) {
            // The last one still waits for a buffer of the guest's, who has not ignored it.
            self.rto_at = Some(cx.now + self.rto.current());
            return;
        }
        self.attempts = self.attempts.saturating_add(1);
        self.rto.back_off();
        match self.state {
            State::SynSent | State::SynReceived => {
                self.marks |= Marks::SYN;
                self.snd_nxt = self.snd_una;
                self.give_up_after(SYN_ATTEMPTS);
            }
            _ if self.snd_una != self.snd_max && self.snd_wnd > 0 => {
                tracing::trace!(guest = %self.key.guest, una = self.snd_una, "TCP: sending again");
                self.time_out();
                self.give_up_after(ATTEMPTS);
            }
            _ => {
                self.marks |= Marks::PROBE;
                self.give_up_after(ATTEMPTS);
            }
        }
        self.rto_at = Some(cx.now + self.rto.current());
    }

    fn give_up_after(&mut self, attempts: u8) {
        if self.attempts >= attempts {
            self.finish(End::Reset(Close::Reset));
        }
    }

    /// The window to announce, as it goes into a header: what the socket is sure to take.
    ///
    /// The right edge never moves back (RFC 9293 §3.8.6.2.2), even when the socket turns out to have less room: then
    /// it refuses, and the guest sends again. Only the header's units of 256 bytes hide up to 255 bytes of it, and what
    /// was announced before is still taken (RFC 7323 §2.4). The socket is asked once half of what was announced is used
    /// up. When the socket is nearly full we ask for its event, which also tells the kernel that its send buffer
    /// is what limits the flow and may grow.
    pub(super) fn window(&mut self, cx: &mut Cx<'_>) -> u16 {
        let left = self.announced();
        if left <= self.space / 2 {
            let space = cx.host.send_space(self.sock);
            self.space = space.size;
            let limit = u32::from(u16::MAX) << self.shift();
            let edge = self.rcv_nxt.wrapping_add(space.free.min(limit));
            let gain = edge.wrapping_sub(self.rcv_edge);
            let step = u32::from(self.mss).min(space.size / 2);
            if before(self.rcv_edge, edge) && gain >= step {
                self.rcv_edge = edge;
            }
            if !space.writable && self.state.guest_may_send() && !self.marks.contains(Marks::WAIT_WRITE) {
                self.marks |= Marks::WAIT_WRITE;
                cx.host.want_write(self.sock, self.token);
            }
        }
        let units = self.announced() >> self.shift();
        u16::try_from(units).unwrap_or(u16::MAX)
    }

    /// Bytes that the guest may still send.
    pub(super) fn announced(&self) -> u32 {
        if before(self.rcv_edge, self.rcv_nxt) { 0 } else { self.rcv_edge.wrapping_sub(self.rcv_nxt) }
    }

    fn shift(&self) -> u8 {
        if self.marks.contains(Marks::SCALED) && self.state.is_synchronized() { SHIFT } else { 0 }
    }

    /// Bytes of the headers of a frame with data.
    pub(super) fn headers(&self) -> usize {
        if self.stamps.agreed() { HEADERS + STAMP_LEN } else { HEADERS }
    }

    /// The header of a segment at `seq`, sent `now`.
    pub(super) fn header(&self, seq: u32, flags: Flags, window: u16, now: Instant) -> Header {
        Header {
            guest: self.key.guest,
            world: self.key.world,
            seq,
            ack: self.rcv_nxt,
            flags: flags | Flags::ACK,
            window,
            offer: None,
            stamp: self.stamps.stamp(now),
        }
    }

    /// The header of the RST that ends the flow in the guest (RFC 9293 §3.10.7). It has no timestamp: nobody would look
    /// at it (RFC 7323 §5.2).
    pub(super) fn reset_header(&self, now: Instant) -> Header {
        let seq = if self.marks.contains(Marks::SILENT) { 0 } else { self.snd_max };
        Header { stamp: None, ..self.header(seq, Flags::RST, 0, now) }
    }
}
