//! IPv4 between the guests and us: validated once on its way in, built in one place on its way out (RFC 791).
//!
//! Enters: a frame whose first bytes have been copied out of guest memory. Leaves: an [`Ipv4In`], whose header
//! fields are values and whose payload is still the guest's memory. Refused: a wrong version or length
//! (`Malformed`), a wrong header checksum. Ethernet padding behind the packet's total length is cut off.
//! Options are skipped, never acted on (RFC 7126 §4.3: source routes are not for an edge).

use std::net::Ipv4Addr;

use vm_memory::VolatileSlice;

use crate::checksum::{self, Sum};
use crate::{DropReason, ETHERNET_LEN, GsoType, MacAddr, TxFrame, VnetFlags, VnetHdr};

/// Bytes of an IPv4 header without options.
pub(crate) const IPV4_LEN: usize = 20;
/// Bytes of Ethernet and IPv4 header as we build them.
pub(crate) const FRAME_HEAD: usize = ETHERNET_LEN + IPV4_LEN;
/// Bytes that are copied out of a frame to be parsed: Ethernet, the longest IPv4 and the longest TCP header fit.
pub(crate) const HEAD_MAX: usize = 160;
/// Hops that a packet of ours may make.
pub(crate) const TTL: u8 = 64;

/// IP protocol numbers.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
}

/// What is known of a transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Integrity {
    /// It must be verified.
    Unverified,
    /// The bytes come from the sender's memory or were verified on the way: the checksum field says nothing.
    Trusted,
}

/// A validated IPv4 packet from a guest: not a fragment, or a reassembled one.
pub(crate) struct Ipv4In<'a> {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    /// The Ethernet address that it came from.
    pub(crate) mac: MacAddr,
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    /// The sender forbids fragmentation.
    pub(crate) dont_fragment: bool,
    /// The packet's first bytes: its IPv4 header, options included, and the beginning of its payload.
    pub(crate) head: &'a [u8],
    /// Bytes of the IPv4 header.
    pub(crate) header_len: usize,
    /// The `virtio_net_hdr`: how the payload is to be cut, if it is.
    pub(crate) vnet: VnetHdr,
    pub(crate) payload: Payload<'a>,
}

impl Ipv4In<'_> {
    /// The payload's first bytes, copied once: what headers are parsed from. All of a payload shorter than
    /// [`HEAD_MAX`] less 74 bytes.
    pub(crate) fn payload_head(&self) -> &[u8] {
        self.head.get(self.header_len..).unwrap_or(&[])
    }

    /// What an ICMP error quotes: the IPv4 header and at least 8 bytes behind it, as far as there are any.
    pub(crate) fn quote(&self) -> &[u8] {
        self.head
    }
}

/// The payload of an IPv4 packet, in the guest's memory.
#[derive(Clone, Copy)]
pub(crate) struct Payload<'a> {
    frame: TxFrame<'a>,
    offset: usize,
    len: usize,
    integrity: Integrity,
}

impl<'a> Payload<'a> {
    /// The bytes of `frame` from `offset` on; `len` of them are there.
    pub(crate) fn new(frame: TxFrame<'a>, offset: usize, len: usize, integrity: Integrity) -> Self {
        Self { frame, offset, len, integrity }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `len` bytes from `skip` on, in pieces.
    pub(crate) fn parts(&self, skip: usize, len: usize) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        let mut left = len.min(self.len.saturating_sub(skip));
        self.frame.parts_from(self.offset + skip).map_while(move |part| {
            let take = part.len().min(left);
            left -= take;
            // `take <= part.len()`, so the piece is within the slice.
            part.subslice(0, take).ok().filter(|piece| !piece.is_empty())
        })
    }

    /// Whether the checksum over pseudo-header and payload holds, if it has to be looked at.
    pub(crate) fn verify(&self, pseudo: Sum) -> bool {
        let mut sum = pseudo;
        match self.integrity {
            Integrity::Trusted => true,
            Integrity::Unverified => {
                sum.add_parts(self.parts(0, self.len));
                sum.finish() == 0
            }
        }
    }

    /// Copies all of it.
    pub(crate) fn to_vec(self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.frame.copy_out(self.offset, &mut bytes);
        bytes
    }
}

/// How a packet relates to fragmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragment {
    Whole,
    Piece,
}

