//! The options of a segment from a guest (RFC 9293 §3.1), parsed once.
//!
//! Read are MSS (RFC 9293 §3.7.1), window scale and timestamps (RFC 7323 §2, §3), SACK-permitted and the blocks of
//! SACK (RFC 2018 §2, §3). Which of them mean something in a segment is for the flow to say: MSS, scale and
//! SACK-permitted only on a SYN, blocks only where SACK was agreed. Others, and those of a wrong length, are skipped by
//! their length; nonsense ends the list, and what was read until there counts.

/// Largest shift of a window (RFC 7323 §2.3).
pub(super) const MAX_SHIFT: u8 = 14;
/// Bytes of a timestamp in our segments, two no-operations in front of it (RFC 7323 appendix A).
pub(super) const STAMP_LEN: usize = 12;
/// Blocks that fit into the 40 bytes of options.
const MAX_BLOCKS: usize = 4;

const NOP: u8 = 1;
const MSS: u8 = 2;
const SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
const SACK: u8 = 5;
const STAMP: u8 = 8;

/// A timestamp option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// TSval: the sender's clock.
    pub(super) value: u32,
    /// TSecr: the other's clock, as the sender last saw it.
    pub(super) echo: u32,
}

/// Sequence numbers from `start` on, before `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) start: u32,
    pub(super) end: u32,
}

/// What a guest says in its options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// The largest segment that the guest takes.
    pub(super) mss: Option<u16>,
    /// The guest's window scale.
    pub(super) shift: Option<u8>,
    /// The guest can send SACK blocks.
    pub(super) sack_permitted: bool,
    pub(super) stamp: Option<Stamp>,
    blocks: [Block; MAX_BLOCKS],
    count: usize,
}

impl Options {
    /// Reads the bytes between the header's fixed part and the data.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let mut options = Self::default();
        let mut rest = bytes;
        loop {
            match *rest {
                // No-operation has no length.
                [NOP, ..] => rest = &rest[1..],
                [kind, len, ..] if kind > NOP && len >= 2 && usize::from(len) <= rest.len() => {
                    let (option, behind) = rest.split_at(usize::from(len));
                    options.take(kind, &option[2..]);
                    rest = behind;
                }
                // The end, a length that can't be, or one behind the end.
                _ => return options,
            }
        }
    }

    fn take(&mut self, kind: u8, value: &[u8]) {
        match (kind, value) {
            (MSS, &[high, low]) => self.mss = Some(u16::from_be_bytes([high, low])),
            (SCALE, &[shift]) => self.shift = Some(shift.min(MAX_SHIFT)),
            (SACK_PERMITTED, []) => self.sack_permitted = true,
            (STAMP, &[a, b, c, d, e, f, g, h]) => {
                let value = u32::from_be_bytes([a, b, c, d]);
                self.stamp = Some(Stamp { value, echo: u32::from_be_bytes([e, f, g, h]) });
            }
            (SACK, value) => {
                let (pairs, _) = value.as_chunks::<8>();
                self.count = pairs.len().min(MAX_BLOCKS);
                for (block, &[a, b, c, d, e, f, g, h]) in self.blocks.iter_mut().zip(pairs) {
                    let start = u32::from_be_bytes([a, b, c, d]);
                    *block = Block { start, end: u32::from_be_bytes([e, f, g, h]) };
                }
            }
            _ => {}
        }
    }

    /// The SACK blocks, unchecked, in the guest's order: the newest first.
    pub(super) fn blocks(&self) -> &[Block] {
        &self.blocks[..self.count]
    }
}

/// What our SYN, or SYN-ACK, offers besides the timestamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) mss: u16,
    pub(super) shift: Option<u8>,
    pub(super) sack: bool,
}

/// Most bytes that [`write`] makes.
pub(super) const OPTIONS_MAX: usize = 8 + STAMP_LEN;

/// Writes our options, and says how many bytes they are: a multiple of four.
pub(super) fn write(offer: Option<Offer>, stamp: Option<Stamp>, into: &mut [u8; OPTIONS_MAX]) -> usize {
    let mut len = 0;
    let mut push = |bytes: &[u8]| {
        into[len..len + bytes.len()].copy_from_slice(bytes);
        len += bytes.len();
    };
    if let Some(offer) = offer {
        push(&[MSS, 4]);
        push(&offer.mss.to_be_bytes());
    }
    let sack = offer.is_some_and(|offer| offer.sack);
    // SACK-permitted goes where a timestamp has its two no-operations.
    match (sack, stamp) {
        (true, Some(_)) => push(&[SACK_PERMITTED, 2]),
        (true, None) => push(&[NOP, NOP, SACK_PERMITTED, 2]),
        (false, Some(_)) => push(&[NOP, NOP]),
        (false, None) => {}
    }
    if let Some(stamp) = stamp {
        push(&[STAMP, 10]);
        push(&stamp.value.to_be_bytes());
        push(&stamp.echo.to_be_bytes());
    }
    if let Some(shift) = offer.and_then(|offer| offer.shift) {
        push(&[NOP, SCALE, 3, shift]);
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn options_are_read_past_unknown_ones_and_stop_at_nonsense() {
        let read = |bytes: &[u8]| {
            let options = Options::read(bytes);
            (options.mss, options.shift)
        };
        assert_eq!(read(&[2, 4, 5, 0xb4, 19, 4, 9, 9, 8, 3, 0, 1, 3, 3, 7]), (Some(1460), Some(7)));
        assert_eq!(read(&[3, 3, 200]), (None, Some(14)));
        assert_eq!(read(&[8, 0, 2, 4, 5, 0xb4]), (None, None));
        assert_eq!(read(&[0, 2, 4, 5, 0xb4]), (None, None));
        assert_eq!(read(&[2, 4, 5]), (None, None));
    }

    #[test]
    fn blocks_are_read_beside_a_timestamp() {
        let mut bytes = vec![1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9, 1, 1, 5, 18];
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]);
        let options = Options::read(&bytes);
        assert_eq!(options.stamp, Some(Stamp { value: 7, echo: 9 }));
        assert_eq!(options.blocks(), [Block { start: 1, end: 2 }, Block { start: 3, end: 4 }]);
    }

    proptest! {
        #[test]
        fn any_options_end(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let options = Options::read(&bytes);
            prop_assert!(options.shift.is_none_or(|shift| shift <= MAX_SHIFT));
            prop_assert!(options.blocks().len() <= MAX_BLOCKS);
        }

        #[test]
        fn what_is_written_is_read(
            mss in any::<u16>(), shift in proptest::option::of(0..=MAX_SHIFT), sack in any::<bool>(),
            syn in any::<bool>(), stamp in proptest::option::of(any::<(u32, u32)>()),
        ) {
            let stamp = stamp.map(|(value, echo)| Stamp { value, echo });
            let mut bytes = [0; OPTIONS_MAX];
            let len = write(syn.then_some(Offer { mss, shift, sack }), stamp, &mut bytes);
            prop_assert_eq!(len % 4, 0);
            let read = Options::read(&bytes[..len]);
            let shift = shift.filter(|_| syn);
            let expected = Options { mss: syn.then_some(mss), shift, sack_permitted: syn && sack, stamp, ..read };
            prop_assert_eq!(read, expected);
        }
    }
}
