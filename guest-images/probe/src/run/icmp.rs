//! `ping`, `traceroute` and `arp`.
//!
//! Echo payloads go through smoltcp's ICMP socket (which fragments and reassembles); TTLs, reply times and
//! errors come from the observer, which sees the frames.

use super::{Outcome, micros, since, target};
use crate::nic::Nic;
use crate::observe::{EchoReply, IcmpError};
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{icmp, udp};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, Icmpv4Packet, Icmpv4Repr, Ipv4Address,
};

const ICMP: u8 = 1;
const UDP: u8 = 17;
/// The first port of a UDP traceroute, as everywhere.
const TRACE_PORT: u16 = 33434;

/// What became of one echo request.
enum Echo {
    Reply { rtt: u64, ttl: u8, intact: bool },
    Error(IcmpError),
    Nothing,
}

/// Why an ICMP error makes an order fail.
pub(super) fn reason(error: &IcmpError) -> Reason {
    match (error.kind, error.code) {
        (3, 3) => Reason::Refused,
        (3, 4) => Reason::TooBig,
        (11, _) => Reason::TimeExceeded,
        _ => Reason::Unreachable,
    }
}

/// Reports an ICMP error.
pub(super) fn describe(error: &IcmpError, report: &mut Report) {
    report.text("icmp_from", error.from);
    report.number("icmp_type", u64::from(error.kind));
    report.number("icmp_code", u64::from(error.code));
    if reason(error) == Reason::TooBig {
        report.number("icmp_mtu", u64::from(error.mtu));
    }
}

fn open<N: Nic>(stack: &mut Stack<N>, size: usize, ident: u16) -> SocketHandle {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; (size + 64) * 2]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(ident)).expect("a fresh socket can be bound once");
    stack.sockets.add(socket)
}

/// Sends one echo request and waits for what comes of it.
fn echo<N: Nic>(
    stack: &mut Stack<N>,
    handle: SocketHandle,
    to: Ipv4Address,
    (ident, seq): (u16, u16),
    (size, ttl, timeout): (usize, u8, u32),
) -> Echo {
    let payload: Vec<u8> = (0..size).map(|at| stack.pattern.at(at as u64, 1)[0]).collect();
    let socket = stack.sockets.get_mut::<icmp::Socket>(handle);
    socket.set_hop_limit(Some(ttl.max(1)));
    let request = Icmpv4Repr::EchoRequest { ident, seq_no: seq, data: &payload };
    let Ok(space) = socket.send(request.buffer_len(), to.into()) else { return Echo::Nothing };
    request.emit(&mut Icmpv4Packet::new_unchecked(space), &ChecksumCapabilities::default());
    let start = stack.now();
    let deadline = stack.after(timeout);
    let found = stack.until(deadline, |stack| {
        let observer = stack.nic.observer();
        if let Some(error) = observer.error(ICMP, to, |e| e.more == (ident, seq)) {
            return Progress::Done(Echo::Error(error));
        }
        let seen = observer.replies.iter().find(|r| (r.ident, r.seq) == (ident, seq)).copied();
        match (received(stack, handle, &payload, seq), seen) {
            (Some(intact), Some(EchoReply { ttl, at, .. })) => {
                let rtt = at.saturating_sub(start.total_micros().cast_unsigned());
                Progress::Done(Echo::Reply { rtt, ttl, intact })
            }
            _ => Progress::Wait(None),
        }
    });
    found.unwrap_or(Echo::Nothing)
}

/// Whether a reply with this number is there, and then whether its payload is the request's.
fn received<N: Nic>(stack: &mut Stack<N>, handle: SocketHandle, payload: &[u8], seq: u16) -> Option<bool> {
    let socket = stack.sockets.get_mut::<icmp::Socket>(handle);
    while socket.can_recv() {
        let Ok((bytes, _)) = socket.recv() else { return None };
        let packet = Icmpv4Packet::new_checked(bytes).ok()?;
        if let Ok(Icmpv4Repr::EchoReply { seq_no, data, .. }) =
            Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default())
            && seq_no == seq
        {
            return Some(data == payload);
        }
    }
    None
}

/// `ping=HOST,count=N,size=N,interval=MS,ttl=N`.
pub(super) fn ping<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::host(stack, &order.target, report)?;
    if stack.address().is_none() {
        return Err(Reason::NoAddress);
    }
    let count = order.number("count", 1).clamp(1, 65535) as u16;
    let size = order.number("size", 56).min(65000) as usize;
    let ttl = order.number("ttl", 64).min(255) as u8;
    let (interval, timeout) = (order.number("interval", 0), order.number("timeout", 1000));
    let ident = stack.rng.bits() as u16;
    let handle = open(stack, size, ident);
    let (mut times, mut last_ttl, mut intact, mut error) = (Vec::new(), 0, true, None);
    for seq in 0..count {
        match echo(stack, handle, to, (ident, seq), (size, ttl, timeout)) {
            Echo::Reply { rtt, ttl, intact: same } => {
                times.push(rtt);
                last_ttl = ttl;
                intact &= same;
            }
            Echo::Error(e) => error = Some(e),
            Echo::Nothing => {}
        }
        if seq + 1 < count {
            stack.idle(interval);
        }
    }
    stack.sockets.remove(handle);
    report.number("sent", u64::from(count));
    report.number("received", times.len() as u64);
    if !times.is_empty() {
        report.number("ttl", u64::from(last_ttl));
        report.number("rtt_min_us", times.iter().copied().min().unwrap_or(0));
        report.number("rtt_avg_us", times.iter().sum::<u64>() / times.len() as u64);
        report.number("rtt_max_us", times.iter().copied().max().unwrap_or(0));
    }
    match error {
        Some(error) => {
            describe(&error, report);
            Err(reason(&error))
        }
        None if times.is_empty() => Err(Reason::Timeout),
        None if times.len() < usize::from(count) => Err(Reason::Loss),
        None if !intact => Err(Reason::Mismatch),
        None => Ok(()),
    }
}