/// Validates the IPv4 packet in `frame`, whose first bytes are `head`, an Ethernet header in front.
///
/// # Errors
/// Why it is refused.
pub(crate) fn parse<'a>(
    frame: &TxFrame<'a>,
    head: &'a [u8],
    frame_len: usize,
) -> Result<(Ipv4In<'a>, Fragment), DropReason> {
    let packet = head.get(ETHERNET_LEN..).ok_or(DropReason::Malformed)?;
    let fixed: &[u8; IPV4_LEN] = packet.first_chunk().ok_or(DropReason::Malformed)?;
    let word = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
    let header_len = usize::from(fixed[0] & 0xf) * 4;
    let total = usize::from(word(2));
    if fixed[0] >> 4 != 4 || header_len < IPV4_LEN || total < header_len || ETHERNET_LEN + total > frame_len {
        return Err(DropReason::Malformed);
    }
    let header = packet.get(..header_len).ok_or(DropReason::Malformed)?;
    if !checksum::is_valid(header) {
        return Err(DropReason::BadChecksum);
    }
    let address = |at: usize| Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]);
    let trusted = frame.hdr.flags.intersects(VnetFlags::NEEDS_CSUM | VnetFlags::DATA_VALID);
    let integrity = if trusted { Integrity::Trusted } else { Integrity::Unverified };
    let fragment = if word(6) & 0x3fff == 0 { Fragment::Whole } else { Fragment::Piece };
    let parsed = Ipv4In {
        src: address(12),
        dst: address(16),
        mac: MacAddr([head[6], head[7], head[8], head[9], head[10], head[11]]),
        protocol: fixed[9],
        ttl: fixed[8],
        tos: fixed[1],
        dont_fragment: word(6) & 0x4000 != 0,
        head: &packet[..packet.len().min(total)],
        header_len,
        vnet: frame.hdr,
        payload: Payload::new(*frame, ETHERNET_LEN + header_len, total - header_len, integrity),
    };
    Ok((parsed, fragment))
}

/// What differs between the IPv4 headers that we send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ipv4Out {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    /// Identification; 0 for packets that are never cut (RFC 6864 §4.1).
    pub(crate) id: u16,
    /// Flags and fragment offset as they stand in the header; [`DONT_FRAGMENT`] for a whole packet.
    pub(crate) fragment: u16,
}

/// The DF bit of [`Ipv4Out::fragment`].
pub(crate) const DONT_FRAGMENT: u16 = 0x4000;

impl Ipv4Out {
    /// The Ethernet and IPv4 headers of a packet with `payload_len` bytes (at most 65,515) behind them.
    pub(crate) fn head(&self, to: MacAddr, from: MacAddr, payload_len: usize) -> [u8; FRAME_HEAD] {
        let mut head = [0; FRAME_HEAD];
        head[..6].copy_from_slice(&to.octets());
        head[6..12].copy_from_slice(&from.octets());
        head[12..14].copy_from_slice(&[0x08, 0x00]);
        let total = u16::try_from(IPV4_LEN + payload_len).unwrap_or(u16::MAX);
        let ip = &mut head[ETHERNET_LEN..];
        ip[0] = 0x45;
        ip[1] = self.tos;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        ip[4..6].copy_from_slice(&self.id.to_be_bytes());
        ip[6..8].copy_from_slice(&self.fragment.to_be_bytes());
        ip[8] = self.ttl;
        ip[9] = self.protocol;
        ip[12..16].copy_from_slice(&self.src.octets());
        ip[16..20].copy_from_slice(&self.dst.octets());
        let sum = checksum::checksum(ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        head
    }

    /// A whole small frame: headers and payload.
    pub(crate) fn frame(&self, to: MacAddr, from: MacAddr, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(FRAME_HEAD + payload.len());
        frame.extend_from_slice(&self.head(to, from, payload.len()));
        frame.extend_from_slice(payload);
        frame
    }
}

/// Whether a frame's segmentation fits its protocol; a frame of another kind makes no sense.
pub(crate) fn gso_fits(gso: GsoType, protocol: u8) -> bool {
    match gso {
        GsoType::None => true,
        GsoType::Tcp4 => protocol == protocol::TCP,
        GsoType::Udp | GsoType::UdpL4 => protocol == protocol::UDP,
        GsoType::Tcp6 => false,
    }
}
