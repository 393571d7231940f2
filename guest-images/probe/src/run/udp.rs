//! `udp-echo` and `udp-send`.

use super::{Outcome, icmp, target};
use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use alloc::vec;
use alloc::vec::Vec;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::udp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::Ipv4Address;

const UDP: u8 = 17;
/// The largest payload of a UDP datagram over IPv4.
const MAX: u32 = 65507;

/// A bound socket with room for a few datagrams of `size` bytes.
pub(super) fn open<N: Nic>(stack: &mut Stack<N>, port: u16, size: usize) -> Option<SocketHandle> {
    let buffer =
        || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; (size * 4).max(65536)]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).ok()?;
    Some(stack.sockets.add(socket))
}

fn local_port<N: Nic>(stack: &mut Stack<N>, order: &Order) -> u16 {
    let chosen = order.number("port", 0) as u16;
    if chosen == 0 { stack.port() } else { chosen }
}

/// `udp-echo=HOST:PORT,bytes=N,count=N,ttl=N,port=N,data=TEXT`: each datagram must come back as it was.
pub(super) fn echo<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let port = local_port(stack, order);
    let size = order.number("bytes", 64).min(MAX) as usize;
    let handle = open(stack, port, size).ok_or(Reason::BadTarget)?;
    let socket = stack.sockets.get_mut::<udp::Socket>(handle);
    socket.set_hop_limit(Some(order.number("ttl", 64).clamp(1, 255) as u8));
    let count = order.number("count", 1);
    let data = order.text("data").map(|text| Vec::from(text.as_bytes()));
    let (mut received, mut bytes, mut best, mut outcome) = (0u64, 0u64, u64::MAX, Ok(()));
    for number in 0..count {
        let start = stack.now();
        let sent = data.clone().unwrap_or_else(|| stack.pattern.at(u64::from(number), size).to_vec());
        match exchange(stack, handle, (port, to), &sent, order.number("timeout", 1000), report) {
            Ok(len) => {
                received += 1;
                bytes += len;
                best = best.min(super::since(stack, start));
            }
            Err(reason) => outcome = Err(reason),
        }
    }
    stack.sockets.remove(handle);
    report.number("port", u64::from(port));
    report.number("sent", u64::from(count));
    report.number("received", received);
    report.number("bytes", bytes);
    if received > 0 {
        report.number("rtt_min_us", best);
    }
    match outcome {
        Err(Reason::Timeout) if received > 0 => Err(Reason::Loss),
        outcome => outcome,
    }
}

fn exchange<N: Nic>(
    stack: &mut Stack<N>,
    handle: SocketHandle,
    (port, to): (u16, (Ipv4Address, u16)),
    sent: &[u8],
    timeout: u32,
    report: &mut Report,
) -> Result<u64, Reason> {
    let socket = stack.sockets.get_mut::<udp::Socket>(handle);
    socket.send_slice(sent, to).map_err(|_| Reason::NoAddress)?;
    let deadline = stack.after(timeout);
    let found = stack.until(deadline, |stack| {
        if let Some(error) = stack.nic.observer().error(UDP, to.0, |e| e.ports == (port, to.1)) {
            return Progress::Done(Err(error));
        }
        let socket = stack.sockets.get_mut::<udp::Socket>(handle);
        match socket.recv() {
            Ok((data, meta)) => Progress::Done(Ok((data == sent, data.len() as u64, meta.endpoint))),
            Err(_) => Progress::Wait(None),
        }
    });
    match found.ok_or(Reason::Timeout)? {
        Err(error) => {
            if report.get("icmp_from").is_none() {
                icmp::describe(&error, report);
            }
            Err(icmp::reason(&error))
        }
        Ok((_, _, from)) if from != to.into() => {
            report.text("from", from);
            Err(Reason::BadReply)
        }
        Ok((false, ..)) => Err(Reason::Mismatch),
        Ok((true, len, _)) => Ok(len),
    }
}

/// `udp-send=HOST:PORT,bytes=N,count=N,pps=N,port=N`: sends and expects nothing.
pub(super) fn send<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let port = local_port(stack, order);
    let size = order.number("bytes", 64).min(MAX) as usize;
    let handle = open(stack, port, size).ok_or(Reason::BadTarget)?;
    let (count, rate) = (u64::from(order.number("count", 1)), u64::from(order.number("pps", 0)));
    let payload = Vec::from(stack.pattern.at(0, size));
    let start = stack.now();
    let deadline = stack.after(order.number("timeout", 60_000));
    let mut sent = 0;
    let done = stack.until(deadline, |stack| {
        let due = |number: u64| {
            (number * 1_000_000).checked_div(rate).map_or(start, |us| start + Duration::from_micros(us))
        };
        let now = stack.now();
        let socket = stack.sockets.get_mut::<udp::Socket>(handle);
        let before = sent;
        while sent < count && due(sent) <= now && socket.send_slice(&payload, to).is_ok() {
            sent += 1;
        }
        match (sent == count && socket.send_queue() == 0, sent > before) {
            (true, _) => Progress::Done(()),
            (false, true) => Progress::Again,
            (false, false) => Progress::Wait(Some(due(sent)).filter(|at: &Instant| *at > now)),
        }
    });
    stack.sockets.remove(handle);
    report.number("port", u64::from(port));
    report.number("sent", sent);
    report.number("bytes", sent * size as u64);
    done.ok_or(Reason::Timeout)
}
