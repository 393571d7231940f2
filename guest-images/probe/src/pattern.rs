//! The bytes that bulk orders send and check, and the hash that they report.
//!
//! Byte `o` of a stream is `(i*31 + (i>>8)*17 + 7) mod 256` with `i = o mod 65521`: a period that is prime,
//! so that a block that was lost, doubled or moved by any power of two shows.

use alloc::vec::Vec;

/// The period in bytes.
pub const PERIOD: usize = 65521;

/// One period and a second one behind it, so that any stretch of a period's length is one slice.
#[derive(Debug)]
pub struct Pattern(Vec<u8>);

impl Default for Pattern {
    fn default() -> Self {
        let byte = |i: usize| (i * 31 + (i >> 8) * 17 + 7) as u8;
        Self((0..2 * PERIOD).map(|at| byte(at % PERIOD)).collect())
    }
}

impl Pattern {
    /// Bytes of the stream from `offset`; as many as `len`, but at most a period.
    #[must_use]
    pub fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.0[start..start + len.min(PERIOD)]
    }

    /// Whether `bytes` are the stream's from `offset`.
    #[must_use]
    pub fn matches(&self, offset: u64, bytes: &[u8]) -> bool {
        let mut at = offset;
        bytes.chunks(PERIOD).all(|chunk| {
            let same = self.at(at, chunk.len()) == chunk;
            at += chunk.len() as u64;
            same
        })
    }
}

/// FNV-1a, 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fnv(pub u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_knows_its_own_bytes_across_the_period() {
        let pattern = Pattern::default();
        let long: Vec<u8> = (0..3).flat_map(|n| pattern.at(n * PERIOD as u64, PERIOD).to_vec()).collect();
        assert!(pattern.matches(0, &long));
        assert!(pattern.matches(65_000, &long[65_000..]));
    }

    #[test]
    fn a_block_moved_by_a_power_of_two_is_seen() {
        let pattern = Pattern::default();
        for power in 0..20 {
            assert!(!pattern.matches(1 << power, pattern.at(0, 1000)), "moved by 2^{power}");
        }
    }

    #[test]
    fn fnv_of_the_published_vector() {
        let mut hash = Fnv::default();
        hash.add(b"foobar");
        assert_eq!(hash.0, 0x8594_4171_f739_67e8);
    }
}
