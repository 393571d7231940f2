//! IPv4 fragments (RFC 791 §3.2, RFC 815): those of the guest become packets again, packets for the guest become
//! fragments.
//!
//! **From the guest.** Enters: an IPv4 packet whose header has been checked and which has MF or an offset. Leaves:
//! the whole packet, with the header of its first fragment made valid for the whole (length, no MF, no offset, new
//! header checksum), once every byte is there. A host socket takes whole datagrams only, and the kernel fragments
//! them again where the way demands it.
//!
//! Refused, each with the whole packet that the fragment would have belonged to: a fragment that overlaps another
//! without being its exact copy, or ends behind the packet's end (the spirit of RFC 5722: an overlap is an attack);
//! a fragment of a length that is not a multiple of eight and not the last; a packet beyond 65,535 bytes; more than
//! [`MAX_PIECES`] fragments. What was refused stays refused for the rest of its time: later fragments of it are
//! dropped, so that no second packet grows out of its remains.
//!
//! **Limits**: [`MAX_PACKETS`] packets and [`MAX_BYTES`] bytes at a time; the oldest makes room. A packet that is
//! not whole after [`TIMEOUT`] is dropped (RFC 1122 §3.3.2 says 60 to 120 s, Linux does 30); if its first fragment
//! is there, the guest may be told (ICMP time exceeded, code 1).
//!
//! **Towards the guest**: [`pieces`] computes offsets only; whoever emits the packet copies the bytes.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::{DropReason, checksum};

/// Packets that may be incomplete at a time.
pub(crate) const MAX_PACKETS: usize = 64;
/// Bytes of all incomplete packets.
pub(crate) const MAX_BYTES: usize = 4 << 20;
/// Fragments of one packet: a 64 KiB packet at an MTU of 576 has 119.
pub(crate) const MAX_PIECES: usize = 256;
/// How long a packet may stay incomplete, from its first fragment that arrived.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

const MORE_FRAGMENTS: u16 = 0x2000;
const DONT_FRAGMENT: u16 = 0x4000;
const OFFSET_MASK: u16 = 0x1fff;

/// What came of a fragment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reassembled {
    /// The whole packet, headers included.
    Whole(Vec<u8>),
    /// Others are missing.
    Incomplete,
}

/// A packet that ran out of time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Expired {
    /// The header and the first bytes, if the first fragment had come: enough to quote in an ICMP error.
    pub(crate) first: Option<Vec<u8>>,
}

/// RFC 791: these four name a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    id: u16,
}

#[derive(Debug)]
enum Packet {
    Collecting(Collecting),
    /// Refused; its late fragments are swallowed.
    Poisoned,
}

#[derive(Debug, Default)]
struct Collecting {
    /// Header of the first fragment, 20 to 60 bytes; empty until it comes.
    header: Vec<u8>,
    /// Payload; bytes outside `pieces` are zeros that nobody will see.
    payload: Vec<u8>,
    /// Disjoint [start, end) in ascending order, one per fragment.
    pieces: Vec<(usize, usize)>,
    /// Payload bytes of the whole packet, once the last fragment has come.
    total: Option<usize>,
}

/// Puts fragments together.
#[derive(Debug, Default)]
pub(crate) struct Reassembler {
    packets: HashMap<Key, (Instant, Packet)>,
    /// Payload bytes of all packets.
    bytes: usize,
}

/// A fragment, taken apart.
struct Piece<'a> {
    header: &'a [u8],
    payload: &'a [u8],
    offset: usize,
    more: bool,
}

impl<'a> Piece<'a> {
    fn parse(packet: &'a [u8]) -> Result<(Key, Self), DropReason> {
        let fixed: &[u8; 20] = packet.first_chunk().ok_or(DropReason::Malformed)?;
        let header_len = usize::from(fixed[0] & 0xf) * 4;
        let total = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        if fixed[0] >> 4 != 4 || header_len < 20 || total <= header_len || packet.len() < total {
            return Err(DropReason::Malformed);
        }
        let fragment = u16::from_be_bytes([fixed[6], fixed[7]]);
        let key = Key {
            source: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]),
            destination: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]),
            protocol: fixed[9],
            id: u16::from_be_bytes([fixed[4], fixed[5]]),
        };
        let (header, payload) = packet[..total].split_at(header_len);
        let offset = usize::from(fragment & OFFSET_MASK) * 8;
        Ok((key, Piece { header, payload, offset, more: fragment & MORE_FRAGMENTS != 0 }))
    }

    fn end(&self) -> usize {
        self.offset + self.payload.len()
    }
}

