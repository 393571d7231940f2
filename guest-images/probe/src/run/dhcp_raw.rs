//! `dhcp-raw`: one DHCP message with chosen fields, and the server's answer to it: for what a well-behaved
//! client never asks (another's address, INFORM, DECLINE) and for clients that aren't this card.

use super::{Outcome, dhcp};
use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use crate::virtio::offload::HEADER;
use alloc::vec;
use alloc::vec::Vec;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType as Kind, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame,
    EthernetProtocol, EthernetRepr, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};

const ETHERNET: usize = 14;
const IP: usize = 20;
const UDP: usize = 8;
const PARAMETERS: &[u8] = &[1, 3, 6, 12, 15, 26, 28, 51, 54, 58, 59, 119, 121];

/// Who sends a datagram, and to whom.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub(super) mac: EthernetAddress,
    pub(super) to_mac: EthernetAddress,
    pub(super) from: (Ipv4Address, u16),
    pub(super) to: (Ipv4Address, u16),
}

/// A complete Ethernet frame with a UDP datagram.
pub(super) fn datagram(route: Route, payload: &[u8]) -> Vec<u8> {
    let udp = UdpRepr { src_port: route.from.1, dst_port: route.to.1 };
    let ip = Ipv4Repr {
        src_addr: route.from.0,
        dst_addr: route.to.0,
        next_header: IpProtocol::Udp,
        payload_len: UDP + payload.len(),
        hop_limit: 64,
    };
    let ethernet =
        EthernetRepr { src_addr: route.mac, dst_addr: route.to_mac, ethertype: EthernetProtocol::Ipv4 };
    let caps = ChecksumCapabilities::default();
    let mut frame = vec![0; ETHERNET + IP + UDP + payload.len()];
    ethernet.emit(&mut EthernetFrame::new_unchecked(&mut frame));
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[ETHERNET..]), &caps);
    let (from, to) = (route.from.0.into(), route.to.0.into());
    let fill = |space: &mut [u8]| space.copy_from_slice(payload);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut frame[ETHERNET + IP..]),
        &from,
        &to,
        payload.len(),
        fill,
        &caps,
    );
    frame
}

/// What a client's message says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) kind: Kind,
    pub(super) xid: u32,
    pub(super) mac: EthernetAddress,
    pub(super) client: Ipv4Address,
    pub(super) requested: Option<Ipv4Address>,
    pub(super) server: Option<Ipv4Address>,
    pub(super) options: &'a [DhcpOption<'a>],
}

/// The UDP payload of a client's message.
pub(super) fn message(what: Message<'_>) -> Vec<u8> {
    let repr = DhcpRepr {
        message_type: what.kind,
        transaction_id: what.xid,
        secs: 0,
        client_hardware_address: what.mac,
        client_ip: what.client,
        your_ip: Ipv4Address::UNSPECIFIED,
        server_ip: Ipv4Address::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: false,
        requested_ip: what.requested,
        client_identifier: Some(what.mac),
        server_identifier: what.server,
        parameter_request_list: Some(PARAMETERS),
        dns_servers: None,
        max_size: Some(1432),
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: what.options,
    };
    let mut payload = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut payload[..]))
        .expect("the buffer has the length that it asked for");
    payload
}

/// A client's message as a broadcast frame.
pub(super) fn broadcast(what: Message<'_>) -> Vec<u8> {
    let route = Route {
        mac: what.mac,
        to_mac: EthernetAddress::BROADCAST,
        from: (what.client, 68),
        to: (Ipv4Address::BROADCAST, 67),
    };
    datagram(route, &message(what))
}

fn kind(name: &str) -> Option<Kind> {
    Some(match name {
        "discover" => Kind::Discover,
        "request" => Kind::Request,
        "decline" => Kind::Decline,
        "release" => Kind::Release,
        "inform" => Kind::Inform,
        _ => return None,
    })
}

fn reply_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Offer => "offer",
        Kind::Ack => "ack",
        Kind::Nak => "nak",
        _ => "other",
    }
}

/// `dhcp-raw=discover|request|inform|decline|release,address=A,server=A,client=A,mac=M,hostname=TEXT`.
pub(super) fn exchange<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let kind = kind(&order.target).ok_or(Reason::BadTarget)?;
    let address = |key: &str| {
        order.text(key).map(|text| text.parse::<Ipv4Address>().map_err(|_| Reason::BadTarget)).transpose()
    };
    let mac = match order.text("mac") {
        Some(text) => text.parse().map_err(|()| Reason::BadTarget)?,
        None => EthernetAddress(stack.nic.facts().mac),
    };
    let hostname: Vec<DhcpOption<'_>> = order
        .text("hostname")
        .map(|name| DhcpOption { kind: 12, data: name.as_bytes() })
        .into_iter()
        .collect();
    let xid = stack.rng.bits() as u32;
    let frame = broadcast(Message {
        kind,
        xid,
        mac,
        client: address("client")?.unwrap_or(Ipv4Address::UNSPECIFIED),
        requested: address("address")?,
        server: address("server")?,
        options: &hostname,
    });
    stack.nic.send_raw([0; HEADER], &frame);
    stack.nic.flush();
    if matches!(kind, Kind::Decline | Kind::Release) {
        return Ok(());
    }
    let deadline = stack.after(order.number("timeout", 3000));
    let reply = stack.until(deadline, |stack| {
        let mine = |bytes: &&Vec<u8>| {
            DhcpPacket::new_checked(&bytes[..]).is_ok_and(|packet| packet.transaction_id() == xid)
        };
        match stack.nic.observer().dhcp.iter().find(mine) {
            Some(bytes) => Progress::Done(bytes.clone()),
            None => Progress::Wait(None),
        }
    });
    describe(&reply.ok_or(Reason::Timeout)?, report)
}

fn describe(bytes: &[u8], report: &mut Report) -> Outcome {
    let packet = DhcpPacket::new_checked(bytes).map_err(|_| Reason::BadReply)?;
    let kind =
        packet.options().find(|option| option.kind == 53).and_then(|option| option.data.first().copied());
    let kind = Kind::from(kind.ok_or(Reason::BadReply)?);
    report.text("reply", reply_name(kind));
    report.text("yours", packet.your_ip());
    if let Some(server) = packet.options().find(|option| option.kind == 54)
        && let Ok(octets) = <[u8; 4]>::try_from(server.data)
    {
        report.text("server", Ipv4Address::from(octets));
    }
    dhcp::options(&packet, report);
    match kind {
        Kind::Offer | Kind::Ack => Ok(()),
        Kind::Nak => Err(Reason::Nak),
        _ => Err(Reason::BadReply),
    }
}
