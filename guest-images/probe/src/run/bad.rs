//! `bad`: misbehaviour on purpose, reproducible by its seed. The order itself succeeds when it was carried
//! out and the card works afterwards; what the host made of it is for the orders behind it to show.

use super::Outcome;
use super::dhcp_raw::{Message, Route, broadcast, datagram, message};
use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::rng::Rng;
use crate::stack::{Reason, Stack};
use crate::virtio::abuse::Abuse;
use crate::virtio::offload::{self, HEADER};
use alloc::vec;
use alloc::vec::Vec;
use smoltcp::wire::{DhcpMessageType, EthernetAddress, Ipv4Address};

const ETHERNET: usize = 14;
/// Frames between two turns of the stack, which also lets the host take a breath.
const BURST: u64 = 32;
/// How often a full ring is tried again.
const PATIENCE: usize = 100;
/// The sender's hardware and protocol address in an ARP frame.
const ARP_SENDER: core::ops::Range<usize> = 22..32;
/// The longest frame that is made up.
const LONGEST: usize = 65549;

/// `bad=KIND,count=N,seed=N`.
pub(super) fn bad<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let seed = u64::from(order.number("seed", 1));
    let count = |default| u64::from(order.number("count", default));
    let rng = &mut Rng::new(seed);
    match order.target.as_str() {
        "dhcp-flood" => burst(stack, count(1000), report, |_| discover(rng)),
        "dhcp-garbage" => burst(stack, count(1000), report, |_| garbage(rng)),
        "frames" => {
            let base = templates(stack);
            frames(stack, count(1000), &base, rng, report)
        }
        "rings" => abuse(stack, Abuse::Rings { seed, count: count(100) }, report),
        "registers" => abuse(stack, Abuse::Registers { seed, count: count(1000) }, report),
        "reset" => abuse(stack, Abuse::Reset { count: count(10) }, report),
        _ => Err(Reason::BadTarget),
    }
}

fn abuse<N: Nic>(stack: &mut Stack<N>, abuse: Abuse, report: &mut Report) -> Outcome {
    match stack.nic.abuse(abuse).ok_or(Reason::Unsupported)? {
        Ok(damage) => {
            report.number("rounds", damage.rounds);
            report.number("needs_reset", damage.needs_reset);
            Ok(())
        }
        Err(refused) => {
            report.text("detail", refused);
            Err(Reason::Device)
        }
    }
}

fn burst<N: Nic>(
    stack: &mut Stack<N>,
    count: u64,
    report: &mut Report,
    mut make: impl FnMut(u64) -> Vec<u8>,
) -> Outcome {
    let mut sent = 0;
    for number in 0..count {
        let frame = make(number);
        sent += u64::from(send(stack, [0; HEADER], &frame));
        if number % BURST == BURST - 1 {
            stack.poll();
            stack.nic.flush();
        }
    }
    stack.idle(10);
    report.number("sent", sent);
    Ok(())
}

/// Sends a frame; a full ring gets some turns of the stack, since a host that is busy answering takes nothing.
fn send<N: Nic>(stack: &mut Stack<N>, header: [u8; HEADER], frame: &[u8]) -> bool {
    (0..PATIENCE).any(|_| {
        let sent = stack.nic.send_raw(header, frame);
        if !sent {
            stack.poll();
        }
        sent
    })
}

fn random_mac(rng: &mut Rng) -> EthernetAddress {
    let mut mac = [0; 6];
    rng.fill(&mut mac);
    mac[0] = mac[0] & 0xfc | 0x02;
    EthernetAddress(mac)
}

fn random_discover(rng: &mut Rng) -> Message<'static> {
    Message {
        kind: DhcpMessageType::Discover,
        xid: rng.bits() as u32,
        mac: random_mac(rng),
        client: Ipv4Address::UNSPECIFIED,
        requested: None,
        server: None,
        options: &[],
    }
}

/// A DISCOVER of a client that nobody has seen before.
fn discover(rng: &mut Rng) -> Vec<u8> {
    broadcast(random_discover(rng))
}

/// A DHCP message with some of it wrong, in an otherwise correct datagram.
fn garbage(rng: &mut Rng) -> Vec<u8> {
    let what = Message { kind: DhcpMessageType::from(rng.below(20) as u8), ..random_discover(rng) };
    let mut payload = message(what);
    match rng.below(5) {
        0 => payload.truncate(rng.below(payload.len() as u64) as usize),
        // Options that run past the end, or have no end.
        1 => {
            payload.truncate(240);
            payload.extend_from_slice(&[rng.bits() as u8, 255, 1, 2]);
        }
        2 => {
            payload.truncate(240);
            payload.resize(240 + rng.below(1200) as usize, rng.pick(&[0, 53, 82, 255]));
        }
        3 => rng.fill(&mut payload[236..]),
        _ => flip(rng, &mut payload),
    }
    let route = Route {
        mac: what.mac,
        to_mac: EthernetAddress::BROADCAST,
        from: (Ipv4Address::from(rng.bits() as u32), 68),
        to: (Ipv4Address::BROADCAST, 67),
    };
    datagram(route, &payload)
}

fn flip(rng: &mut Rng, bytes: &mut [u8]) {
    if bytes.is_empty() {
        return;
    }
    for _ in 0..1 + rng.below(8) {
        let at = rng.below(bytes.len() as u64) as usize;
        bytes[at] = rng.pick(&[0, 1, 0x7f, 0x80, 0xff, rng.clone().bits() as u8]);
    }
}

