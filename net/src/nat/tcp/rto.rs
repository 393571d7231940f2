//! The retransmission timer of a flow (RFC 6298).
//!
//! One round trip is timed at a time. Without timestamps it is never that of a segment that was sent twice (Karn); with
//! them the echo says which one was answered. Between [`MIN`] and
//! [`MAX`], doubled at each time-out. The clock of a turn is coarse enough that nothing below a millisecond matters.

use std::time::{Duration, Instant};

/// Before anything was measured (RFC 6298 §2.1).
const INITIAL: Duration = Duration::from_secs(1);
/// The RFC says one second; every stack says 200 ms, and the way to a guest is shorter than any other.
const MIN: Duration = Duration::from_millis(200);
const MAX: Duration = Duration::from_secs(60);

/// Estimator and timer value. Times are in microseconds: four bytes are enough for an hour.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rto {
    srtt: u32,
    rttvar: u32,
    backoff: u8,
    /// Round trips are told by timestamps.
    stamped: bool,
    /// A segment that ends here was sent then.
    timed: Option<(u32, Instant)>,
}

impl Rto {
    pub(super) fn new() -> Self {
        Self { srtt: 0, rttvar: 0, backoff: 0, stamped: false, timed: None }
    }

    /// Timestamps were agreed: from now on [`Self::acked`] is told the round trips.
    pub(super) fn use_stamps(&mut self) {
        self.stamped = true;
    }

    /// The time-out to use now.
    pub(super) fn current(&self) -> Duration {
        let base = match self.srtt {
            0 => INITIAL,
            srtt => Duration::from_micros(u64::from(srtt) + 4 * u64::from(self.rttvar)).max(MIN),
        };
        base.saturating_mul(1 << self.backoff.min(10)).min(MAX)
    }

    /// New data up to `end` were sent.
    pub(super) fn sent(&mut self, end: u32, now: Instant) {
        self.timed.get_or_insert((end, now));
    }

    /// Something was sent again: what is being timed would be ambiguous.
    pub(super) fn resent(&mut self) {
        if !self.stamped {
            self.timed = None;
        }
    }

    /// The timer ran out.
    pub(super) fn back_off(&mut self) {
        self.backoff = self.backoff.saturating_add(1);
        self.resent();
    }

    /// The guest acknowledged new data up to `ack`, `echoed` after the segment that it answers was sent.
    pub(super) fn acked(&mut self, ack: u32, now: Instant, echoed: Option<Duration>) {
        self.backoff = 0;
        let Some((end, at)) = self.timed else { return };
        if super::segment::before(ack, end) {
            return;
        }
        self.timed = None;
        let passed = if self.stamped { echoed } else { Some(now.saturating_duration_since(at)) };
        let Some(passed) = passed else { return };
        let rtt = u32::try_from(passed.as_micros()).unwrap_or(u32::MAX).min(u32::MAX / 16);
        if self.srtt == 0 {
            self.srtt = rtt.max(1);
            self.rttvar = rtt / 2;
        } else {
            self.rttvar = self.rttvar / 4 * 3 + self.srtt.abs_diff(rtt) / 4;
            self.srtt = (self.srtt / 8 * 7 + rtt / 8).max(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_round_trip_and_doubles() {
        let start = Instant::now();
        let mut rto = Rto::new();
        assert_eq!(rto.current(), INITIAL);
        rto.sent(100, start);
        rto.acked(100, start + Duration::from_millis(400), None);
        assert_eq!(rto.current(), Duration::from_millis(1200));
        rto.back_off();
        assert_eq!(rto.current(), Duration::from_millis(2400));
        for _ in 0..20 {
            rto.back_off();
        }
        assert_eq!(rto.current(), MAX);
        rto.acked(200, start, None);
        assert_eq!(rto.current(), Duration::from_millis(1200));
    }

    #[test]
    fn a_segment_that_was_sent_twice_is_not_timed() {
        let start = Instant::now();
        let mut rto = Rto::new();
        rto.sent(100, start);
        rto.resent();
        rto.acked(100, start + Duration::from_secs(30), None);
        assert_eq!(rto.current(), INITIAL);
        rto.sent(200, start);
        rto.acked(200, start, None);
        assert_eq!(rto.current(), MIN);
    }

    #[test]
    fn with_timestamps_the_echo_counts_whatever_was_sent_twice() {
        let start = Instant::now();
        let mut rto = Rto::new();
        rto.use_stamps();
        rto.sent(100, start);
        rto.back_off();
        rto.acked(100, start + Duration::from_secs(30), Some(Duration::from_millis(400)));
        assert_eq!(rto.current(), Duration::from_millis(1200));
        rto.sent(200, start);
        rto.acked(200, start + Duration::from_secs(30), None);
        assert_eq!(rto.current(), Duration::from_millis(1200), "no echo, no measurement");
    }
}
