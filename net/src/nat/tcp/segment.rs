//! TCP segments on the wire (RFC 9293 §3.1): parsed once from copied bytes, built in one place.
//!
//! Refused: shorter than its header, a data offset below five words or behind the end, a wrong checksum, and the
//! flag combinations that no state can answer (SYN with FIN or RST, none at all). Options: [`super::options`]. We send
//! MSS, window scale, SACK-permitted and timestamps on a SYN, timestamps on all others where they are agreed. We never
//! send SACK blocks, because nothing out of order is kept (RFC 2018 §3 leaves it to the receiver).

use std::net::SocketAddrV4;

use super::options::{OPTIONS_MAX, Offer, Options, Stamp, write};
use crate::checksum::Sum;
use crate::nat::ipv4::{FRAME_HEAD, Ipv4In, protocol};
use crate::{DropReason, ETHERNET_LEN};

/// Bytes of a TCP header without options.
pub(super) const TCP_LEN: usize = 20;
/// Bytes of all headers of a frame without options.
pub(super) const HEADERS: usize = FRAME_HEAD + TCP_LEN;
/// Most bytes of our headers.
pub(super) const TCP_MAX: usize = TCP_LEN + OPTIONS_MAX;

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
    pub(super) options: Options,
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
        Ok(Self {
            guest: SocketAddrV4::new(packet.src, word(0)),
            world: SocketAddrV4::new(packet.dst, word(2)),
            seq: long(4),
            ack: long(8),
            flags,
            window: word(14),
            header_len,
            data_len: u32::try_from(total - header_len).unwrap_or(0),
            options: Options::read(&head[TCP_LEN..header_len]),
        })
    }

    /// Sequence numbers that it takes: data, SYN and FIN.
    pub(super) fn seq_len(&self) -> u32 {
        let control = self.flags.intersection(Flags::SYN | Flags::FIN).bits().count_ones();
        self.data_len + control
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
    /// On a SYN: what is offered.
    pub(super) offer: Option<Offer>,
    pub(super) stamp: Option<Stamp>,
}

impl Header {
    /// Writes the header into `into`, its checksum zero, and says how long it is.
    pub(super) fn write(&self, into: &mut [u8; TCP_MAX]) -> usize {
        into[0..2].copy_from_slice(&self.world.port().to_be_bytes());
        into[2..4].copy_from_slice(&self.guest.port().to_be_bytes());
        into[4..8].copy_from_slice(&self.seq.to_be_bytes());
        into[8..12].copy_from_slice(&self.ack.to_be_bytes());
        into[13] = self.flags.bits();
        into[14..16].copy_from_slice(&self.window.to_be_bytes());
        into[16..20].fill(0);
        let mut options = [0; OPTIONS_MAX];
        let len = TCP_LEN + write(self.offer, self.stamp, &mut options);
        into[TCP_LEN..].copy_from_slice(&options);
        into[12] = u8::try_from(len / 4).unwrap_or(5) << 4;
        len
    }

    /// The sum of the pseudo-header for a segment of `len` bytes.
    pub(super) fn pseudo(&self, len: usize) -> Sum {
        let len = u16::try_from(len).unwrap_or(u16::MAX);
        Sum::pseudo_v4(*self.world.ip(), *self.guest.ip(), protocol::TCP, len)
    }

    /// A whole segment without data, its checksum complete.
    pub(super) fn control(&self) -> ([u8; TCP_MAX], usize) {
        let mut bytes = [0; TCP_MAX];
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

    #[test]
    fn order_wraps() {
        assert!(before(u32::MAX, 0) && !before(0, u32::MAX) && !before(7, 7));
    }
}
