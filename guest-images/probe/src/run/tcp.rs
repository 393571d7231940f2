//! TCP orders of a client: `tcp-connect`, `tcp-get`, `tcp-echo`, `tcp-rr`, `tcp-churn`, `tcp-hold`.
//!
//! smoltcp says only that a connection is gone; whether by RST or by an ICMP error comes from the observer.

use super::{Outcome, icmp, since, target};
use crate::nic::Nic;
use crate::orders::Order;
use crate::pattern::Fnv;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::Ipv4Address;

const TCP: u8 = 6;
/// How long a connection may take to close before it is dropped, in milliseconds.
const CLOSE: u32 = 3000;
/// Buffers of a connection that echoes in bulk, in bytes.
const ECHO_WINDOW: usize = 512 * 1024;
/// The longest HTTP header that is read.
const HTTP_HEADER_MAX: usize = 16 * 1024;

/// How to connect.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    /// Receive and send buffer, in bytes.
    pub(super) window: usize,
    /// TTL of our packets.
    pub(super) ttl: u8,
}

impl Default for Options {
    fn default() -> Self {
        Self { window: 65535, ttl: 64 }
    }
}

/// A connection that was accepted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Connection {
    pub(super) handle: SocketHandle,
    pub(super) port: u16,
}

/// A socket with buffers of this size.
pub(super) fn socket(window: usize) -> Socket<'static> {
    let mut socket = Socket::new(SocketBuffer::new(vec![0; window]), SocketBuffer::new(vec![0; window]));
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket
}

/// Connects, or says why not.
pub(super) fn connect<N: Nic>(
    stack: &mut Stack<N>,
    to: (Ipv4Address, u16),
    options: &Options,
    deadline: Instant,
    report: &mut Report,
) -> Result<Connection, Reason> {
    let port = stack.port();
    let mut socket = socket(options.window);
    socket.set_hop_limit(Some(options.ttl));
    socket.connect(stack.iface.context(), to, port).map_err(|_| Reason::NoAddress)?;
    let handle = stack.sockets.add(socket);
    let state = stack.until(deadline, |stack| {
        if let Some(error) = stack.nic.observer().error(TCP, to.0, |e| e.ports == (port, to.1)) {
            return Progress::Done(Err(Some(error)));
        }
        match stack.sockets.get::<Socket>(handle).state() {
            State::SynSent | State::SynReceived => Progress::Wait(None),
            State::Closed | State::TimeWait => Progress::Done(Err(None)),
            _ => Progress::Done(Ok(())),
        }
    });
    let reason = match state {
        Some(Ok(())) => return Ok(Connection { handle, port }),
        Some(Err(Some(error))) => {
            icmp::describe(&error, report);
            icmp::reason(&error)
        }
        Some(Err(None)) => Reason::Refused,
        None => Reason::Timeout,
    };
    discard(stack, handle);
    Err(reason)
}

/// Takes everything that was received; false once nothing more can come.
pub(super) fn drain(socket: &mut Socket<'_>, mut take: impl FnMut(&[u8])) -> bool {
    while socket.can_recv() {
        let _ = socket.recv(|bytes| {
            take(bytes);
            (bytes.len(), ())
        });
    }
    socket.may_recv() || matches!(socket.state(), State::SynSent | State::SynReceived)
}

/// Whether the peer ended the connection at `port` by RST.
pub(super) fn was_reset<N: Nic>(stack: &mut Stack<N>, port: u16) -> bool {
    stack.nic.observer().resets.iter().any(|reset| reset.to == port)
}

/// Closes in order and forgets the socket once the peer agrees, or after a while.
pub(super) fn finish<N: Nic>(stack: &mut Stack<N>, handle: SocketHandle) {
    stack.sockets.get_mut::<Socket>(handle).close();
    let deadline = stack.after(CLOSE);
    let _ = stack.until(deadline, |stack| match stack.sockets.get::<Socket>(handle).state() {
        State::Closed | State::TimeWait => Progress::Done(()),
        _ => Progress::Wait(None),
    });
    stack.sockets.remove(handle);
}

/// Resets the connection and forgets the socket.
pub(super) fn discard<N: Nic>(stack: &mut Stack<N>, handle: SocketHandle) {
    stack.sockets.get_mut::<Socket>(handle).abort();
    stack.poll();
    stack.nic.flush();
    stack.sockets.remove(handle);
}

