//! What is sent again, and how much may be under way (RFC 5681, RFC 6675 where the guest agreed to SACK).
//!
//! There is no network between the guest and us, so that nothing limits a flow until something is lost. A loss is three
//! duplicate ACKs, or more than two segments' worth of SACKed data: half of what was in flight may be under
//! way, then.
//!
//! - With SACK ([`Marks::SELECTIVE`]) the holes below the highest SACKed range are sent again, each once, then new data
//!   go on. The ring keeps frames in order, so a hole is lost as soon as recovery begins, and so is what
//!   lies behind the last hole if the guest got that and tells of nothing more.
//! - Without, all behind the cumulative ACK is.
//! - After a time-out, too, one segment at first; what the guest told is forgotten, and skipped if it tells it again.
//!
//! A DSACK (RFC 2883, below the cumulative ACK only) says that something was needlessly sent again. Once that is so for
//! all of it, the loss was none, and the congestion window is what it was (RFC 3708).

use super::flow::{Flow, Marks};
use super::options::Options;
use super::segment::before;

/// Duplicate ACKs after which a segment counts as lost (RFC 5681 §3.2).
pub(super) const DUP_ACKS: u8 = 3;
/// Congestion window that never limits.
const UNLIMITED: u32 = u32::MAX / 2;

/// The part of a flow that recovers from losses.
#[derive(Debug)]
pub(super) struct Recovery {
    pub(super) dup_acks: u8,
    pub(super) cwnd: u32,
    /// Recovery is over when everything before this is acknowledged.
    until: u32,
    /// Holes before this were sent again.
    resend: u32,
    /// The congestion window before the loss, if there was one.
    undo: Option<u32>,
    /// Sequence numbers that were sent again since, less those that the guest had already.
    again: u32,
}

impl Recovery {
    pub(super) fn new(iss: u32) -> Self {
        Self { dup_acks: 0, cwnd: UNLIMITED, until: iss, resend: iss, undo: None, again: 0 }
    }
}

impl Flow {
    /// Sequence numbers that are on their way, as far as is known (RFC 6675's pipe).
    pub(super) fn pipe(&self) -> u32 {
        let upto = |end: u32| end.wrapping_sub(self.snd_una).saturating_sub(self.sacked.count_before(end));
        match self.sacked.high() {
            Some(high) if self.marks.contains(Marks::SELECTIVE) => {
                let resent =
                    if before(self.recovery.resend, self.snd_una) { 0 } else { upto(self.recovery.resend) };
                self.snd_max.wrapping_sub(high) + resent
            }
            _ => upto(self.snd_nxt),
        }
    }

    /// What is missing at the guest and may be sent again now: where it begins, and how much of it.
    pub(super) fn hole(&self) -> Option<(u32, u32)> {
        if !self.marks.contains(Marks::SELECTIVE) {
            return None;
        }
        let first = before(self.recovery.resend, self.snd_una) || self.recovery.resend == self.snd_una;
        let from = if first { self.snd_una } else { self.recovery.resend };
        let start = self.sacked.skip(from);
        let len = self.sacked.next_start(start)?.wrapping_sub(start);
        let room = self.recovery.cwnd.saturating_sub(self.pipe());
        // The first goes whatever is under way (RFC 6675 §5 step 4.3); small pieces wait until they are large.
        let room = if first { room.max(self.mss.into()) } else { room };
        (room >= len.min(self.mss.into())).then_some((start, len.min(room)))
    }

    /// A hole was sent again, up to `end`.
    pub(super) fn filled(&mut self, end: u32, len: u32) {
        self.recovery.resend = end;
        self.sent_again(len);
    }

    /// `len` sequence numbers were sent that had been sent before.
    pub(super) fn sent_again(&mut self, len: u32) {
        self.recovery.again = self.recovery.again.saturating_add(len);
    }

    /// The next place to send from while all is sent again; what the guest has is left out. Says how much may be sent
    /// from there at most.
    pub(super) fn skip_sacked(&mut self) -> u32 {
        if self.sacked.is_empty() || self.snd_nxt == self.snd_max {
            return u32::MAX;
        }
        self.snd_nxt = self.sacked.skip(self.snd_nxt);
        self.sacked.next_start(self.snd_nxt).map_or(u32::MAX, |start| start.wrapping_sub(self.snd_nxt))
    }

    /// The guest acknowledged `bytes` more.
    pub(super) fn progress(&mut self, bytes: u32) {
        self.recovery.dup_acks = 0;
        self.sacked.advance(self.snd_una);
        if !before(self.snd_una, self.recovery.until) {
            self.marks -= Marks::RECOVERING | Marks::SELECTIVE;
        }
        if !self.marks.contains(Marks::SELECTIVE) {
            self.recovery.cwnd = self.recovery.cwnd.saturating_add(bytes);
        } else if self.sacked.is_empty() {
            // It got the last hole, and nothing of what was sent behind that before.
            self.marks -= Marks::SELECTIVE;
            self.snd_nxt = self.snd_una;
        }
    }

    /// Takes what an ACK says about holes; `repeats` if it is a duplicate in RFC 5681's sense.
    pub(super) fn take_blocks(&mut self, ack: u32, options: &Options, repeats: bool) {
        let blocks = if self.marks.contains(Marks::SACK) { options.blocks() } else { &[] };
        let mut news = false;
        for block in blocks {
            news |= self.sacked.add(*block, self.snd_una, self.snd_max);
        }
        if let Some(first) = blocks.first()
            && before(first.start, first.end)
            && !before(ack, first.end)
        {
            self.needless(first.end.wrapping_sub(first.start));
        }
        if ack == self.snd_una && (news || repeats && blocks.is_empty()) {
            self.duplicate();
        }
    }

    fn needless(&mut self, len: u32) {
        let Some(cwnd) = self.recovery.undo.filter(|_| self.recovery.again > 0) else { return };
        self.recovery.again = self.recovery.again.saturating_sub(len);
        if self.recovery.again == 0 {
            self.recovery.cwnd = self.recovery.cwnd.max(cwnd);
            self.recovery.undo = None;
        }
    }

    /// The guest says again what it has: perhaps something was lost.
    fn duplicate(&mut self) {
        if self.snd_una == self.snd_max || self.marks.contains(Marks::RECOVERING) {
            return;
        }
        self.recovery.dup_acks += 1;
        let mss = u32::from(self.mss);
        let told = self.sacked.count_before(self.snd_max);
        if self.recovery.dup_acks < DUP_ACKS && told <= u32::from(DUP_ACKS - 1) * mss {
            return;
        }
        let cwnd = (self.in_flight() / 2).max(2 * mss);
        self.lost(cwnd);
        self.recovery.resend = self.snd_una;
        if self.sacked.is_empty() {
            self.snd_nxt = self.snd_una;
        } else {
            self.marks |= Marks::SELECTIVE;
        }
    }

    /// The time is out: nothing counts that was told, and everything is sent again.
    pub(super) fn time_out(&mut self) {
        self.sacked.clear();
        self.lost(self.mss.into());
        self.marks -= Marks::SELECTIVE;
        self.snd_nxt = self.snd_una;
    }

    fn lost(&mut self, cwnd: u32) {
        if !self.marks.contains(Marks::RECOVERING) {
            self.recovery.undo = Some(self.recovery.cwnd);
            self.recovery.again = 0;
        }
        self.marks |= Marks::RECOVERING;
        self.recovery.dup_acks = 0;
        self.recovery.until = self.snd_max;
        self.recovery.cwnd = cwnd;
        self.rto.resent();
    }
}
