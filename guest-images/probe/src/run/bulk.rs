//! `upload` and `download`: a stream as fast as it goes, over one connection.

use super::{Outcome, since, target, tcp};
use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use alloc::string::String;
use alloc::vec::Vec;
use smoltcp::socket::tcp::Socket;

const MIB: u64 = 1 << 20;
/// The largest window that the `window` key gives, in KiB.
const WINDOW_MAX: u32 = 8192;
/// How much of what the peer says at the end of an upload is reported, in bytes.
const REPLY_MAX: usize = 200;

fn options(order: &Order) -> tcp::Options {
    let window = order.number("window", 2048).clamp(4, WINDOW_MAX) as usize;
    tcp::Options { window: window * 1024, ..tcp::Options::default() }
}

fn rate(report: &mut Report, bytes: u64, us: u64) {
    report.number("bytes", bytes);
    report.number("us", us);
    report.number("mbit_s", bytes * 8 / us.max(1));
}

/// `upload=HOST:PORT,mb=N,window=KIB`: sends the pattern, closes, and waits for the peer to close. What the
/// peer says meanwhile is reported as `reply`, so that it can tell what it counted.
pub(super) fn upload<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let total = u64::from(order.number("mb", 1)) * MIB;
    let deadline = stack.after(order.number("timeout", 60_000));
    let connection = tcp::connect(stack, to, &options(order), deadline, report)?;
    let start = stack.now();
    let (mut sent, mut reply) = (0, Vec::new());
    let done = stack.until(deadline, |stack| {
        let socket = stack.sockets.get_mut::<Socket>(connection.handle);
        let added = tcp::fill(socket, &stack.pattern, sent, total);
        sent += added;
        if sent == total {
            socket.close();
        }
        let more = tcp::drain(socket, |bytes| {
            let room = REPLY_MAX.saturating_sub(reply.len()).min(bytes.len());
            reply.extend_from_slice(&bytes[..room]);
        });
        match (more, added > 0) {
            (false, _) => Progress::Done(socket.send_queue()),
            (true, true) => Progress::Again,
            (true, false) => Progress::Wait(None),
        }
    });
    let took = since(stack, start);
    let reset = tcp::was_reset(stack, connection.port);
    if done.is_some() {
        tcp::finish(stack, connection.handle);
    } else {
        tcp::discard(stack, connection.handle);
    }
    rate(report, sent, took);
    if !reply.is_empty() {
        report.text("reply", String::from_utf8_lossy(&reply).trim_end());
    }
    match done {
        None => Err(Reason::Timeout),
        Some(_) if reset => Err(Reason::Reset),
        Some(left) if left > 0 || sent < total => Err(Reason::Short),
        Some(_) => Ok(()),
    }
}

/// `download=HOST:PORT,mb=N,window=KIB,pause=MS`: reads until the peer closes, or N MiB. The bytes must be
/// the pattern. With `pause` nothing is read for that long after connecting: the window fills and reopens.
pub(super) fn download<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let total = order.text("mb").map(|_| u64::from(order.number("mb", 1)) * MIB);
    let deadline = stack.after(order.number("timeout", 60_000));
    let connection = tcp::connect(stack, to, &options(order), deadline, report)?;
    stack.idle(order.number("pause", 0));
    let start = stack.now();
    let (mut got, mut same) = (0, true);
    let done = stack.until(deadline, |stack| {
        let socket = stack.sockets.get_mut::<Socket>(connection.handle);
        let before = got;
        let more = tcp::drain(socket, |bytes| {
            same &= stack.pattern.matches(got, bytes);
            got += bytes.len() as u64;
        });
        match (!more || total.is_some_and(|total| got >= total), got > before) {
            (true, _) => Progress::Done(()),
            (false, true) => Progress::Again,
            (false, false) => Progress::Wait(None),
        }
    });
    let took = since(stack, start);
    let reset = tcp::was_reset(stack, connection.port);
    if total.is_some_and(|total| got > total) || done.is_none() {
        tcp::discard(stack, connection.handle);
    } else {
        tcp::finish(stack, connection.handle);
    }
    rate(report, got, took);
    match done {
        None => Err(Reason::Timeout),
        Some(()) if reset => Err(Reason::Reset),
        Some(()) if total.is_some_and(|total| got < total) => Err(Reason::Short),
        Some(()) if !same => Err(Reason::Mismatch),
        Some(()) => Ok(()),
    }
}