/// `tcp-connect=HOST:PORT`: connects and closes.
pub(super) fn connect_only<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let options = Options { ttl: order.number("ttl", 64).clamp(1, 255) as u8, ..Options::default() };
    let (start, deadline) = (stack.now(), stack.after(order.number("timeout", 5000)));
    let connection = connect(stack, to, &options, deadline, report);
    report.number("us", since(stack, start));
    finish(stack, connection?.handle);
    Ok(())
}

/// `tcp-get=HOST:PORT/PATH`: an HTTP/1.0 GET.
pub(super) fn get<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let (name, _, path) = target::split(&order.target)?;
    let (start, deadline) = (stack.now(), stack.after(order.number("timeout", 30_000)));
    let connection =
        connect(stack, to, &Options { window: 1 << 20, ..Options::default() }, deadline, report)?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {name}\r\nConnection: close\r\n\r\n");
    let _ = stack.sockets.get_mut::<Socket>(connection.handle).send_slice(request.as_bytes());
    let (mut header, mut body, mut hash) = (Vec::new(), None::<u64>, Fnv::default());
    let done = stack.until(deadline, |stack| {
        let socket = stack.sockets.get_mut::<Socket>(connection.handle);
        let more = drain(socket, |bytes| match &mut body {
            Some(len) => {
                *len += bytes.len() as u64;
                hash.add(bytes);
            }
            None => {
                header.extend_from_slice(bytes);
                if let Some(end) = header.windows(4).position(|four| four == b"\r\n\r\n") {
                    let rest = header.split_off(end + 4);
                    body = Some(rest.len() as u64);
                    hash.add(&rest);
                }
            }
        });
        if more && header.len() <= HTTP_HEADER_MAX { Progress::Wait(None) } else { Progress::Done(()) }
    });
    report.number("us", since(stack, start));
    let reset = was_reset(stack, connection.port);
    finish(stack, connection.handle);
    describe_response(&header, body, hash, report);
    match (done, body) {
        (None, _) => Err(Reason::Timeout),
        _ if reset => Err(Reason::Reset),
        (_, None) => Err(Reason::BadReply),
        (_, Some(len)) if content_length(&header).is_some_and(|said| said != len) => Err(Reason::Short),
        _ => Ok(()),
    }
}

fn describe_response(header: &[u8], body: Option<u64>, hash: Fnv, report: &mut Report) {
    let text = String::from_utf8_lossy(header);
    if let Some(status) = text.split(' ').nth(1).and_then(|code| code.parse().ok()) {
        report.number("status", status);
    }
    report.number("bytes", body.unwrap_or(0));
    report.text("fnv", format_args!("{:016x}", hash.0));
}

fn content_length(header: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(header).to_ascii_lowercase();
    text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok())
}

/// `tcp-echo=HOST:PORT,bytes=N,end=fin|rst`: sends the pattern, expects it back, then ends the connection.
///
/// With `fin` our half is closed when everything is sent and the echo must still come; with `rst` the
/// connection is aborted after the echo.
pub(super) fn echo<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let reset_at_end = match order.text("end") {
        None | Some("fin") => false,
        Some("rst") => true,
        Some(_) => return Err(Reason::BadTarget),
    };
    let total = u64::from(order.number("bytes", 4096));
    let (start, deadline) = (stack.now(), stack.after(order.number("timeout", 30_000)));
    let connection =
        connect(stack, to, &Options { window: ECHO_WINDOW, ..Options::default() }, deadline, report)?;
    let (mut sent, mut got, mut same) = (0, 0, true);
    let done = stack.until(deadline, |stack| {
        let socket = stack.sockets.get_mut::<Socket>(connection.handle);
        let before = (sent, got);
        sent += fill(socket, &stack.pattern, sent, total);
        if sent == total && !reset_at_end {
            socket.close();
        }
        let more = drain(socket, |bytes| {
            same &= stack.pattern.matches(got, bytes);
            got += bytes.len() as u64;
        });
        match (got >= total && (reset_at_end || !more), more, (sent, got) != before) {
            (true, ..) | (_, false, _) => Progress::Done(()),
            (_, _, true) => Progress::Again,
            _ => Progress::Wait(None),
        }
    });
    let was_reset = was_reset(stack, connection.port);
    if reset_at_end {
        discard(stack, connection.handle);
    } else {
        finish(stack, connection.handle);
    }
    report.number("us", since(stack, start));
    report.number("sent", sent);
    report.number("bytes", got);
    match done {
        None => Err(Reason::Timeout),
        Some(()) if was_reset => Err(Reason::Reset),
        Some(()) if got < total => Err(Reason::Short),
        Some(()) if !same || got > total => Err(Reason::Mismatch),
        Some(()) => Ok(()),
    }
}

