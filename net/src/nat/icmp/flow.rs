//! Ping flows, without sockets: one per guest and echo identifier.
//!
//! A flow's socket has an identifier of its own on the host's side; [`set_identifier`] puts the right one into an echo
//! message and mends its checksum (RFC 1624). Only those who were asked may answer. A flow lives for [`IDLE`] after its
//! last message (RFC 5508 REQ-2: at least 60 seconds).

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::checksum;
use crate::nat::host::SockId;
use crate::nat::ipv4::IPV4_LEN;
use crate::nat::udp::socket::PingKind;

/// Bytes of an echo message's header.
pub(crate) const ECHO_LEN: usize = 8;
/// ICMP types.
pub(crate) const ECHO_REPLY: u8 = 0;
pub(crate) const ECHO: u8 = 8;
/// How long a flow lives after its last message.
pub(crate) const IDLE: Duration = Duration::from_secs(60);
/// Destinations of one flow that may still answer; `ping` has one, `fping` asks many with one identifier.
pub(crate) const MAX_PEERS: usize = 256;

/// A guest's identifier, and the socket that stands for it.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) guest: Ipv4Addr,
    /// The identifier that the guest chose.
    pub(crate) id: u16,
    pub(crate) sock: SockId,
    pub(crate) kind: PingKind,
    /// The identifier on the host's side, which we choose for a raw socket only.
    pub(crate) host_id: u16,
    pub(crate) dont_fragment: bool,
    pub(crate) queued: bool,
    pub(crate) used: Instant,
    /// Whom it asked, the latest last, each with the IPv4 header of the last request.
    peers: Vec<(Ipv4Addr, [u8; IPV4_LEN])>,
}

impl Flow {
    pub(crate) fn new(
        guest: (Ipv4Addr, u16),
        sock: SockId,
        kind: PingKind,
        host_id: u16,
        now: Instant,
    ) -> Self {
        let (guest, id) = guest;
        Self {
            guest,
            id,
            sock,
            kind,
            host_id,
            dont_fragment: false,
            queued: false,
            used: now,
            peers: Vec::new(),
        }
    }

    /// The guest asks `peer` in a packet with this header.
    pub(crate) fn sent(&mut self, peer: Ipv4Addr, header: [u8; IPV4_LEN], now: Instant) {
        self.used = now;
        self.peers.retain(|(known, _)| *known != peer);
        if self.peers.len() >= MAX_PEERS {
            self.peers.remove(0);
        }
        self.peers.push((peer, header));
    }

    /// Whether `peer` was asked.
    pub(crate) fn expects(&self, peer: Ipv4Addr) -> bool {
        self.peers.iter().any(|(known, _)| *known == peer)
    }

    /// The guest's packet to `peer` as far as an error quotes it: `echo` is the message as it came back.
    pub(crate) fn quote(&self, peer: Ipv4Addr, echo: &[u8]) -> Option<Vec<u8>> {
        let (_, header) = self.peers.iter().find(|(known, _)| *known == peer)?;
        let mut echo: [u8; ECHO_LEN] = *echo.first_chunk()?;
        let ours = self.kind == PingKind::Datagram || identifier(&echo) == self.host_id;
        if echo[0] != ECHO || !ours {
            return None;
        }
        set_identifier(&mut echo, self.id);
        Some([&header[..], &echo].concat())
    }
}

/// The identifier of an echo message.
pub(crate) fn identifier(echo: &[u8; ECHO_LEN]) -> u16 {
    u16::from_be_bytes([echo[4], echo[5]])
}

/// Puts another identifier into an echo message whose checksum is right, and keeps it right.
pub(crate) fn set_identifier(echo: &mut [u8; ECHO_LEN], id: u16) {
    let sum = u16::from_be_bytes([echo[2], echo[3]]);
    let sum = checksum::update16(sum, identifier(echo), id);
    echo[2..4].copy_from_slice(&sum.to_be_bytes());
    echo[4..6].copy_from_slice(&id.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flow(kind: PingKind) -> Flow {
        Flow::new(([192, 168, 122, 2].into(), 77), SockId(3), kind, 4711, Instant::now())
    }

    fn echo(id: u16) -> [u8; ECHO_LEN] {
        let mut echo = [ECHO, 0, 0, 0, 0, 0, 0, 1];
        echo[4..6].copy_from_slice(&id.to_be_bytes());
        let sum = checksum::checksum(&echo);
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
        echo
    }

    #[test]
    fn an_error_quotes_the_identifier_of_the_guest() {
        let mut flow = flow(PingKind::Raw);
        let peer = Ipv4Addr::new(10, 0, 0, 1);
        assert!(!flow.expects(peer));
        flow.sent(peer, [0x45; IPV4_LEN], Instant::now());
        assert!(flow.expects(peer));
        let quote = flow.quote(peer, &echo(4711)).unwrap();
        assert_eq!(quote[..IPV4_LEN], [0x45; IPV4_LEN]);
        assert_eq!(quote[IPV4_LEN..], echo(77));
        assert_eq!(flow.quote(peer, &echo(4712)), None, "of another process");
        assert_eq!(flow.quote(Ipv4Addr::new(10, 0, 0, 2), &echo(4711)), None);
        assert_eq!(flow.quote(peer, &echo(4711)[..7]), None);
    }

    #[test]
    fn the_peers_of_a_flow_are_bounded() {
        let mut flow = flow(PingKind::Datagram);
        for n in 0..1000 {
            flow.sent(Ipv4Addr::from_bits(n), [0; IPV4_LEN], Instant::now());
        }
        assert_eq!(flow.peers.len(), MAX_PEERS);
        assert!(flow.expects(Ipv4Addr::from_bits(999)) && !flow.expects(Ipv4Addr::from_bits(0)));
    }

    proptest! {
        #[test]
        fn any_identifier_leaves_a_valid_checksum(old in any::<u16>(), new in any::<u16>()) {
            let mut message = echo(old);
            set_identifier(&mut message, new);
            prop_assert_eq!(identifier(&message), new);
            prop_assert!(checksum::is_valid(&message));
        }
    }
}
