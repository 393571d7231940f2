//! TCP segments on the wire (RFC 9293 §3.1): parsed once from copied bytes, built in one place.
//!
//! Refused: shorter than its header, a data offset below five words or behind the end, a wrong checksum, and the
//! flag combinations that no state can answer (SYN with FIN or RST, none at all). Of the options only MSS (RFC 9293
//! §3.7.1) and window scale (RFC 7323 §2) are read, and only on a SYN; others are skipped by their length. A SYN
//! that offers timestamps or SACK gets neither: the wire towards a guest is memory, so that loss is rare and the
//! round trip short, and without SACK a guest falls back to counting duplicate ACKs, which we can send.

use std::net::SocketAddrV4;

use crate::checksum::Sum;
use crate::nat::ipv4::{FRAME_HEAD, Ipv4In, protocol};
use crate::{DropReason, ETHERNET_LEN};

/// Bytes of a TCP header without options.
pub(super) const TCP_LEN: usize = 20;
/// Bytes of all headers of a frame without options.
pub(super) const HEADERS: usize = FRAME_HEAD + TCP_LEN;
/// Bytes of the options of our SYN: MSS, no-operation, window scale.
const SYN_OPTIONS: usize = 8;
/// Largest shift of a window (RFC 7323 §2.3).
pub(super) const MAX_SHIFT: u8 = 14;

bitflags::bitflags! {
    /// Control bits (RFC 9293 §3.1). ECE and CWR are ignored: we never agree to ECN.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Flags: u8 {
        const FIN = 1;
        const SYN = 2;
        const RST = 4;
        const PSH = 8;
        const ACK = 16;
        /// Urgent data is delivered in line (RFC 6093 §6 advises against anything else).
        const URG = 32;
    }
}

/// A segment from a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) guest: SocketAddrV4,
    pub(super) world: SocketAddrV4,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: Flags,
    /// As it stands in the header, unscaled.
    pub(super) window: u16,
    /// Bytes of the TCP header: where the data begin in the packet's payload.
    pub(super) header_len: usize,
    pub(super) data_len: u32,
    /// On a SYN: the largest segment that the guest takes.
    pub(super) mss: Option<u16>,
    /// On a SYN: the guest's window scale.
    pub(super) shift: Option<u8>,
}

impl Segment {
    /// Validates the segment in `packet`.
    pub(super) fn parse(packet: &Ipv4In<'_>) -> Result<Self, DropReason> {
        let head = packet.payload_head();
        let fixed: &[u8; TCP_LEN] = head.first_chunk().ok_or(DropReason::Malformed)?;
        let word = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
        let long = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let header_len = usize::from(fixed[12] >> 4) * 4;
        let total = packet.payload.len();
        if header_len < TCP_LEN || header_len > total || header_len > head.len() {
            return Err(DropReason::Malformed);
        }
        let pseudo =
            Sum::pseudo_v4(packet.src, packet.dst, protocol::TCP, u16::try_from(total).unwrap_or(u16::MAX));
        if !packet.payload.verify(pseudo) {
            return Err(DropReason::BadChecksum);
        }
        let flags = Flags::from_bits_truncate(fixed[13]);
        let opens = flags.contains(Flags::SYN);
        if flags.is_empty() || opens && flags.intersects(Flags::FIN | Flags::RST) {
            return Err(DropReason::Malformed);
        }
        let (mss, shift) = if opens { options(&head[TCP_LEN..header_len]) } else { (None, None) };
        Ok(Self {
            guest: SocketAddrV4::new(packet.src, word(0)),
            world: SocketAddrV4::new(packet.dst, word(2)),
            seq: long(4),
            ack: long(8),
            flags,
            window: word(14),
            header_len,
            data_len: u32::try_from(total - header_len).unwrap_or(0),
            mss,
            shift,
        })
    }

    /// Sequence numbers that it takes: data, SYN and FIN.
    pub(super) fn seq_len(&self) -> u32 {
        let control = self.flags.intersection(Flags::SYN | Flags::FIN).bits().count_ones();
        self.data_len + control
    }
}