impl Reassembler {
    /// Takes one fragment: an IPv4 packet from its header on; bytes behind its total length are ignored.
    ///
    /// # Errors
    /// `Malformed` when it is no IPv4 packet, `Fragment` when it is refused, with the packet it belonged to.
    pub(crate) fn input(&mut self, packet: &[u8], now: Instant) -> Result<Reassembled, DropReason> {
        let (key, piece) = Piece::parse(packet)?;
        self.make_room(&key, piece.end());
        let (_, state) =
            self.packets.entry(key).or_insert_with(|| (now, Packet::Collecting(Collecting::default())));
        let Packet::Collecting(collecting) = state else { return Err(DropReason::Fragment) };
        let before = collecting.payload.len();
        let outcome = collecting.add(&piece);
        let after = collecting.payload.len();
        match outcome {
            Ok(None) => {
                self.bytes += after - before;
                Ok(Reassembled::Incomplete)
            }
            Ok(Some(whole)) => {
                self.packets.remove(&key);
                self.bytes -= before;
                Ok(Reassembled::Whole(whole))
            }
            Err(reason) => {
                *state = Packet::Poisoned;
                self.bytes -= before;
                Err(reason)
            }
        }
    }

    /// Drops what has been incomplete for too long.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Expired> {
        let mut expired = Vec::new();
        let bytes = &mut self.bytes;
        self.packets.retain(|_, (since, packet)| {
            let keep = now.duration_since(*since) < TIMEOUT;
            if let (false, Packet::Collecting(collecting)) = (keep, packet) {
                *bytes -= collecting.payload.len();
                expired.push(Expired { first: collecting.first_bytes() });
            }
            keep
        });
        expired
    }

    /// When [`Self::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.packets.values().map(|(since, _)| *since + TIMEOUT).min()
    }

    #[cfg(test)]
    /// Packets that are incomplete (or refused) and their payload bytes.
    pub(crate) fn load(&self) -> (usize, usize) {
        (self.packets.len(), self.bytes)
    }

    /// Evicts the oldest packets, never `key`'s own, until that one may grow to `end` payload bytes.
    fn make_room(&mut self, key: &Key, end: usize) {
        let known = self.packets.contains_key(key);
        while self.packets.len() + usize::from(!known) > MAX_PACKETS || self.bytes + end > MAX_BYTES {
            let others = self.packets.iter().filter(|(k, _)| *k != key);
            let Some(oldest) = others.min_by_key(|(_, (since, _))| *since).map(|(k, _)| *k) else { return };
            if let Some((_, Packet::Collecting(gone))) = self.packets.remove(&oldest) {
                self.bytes -= gone.payload.len();
            }
        }
    }
}

impl Collecting {
    /// Adds a fragment; gives the packet when it is the last one that was missing.
    fn add(&mut self, piece: &Piece<'_>) -> Result<Option<Vec<u8>>, DropReason> {
        let (start, end) = (piece.offset, piece.end());
        if end + 20 > usize::from(u16::MAX) || (piece.more && !piece.payload.len().is_multiple_of(8)) {
            return Err(DropReason::Fragment);
        }
        let at = self.pieces.partition_point(|(s, _)| *s < start);
        if self.pieces.get(at) == Some(&(start, end)) {
            return Ok(None); // the network may duplicate
        }
        let overlaps = at.checked_sub(1).is_some_and(|i| self.pieces[i].1 > start)
            || self.pieces.get(at).is_some_and(|(s, _)| *s < end);
        let last = self.pieces.last().map_or(0, |(_, e)| *e);
        let beyond = match self.total {
            Some(total) => end > total || (!piece.more && end != total),
            None => !piece.more && last > end,
        };
        if overlaps || beyond || self.pieces.len() >= MAX_PIECES {
            return Err(DropReason::Fragment);
        }
        if !piece.more {
            self.total = Some(end);
        }
        if start == 0 {
            self.header = piece.header.to_vec();
        }
        self.pieces.insert(at, (start, end));
        if self.payload.len() < end {
            self.payload.resize(end, 0);
        }
        self.payload[start..end].copy_from_slice(piece.payload);
        if self.total == Some(self.received()) { self.finish().map(Some) } else { Ok(None) }
    }

    fn received(&self) -> usize {
        self.pieces.iter().map(|(start, end)| end - start).sum()
    }

