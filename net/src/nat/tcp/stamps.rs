//! The timestamps of a flow (RFC 7323 §3–§5).
//!
//! Agreed when both SYNs had one; from then on every segment of ours has one, but a RST. Our clock ticks in milliseconds
//! and begins, for each pair of addresses, somewhere secret (§7.1); it goes on from one connection to the next of the
//! same pair.
//!
//! **Echo** (§4.3): `recent` is the value of the oldest segment that we have not acknowledged, so that a guest measures
//! our one ACK per turn honestly. A segment that the guest sent again, and its keepalives, count too: so `recent`
//! is never older than what an idle connection may be (§5.5).
//!
//! **PAWS** (§5): a segment from before `recent` is answered with an ACK and not taken, unless it is a RST. One that
//! has no timestamp is taken, against §3.2's "SHOULD silently drop": the rule guards against segments that wander about
//! in a network, none does between a guest's ring and us, and a guest that forgets the option would hang.
//!
//! **Round trips** (§4.1): from the echo of an ACK of something new, of a segment sent twice as well.

use std::time::{Duration, Instant};

use super::options::Stamp;
use super::segment::before;

/// One end's clock, and what it knows of the other's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamps {
    epoch: Instant,
    offset: u32,
    agreed: bool,
    /// TS.Recent.
    recent: u32,
    /// Last.ACK.sent.
    last_ack: u32,
}

impl Stamps {
    /// A clock that showed `offset` at `epoch`; nothing is agreed.
    pub(super) fn new(epoch: Instant, offset: u32) -> Self {
        Self { epoch, offset, agreed: false, recent: 0, last_ack: 0 }
    }

    /// The guest's SYN had a timestamp; everything before `rcv_nxt` was received.
    pub(super) fn agree(&mut self, stamp: Stamp, rcv_nxt: u32) {
        self.agreed = true;
        self.recent = stamp.value;
        self.last_ack = rcv_nxt;
    }

    pub(super) fn agreed(&self) -> bool {
        self.agreed
    }

    /// What a segment sent `now` says, if it was agreed.
    pub(super) fn stamp(&self, now: Instant) -> Option<Stamp> {
        self.agreed.then(|| self.offer(now))
    }

    /// What our SYN says.
    pub(super) fn offer(&self, now: Instant) -> Stamp {
        Stamp { value: self.clock(now), echo: self.recent }
    }

    fn clock(&self, now: Instant) -> u32 {
        let ticks = now.saturating_duration_since(self.epoch).as_millis();
        // The clock wraps, as the RFC says.
        self.offset.wrapping_add(ticks as u32)
    }

    /// We have acknowledged everything before `rcv_nxt`.
    pub(super) fn acknowledged(&mut self, rcv_nxt: u32) {
        self.last_ack = rcv_nxt;
    }

    /// Takes the timestamp of a segment at `seq`. False if it comes from the past (PAWS).
    pub(super) fn accept(&mut self, seq: u32, stamp: Option<Stamp>) -> bool {
        let Some(stamp) = stamp.filter(|_| self.agreed) else { return true };
        if before(stamp.value, self.recent) {
            return false;
        }
        if !before(self.last_ack, seq) {
            self.recent = stamp.value;
        }
        true
    }

    /// How long ago we sent what the guest echoes. Nothing for an echo from the future.
    pub(super) fn round_trip(&self, now: Instant, stamp: Option<Stamp>) -> Option<Duration> {
        let stamp = stamp.filter(|_| self.agreed)?;
        let clock = self.clock(now);
        (!before(clock, stamp.echo)).then(|| Duration::from_millis(clock.wrapping_sub(stamp.echo).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreed(value: u32) -> (Stamps, Instant) {
        let epoch = Instant::now();
        let mut stamps = Stamps::new(epoch, u32::MAX - 10);
        stamps.agree(Stamp { value, echo: 0 }, 100);
        (stamps, epoch)
    }

    fn take(stamps: &mut Stamps, seq: u32, value: u32) -> bool {
        stamps.accept(seq, Some(Stamp { value, echo: 0 }))
    }

    #[test]
    fn the_oldest_segment_without_an_ack_is_echoed() {
        let (mut stamps, epoch) = agreed(u32::MAX);
        assert!(take(&mut stamps, 100, 5) && take(&mut stamps, 200, 6));
        assert_eq!(stamps.offer(epoch).echo, 5);
        stamps.acknowledged(300);
        assert!(take(&mut stamps, 300, 7));
        assert_eq!(stamps.offer(epoch).echo, 7);
    }

    #[test]
    fn the_past_is_not_accepted_and_no_timestamp_is() {
        let (mut stamps, _) = agreed(5);
        assert!(!take(&mut stamps, 100, 4) && !take(&mut stamps, 100, u32::MAX));
        assert!(stamps.accept(100, None));
    }

    #[test]
    fn the_clock_wraps_and_echoes_from_the_future_measure_nothing() {
        let (stamps, epoch) = agreed(0);
        let now = epoch + Duration::from_millis(15);
        assert_eq!(stamps.offer(now).value, 4);
        let round_trip = |echo| stamps.round_trip(now, Some(Stamp { value: 0, echo }));
        assert_eq!(round_trip(u32::MAX - 5), Some(Duration::from_millis(10)));
        assert_eq!(round_trip(5), None);
    }
}
