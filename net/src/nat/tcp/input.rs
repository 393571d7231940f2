//! A segment from the guest arrives at a flow: RFC 9293 §3.10.7, in its order.
//!
//! Segments out of order are not kept: a guest's ring is read in order, so that what is missing was refused by
//! us, and the guest sends everything behind it again. They are answered with one ACK each, so that a guest counts
//! duplicates. (With SACK agreed Linux counts blocks instead, and repairs a loss of its own when its timer runs out, 0.2 s
//! later: neither a ring nor a TAP that is read loses anything.) Data beyond the announced window are not refused for that alone: the socket decides.

use std::io;

use super::flow::{End, Flow, Marks};
use super::recovery::DUP_ACKS;
use super::segment::{Flags, Segment, before};
use super::state::{Event, State};
use crate::DropReason;
use crate::nat::cx::Cx;
use crate::nat::host::Close;
use crate::nat::ipv4::Ipv4In;

/// ACKs of one turn: the first may tell news, the others are duplicates.
const MAX_ACKS: u8 = DUP_ACKS + 1;

impl Flow {
    /// Takes a segment.
    ///
    /// # Errors
    /// Why it was of no use; the caller counts it.
    pub(super) fn input(
        &mut self,
        cx: &mut Cx<'_>,
        packet: &Ipv4In<'_>,
        segment: &Segment,
    ) -> Result<(), DropReason> {
        match self.state {
            State::Dialing => self.input_dialing(segment),
            State::SynSent => self.input_syn_sent(cx, segment),
            _ => self.input_open(cx, packet, segment),
        }
    }

    /// The guest waits for us: it may send its SYN again, or lose interest.
    fn input_dialing(&mut self, segment: &Segment) -> Result<(), DropReason> {
        let same = segment.seq.wrapping_add(1) == self.rcv_nxt;
        if segment.flags.contains(Flags::SYN) && same {
            self.stamps.accept(segment.seq, segment.options.stamp);
            return Ok(());
        }
        if segment.flags.contains(Flags::RST) && (same || segment.seq == self.rcv_nxt) {
            self.finish(End::Quiet(Close::Reset));
            return Ok(());
        }
        if segment.flags.contains(Flags::SYN) {
            // The same ports with a new sequence number: the guest has started over, and so do we at its next SYN.
            self.finish(End::Quiet(Close::Reset));
        }
        Err(DropReason::Tcp)
    }

    fn input_syn_sent(&mut self, cx: &mut Cx<'_>, segment: &Segment) -> Result<(), DropReason> {
        let answers = segment.flags.contains(Flags::ACK) && segment.ack == self.snd_una.wrapping_add(1);
        if !answers {
            return Err(DropReason::Tcp);
        }
        if segment.flags.contains(Flags::RST) {
            self.finish(End::Quiet(Close::Reset));
            return Ok(());
        }
        if !segment.flags.contains(Flags::SYN) {
            return Err(DropReason::Tcp);
        }
        self.greet(segment, cx);
        self.open(cx, segment);
        self.acks = 1;
        Ok(())
    }

    /// The guest has acknowledged our SYN.
    fn open(&mut self, cx: &mut Cx<'_>, segment: &Segment) {
        let ack = segment.ack;
        self.state = self.state.on(Event::Acked);
        self.marks -= Marks::SYN;
        self.snd_una = ack;
        self.snd_nxt = ack;
        self.snd_max = ack;
        self.rto.acked(ack, cx.now, self.stamps.round_trip(cx.now, segment.options.stamp));
        self.heard_from(cx);
        self.rto_at = None;
    }

    fn heard_from(&mut self, cx: &Cx<'_>) {
        self.heard = cx.now;
        self.attempts = 0;
    }

    fn input_open(
        &mut self,
        cx: &mut Cx<'_>,
        packet: &Ipv4In<'_>,
        segment: &Segment,
    ) -> Result<(), DropReason> {
        let ahead = segment.seq.wrapping_sub(self.rcv_nxt);
        let in_window = !before(segment.seq, self.rcv_nxt) && ahead <= self.announced();
        if segment.flags.contains(Flags::RST) {
            return self.input_rst(ahead == 0, in_window);
        }
        if !self.stamps.accept(segment.seq, segment.options.stamp) {
            self.acknowledge();
            return Err(DropReason::Tcp);
        }
        if segment.flags.contains(Flags::SYN) {
            return self.input_syn(segment);
        }
        if !segment.flags.contains(Flags::ACK) {
            return Err(DropReason::Tcp);
        }
        let end = segment.seq.wrapping_add(segment.seq_len());
        let old = before(segment.seq, self.rcv_nxt) && !before(self.rcv_nxt, end);
        if old || !before(segment.seq, self.rcv_nxt) && !in_window && ahead != 0 {
            // A keepalive, something sent twice, or something from far away: RFC 9293 §3.10.7.4 wants an ACK.
            self.heard_from(cx);
            self.acknowledge();
            return Err(DropReason::Tcp);
        }
        self.input_ack(cx, segment)?;
        if !self.state.is_synchronized() {
            return Ok(());
        }
        if segment.seq_len() == 0 {
            return Ok(());
        }
        if before(self.rcv_nxt, segment.seq) {
            self.acks = (self.acks + 1).min(MAX_ACKS);
            return Err(DropReason::Tcp);
        }
        self.input_data(cx, packet, segment);
        Ok(())
    }