    fn finish(&mut self) -> Result<Vec<u8>, DropReason> {
        let mut packet = std::mem::take(&mut self.header);
        let header_len = packet.len();
        packet.append(&mut self.payload);
        let len = u16::try_from(packet.len()).map_err(|_| DropReason::Fragment)?;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        let flags = u16::from_be_bytes([packet[6], packet[7]]) & DONT_FRAGMENT;
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        packet[10..12].fill(0);
        let sum = checksum::checksum(&packet[..header_len]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        Ok(packet)
    }

    /// The header and up to eight payload bytes of the first fragment.
    fn first_bytes(&self) -> Option<Vec<u8>> {
        let (0, end) = *self.pieces.first()? else { return None };
        let mut bytes = self.header.clone();
        bytes.extend_from_slice(&self.payload[..end.min(8)]);
        Some(bytes)
    }
}

/// One fragment to emit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Offset in the packet's payload, a multiple of eight.
    pub(crate) offset: usize,
    /// Payload bytes of this fragment.
    pub(crate) len: usize,
    /// Others follow.
    pub(crate) more: bool,
}

impl Cut {
    /// The flags and offset field of the fragment's header.
    pub(crate) fn field(self) -> u16 {
        // A payload offset is below 65,536, so an eighth of it fits 13 bits.
        let offset = u16::try_from(self.offset / 8).unwrap_or(OFFSET_MASK) & OFFSET_MASK;
        offset | if self.more { MORE_FRAGMENTS } else { 0 }
    }
}

