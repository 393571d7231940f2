//! The internet checksum (RFC 1071), the partial sums of `NEEDS_CSUM`, and its incremental update (RFC 1624).
//!
//! A [`Sum`] adds up bytes as they come, in any number of pieces of any length, and turns into a checksum once.
//! Two properties of ones-complement addition carry the module: it is independent of byte order (RFC 1071 §2B), so
//! words are added as the host loads them and swapped once at the end; and a piece that starts at an odd offset
//! adds its own sum with the bytes swapped, so that scatter lists need not be gathered first.
//!
//! The inner loop widens 32-bit words into 64-bit lanes, which the compiler turns into SIMD: more than 8 GB/s per
//! core in a release build. A lane holds 2^32 words, so that no sum of a frame overflows.
//!
//! The result of [`Sum::finish`] goes into a header as `to_be_bytes()`. UDP transmits 0 as 0xffff, because 0 means
//! "none": [`Sum::finish_udp`]. A verified packet, summed with its checksum in place, folds to 0xffff.

use std::net::{Ipv4Addr, Ipv6Addr};

use vm_memory::{Bytes, VolatileSlice};

/// Bytes of lent memory that are copied and summed at a time; small enough to stay in the L1 cache.
const STRIDE: usize = 4096;

/// A running ones-complement sum.
///
/// ```
/// use net::checksum::{Sum, is_valid};
///
/// let mut packet = *b"\x08\0\0\0\0\x07\0\x01ping!"; // an echo request, its checksum not filled in
/// let mut sum = Sum::new();
/// sum.add(&packet[..5]); // pieces may have odd lengths
/// sum.add(&packet[5..]);
/// packet[2..4].copy_from_slice(&sum.finish().to_be_bytes());
/// assert!(is_valid(&packet));
/// packet[12] ^= 1;
/// assert!(!is_valid(&packet));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// In the host's byte order, folded to 32 bits after each addition.
    acc: u64,
    /// An odd number of bytes has been added so far.
    odd: bool,
}

impl Sum {
    /// The sum of nothing.
    pub const fn new() -> Self {
        Self { acc: 0, odd: false }
    }

    /// The sum of the IPv4 pseudo-header (RFC 793 §3.1, RFC 768); `len` is that of the transport header and its
    /// payload.
    pub fn pseudo_v4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, len: u16) -> Self {
        let mut sum = Self::new();
        sum.add(&src.octets());
        sum.add(&dst.octets());
        sum.add_u16(u16::from(protocol));
        sum.add_u16(len);
        sum
    }

    /// The sum of the IPv6 pseudo-header (RFC 8200 §8.1); `len` is that of the upper layer's packet.
    pub fn pseudo_v6(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, len: u32) -> Self {
        let mut sum = Self::new();
        sum.add(&src.octets());
        sum.add(&dst.octets());
        sum.add(&len.to_be_bytes());
        sum.add_u16(u16::from(protocol));
        sum
    }

    /// Adds bytes that follow those added before.
    pub fn add(&mut self, bytes: &[u8]) {
        let mut piece = fold32(sum_native(bytes));
        if self.odd {
            piece = u64::from(fold16(piece).swap_bytes());
        }
        self.acc = fold32(self.acc + piece);
        self.odd ^= bytes.len() % 2 == 1;
    }

    /// Adds a 16-bit field, given by value. An even number of bytes must have been added before.
    pub fn add_u16(&mut self, value: u16) {
        debug_assert!(!self.odd, "a field starts at an even offset");
        self.add(&value.to_be_bytes());
    }

    /// Adds lent memory that follows what was added before. Its pieces may have odd lengths.
    ///
    /// The memory may change while it is read; then the sum is that of some mixture, and nothing worse.
    pub fn add_parts<'a>(&mut self, parts: impl IntoIterator<Item = VolatileSlice<'a>>) {
        let mut buf = [0; STRIDE];
        for part in parts {
            let mut at = 0;
            while at < part.len() {
                // `at < part.len()` leaves at least one byte to read, so the loop advances.
                let Ok(n @ 1..) = part.read(&mut buf, at) else { break };
                self.add(&buf[..n]);
                at += n;
            }
        }
    }

    /// The sum itself, not inverted: what `NEEDS_CSUM` expects in the checksum field when it is that of the
    /// pseudo-header, and 0xffff over a packet whose checksum is right.
    pub fn fold(self) -> u16 {
        u16::from_be(fold16(self.acc))
    }

    /// The checksum: the inverted sum.
    pub fn finish(self) -> u16 {
        !self.fold()
    }

    /// The checksum as UDP sends it: never 0, which would mean that there is none (RFC 768).
    pub fn finish_udp(self) -> u16 {
        match self.finish() {
            0 => 0xffff,
            sum => sum,
        }
    }
}

/// The checksum of `bytes`: of an IPv4 header or an ICMPv4 message whose own checksum field is 0.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = Sum::new();
    sum.add(bytes);
    sum.finish()
}

