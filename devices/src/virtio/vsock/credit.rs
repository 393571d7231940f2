//! Credit (virtio 1.3 §5.10.6.3): how much each side may still send, in bytes of payload.
//!
//! Counters are free-running 32-bit numbers that wrap. A sender may have `buf_alloc - (sent - fwd_cnt)` more bytes on
//! the way, with the last `buf_alloc` and `fwd_cnt` that the receiver told. [`ToGuest`] is our side as a sender,
//! [`FromGuest`] as a receiver. What the guest tells is not trusted: numbers that make no sense mean no credit, which
//! harms nobody but that guest's own connection.

use std::num::Wrapping;

/// Bytes that a connection holds for its host socket, at most: what the guest is told as `buf_alloc`.
pub const BUF_ALLOC: u32 = 256 << 10;

/// What we may send to the guest.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ToGuest {
    sent: Wrapping<u32>,
    fwd_cnt: Wrapping<u32>,
    buf_alloc: u32,
    /// We asked for credit since there was some.
    asked: bool,
}

impl ToGuest {
    /// The guest told its numbers.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.fwd_cnt = Wrapping(fwd_cnt);
        if self.free() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that may be sent now.
    pub(super) fn free(&self) -> u32 {
        self.buf_alloc.saturating_sub((self.sent - self.fwd_cnt).0)
    }

    /// `bytes` were sent; not more than [`Self::free`].
    pub(super) fn sent(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.free(), "sent without credit");
        self.sent += bytes;
    }

    /// Whether to ask for credit: there is none, and nobody asked yet.
    pub(super) fn must_ask(&self) -> bool {
        self.free() == 0 && !self.asked
    }

    /// Credit was asked for.
    pub(super) fn asked(&mut self) {
        self.asked = true;
    }
}

/// What the guest may send to us.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FromGuest {
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// The `fwd_cnt` that the guest knows.
    told: Wrapping<u32>,
    /// The guest asked to be told.
    asked: bool,
}

impl FromGuest {
    /// Takes `bytes` from the guest; false when it had no credit for them.
    #[must_use]
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let fits = bytes <= BUF_ALLOC - self.held();
        if fits {
            self.received += bytes;
        }
        fits
    }

    /// `bytes` of what was received have gone on to the host, or were thrown away on purpose.
    pub(super) fn forward(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.held(), "forwarded what was not received");
        self.forwarded += bytes;
    }

    /// Bytes received and not forwarded; never more than [`BUF_ALLOC`].
    fn held(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// The guest wants to know.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// Whether the guest must be told: it asked, or it believes to have less than half of the buffer while there is
    /// more. A guest that sees no credit, or waits for room for a packet of 64 KiB, is so always told in time.
    pub(super) fn must_tell(&self) -> bool {
        let believed = BUF_ALLOC.saturating_sub((self.received - self.told).0);
        self.asked || (believed < BUF_ALLOC / 2 && self.told != self.forwarded)
    }

    /// The `fwd_cnt` to put into a packet that is sent now.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.asked = false;
        self.forwarded.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn credit_is_what_the_guest_has_room_for() {
        let mut credit = ToGuest::default();
        assert_eq!(credit.free(), 0);
        credit.update(100, 0);
        assert_eq!(credit.free(), 100);
        credit.sent(100);
        assert_eq!(credit.free(), 0);
        credit.update(100, 40);
        assert_eq!(credit.free(), 40);
        // The guest made its buffer smaller than what is on the way.
        credit.update(30, 40);
        assert_eq!(credit.free(), 0);
        credit.update(30, 100);
        assert_eq!(credit.free(), 30);
    }

    #[test]
    fn credit_is_asked_for_once_until_there_is_some() {
        let mut credit = ToGuest::default();
        assert!(credit.must_ask());
        credit.asked();
        credit.update(0, 0);
        assert!(!credit.must_ask());
        credit.update(1, 0);
        credit.sent(1);
        assert!(credit.must_ask());
    }

    #[test]
    fn counters_wrap() {
        let near = u32::MAX - 10;
        let mut credit =
            ToGuest { sent: Wrapping(near), fwd_cnt: Wrapping(near), buf_alloc: 64, asked: false };
        credit.sent(64);
        assert_eq!(credit.free(), 0);
        credit.update(64, near.wrapping_add(64));
        assert_eq!(credit.free(), 64);
        let start = Wrapping(near);
        let mut credit = FromGuest { received: start, forwarded: start, told: start, asked: false };
        assert!(credit.receive(BUF_ALLOC));
        assert!(!credit.receive(1));
        credit.forward(BUF_ALLOC);
        assert!(credit.must_tell());
        assert_eq!(credit.tell(), near.wrapping_add(BUF_ALLOC));
    }

    #[test]
    fn a_guest_that_claims_more_than_it_got_gains_nothing() {
        let mut credit = ToGuest::default();
        credit.update(1000, 1);
        assert_eq!(credit.free(), 0);
        credit.update(u32::MAX, u32::MAX);
        assert!(credit.free() > 0);
    }

    proptest! {
        /// Sender and receiver that exchange their numbers now and then never break each other's rule, and the
        /// receiver always tells before the sender is stuck for good.
        #[test]
        fn both_sides_agree(steps in prop::collection::vec((0u8..4, 1u32..100_000), 1..200)) {
            let (mut sender, mut receiver, mut held) = (ToGuest::default(), FromGuest::default(), 0u32);
            sender.update(BUF_ALLOC, receiver.tell());
            for (what, n) in steps {
                match what {
                    0 => {
                        let n = n.min(sender.free());
                        sender.sent(n);
                        prop_assert!(receiver.receive(n));
                        held += n;
                    }
                    1 => {
                        let n = n.min(held);
                        receiver.forward(n);
                        held -= n;
                    }
                    2 => receiver.ask(),
                    _ => {}
                }
                if receiver.must_tell() {
                    sender.update(BUF_ALLOC, receiver.tell());
                }
                prop_assert!(held <= BUF_ALLOC);
                prop_assert!(sender.free() <= BUF_ALLOC - held);
                prop_assert!(sender.free() >= (BUF_ALLOC - held).min(BUF_ALLOC / 2));
            }
        }
    }
}
