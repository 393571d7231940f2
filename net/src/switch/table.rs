//! Which station is behind which port: learning, ageing, pinning (IEEE 802.1D §7.8, 7.9).
//!
//! Enters: the source address of each frame, with the port that it came through and the time. Leaves: where a
//! destination is. A station that has said nothing for [`AGEING`] is forgotten, and frames to it are flooded.
//!
//! A *pinned* station was announced by whoever plugged the port in: it never ages and never moves, and a frame that
//! claims its address on another port is refused. So one guest can't take over another's traffic, or the gateway's.
//!
//! Bounded: [`MAX_LEARNED`] learned stations per port. A guest that invents addresses fills its own share, and is
//! flooded to; nobody else's entry is evicted. Expired entries are swept at most once per [`SWEEP`], so that no frame
//! pays for more than that.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::mac::MacAddr;

/// How long a silent station is remembered.
pub const AGEING: Duration = Duration::from_secs(300);
/// Most learned stations per port.
pub const MAX_LEARNED: usize = 64;
/// Shortest time between two sweeps for expired entries.
const SWEEP: Duration = Duration::from_secs(1);

/// A port, as the table knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Side {
    /// The way out of the switch.
    Uplink,
    /// The port with this number.
    Port(usize),
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    One(Side),
    /// To every port but its own.
    All,
    /// The destination is where the frame came from.
    Nobody,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    side: Side,
    /// `None`: pinned.
    seen: Option<Instant>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: HashMap<MacAddr, Entry>,
    learned: HashMap<Side, usize>,
    swept: Option<Instant>,
}

impl Table {
    /// Announces a station. False if it is announced on another port already.
    pub(super) fn pin(&mut self, mac: MacAddr, side: Side) -> bool {
        if let Some(entry) = self.entries.get(&mac) {
            if entry.seen.is_none() {
                return entry.side == side;
            }
            self.forget(mac);
        }
        self.entries.insert(mac, Entry { side, seen: None });
        true
    }

    /// Notes that `mac` has sent through `side`. False if it may not: a group address, or pinned elsewhere.
    pub(super) fn learn(&mut self, mac: MacAddr, side: Side, now: Instant) -> bool {
        if mac.is_group() {
            return false;
        }
        match self.entries.get_mut(&mac) {
            Some(Entry { side: known, seen: None }) => return *known == side,
            Some(entry) if entry.side == side => {
                entry.seen = Some(now);
                return true;
            }
            // It has moved.
            Some(_) => self.forget(mac),
            None => {}
        }
        if self.count(side) >= MAX_LEARNED {
            self.sweep(now);
        }
        if self.count(side) < MAX_LEARNED {
            self.entries.insert(mac, Entry { side, seen: Some(now) });
            *self.learned.entry(side).or_default() += 1;
        }
        true
    }

    /// Where a frame to `mac` that came through `from` goes.
    pub(super) fn lookup(&self, mac: MacAddr, from: Side, now: Instant) -> To {
        match self.entries.get(&mac) {
            Some(entry) if !expired(entry, now) => {
                if entry.side == from {
                    To::Nobody
                } else {
                    To::One(entry.side)
                }
            }
            _ => To::All,
        }
    }

    /// Forgets every station behind a port that is gone.
    pub(super) fn unplug(&mut self, side: Side) {
        self.entries.retain(|_, entry| entry.side != side);
        self.learned.remove(&side);
    }

    /// Every station: its address, where it is, and whether it is pinned.
    pub(super) fn stations(&self, now: Instant) -> impl Iterator<Item = (MacAddr, Side, bool)> + '_ {
        let known = self.entries.iter().filter(move |(_, entry)| !expired(entry, now));
        known.map(|(mac, entry)| (*mac, entry.side, entry.seen.is_none()))
    }

    fn count(&self, side: Side) -> usize {
        self.learned.get(&side).copied().unwrap_or(0)
    }

    fn forget(&mut self, mac: MacAddr) {
        if let Some(Entry { side, seen: Some(_) }) = self.entries.remove(&mac)
            && let Some(count) = self.learned.get_mut(&side)
        {
            *count = count.saturating_sub(1);
        }
    }

    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < SWEEP) {
            return;
        }
        self.swept = Some(now);
        let old: Vec<MacAddr> =
            self.entries.iter().filter(|(_, entry)| expired(entry, now)).map(|(mac, _)| *mac).collect();
        for mac in old {
            self.forget(mac);
        }
    }
}

fn expired(entry: &Entry, now: Instant) -> bool {
    entry.seen.is_some_and(|at| now.saturating_duration_since(at) >= AGEING)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Side = Side::Port(0);
    const B: Side = Side::Port(1);

    fn mac(n: u8) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, n])
    }

    #[test]
    fn a_station_is_found_where_it_spoke_until_it_is_silent_too_long() {
        let (mut table, start) = (Table::default(), Instant::now());
        assert_eq!(table.lookup(mac(1), B, start), To::All);
        assert!(table.learn(mac(1), A, start));
        assert_eq!(table.lookup(mac(1), B, start), To::One(A));
        assert_eq!(table.lookup(mac(1), A, start), To::Nobody);
        assert!(table.learn(mac(1), B, start), "it moved");
        assert_eq!(table.lookup(mac(1), A, start), To::One(B));
        assert_eq!(table.lookup(mac(1), A, start + AGEING), To::All);
    }

    #[test]
    fn a_pinned_station_neither_moves_nor_ages() {
        let (mut table, start) = (Table::default(), Instant::now());
        assert!(table.learn(mac(1), B, start), "somebody was faster");
        assert!(table.pin(mac(1), A));
        assert!(!table.learn(mac(1), B, start));
        assert!(!table.pin(mac(1), B));
        assert_eq!(table.lookup(mac(1), B, start + 10 * AGEING), To::One(A));
        table.unplug(A);
        assert!(table.pin(mac(1), B));
    }

    #[test]
    fn a_port_that_invents_addresses_fills_its_own_share_only() {
        let (mut table, start) = (Table::default(), Instant::now());
        assert!(table.learn(mac(1), B, start));
        for n in 0..1000u16 {
            let [high, low] = n.to_be_bytes();
            assert!(table.learn(MacAddr([6, 0, 0, 0, high, low]), A, start));
        }
        assert_eq!(table.stations(start).count(), MAX_LEARNED + 1);
        assert_eq!(table.lookup(mac(1), A, start), To::One(B));
        assert!(table.learn(mac(2), A, start + AGEING), "the old ones have made room");
        assert_eq!(table.lookup(mac(2), B, start + AGEING), To::One(A));
    }

    #[test]
    fn a_group_is_no_station() {
        assert!(!Table::default().learn(MacAddr::BROADCAST, A, Instant::now()));
    }

    proptest! {
        #[test]
        fn counts_follow_entries(steps in proptest::collection::vec((0u8..100, 0usize..3, 0u64..400, 0u8..5), 0..300)) {
            let (mut table, mut now) = (Table::default(), Instant::now());
            for (n, port, later, what) in steps {
                now += Duration::from_secs(later / 8);
                match what {
                    0 => table.unplug(Side::Port(port)),
                    1 => { table.pin(mac(n), Side::Port(port)); }
                    _ => { table.learn(mac(n), Side::Port(port), now); }
                }
                for side in [A, B, Side::Port(2)] {
                    let real = table.entries.values().filter(|e| e.side == side && e.seen.is_some()).count();
                    prop_assert_eq!(table.count(side), real);
                    prop_assert!(real <= MAX_LEARNED);
                }
            }
        }
    }
}
