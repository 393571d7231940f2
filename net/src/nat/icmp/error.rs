//! ICMP errors for a guest (RFC 792, RFC 1812 §4.3.2): the gateway's own, and those of the world.
//!
//! An error quotes the packet that it is about: as much of it as fits into 576 bytes (RFC 1812 §4.3.2.3). One of the
//! world comes from the router that sent it, so that `traceroute` shows the way.
//!
//! None is sent (RFC 1122 §3.2.2) about an ICMP error, a fragment other than the first, a packet to a group, or one
//! without a source; nor beyond the rate of [`Budget`] (RFC 1812 §4.3.2.8).

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::nat::cx::Cx;
use crate::nat::ipv4::{DONT_FRAGMENT, IPV4_LEN, Ipv4Out, TTL, protocol};
use crate::{DropReason, checksum};

/// Most bytes of the quoted packet.
const QUOTE_MAX: usize = 576 - IPV4_LEN - 8;
/// Errors that may be sent at once.
pub(crate) const BURST: u32 = 200;
/// One more may be sent each time that this has passed: 200 a second.
pub(crate) const REFILL: Duration = Duration::from_millis(5);

/// What is said about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IcmpError {
    NetUnreachable,
    HostUnreachable,
    PortUnreachable,
    /// With the MTU of the next hop (RFC 1191 §4).
    FragmentationNeeded(u16),
    Prohibited,
    TtlExceeded,
    /// Fragments were missing for too long.
    ReassemblyTimeout,
    /// What a router of the world said: type, code, and the MTU of a "fragmentation needed".
    Relayed(u8, u8, u16),
}

impl IcmpError {
    fn type_code_rest(self) -> (u8, u8, u32) {
        match self {
            Self::NetUnreachable => (3, 0, 0),
            Self::HostUnreachable => (3, 1, 0),
            Self::PortUnreachable => (3, 3, 0),
            Self::FragmentationNeeded(mtu) => (3, 4, u32::from(mtu)),
            Self::Prohibited => (3, 13, 0),
            Self::TtlExceeded => (11, 0, 0),
            Self::ReassemblyTimeout => (11, 1, 0),
            Self::Relayed(kind, code, mtu) => (kind, code, u32::from(mtu)),
        }
    }
}

/// How many errors may still be sent: a token bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Budget {
    spent: u32,
    since: Option<Instant>,
}

impl Budget {
    /// Takes one out, if there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_millis() / REFILL.as_millis();
        if earned > 0 {
            self.spent = self.spent.saturating_sub(u32::try_from(earned).unwrap_or(u32::MAX));
            self.since = Some(now);
        }
        let left = self.spent < BURST;
        self.spent += u32::from(left);
        left
    }
}

/// Tells the guest at `to` what became of the packet that begins with `quote` (its IPv4 header first).
pub(crate) fn post(cx: &mut Cx<'_>, to: Ipv4Addr, error: IcmpError, quote: &[u8]) {
    if may_be_about(quote) && !cx.icmp_errors.take(cx.now) {
        cx.drop(DropReason::RateLimited, || format!("{error:?} for {to}"));
        return;
    }
    let gateway = cx.config.gateway();
    post_from(cx, gateway, to, error, quote);
}

/// Tells it in the name of `from`, the router of the world that said so.
pub(crate) fn post_from(cx: &mut Cx<'_>, from: Ipv4Addr, to: Ipv4Addr, error: IcmpError, quote: &[u8]) {
    let Some(mac) = cx.neighbours.mac_of(to).filter(|_| may_be_about(quote)) else { return };
    let out = Ipv4Out {
        src: from,
        dst: to,
        protocol: protocol::ICMP,
        ttl: TTL,
        tos: 0xc0, // internetwork control (RFC 1812 §4.3.2.5)
        id: 0,
        fragment: DONT_FRAGMENT,
    };
    let frame = out.frame(mac, cx.config.gateway_mac, &message(error, quote));
    cx.post(frame);
}

/// The ICMP message, with its checksum.
fn message(error: IcmpError, quote: &[u8]) -> Vec<u8> {
    let (kind, code, rest) = error.type_code_rest();
    let mut message = vec![kind, code, 0, 0];
    message.extend_from_slice(&rest.to_be_bytes());
    message.extend_from_slice(&quote[..quote.len().min(QUOTE_MAX)]);
    let sum = checksum::checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Whether an error may be sent about the packet that begins with `quote`.
fn may_be_about(quote: &[u8]) -> bool {
    let Some(fixed) = quote.first_chunk::<IPV4_LEN>() else { return false };
    let address = |at: usize| Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]);
    let (src, dst) = (address(12), address(16));
    let later_fragment = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x1fff != 0;
    let about_icmp = fixed[9] == protocol::ICMP;
    // Of ICMP, only requests and replies: 0, 8, 13 to 18.
    let kind = quote.get(usize::from(fixed[0] & 0xf) * 4);
    let icmp_error = about_icmp && !matches!(kind, Some(0 | 8 | 13..=18));
    let group = dst.is_multicast() || dst.is_broadcast() || src.is_multicast();
    !later_fragment && !icmp_error && !group && !src.is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn quote(protocol: u8, fragment: u16, dst: [u8; 4], first: u8) -> Vec<u8> {
        let mut quote = vec![0x45, 0, 0, 28, 0, 1, 0, 0, 1, protocol, 0, 0, 192, 168, 122, 2];
        quote[6..8].copy_from_slice(&fragment.to_be_bytes());
        quote.extend(dst);
        quote.extend([first, 0, 0, 0, 0, 0, 0, 0]);
        quote
    }

    #[test]
    fn no_error_about_errors_fragments_and_groups() {
        assert!(may_be_about(&quote(17, 0, [1, 1, 1, 1], 0)));
        assert!(may_be_about(&quote(1, 0x2000, [1, 1, 1, 1], 8)));
        assert!(!may_be_about(&quote(1, 0, [1, 1, 1, 1], 3)));
        assert!(!may_be_about(&quote(17, 1, [1, 1, 1, 1], 0)));
        assert!(!may_be_about(&quote(17, 0, [224, 0, 0, 251], 0)));
        assert!(!may_be_about(&quote(17, 0, [255; 4], 0)));
        assert!(!may_be_about(&[0x45; 19]));
    }

    #[test]
    fn a_message_carries_its_mtu_and_a_valid_checksum() {
        let message = message(IcmpError::FragmentationNeeded(1280), &[0x45; 1000]);
        assert_eq!(message.len() + IPV4_LEN, 576);
        assert_eq!((message[0], message[1]), (3, 4));
        assert_eq!(message[4..8], [0, 0, 5, 0]);
        assert!(checksum::is_valid(&message));
    }

    #[test]
    fn errors_are_limited_to_a_burst_and_a_rate() {
        let (mut budget, now) = (Budget::default(), Instant::now());
        assert_eq!((0..1000).filter(|_| budget.take(now)).count(), BURST as usize);
        assert!(!budget.take(now + REFILL / 2));
        assert!(budget.take(now + REFILL));
        assert!(!budget.take(now + REFILL));
        assert_eq!((0..1000).filter(|_| budget.take(now + REFILL * 101)).count(), 100);
    }

    proptest! {
        #[test]
        fn any_bytes_may_be_asked_about(quote in proptest::collection::vec(any::<u8>(), 0..80)) {
            may_be_about(&quote);
            message(IcmpError::TtlExceeded, &quote);
        }
    }
}