/// How `payload_len` bytes behind an IPv4 header of `header_len` bytes are cut for `mtu` (at least
/// `header_len` + 8). One piece without MF if they fit.
pub(crate) fn pieces(payload_len: usize, header_len: usize, mtu: usize) -> impl Iterator<Item = Cut> {
    let room = mtu.saturating_sub(header_len);
    let step = if payload_len <= room { payload_len } else { (room & !7).max(8) };
    let count = payload_len.div_ceil(step.max(1)).max(1);
    (0..count).map(move |n| {
        let offset = n * step;
        let len = step.min(payload_len - offset);
        Cut { offset, len, more: offset + len < payload_len }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fragment(id: u16, offset: usize, more: bool, payload: &[u8]) -> Vec<u8> {
        let cut = Cut { offset, len: payload.len(), more };
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 192, 168, 122, 2, 10, 0, 0, 1];
        let len = u16::try_from(20 + payload.len()).unwrap();
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[6..8].copy_from_slice(&cut.field().to_be_bytes());
        packet.extend_from_slice(payload);
        packet
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    #[test]
    fn fragments_in_any_order_become_the_packet() {
        let (mut all, now, data) = (Reassembler::default(), Instant::now(), bytes(4000));
        for (from, to) in [(2960, 4000), (0, 1480)] {
            let piece = fragment(7, from, to < 4000, &data[from..to]);
            assert_eq!(all.input(&piece, now), Ok(Reassembled::Incomplete));
        }
        let Ok(Reassembled::Whole(packet)) = all.input(&fragment(7, 1480, true, &data[1480..2960]), now)
        else {
            panic!("it is whole")
        };
        assert_eq!(packet[20..], data);
        assert_eq!(packet[2..8], [0x0f, 0xb4, 0, 7, 0, 0]);
        assert!(checksum::is_valid(&packet[..20]));
        assert_eq!(all.load(), (0, 0));
    }

    #[test]
    fn an_exact_copy_is_harmless_and_an_overlap_poisons_the_packet() {
        let (mut all, now, data) = (Reassembler::default(), Instant::now(), bytes(32));
        for _ in 0..2 {
            assert_eq!(all.input(&fragment(1, 0, true, &data[..16]), now), Ok(Reassembled::Incomplete));
        }
        assert_eq!(all.input(&fragment(1, 8, false, &data[8..]), now), Err(DropReason::Fragment));
        assert_eq!(all.input(&fragment(1, 16, false, &data[16..]), now), Err(DropReason::Fragment));
        assert_eq!(all.load(), (1, 0));
        all.expire(now + TIMEOUT);
        assert_eq!(all.load(), (0, 0));
    }

    #[test]
    fn ends_that_contradict_each_other_are_refused() {
        for second in
            [fragment(1, 0, true, &[0; 64]), fragment(1, 48, false, &[0; 8]), fragment(1, 48, true, &[0; 8])]
        {
            let (mut all, now) = (Reassembler::default(), Instant::now());
            assert_eq!(all.input(&fragment(1, 40, false, &[0; 8]), now), Ok(Reassembled::Incomplete));
            assert_eq!(all.input(&second, now), Err(DropReason::Fragment));
        }
        let (mut all, now) = (Reassembler::default(), Instant::now());
        assert_eq!(all.input(&fragment(1, 80, true, &[0; 8]), now), Ok(Reassembled::Incomplete));
        assert_eq!(all.input(&fragment(1, 40, false, &[0; 8]), now), Err(DropReason::Fragment));
    }

    #[test]
    fn a_packet_beyond_64_kib_and_an_odd_middle_are_refused() {
        let (mut all, now) = (Reassembler::default(), Instant::now());
        assert_eq!(all.input(&fragment(1, 65_528, false, &[0; 100]), now), Err(DropReason::Fragment));
        assert_eq!(all.input(&fragment(2, 0, true, &[0; 9]), now), Err(DropReason::Fragment));
        assert_eq!(all.input(&[0x45; 19], now), Err(DropReason::Malformed));
    }

    #[test]
    fn after_thirty_seconds_the_guest_may_be_told_about_a_first_fragment() {
        let (mut all, now) = (Reassembler::default(), Instant::now());
        let _ = all.input(&fragment(1, 0, true, &bytes(64)), now);
        let _ = all.input(&fragment(2, 64, false, &bytes(64)), now + Duration::from_secs(1));
        assert_eq!(all.deadline(), Some(now + TIMEOUT));
        assert_eq!(all.expire(now + TIMEOUT - Duration::from_millis(1)), []);
        let expired = all.expire(now + TIMEOUT);
        assert_eq!(expired.len(), 1);
        let first = expired[0].first.as_ref().unwrap();
        assert_eq!((first.len(), &first[20..]), (28, &bytes(8)[..]));
        assert_eq!(all.expire(now + TIMEOUT + Duration::from_secs(1)), [Expired { first: None }]);
        assert_eq!(all.deadline(), None);
    }

    #[test]
    fn what_fits_is_one_piece_and_nine_kilobytes_are_seven() {
        assert_eq!(pieces(1480, 20, 1500).collect::<Vec<_>>(), [Cut { offset: 0, len: 1480, more: false }]);
        let cuts: Vec<_> = pieces(9008, 20, 1500).collect();
        assert_eq!(cuts.len(), 7);
        assert_eq!(cuts[6], Cut { offset: 8880, len: 128, more: false });
        assert_eq!(cuts[1].field(), 0x2000 | 185);
        assert_eq!(pieces(0, 20, 1500).count(), 1);
    }

    proptest! {
        #[test]
        fn any_packet_cut_and_shuffled_is_whole_again(
            len in 1usize..65_515, mtu in 68usize..3000, seed in any::<u64>(),
        ) {
            let data = bytes(len);
            let mut cuts: Vec<_> = pieces(len, 20, mtu).collect();
            prop_assert!(cuts.iter().all(|c| c.len + 20 <= mtu));
            prop_assume!(cuts.len() <= MAX_PIECES && cuts.len() > 1);
            let mut state = seed | 1;
            for i in (1..cuts.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                cuts.swap(i, usize::try_from(state >> 33).unwrap() % (i + 1));
            }
            let (mut all, now) = (Reassembler::default(), Instant::now());
            for (n, cut) in cuts.iter().enumerate() {
                let piece = fragment(3, cut.offset, cut.more, &data[cut.offset..cut.offset + cut.len]);
                match all.input(&piece, now).unwrap() {
                    Reassembled::Whole(packet) => {
                        prop_assert_eq!(n, cuts.len() - 1);
                        prop_assert_eq!(&packet[20..], &data[..]);
                    }
                    Reassembled::Incomplete => prop_assert!(n + 1 < cuts.len()),
                }
            }
            prop_assert_eq!(all.load(), (0, 0));
        }

        #[test]
        fn any_fragments_stay_within_the_bounds(
            pieces in proptest::collection::vec(
                (0u16..200, 0usize..8192, any::<bool>(), 1usize..2000), 1..300),
        ) {
            let (mut all, mut now) = (Reassembler::default(), Instant::now());
            for (id, offset, more, len) in pieces {
                let _ = all.input(&fragment(id, offset * 8, more, &vec![0; len]), now);
                now += Duration::from_millis(100);
                let (packets, bytes) = all.load();
                prop_assert!(packets <= MAX_PACKETS && bytes <= MAX_BYTES);
                let held: usize = all.packets.values().map(|(_, p)| match p {
                    Packet::Collecting(c) => c.payload.len(),
                    Packet::Poisoned => 0,
                }).sum();
                prop_assert_eq!(held, bytes);
            }
            all.expire(now + TIMEOUT);
            prop_assert_eq!(all.load(), (0, 0));
        }

        #[test]
        fn any_bytes_are_refused_or_kept(packet in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Reassembler::default().input(&packet, Instant::now());
        }
    }
}
