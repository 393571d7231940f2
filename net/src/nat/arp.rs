//! ARP on the NAT's side of the wire (RFC 826, RFC 5227): the gateway's address is answered for, nothing else is.
//!
//! Enters: the payload of an Ethernet frame of type 0x0806, and the frame's source address. Leaves: at most one
//! ARP frame, and what has been learned about who is where.
//!
//! - A request or a probe (RFC 5227 §1.1: sender 0.0.0.0) for the gateway is answered to the sender.
//! - A request for any other address is not ours to answer: other guests answer for themselves on the switch, and
//!   there is no proxy ARP, so a guest sees "no route to host" for a neighbour that is not there.
//! - Whoever claims the gateway's address is contradicted with an announcement, at most once in
//!   [`DEFEND_INTERVAL`] (RFC 5227 §2.4 b).
//! - A sender is learned from whatever it says to the gateway; an announcement moves an address that no lease holds
//!   ([`Neighbours::announce`] decides). A probe teaches nothing: its sender has no address yet.
//!
//! Refused: other hardware or protocol types, a sender that is not the frame's own source, group addresses as
//! senders, addresses outside the subnet, an address that belongs to another machine's lease.
//!
//! Limits: the gateway asks for a guest that it does not know (a published port leads there) once a second and for
//! [`MAX_ASKED`] guests at a time.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::config::Subnet;
use super::neighbours::Neighbours;
use crate::{DropReason, MacAddr};

/// Most addresses that are being asked for.
pub(crate) const MAX_ASKED: usize = 64;
/// Time between two defences of the gateway's address (RFC 5227 §1.1, `DEFEND_INTERVAL`).
pub(crate) const DEFEND_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two requests for the same address (RFC 1122 §2.3.2.1: at most one per second).
pub(crate) const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// Bytes of an ARP packet for IPv4 over Ethernet.
const ARP_LEN: usize = 28;
/// Bytes of an Ethernet frame with an ARP packet.
pub(crate) const ARP_FRAME_LEN: usize = 14 + ARP_LEN;

const REQUEST: u16 = 1;
const REPLY: u16 = 2;

/// An ARP frame, with its Ethernet header.
pub(crate) type ArpFrame = [u8; ARP_FRAME_LEN];

/// The gateway's ARP.
#[derive(Debug)]
pub(crate) struct Arp {
    subnet: Subnet,
    mac: MacAddr,
    asked: BTreeMap<Ipv4Addr, Instant>,
    defended: Option<Instant>,
}

/// An ARP packet for IPv4 over Ethernet, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packet {
    operation: u16,
    sender_mac: MacAddr,
    sender: Ipv4Addr,
    target_mac: MacAddr,
    target: Ipv4Addr,
}

impl Packet {
    fn parse(bytes: &[u8]) -> Result<Self, DropReason> {
        let bytes: &[u8; ARP_LEN] = bytes.first_chunk().ok_or(DropReason::Malformed)?;
        let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let mac = |at: usize| {
            MacAddr([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3], bytes[at + 4], bytes[at + 5]])
        };
        let ip = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
        if word(0) != 1 || word(2) != 0x0800 || bytes[4] != 6 || bytes[5] != 4 {
            return Err(DropReason::UnknownProtocol);
        }
        Ok(Self {
            operation: word(6),
            sender_mac: mac(8),
            sender: ip(14),
            target_mac: mac(18),
            target: ip(24),
        })
    }

    fn to_frame(self, destination: MacAddr) -> ArpFrame {
        let mut frame = [0; ARP_FRAME_LEN];
        frame[0..6].copy_from_slice(&destination.octets());
        frame[6..12].copy_from_slice(&self.sender_mac.octets());
        frame[12..20].copy_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0, 6, 4]);
        frame[20..22].copy_from_slice(&self.operation.to_be_bytes());
        frame[22..28].copy_from_slice(&self.sender_mac.octets());
        frame[28..32].copy_from_slice(&self.sender.octets());
        frame[32..38].copy_from_slice(&self.target_mac.octets());
        frame[38..42].copy_from_slice(&self.target.octets());
        frame
    }
}

impl Arp {
    /// ARP for the gateway of `subnet`, whose Ethernet address is `mac`.
    pub(crate) fn new(subnet: Subnet, mac: MacAddr) -> Self {
        Self { subnet, mac, asked: BTreeMap::new(), defended: None }
    }

