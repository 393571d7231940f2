//! `listen` and `listen-udp`: being a server, for published ports and for other VMs.

use super::{Outcome, tcp, udp};
use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::socket::udp as udp_socket;
use smoltcp::wire::IpEndpoint;

/// Connections that are served at once, at most.
const BACKLOG: u32 = 16;
/// Peers that a report names, at most.
const PEERS_MAX: usize = 32;
const WINDOW: usize = 512 * 1024;

/// What a server does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Sends everything back until the peer closes.
    Echo,
    /// Reads the pattern until the peer closes and answers with the count.
    Sink,
    /// Sends this many bytes of the pattern and closes.
    Source(u64),
}

/// One place for a connection, reused after each.
#[derive(Debug)]
struct Place {
    handle: SocketHandle,
    peer: Option<IpEndpoint>,
    received: u64,
    sent: u64,
    same: bool,
    answered: bool,
}

/// `listen=PORT,count=N,mode=echo|sink|source,mb=N`: serves N connections, then ends.
pub(super) fn tcp<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let port = order.target.parse().map_err(|_| Reason::BadTarget)?;
    let mode = match order.text("mode") {
        None | Some("echo") => Mode::Echo,
        Some("sink") => Mode::Sink,
        Some("source") => Mode::Source(u64::from(order.number("mb", 1)) << 20),
        Some(_) => return Err(Reason::BadTarget),
    };
    let count = order.number("count", 1);
    let mut places = Vec::new();
    for _ in 0..count.min(BACKLOG) {
        let mut socket = tcp::socket(WINDOW);
        socket.listen(port).map_err(|_| Reason::BadTarget)?;
        let handle = stack.sockets.add(socket);
        places.push(Place { handle, peer: None, received: 0, sent: 0, same: true, answered: false });
    }
    let deadline = stack.after(order.number("timeout", 60_000));
    let (mut served, mut peers, mut bytes, mut same) = (0, Vec::new(), 0, true);
    let done = stack.until(deadline, |stack| {
        let mut moved = false;
        for place in &mut places {
            moved |= serve(stack, place, mode);
            if let Some(peer) = ended(stack, place) {
                served += 1;
                bytes += place.received + place.sent;
                same &= place.same;
                if peers.len() < PEERS_MAX {
                    peers.push(format!("{peer}/{}", place.received));
                }
                relisten(stack, place, port);
            }
        }
        match (served >= count, moved) {
            (true, _) => Progress::Done(()),
            (false, true) => Progress::Again,
            (false, false) => Progress::Wait(None),
        }
    });
    for place in places {
        tcp::discard(stack, place.handle);
    }
    report.number("served", u64::from(served));
    report.number("bytes", bytes);
    report.list("peers", peers);
    match (done, same) {
        (None, _) => Err(Reason::Timeout),
        (Some(()), false) => Err(Reason::Mismatch),
        (Some(()), true) => Ok(()),
    }
}

/// Moves bytes of one connection; whether any moved.
fn serve<N: Nic>(stack: &mut Stack<N>, place: &mut Place, mode: Mode) -> bool {
    let socket = stack.sockets.get_mut::<Socket>(place.handle);
    if matches!(socket.state(), State::Listen | State::SynReceived | State::Closed) {
        return false;
    }
    place.peer = place.peer.or(socket.remote_endpoint());
    let before = (place.received, place.sent);
    match mode {
        Mode::Echo => echo(socket, place),
        Mode::Sink => {
            let more = tcp::drain(socket, |bytes| {
                place.same &= stack.pattern.matches(place.received, bytes);
                place.received += bytes.len() as u64;
            });
            if !more && !core::mem::replace(&mut place.answered, true) {
                let _ = socket.send_slice(format!("{}\n", place.received).as_bytes());
                socket.close();
            }
        }
        Mode::Source(total) => {
            let _ = tcp::drain(socket, |bytes| place.received += bytes.len() as u64);
            place.sent += tcp::fill(socket, &stack.pattern, place.sent, total);
            if place.sent == total {
                socket.close();
            }
        }
    }
    before != (place.received, place.sent)
}

fn echo(socket: &mut Socket<'_>, place: &mut Place) {
    while socket.can_recv() && socket.can_send() {
        let room = socket.send_capacity() - socket.send_queue();
        let taken = socket.recv(|bytes| {
            let len = bytes.len().min(room);
            (len, Vec::from(&bytes[..len]))
        });
        let Ok(bytes) = taken else { break };
        let _ = socket.send_slice(&bytes);
        place.received += bytes.len() as u64;
    }
    if !socket.may_recv() {
        socket.close();
    }
}

/// The peer, once its connection is over.
fn ended<N: Nic>(stack: &Stack<N>, place: &Place) -> Option<IpEndpoint> {
    let state = stack.sockets.get::<Socket>(place.handle).state();
    matches!(state, State::Closed | State::TimeWait).then_some(place.peer).flatten()
}

fn relisten<N: Nic>(stack: &mut Stack<N>, place: &mut Place, port: u16) {
    let socket = stack.sockets.get_mut::<Socket>(place.handle);
    socket.abort();
    *place = Place { handle: place.handle, peer: None, received: 0, sent: 0, same: true, answered: false };
    let _ = socket.listen(port);
}

/// `listen-udp=PORT,count=N`: sends N datagrams back to where they came from, then ends.
pub(super) fn udp<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    let port = order.target.parse().map_err(|_| Reason::BadTarget)?;
    let handle = udp::open(stack, port, 65536).ok_or(Reason::BadTarget)?;
    let count = order.number("count", 1);
    let deadline = stack.after(order.number("timeout", 60_000));
    let (mut served, mut bytes, mut peers) = (0, 0, Vec::<String>::new());
    let done = stack.until(deadline, |stack| {
        let socket = stack.sockets.get_mut::<udp_socket::Socket>(handle);
        let mut moved = false;
        while socket.can_recv() && socket.can_send() && served < count {
            let Ok((data, meta)) = socket.recv().map(|(data, meta)| (Vec::from(data), meta)) else { break };
            let _ = socket.send_slice(&data, meta.endpoint);
            (served, bytes, moved) = (served + 1, bytes + data.len() as u64, true);
            let peer = format!("{}", meta.endpoint);
            if peers.len() < PEERS_MAX && !peers.contains(&peer) {
                peers.push(peer);
            }
        }
        match (served >= count && socket.send_queue() == 0, moved) {
            (true, _) => Progress::Done(()),
            (false, true) => Progress::Again,
            (false, false) => Progress::Wait(None),
        }
    });
    stack.sockets.remove(handle);
    report.number("served", u64::from(served));
    report.number("bytes", bytes);
    report.list("peers", peers);
    done.ok_or(Reason::Timeout)
}