fn options(bytes: &[u8]) -> (Option<u16>, Option<u8>) {
    let (mut mss, mut shift) = (None, None);
    let mut rest = bytes;
    loop {
        match *rest {
            // No-operation has no length.
            [1, ..] => rest = &rest[1..],
            [2, 4, high, low, ..] => {
                mss = Some(u16::from_be_bytes([high, low]));
                rest = &rest[4..];
            }
            [3, 3, value, ..] => {
                shift = Some(value.min(MAX_SHIFT));
                rest = &rest[3..];
            }
            // The end, a length that can't be, or one behind the end: what was read until here counts.
            [0, ..] | [] | [_] | [_, 0 | 1, ..] => return (mss, shift),
            [_, len, ..] => match rest.get(usize::from(len)..) {
                Some(behind) => rest = behind,
                None => return (mss, shift),
            },
        }
    }
}

/// A segment to a guest, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) guest: SocketAddrV4,
    pub(super) world: SocketAddrV4,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: Flags,
    /// As it goes into the header, already scaled.
    pub(super) window: u16,
    /// On a SYN: MSS, and window scale if it is agreed.
    pub(super) syn: Option<(u16, Option<u8>)>,
}

impl Header {
    /// Writes the header into `into`, its checksum zero, and says how long it is.
    pub(super) fn write(&self, into: &mut [u8; TCP_LEN + SYN_OPTIONS]) -> usize {
        let mut len = TCP_LEN;
        into[0..2].copy_from_slice(&self.world.port().to_be_bytes());
        into[2..4].copy_from_slice(&self.guest.port().to_be_bytes());
        into[4..8].copy_from_slice(&self.seq.to_be_bytes());
        into[8..12].copy_from_slice(&self.ack.to_be_bytes());
        into[13] = self.flags.bits();
        into[14..16].copy_from_slice(&self.window.to_be_bytes());
        into[16..20].fill(0);
        if let Some((mss, shift)) = self.syn {
            into[20..22].copy_from_slice(&[2, 4]);
            into[22..24].copy_from_slice(&mss.to_be_bytes());
            len += 4;
            if let Some(shift) = shift {
                into[24..28].copy_from_slice(&[1, 3, 3, shift]);
                len += 4;
            }
        }
        into[12] = u8::try_from(len / 4).unwrap_or(5) << 4;
        len
    }

    /// The sum of the pseudo-header for a segment of `len` bytes.
    pub(super) fn pseudo(&self, len: usize) -> Sum {
        let len = u16::try_from(len).unwrap_or(u16::MAX);
        Sum::pseudo_v4(*self.world.ip(), *self.guest.ip(), protocol::TCP, len)
    }

    /// A whole segment without data, its checksum complete.
    pub(super) fn control(&self) -> ([u8; TCP_LEN + SYN_OPTIONS], usize) {
        let mut bytes = [0; TCP_LEN + SYN_OPTIONS];
        let len = self.write(&mut bytes);
        let mut sum = self.pseudo(len);
        sum.add(&bytes[..len]);
        bytes[16..18].copy_from_slice(&sum.finish().to_be_bytes());
        (bytes, len)
    }
}

/// Offset of the TCP header in our frames, and of the checksum in it: what `NEEDS_CSUM` needs.
pub(super) const CSUM_START: u16 = FRAME_HEAD as u16;
pub(super) const CSUM_OFFSET: u16 = 16;
const _: () = assert!(FRAME_HEAD == ETHERNET_LEN + 20);

/// Whether sequence number `a` is before `b` (RFC 9293 §3.4).
pub(super) fn before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) > u32::MAX / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn options_are_read_past_unknown_ones_and_stop_at_nonsense() {
        assert_eq!(
            options(&[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3, 7]),
            (Some(1460), Some(7))
        );
        assert_eq!(options(&[3, 3, 200]), (None, Some(14)));
        assert_eq!(options(&[8, 0, 2, 4, 5, 0xb4]), (None, None));
        assert_eq!(options(&[0, 2, 4, 5, 0xb4]), (None, None));
        assert_eq!(options(&[2, 4, 5]), (None, None));
    }

    #[test]
    fn order_wraps() {
        assert!(before(u32::MAX, 0) && !before(0, u32::MAX) && !before(7, 7));
    }

    proptest! {
        #[test]
        fn any_options_end(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let (_, shift) = options(&bytes);
            prop_assert!(shift.is_none_or(|shift| shift <= MAX_SHIFT));
        }
    }
}