    /// Takes the payload of an ARP frame that came from `source` and gives the frame that answers it, if any.
    ///
    /// # Errors
    /// The reason why the packet is of no use.
    pub(crate) fn input(
        &mut self,
        neighbours: &mut Neighbours,
        payload: &[u8],
        source: MacAddr,
        now: Instant,
    ) -> Result<Option<ArpFrame>, DropReason> {
        let packet = Packet::parse(payload)?;
        if !matches!(packet.operation, REQUEST | REPLY) {
            return Err(DropReason::UnknownProtocol);
        }
        if packet.sender_mac != source || source.is_group() {
            return Err(DropReason::BadSource);
        }
        let gateway = self.gateway();
        if packet.sender == gateway {
            return self.defend(now).map(Some).ok_or(DropReason::BadSource);
        }
        if !packet.sender.is_unspecified() {
            self.learn(neighbours, &packet, now)?;
        }
        let answer = Packet {
            operation: REPLY,
            sender_mac: self.mac,
            sender: gateway,
            target_mac: packet.sender_mac,
            target: packet.sender,
        };
        let asked = packet.operation == REQUEST && packet.target == gateway;
        Ok(asked.then(|| answer.to_frame(source)))
    }

    /// The request for a guest that nobody knows yet; none if it was asked for just now.
    pub(crate) fn ask(&mut self, address: Ipv4Addr, now: Instant) -> Option<ArpFrame> {
        self.asked.retain(|_, at| now.duration_since(*at) < REQUEST_INTERVAL);
        if self.asked.len() >= MAX_ASKED || self.asked.contains_key(&address) || !self.subnet.is_host(address)
        {
            return None;
        }
        self.asked.insert(address, now);
        let request = Packet {
            operation: REQUEST,
            sender_mac: self.mac,
            sender: self.gateway(),
            target_mac: MacAddr([0; 6]),
            target: address,
        };
        Some(request.to_frame(MacAddr::BROADCAST))
    }

    fn gateway(&self) -> Ipv4Addr {
        self.subnet.host(1)
    }

    fn learn(&self, neighbours: &mut Neighbours, packet: &Packet, now: Instant) -> Result<(), DropReason> {
        if !self.subnet.is_host(packet.sender) {
            return Err(DropReason::BadSource);
        }
        let known = if packet.sender == packet.target {
            neighbours.announce(packet.sender, packet.sender_mac, now)
        } else if packet.target == self.gateway() {
            neighbours.check(packet.sender, packet.sender_mac, now)
        } else {
            true // a talk between guests; not ours to judge
        };
        if known { Ok(()) } else { Err(DropReason::BadSource) }
    }