/// Sends as much of the pattern from `offset` up to `total` as fits; returns how much.
pub(super) fn fill(
    socket: &mut Socket<'_>,
    pattern: &crate::pattern::Pattern,
    offset: u64,
    total: u64,
) -> u64 {
    let mut at = offset;
    while at < total && socket.can_send() {
        let left = usize::try_from(total - at).unwrap_or(usize::MAX);
        match socket.send_slice(pattern.at(at, left)) {
            Ok(0) | Err(_) => break,
            Ok(count) => at += count as u64,
        }
    }
    at - offset
}

/// Sends one byte and waits for one; the time that it took.
fn round_trip<N: Nic>(
    stack: &mut Stack<N>,
    connection: Connection,
    deadline: Instant,
) -> Result<u64, Reason> {
    let start = stack.now();
    let _ = stack.sockets.get_mut::<Socket>(connection.handle).send_slice(b"x");
    let answered = stack.until(deadline, |stack| {
        let socket = stack.sockets.get_mut::<Socket>(connection.handle);
        let mut got = 0;
        let more = drain(socket, |bytes| got += bytes.len());
        match (got, more) {
            (1.., _) => Progress::Done(Ok(())),
            (0, false) => Progress::Done(Err(Reason::Short)),
            (0, true) => Progress::Wait(None),
        }
    });
    answered.unwrap_or(Err(Reason::Timeout))?;
    Ok(since(stack, start))
}

fn percentiles(times: &mut [u64], report: &mut Report) {
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1)));
    for (name, percent) in [("min_us", 0), ("p50_us", 50), ("p99_us", 99)] {
        report.number(name, at(percent).copied().unwrap_or(0));
    }
}

/// `tcp-rr=HOST:PORT,count=N`: one-byte round trips over one connection to an echo server.
pub(super) fn round_trips<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let deadline = stack.after(order.number("timeout", 30_000));
    let connection = connect(stack, to, &Options::default(), deadline, report)?;
    let (mut times, mut outcome) = (Vec::new(), Ok(()));
    for _ in 0..order.number("count", 100) {
        match round_trip(stack, connection, deadline) {
            Ok(time) => times.push(time),
            Err(reason) => {
                outcome = Err(reason);
                break;
            }
        }
    }
    finish(stack, connection.handle);
    report.number("count", times.len() as u64);
    percentiles(&mut times, report);
    outcome
}

/// `tcp-churn=HOST:PORT,count=N`: connect, one byte there and back, close; again and again.
pub(super) fn churn<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let start = stack.now();
    let deadline = stack.after(order.number("timeout", 60_000));
    let options = Options { window: 2048, ..Options::default() };
    let (mut times, mut outcome) = (Vec::new(), Ok(()));
    for _ in 0..order.number("count", 100) {
        let began = stack.now();
        let done = connect(stack, to, &options, deadline, report).and_then(|connection| {
            let done = round_trip(stack, connection, deadline);
            finish(stack, connection.handle);
            done
        });
        match done {
            Ok(_) => times.push(since(stack, began)),
            Err(reason) => {
                outcome = Err(reason);
                break;
            }
        }
    }
    let took = since(stack, start);
    report.number("us", took);
    report.number("count", times.len() as u64);
    report.number("per_s", times.len() as u64 * 1_000_000 / took.max(1));
    percentiles(&mut times, report);
    outcome
}

/// `tcp-hold=HOST:PORT,count=N,ms=N`: opens many connections, holds them, closes them.
pub(super) fn hold<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let to = target::endpoint(stack, &order.target, report)?;
    let deadline = stack.after(order.number("timeout", 60_000));
    let options = Options { window: 2048, ..Options::default() };
    let (mut open, mut outcome) = (Vec::new(), Ok(()));
    for _ in 0..order.number("count", 100) {
        match connect(stack, to, &options, deadline, report) {
            Ok(connection) => open.push(connection),
            Err(reason) => {
                outcome = Err(reason);
                break;
            }
        }
    }
    report.number("count", open.len() as u64);
    stack.idle(order.number("ms", 0));
    let alive = |stack: &Stack<N>, c: &&Connection| stack.sockets.get::<Socket>(c.handle).may_recv();
    report.number("alive", open.iter().filter(|connection| alive(stack, connection)).count() as u64);
    for connection in open {
        finish(stack, connection.handle);
    }
    outcome
}