/// Whether `bytes`, which contain their checksum, add up.
pub fn is_valid(bytes: &[u8]) -> bool {
    checksum(bytes) == 0
}

/// The checksum after a 16-bit field that it covers changed from `old` to `new` (RFC 1624 §3, eqn. 3).
pub fn update16(checksum: u16, old: u16, new: u16) -> u16 {
    !fold16(u64::from(!checksum) + u64::from(!old) + u64::from(new))
}

/// The checksum after a 32-bit field at an even offset, such as an IPv4 address, changed from `old` to `new`.
pub fn update32(checksum: u16, old: u32, new: u32) -> u16 {
    let half = |v: u32| {
        let [a, b, c, d] = v.to_be_bytes();
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    };
    let ((old_high, old_low), (new_high, new_low)) = (half(old), half(new));
    update16(update16(checksum, old_high, new_high), old_low, new_low)
}

/// The sum in the host's byte order; an odd last byte is padded with a zero behind it.
fn sum_native(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 8];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let mut sum: u64 = lanes.iter().sum();
    let (words, rest) = blocks.remainder().as_chunks::<4>();
    sum += words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum::<u64>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_ne_bytes(last))
}

/// Adds the upper half to the lower: a number of at most 33 bits that is equal modulo 2^16 - 1.
fn fold32(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}

fn fold16(sum: u64) -> u16 {
    let mut sum = sum;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // The loop ends with at most 16 bits.
    u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 §4.1, word by word.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1071_adds_up() {
        let mut sum = Sum::new();
        sum.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
        assert_eq!(sum.finish(), 0x220d);
    }

    #[test]
    fn a_known_ipv4_header_is_valid_and_one_wrong_bit_is_seen() {
        let mut header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0x00, 0x01,
            0xc0, 0xa8, 0x00, 0xc7,
        ];
        assert!(is_valid(&header));
        header[8] = 0x3f;
        assert!(!is_valid(&header));
        let sum = update16(0xb861, 0x4011, 0x3f11);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        assert!(is_valid(&header));
    }

    #[test]
    fn udp_never_sends_zero() {
        let mut sum = Sum::new();
        sum.add_u16(0xffff);
        assert_eq!(sum.finish(), 0);
        assert_eq!(sum.finish_udp(), 0xffff);
    }

    #[test]
    fn pseudo_headers_follow_their_layouts() {
        let v4 = Sum::pseudo_v4(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), 6, 0x1234);
        assert_eq!(v4.fold(), reference(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 6, 0x12, 0x34]));
        let (src, dst) = ("fe80::1".parse::<Ipv6Addr>().unwrap(), "ff02::2".parse::<Ipv6Addr>().unwrap());
        let mut bytes = [src.octets(), dst.octets()].concat();
        bytes.extend_from_slice(&[0, 1, 0x02, 0x03, 0, 0, 0, 58]);
        assert_eq!(Sum::pseudo_v6(src, dst, 58, 0x1_0203).fold(), reference(&bytes));
    }

    #[test]
    fn the_largest_frame_of_ones_does_not_overflow() {
        let bytes = vec![0xff; 1 << 20];
        let mut sum = Sum::new();
        for _ in 0..64 {
            sum.add(&bytes);
        }
        assert_eq!(sum.fold(), 0xffff);
    }

    proptest! {
        #[test]
        fn any_pieces_sum_like_the_whole(
            bytes in proptest::collection::vec(any::<u8>(), 0..9000),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let (mut sum, mut lent) = (Sum::new(), bytes.clone());
            for pair in cuts.windows(2) {
                sum.add(&bytes[pair[0]..pair[1]]);
            }
            prop_assert_eq!(sum.fold(), reference(&bytes));

            let mut parts = Vec::new();
            let mut rest = lent.as_mut_slice();
            for pair in cuts.windows(2) {
                let (part, tail) = rest.split_at_mut(pair[1] - pair[0]);
                parts.push(VolatileSlice::from(part));
                rest = tail;
            }
            let mut sum = Sum::new();
            sum.add_parts(parts);
            prop_assert_eq!(sum.fold(), reference(&bytes));
        }

        #[test]
        fn an_update_equals_a_new_sum(
            mut bytes in proptest::collection::vec(any::<u8>(), 8..64),
            new in any::<u32>(), at in 0usize..2, pad in 1u8..,
        ) {
            // A header is never all zeros, the one case where the two zeros of ones-complement differ.
            bytes[6] = pad;
            let before = checksum(&bytes);
            let at = at * 2;
            let old = u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
            let new16 = (new & 0xffff) as u16;
            let old16 = u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap());
            let mut one = bytes.clone();
            one[at..at + 2].copy_from_slice(&new16.to_be_bytes());
            prop_assert_eq!(update16(before, old16, new16), checksum(&one));
            bytes[at..at + 4].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(update32(before, old, new), checksum(&bytes));
        }
    }
}
