//! What the guest has beyond its cumulative ACK (RFC 2018, RFC 6675's scoreboard).
//!
//! At most [`RANGES`] ranges, in order, with gaps between them. When a guest tells more, the highest are forgotten: that
//! costs a needless retransmission at most, and the guest tells them again. Believed are only blocks within what is in
//! flight, behind its first byte. All of it is a hint: nothing leaves the socket before the cumulative ACK, and a
//! time-out forgets the hints, because a guest may have thrown away what it told (RFC 2018 §8).

use super::options::Block;
use super::segment::before;

/// Ranges that a flow remembers.
const RANGES: usize = 4;

/// The ranges.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scoreboard {
    ranges: [Block; RANGES],
    len: u8,
}

impl Scoreboard {
    fn ranges(&self) -> &[Block] {
        &self.ranges[..usize::from(self.len)]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// The end of the highest range.
    pub(super) fn high(&self) -> Option<u32> {
        self.ranges().last().map(|range| range.end)
    }

    /// Adds a block that is within `una` and `max`. Says whether it told something new.
    pub(super) fn add(&mut self, block: Block, una: u32, max: u32) -> bool {
        let Block { start, end } = block;
        if !before(una, start) || !before(start, end) || before(max, end) {
            return false;
        }
        let known = |range: &Block| !before(start, range.start) && !before(range.end, end);
        if self.ranges().iter().any(known) {
            return false;
        }
        let mut merged = block;
        let mut rest = [Block::default(); RANGES];
        let mut kept = 0;
        for range in self.ranges() {
            if before(range.end, merged.start) || before(merged.end, range.start) {
                rest[kept] = *range;
                kept += 1;
            } else {
                let start = if before(range.start, merged.start) { range.start } else { merged.start };
                let end = if before(merged.end, range.end) { range.end } else { merged.end };
                merged = Block { start, end };
            }
        }
        let at = rest[..kept].iter().filter(|range| before(range.start, merged.start)).count();
        if at == RANGES {
            return false;
        }
        self.ranges = rest;
        self.ranges.copy_within(at..kept.min(RANGES - 1), at + 1);
        self.ranges[at] = merged;
        // At most `RANGES`, which is 4.
        self.len = (kept + 1).min(RANGES) as u8;
        true
    }

    /// The guest has everything before `una`.
    pub(super) fn advance(&mut self, una: u32) {
        let gone = self.ranges().iter().take_while(|range| !before(una, range.start)).count();
        if gone > 0 {
            self.ranges.copy_within(gone.., 0);
            self.len -= gone as u8;
        }
    }

    /// How many sequence numbers before `end` are in the ranges.
    pub(super) fn count_before(&self, end: u32) -> u32 {
        let below = self.ranges().iter().filter(|range| before(range.start, end));
        below.map(|r| if before(end, r.end) { end } else { r.end }.wrapping_sub(r.start)).sum()
    }

    /// The first at or behind `seq` that is in no range.
    pub(super) fn skip(&self, seq: u32) -> u32 {
        let inside = self.ranges().iter().find(|range| !before(seq, range.start) && before(seq, range.end));
        inside.map_or(seq, |range| range.end)
    }

    /// Where the next range behind `seq` starts.
    pub(super) fn next_start(&self, seq: u32) -> Option<u32> {
        self.ranges().iter().map(|range| range.start).find(|start| before(seq, *start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Near the wrap.
    const BASE: u32 = u32::MAX - 20;

    fn block(start: u32, end: u32) -> Block {
        Block { start: BASE.wrapping_add(start), end: BASE.wrapping_add(end) }
    }

    fn add(board: &mut Scoreboard, start: u32, end: u32) -> bool {
        board.add(block(start, end), BASE, BASE.wrapping_add(60))
    }

    #[test]
    fn blocks_outside_of_what_is_in_flight_are_refused() {
        let mut board = Scoreboard::default();
        for (start, end) in [(0, 5), (u32::MAX, 5), (50, 61), (9, 9), (9, 8), (0, 1 << 31)] {
            assert!(!add(&mut board, start, end), "{start}..{end}");
        }
        assert!(board.is_empty());
        assert!(add(&mut board, 1, 60));
    }

    #[test]
    fn the_highest_range_is_forgotten_when_there_are_too_many() {
        let mut board = Scoreboard::default();
        for start in [10, 20, 30, 40] {
            assert!(add(&mut board, start, start + 2));
        }
        assert!(!add(&mut board, 50, 52));
        assert!(add(&mut board, 15, 16));
        assert_eq!(board.high(), Some(BASE.wrapping_add(32)));
        assert!(add(&mut board, 11, 31));
        assert_eq!(board.ranges(), [block(10, 32)]);
    }

    proptest! {
        #[test]
        fn it_is_the_set_of_what_was_told(
            blocks in proptest::collection::vec((1u32..60, 1u32..20), 0..12), una in 0u32..60,
        ) {
            let mut board = Scoreboard::default();
            let mut told = [false; 61];
            for (start, len) in blocks {
                let end = (start + len).min(60);
                if add(&mut board, start, end) {
                    told[start as usize..end as usize].fill(true);
                }
                // What was forgotten is behind the highest range.
                if let Some(high) = board.high() {
                    told[high.wrapping_sub(BASE) as usize..].fill(false);
                }
                prop_assert!(board.ranges().windows(2).all(|two| before(two[0].end, two[1].start)));
                for at in 0..60 {
                    let seq = BASE.wrapping_add(at);
                    let has = board.skip(seq) != seq;
                    prop_assert_eq!(has, told[at as usize], "{} of {:?}", at, board);
                    let count = told[..at as usize].iter().filter(|told| **told).count();
                    prop_assert_eq!(board.count_before(seq) as usize, count);
                }
            }
            let high = board.high();
            board.advance(BASE.wrapping_add(una));
            prop_assert!(board.is_empty() || board.high() == high);
            prop_assert!(board.ranges().iter().all(|range| before(BASE.wrapping_add(una), range.start)));
        }
    }
}