    /// RFC 5961 §3.2: only a RST at exactly the expected place is believed at once.
    fn input_rst(&mut self, exact: bool, in_window: bool) -> Result<(), DropReason> {
        if exact {
            self.finish(End::Quiet(Close::Reset));
            return Ok(());
        }
        if in_window {
            self.acknowledge();
        }
        Err(DropReason::Tcp)
    }

    /// Our SYN-ACK was lost, or an old connection is in the guest's way (RFC 5961 §4.2: a challenge).
    fn input_syn(&mut self, segment: &Segment) -> Result<(), DropReason> {
        if self.state == State::SynReceived && segment.seq.wrapping_add(1) == self.rcv_nxt {
            self.marks |= Marks::SYN;
            self.snd_nxt = self.snd_una;
            return Ok(());
        }
        self.acknowledge();
        Err(DropReason::Tcp)
    }

    fn input_ack(&mut self, cx: &mut Cx<'_>, segment: &Segment) -> Result<(), DropReason> {
        if self.state == State::SynReceived {
            if segment.ack != self.snd_una.wrapping_add(1) {
                return Err(DropReason::Tcp);
            }
            self.open(cx, segment);
            self.snd_wl1 = segment.seq.wrapping_sub(1);
        }
        if before(self.snd_max, segment.ack) {
            self.acknowledge();
            return Err(DropReason::Tcp);
        }
        self.heard_from(cx);
        let window = u32::from(segment.window) << self.guest_shift_in_use();
        let repeats = segment.ack == self.snd_una && segment.seq_len() == 0 && window == self.snd_wnd;
        let advances = before(self.snd_una, segment.ack);
        if advances {
            self.acked(cx, segment);
        }
        self.take_blocks(segment.ack, &segment.options, repeats);
        // What is sent again is old, and yet the latest word if it acknowledges more.
        let newer = advances
            || before(self.snd_wl1, segment.seq)
            || self.snd_wl1 == segment.seq && !before(segment.ack, self.snd_wl2);
        if newer && !before(segment.ack, self.snd_una) {
            self.snd_wnd = window;
            self.snd_wl1 = segment.seq;
            self.snd_wl2 = segment.ack;
        }
        Ok(())
    }

    fn guest_shift_in_use(&self) -> u8 {
        if self.marks.contains(Marks::SCALED) { self.guest_shift } else { 0 }
    }

    /// The guest has everything before the segment's `ack`.
    fn acked(&mut self, cx: &Cx<'_>, segment: &Segment) {
        let ack = segment.ack;
        let with_fin = self.fin.is_some_and(|fin| before(fin, ack));
        let bytes = ack.wrapping_sub(self.snd_una) - u32::from(with_fin);
        self.undiscarded += bytes;
        self.snd_una = ack;
        if before(self.snd_nxt, ack) {
            self.snd_nxt = ack;
        }
        self.progress(bytes);
        self.rto.acked(ack, cx.now, self.stamps.round_trip(cx.now, segment.options.stamp));
        self.rto_at = None;
        if with_fin {
            self.state = self.state.on(Event::FinAcked);
            if self.state == State::Closed {
                self.finish(End::Quiet(Close::Graceful));
            }
        }
    }

    /// Data, and perhaps a FIN, that begin at or before `rcv_nxt` and end behind it.
    fn input_data(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>, segment: &Segment) {
        self.acknowledge();
        if !self.state.guest_may_send() {
            return;
        }
        let skip = self.rcv_nxt.wrapping_sub(segment.seq);
        let len = segment.data_len.saturating_sub(skip);
        if len > 0 {
            let from = segment.header_len + skip as usize;
            match cx.host.send(self.sock, &mut packet.payload.parts(from, len as usize)) {
                Ok(taken) => self.took(u32::try_from(taken).unwrap_or(len), len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.took(0, len),
                Err(error) => {
                    tracing::debug!(guest = %self.key.guest, world = %self.key.world, %error, "TCP: send");
                    self.marks |= Marks::DEAD | Marks::TOLD | Marks::READABLE;
                    return;
                }
            }
        }
        let fin_at = segment.seq.wrapping_add(segment.data_len);
        if segment.flags.contains(Flags::FIN) && fin_at == self.rcv_nxt {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.state = self.state.on(Event::GuestFin);
            cx.host.shutdown_write(self.sock);
        }
        if !self.marks.contains(Marks::WAIT_WRITE) && self.marks.contains(Marks::REFUSED) {
            self.marks |= Marks::WAIT_WRITE;
            cx.host.want_write(self.sock, self.token);
        }
    }

    /// The socket took `taken` of `len` bytes. The rest is not acknowledged: the guest has to send it again.
    fn took(&mut self, taken: u32, len: u32) {
        self.rcv_nxt = self.rcv_nxt.wrapping_add(taken);
        if taken < len {
            self.marks |= Marks::REFUSED;
        }
    }

    pub(super) fn acknowledge(&mut self) {
        self.acks = self.acks.max(1);
    }

    /// The socket's send buffer has room again: the guest is told, and made to send again what was refused.
    pub(super) fn writable(&mut self) {
        if !self.marks.contains(Marks::WAIT_WRITE) {
            return;
        }
        self.marks -= Marks::WAIT_WRITE;
        self.acks = if self.marks.contains(Marks::REFUSED) { MAX_ACKS } else { 1 };
        self.marks -= Marks::REFUSED;
    }
}
