//! UDP headers (RFC 768): a guest's packet → [`UdpIn`]; an answer of the gateway → frames.
//!
//! Refused: a length that is not that of the packet, a checksum that is there and wrong. A checksum of 0 means that
//! there is none, and is fine.

use std::net::SocketAddrV4;

use crate::checksum::Sum;
use crate::nat::cx::Cx;
use crate::nat::fragment;
use crate::nat::ipv4::{DONT_FRAGMENT, IPV4_LEN, Ipv4In, Ipv4Out, TTL, protocol};
use crate::nat::outbox::Outbox;
use crate::{DropReason, MacAddr};

/// Bytes of a UDP header.
pub(crate) const UDP_LEN: usize = 8;

/// A guest's datagram, checked. Its payload is behind the first [`UDP_LEN`] bytes of the packet's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UdpIn {
    pub(crate) from: SocketAddrV4,
    pub(crate) to: SocketAddrV4,
    /// Bytes of its payload.
    pub(crate) len: usize,
    header: [u8; UDP_LEN],
}

impl UdpIn {
    /// # Errors
    /// Why it is refused.
    pub(crate) fn parse(packet: &Ipv4In<'_>) -> Result<Self, DropReason> {
        let header: [u8; UDP_LEN] = *packet.payload_head().first_chunk().ok_or(DropReason::Malformed)?;
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let len = word(4);
        if usize::from(len) != packet.payload.len() || usize::from(len) < UDP_LEN {
            return Err(DropReason::Malformed);
        }
        let pseudo = Sum::pseudo_v4(packet.src, packet.dst, protocol::UDP, len);
        if word(6) != 0 && !packet.payload.verify(pseudo) {
            return Err(DropReason::BadChecksum);
        }
        Ok(Self {
            from: SocketAddrV4::new(packet.src, word(0)),
            to: SocketAddrV4::new(packet.dst, word(2)),
            len: usize::from(len) - UDP_LEN,
            header,
        })
    }

    /// The port that a packet is for, before anything is checked.
    pub(crate) fn port(packet: &Ipv4In<'_>) -> Option<u16> {
        packet.payload_head().get(2..4).map(|port| u16::from_be_bytes([port[0], port[1]]))
    }

    /// IPv4 header without options and UDP header, as an ICMP error quotes them.
    pub(crate) fn quote(&self, packet: &Ipv4In<'_>) -> [u8; IPV4_LEN + UDP_LEN] {
        let mut quote = [0; IPV4_LEN + UDP_LEN];
        let fixed = packet.head.first_chunk::<IPV4_LEN>().copied().unwrap_or_default();
        quote[..IPV4_LEN].copy_from_slice(&fixed);
        quote[IPV4_LEN..].copy_from_slice(&self.header);
        quote
    }
}

/// The UDP header of a datagram from `from` to `to` with `len` bytes of payload, its checksum field 0.
pub(crate) fn header(from: SocketAddrV4, to: SocketAddrV4, len: usize) -> [u8; UDP_LEN] {
    let mut header = [0; UDP_LEN];
    header[..2].copy_from_slice(&from.port().to_be_bytes());
    header[2..4].copy_from_slice(&to.port().to_be_bytes());
    // A payload is at most 65,507 bytes long.
    let len = u16::try_from(len + UDP_LEN).unwrap_or(u16::MAX);
    header[4..6].copy_from_slice(&len.to_be_bytes());
    header
}

/// The sum of the pseudo-header of a datagram with `len` bytes of payload.
pub(crate) fn pseudo(from: SocketAddrV4, to: SocketAddrV4, len: usize) -> Sum {
    Sum::pseudo_v4(*from.ip(), *to.ip(), protocol::UDP, u16::try_from(len + UDP_LEN).unwrap_or(u16::MAX))
}

/// Header and payload of a whole datagram, with its checksum.
pub(crate) fn datagram(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(from, to, payload.len()).to_vec();
    bytes.extend_from_slice(payload);
    let mut sum = pseudo(from, to, payload.len());
    sum.add(&bytes);
    bytes[6..8].copy_from_slice(&sum.finish_udp().to_be_bytes());
    bytes
}

/// Queues a datagram of one of the gateway's services for the guest at `mac`.
pub(crate) fn post(
    cx: &mut Cx<'_>,
    mac: MacAddr,
    from: SocketAddrV4,
    to: SocketAddrV4,
    payload: &[u8],
    id: u16,
) {
    let out = Ipv4Out {
        src: *from.ip(),
        dst: *to.ip(),
        protocol: protocol::UDP,
        ttl: TTL,
        tos: 0,
        id,
        fragment: 0,
    };
    let bytes = datagram(from, to, payload);
    if let Err(reason) = cut(cx.outbox, &out, (mac, cx.config.gateway_mac), &bytes, cx.config.mtu) {
        cx.drop(reason, || format!("an answer of {} bytes to {to}", payload.len()));
    }
}

/// Queues an IPv4 packet with `payload` for a guest, cut into fragments if it has more than `mtu` bytes. `out.id` names
/// the packet then; a whole one has DF and no name (RFC 6864 §4.1).
///
/// # Errors
/// `QueueFull` when a fragment finds no room; those before it are queued.
pub(crate) fn cut(
    queue: &mut Outbox,
    out: &Ipv4Out,
    (to, from): (MacAddr, MacAddr),
    payload: &[u8],
    mtu: u16,
) -> Result<(), DropReason> {
    for piece in fragment::pieces(payload.len(), IPV4_LEN, mtu.into()) {
        let whole = piece.offset == 0 && !piece.more;
        let (id, fragment) = if whole { (0, DONT_FRAGMENT) } else { (out.id, piece.field()) };
        let out = Ipv4Out { id, fragment, ..*out };
        queue.push(out.frame(to, from, &payload[piece.offset..piece.offset + piece.len]))?;
    }
    Ok(())
}