/// Frames as a correct guest sends them, to be spoilt: ARP, DHCP, DNS, TCP, ICMP, a fragment.
fn templates<N: Nic>(stack: &mut Stack<N>) -> Vec<Vec<u8>> {
    let mac = EthernetAddress(stack.nic.facts().mac);
    let gateway = stack.gateway.unwrap_or(Ipv4Address::new(192, 168, 122, 1));
    let own = stack.address().unwrap_or(Ipv4Address::new(192, 168, 122, 99));
    let route =
        |port| Route { mac, to_mac: EthernetAddress::BROADCAST, from: (own, 40000), to: (gateway, port) };
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\x04test\0\0\x01\0\x01";
    let udp = datagram(route(53), query);
    let mut arp = vec![0; 60];
    arp[..6].fill(0xff);
    arp[6..12].copy_from_slice(&mac.0);
    arp[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp[22..28].copy_from_slice(&mac.0);
    arp[28..32].copy_from_slice(&own.octets());
    arp[38..42].copy_from_slice(&gateway.octets());
    let other = |protocol: u8, payload: &[u8]| {
        let mut frame = datagram(route(0), &payload[8..]);
        frame[ETHERNET + 9] = protocol;
        frame[ETHERNET + 20..].copy_from_slice(payload);
        fix_sums(&mut frame);
        frame
    };
    let mut syn = [0u8; 40];
    syn[..4].copy_from_slice(&[0x9c, 0x40, 0, 80]);
    syn[12..16].copy_from_slice(&[0xa0, 0x02, 0xff, 0xff]);
    syn[20..24].copy_from_slice(&[2, 4, 5, 0xb4]);
    let mut fragment = udp.clone();
    fragment[ETHERNET + 6] = 0x20;
    fix_sums(&mut fragment);
    let echo = [8, 0, 0, 0, 1, 2, 0, 1, b'p', b'i', b'n', b'g'];
    let unreachable = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &udp[ETHERNET..ETHERNET + 28]].concat();
    let discover = broadcast(random_discover(&mut Rng::new(1)));
    vec![arp, udp, other(6, &syn), other(1, &echo), other(1, &unreachable), fragment, discover]
}

/// Makes the IPv4 header and the TCP, UDP or ICMP checksum right, so that the fault behind them is reached.
fn fix_sums(frame: &mut [u8]) {
    let Some(ip) = frame.get_mut(ETHERNET..).filter(|ip| ip.len() >= 20) else { return };
    ip[10..12].fill(0);
    let sum = !offload::sum(&ip[..20], 0);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    if ip[9] == 1 && ip.len() >= 24 {
        ip[22..24].fill(0);
        let sum = !offload::sum(&ip[20..], 0);
        ip[22..24].copy_from_slice(&sum.to_be_bytes());
    }
    if let Some(at) = offload::segment(frame) {
        let _ = offload::fill(frame, None);
        let sum = !offload::sum(&frame[at.start..at.end], 0);
        frame[at.checksum..at.checksum + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

fn frames<N: Nic>(
    stack: &mut Stack<N>,
    count: u64,
    base: &[Vec<u8>],
    rng: &mut Rng,
    report: &mut Report,
) -> Outcome {
    let mut sent = 0;
    for number in 0..count {
        let frame = spoil(base, rng);
        let mut header = [0; HEADER];
        match rng.below(4) {
            0 => rng.fill(&mut header),
            // Plausible flags over an implausible rest.
            1 => {
                rng.fill(&mut header[2..]);
                header[0] = rng.below(4) as u8;
                header[1] = rng.pick(&[0, 1, 3, 4, 5, 0x81]);
            }
            _ => {}
        }
        sent += u64::from(send(stack, header, &frame));
        if number % BURST == BURST - 1 {
            stack.poll();
            stack.nic.flush();
        }
    }
    stack.idle(10);
    report.number("sent", sent);
    Ok(())
}

/// One malformed frame. What still is ARP keeps its sender: telling the network that our address is at
/// another card would only cut us off, as it should.
fn spoil(base: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut frame = spoil_any(base, rng);
    if frame.get(12..14) == Some(&[8, 6])
        && let Some(sender) = frame.get_mut(ARP_SENDER)
    {
        sender.copy_from_slice(&base[0][ARP_SENDER]);
    }
    frame
}

fn spoil_any(base: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut frame = base[rng.below(base.len() as u64) as usize].clone();
    match rng.below(8) {
        0 => {
            frame.resize(rng.below(1600) as usize, 0);
            rng.fill(&mut frame);
        }
        1 => frame.truncate(rng.below(15) as usize),
        2 => frame.truncate(rng.below(frame.len() as u64) as usize),
        3 => frame.resize(frame.len() + rng.below((LONGEST - frame.len()) as u64) as usize, 0xa5),
        4 => flip(rng, &mut frame),
        5 => flip(rng, &mut frame[ETHERNET..]),
        6 => {
            flip(rng, &mut frame[ETHERNET..]);
            fix_sums(&mut frame);
        }
        _ => {
            let end = frame.len().min(60);
            flip(rng, &mut frame[ETHERNET + 20..end]);
            fix_sums(&mut frame);
        }
    }
    frame
}