    /// The announcement that contradicts whoever claims the gateway's address, unless one was made just now.
    fn defend(&mut self, now: Instant) -> Option<ArpFrame> {
        if self.defended.is_some_and(|at| now.duration_since(at) < DEFEND_INTERVAL) {
            return None;
        }
        self.defended = Some(now);
        let gateway = self.gateway();
        tracing::warn!(%gateway, "a guest claims the gateway's address; its connections will suffer until it stops");
        let announcement = Packet {
            operation: REQUEST,
            sender_mac: self.mac,
            sender: gateway,
            target_mac: MacAddr([0; 6]),
            target: gateway,
        };
        Some(announcement.to_frame(MacAddr::BROADCAST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);
    const OURS: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
    const GUEST: MacAddr = MacAddr([0x52, 0x54, 0, 7, 7, 7]);

    fn guest(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 122, n)
    }

    struct Wire {
        arp: Arp,
        table: Neighbours,
        now: Instant,
    }

    impl Wire {
        fn new() -> Self {
            let subnet = "192.168.122.0/24".parse().unwrap();
            Self { arp: Arp::new(subnet, OURS), table: Neighbours::new(16), now: Instant::now() }
        }

        fn send(
            &mut self,
            operation: u16,
            sender: Ipv4Addr,
            target: Ipv4Addr,
        ) -> Result<Option<ArpFrame>, DropReason> {
            self.send_from(GUEST, operation, sender, target)
        }

        fn send_from(
            &mut self,
            source: MacAddr,
            operation: u16,
            sender: Ipv4Addr,
            target: Ipv4Addr,
        ) -> Result<Option<ArpFrame>, DropReason> {
            let packet = Packet { operation, sender_mac: GUEST, sender, target_mac: MacAddr([0; 6]), target };
            let frame = packet.to_frame(MacAddr::BROADCAST);
            self.arp.input(&mut self.table, &frame[14..], source, self.now)
        }
    }

    #[test]
    fn the_gateway_is_answered_for_and_nobody_else() {
        let mut wire = Wire::new();
        let answer = wire.send(REQUEST, guest(2), GATEWAY).unwrap().unwrap();
        assert_eq!(answer[0..6], GUEST.octets());
        assert_eq!(answer[6..12], OURS.octets());
        assert_eq!(answer[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        assert_eq!(answer[22..28], OURS.octets());
        assert_eq!(answer[28..32], GATEWAY.octets());
        assert_eq!(answer[38..42], guest(2).octets());
        assert_eq!(wire.table.mac_of(guest(2)), Some(GUEST));
        assert_eq!(wire.send(REQUEST, guest(2), guest(3)), Ok(None));
        assert_eq!(wire.send(REQUEST, guest(2), [8, 8, 8, 8].into()), Ok(None));
    }

    #[test]
    fn a_probe_is_answered_and_teaches_nothing() {
        let mut wire = Wire::new();
        assert!(wire.send(REQUEST, Ipv4Addr::UNSPECIFIED, GATEWAY).unwrap().is_some());
        assert_eq!(wire.send(REQUEST, Ipv4Addr::UNSPECIFIED, guest(9)), Ok(None));
        assert_eq!(wire.table.iter().count(), 0);
    }

    #[test]
    fn an_announcement_moves_a_learned_address_but_not_a_leased_one() {
        let mut wire = Wire::new();
        assert!(wire.table.check(guest(5), OURS, wire.now));
        assert_eq!(wire.send(REQUEST, guest(5), guest(5)), Ok(None));
        assert_eq!(wire.table.mac_of(guest(5)), Some(GUEST));
        wire.table.lease(guest(6), OURS, wire.now, wire.now + Duration::from_secs(60));
        assert_eq!(wire.send(REQUEST, guest(6), guest(6)), Err(DropReason::BadSource));
        assert_eq!(wire.send(REQUEST, guest(6), GATEWAY), Err(DropReason::BadSource));
    }

    #[test]
    fn whoever_claims_the_gateway_is_contradicted_once_in_ten_seconds() {
        let mut wire = Wire::new();
        let defence = wire.send(REQUEST, GATEWAY, GATEWAY).unwrap().unwrap();
        assert_eq!(defence[0..6], MacAddr::BROADCAST.octets());
        assert_eq!(defence[28..32], defence[38..42]);
        wire.now += Duration::from_secs(9);
        assert_eq!(wire.send(REPLY, GATEWAY, guest(3)), Err(DropReason::BadSource));
        wire.now += Duration::from_secs(1);
        assert!(wire.send(REQUEST, GATEWAY, GATEWAY).is_ok());
        assert_eq!(wire.table.mac_of(GATEWAY), None);
    }

    #[test]
    fn an_unknown_guest_is_asked_for_once_a_second_until_it_answers() {
        let mut wire = Wire::new();
        let request = wire.arp.ask(guest(4), wire.now).unwrap();
        assert_eq!(request[20..22], [0, 1]);
        assert_eq!(request[38..42], guest(4).octets());
        assert_eq!(wire.arp.ask(guest(4), wire.now), None);
        wire.now += REQUEST_INTERVAL;
        assert!(wire.arp.ask(guest(4), wire.now).is_some());
        assert_eq!(wire.send(REPLY, guest(4), GATEWAY), Ok(None));
        assert_eq!(wire.table.mac_of(guest(4)), Some(GUEST));
        for n in 10..250 {
            wire.arp.ask(guest(n), wire.now);
        }
        assert_eq!(wire.arp.asked.len(), MAX_ASKED);
    }

    #[test]
    fn a_forged_sender_is_refused() {
        let mut wire = Wire::new();
        assert_eq!(wire.send_from(OURS, REQUEST, guest(2), GATEWAY), Err(DropReason::BadSource));
        assert_eq!(wire.send(REQUEST, [10, 0, 0, 1].into(), GATEWAY), Err(DropReason::BadSource));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_answered(payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut wire = Wire::new();
            let source = payload.get(8..14).and_then(|m| m.try_into().ok()).map_or(GUEST, MacAddr);
            let answer = wire.arp.input(&mut wire.table, &payload, source, wire.now);
            prop_assert!(payload.len() >= ARP_LEN || answer == Err(DropReason::Malformed));
            prop_assert!(wire.table.iter().count() <= 1);
        }
    }
}
