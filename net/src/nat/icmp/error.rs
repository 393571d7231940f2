//! ICMP errors that the gateway sends to a guest (RFC 792, RFC 1812 §4.3.2).
//!
//! An error quotes the packet that it is about: as much of it as fits into 576 bytes (RFC 1812 §4.3.2.3).

use std::net::Ipv4Addr;

use crate::checksum;
use crate::nat::cx::Cx;
use crate::nat::ipv4::{IPV4_LEN, Ipv4Out, TTL, protocol};

/// Most bytes of the quoted packet.
const QUOTE_MAX: usize = 576 - IPV4_LEN - 8;

/// What the gateway has to say about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IcmpError {
    NetUnreachable,
    HostUnreachable,
    PortUnreachable,
    /// With the MTU of the next hop (RFC 1191 §4).
    FragmentationNeeded(u16),
    Prohibited,
    TtlExceeded,
}

impl IcmpError {
    fn type_code_rest(self) -> (u8, u8, u32) {
        match self {
            Self::NetUnreachable => (3, 0, 0),
            Self::HostUnreachable => (3, 1, 0),
            Self::PortUnreachable => (3, 3, 0),
            Self::FragmentationNeeded(mtu) => (3, 4, u32::from(mtu)),
            Self::Prohibited => (3, 13, 0),
            Self::TtlExceeded => (11, 0, 0),
        }
    }
}

/// Tells the guest at `to` what became of the packet that begins with `quote` (its IPv4 header first).
pub(crate) fn post(cx: &mut Cx<'_>, to: Ipv4Addr, error: IcmpError, quote: &[u8]) {
    let Some(mac) = cx.neighbours.mac_of(to) else { return };
    let (kind, code, rest) = error.type_code_rest();
    let quote = &quote[..quote.len().min(QUOTE_MAX)];
    let mut message = vec![kind, code, 0, 0];
    message.extend_from_slice(&rest.to_be_bytes());
    message.extend_from_slice(quote);
    let sum = checksum::checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let out = Ipv4Out {
        src: cx.config.gateway(),
        dst: to,
        protocol: protocol::ICMP,
        ttl: TTL,
        tos: 0xc0,
        id: 0,
        fragment: 0,
    };
    let frame = out.frame(mac, cx.config.gateway_mac, &message);
    cx.post(frame);
}