/// `traceroute=HOST,max=N,method=icmp|udp,tries=N`.
pub(super) fn traceroute<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::host(stack, &order.target, report)?;
    if stack.address().is_none() {
        return Err(Reason::NoAddress);
    }
    let by_udp = match order.text("method") {
        None | Some("icmp") => false,
        Some("udp") => true,
        Some(_) => return Err(Reason::BadTarget),
    };
    let timeout = order.number("timeout", 1000);
    let mut hops = Vec::new();
    let mut outcome = Err(Reason::Timeout);
    for ttl in 1..=order.number("max", 16).min(64) as u8 {
        let mut hop = None;
        for _ in 0..order.number("tries", 2).max(1) {
            hop = if by_udp { udp_hop(stack, to, ttl, timeout) } else { icmp_hop(stack, to, ttl, timeout) };
            if hop.is_some() {
                break;
            }
        }
        let (text, end) = hop.unwrap_or((String::from("*"), None));
        hops.push(text);
        if let Some(end) = end {
            outcome = end;
            break;
        }
    }
    report.number("count", hops.len() as u64);
    report.list("hops", hops);
    outcome
}

type Hop = Option<(String, Option<Outcome>)>;

fn icmp_hop<N: Nic>(stack: &mut Stack<N>, to: Ipv4Address, ttl: u8, timeout: u32) -> Hop {
    let ident = stack.rng.bits() as u16;
    let handle = open(stack, 32, ident);
    let start = stack.now();
    let found = echo(stack, handle, to, (ident, u16::from(ttl)), (32, ttl, timeout));
    let took = since(stack, start);
    stack.sockets.remove(handle);
    match found {
        Echo::Reply { rtt, .. } => Some((format!("{to} {rtt}us"), Some(Ok(())))),
        Echo::Error(error) => {
            let end = if error.kind == 11 { None } else { Some(Err(reason(&error))) };
            Some((format!("{} {took}us", error.from), end))
        }
        Echo::Nothing => None,
    }
}

fn udp_hop<N: Nic>(stack: &mut Stack<N>, to: Ipv4Address, ttl: u8, timeout: u32) -> Hop {
    let (from_port, to_port) = (stack.port(), TRACE_PORT + u16::from(ttl));
    let handle = super::udp::open(stack, from_port, 64)?;
    let start = stack.now();
    let socket = stack.sockets.get_mut::<udp::Socket>(handle);
    socket.set_hop_limit(Some(ttl));
    let sent = socket.send_slice(b"where are you", (to, to_port));
    let deadline = stack.after(timeout);
    let error = sent.ok().and_then(|()| {
        stack.until(deadline, |stack| {
            match stack.nic.observer().error(UDP, to, |e| e.ports == (from_port, to_port)) {
                Some(error) => Progress::Done(error),
                None => Progress::Wait(None),
            }
        })
    });
    stack.sockets.remove(handle);
    let error = error?;
    let took = micros(smoltcp::time::Instant::from_micros(error.at.cast_signed()) - start);
    let end = match reason(&error) {
        Reason::TimeExceeded => None,
        Reason::Refused => Some(Ok(())),
        other => Some(Err(other)),
    };
    Some((format!("{} {took}us", error.from), end))
}

/// `arp=ADDRESS`: asks the link who has it, without smoltcp's cache.
pub(super) fn arp<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let wanted = target::host(stack, &order.target, report)?;
    let mac = EthernetAddress(stack.nic.facts().mac);
    let request = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: mac,
        source_protocol_addr: stack.address().unwrap_or(Ipv4Address::UNSPECIFIED),
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: wanted,
    };
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..14].copy_from_slice(&[8, 6]);
    request.emit(&mut ArpPacket::new_unchecked(&mut frame[14..42]));
    let deadline = stack.after(order.number("timeout", 1000));
    stack.nic.send_raw([0; crate::virtio::offload::HEADER], &frame);
    let found = stack.until(deadline, |stack| {
        match stack.nic.observer().neighbours.iter().find(|seen| seen.0 == wanted) {
            Some(seen) => Progress::Done(seen.1),
            None => Progress::Wait(None),
        }
    });
    report.mac("mac", found.ok_or(Reason::Timeout)?);
    Ok(())
}
