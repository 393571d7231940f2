//! The host that the NAT gets: the calls, over the sockets of [`World`].
//!
//! Where a call may fail it sometimes does, for want of memory, descriptors or ports, as the kernel's does.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, VolatileSlice};

use super::pipe::Far;
use super::services;
use super::world::{Action, Kind, Remote, World, flow_of, os, pattern, world_addr};
use crate::nat::host::{Close, Machine, SendSpace, SockId, StreamHost};
use crate::nat::outbox::copy_into;
use crate::nat::poller::{Events, Owner, Token};
use crate::nat::udp::socket::{DatagramHost, Incoming, Outgoing, PingKind, SocketError};

/// The host that the NAT gets.
pub(super) struct SimHost {
    pub(super) world: Arc<Mutex<World>>,
    pub(super) fd: std::fs::File,
}

impl SimHost {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("nobody panicked with it")
    }
}

/// What a connect, an accept and a send fail with at once.
const CONNECT_ERRORS: [i32; 6] =
    [libc::EADDRNOTAVAIL, libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EPERM, libc::EACCES, libc::ENOBUFS];
const ACCEPT_ERRORS: [i32; 4] = [libc::ECONNABORTED, libc::EPROTO, libc::ENETDOWN, libc::EHOSTUNREACH];
const SEND_ERRORS: [i32; 5] = [libc::ENOBUFS, libc::ENOMEM, libc::EAGAIN, libc::EPERM, libc::ENETUNREACH];

impl AsFd for SimHost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Machine for SimHost {
    fn now(&self) -> Instant {
        let world = self.world();
        world.base + world.now
    }

    fn poll(&mut self, into: &mut Vec<(Token, Events)>) -> bool {
        let mut world = self.world();
        let now = world.now;
        if world.timer.is_some_and(|at| at <= now) {
            world.timer = None;
            into.push((Token { owner: Owner::Timer, slot: 0, generation: 0 }, Events::READ));
        }
        for _ in 0..=world.rng.below(16) {
            let Some((num, uid)) = world.ready.pop_front() else { return false };
            let Some(sock) = world.get(num, uid) else { continue };
            sock.ready = false;
            let token = sock.token.expect("it is watched");
            let events = world.levels(num);
            if !events.contains(Events::WRITE) {
                world.sock(SockId(num)).nospace = true;
            }
            if !events.is_empty() {
                into.push((token, events));
            }
        }
        // As an answer that was full.
        true
    }

    fn set_timer(&mut self, after: Duration) {
        let mut world = self.world();
        world.timer = Some(world.now + after.max(Duration::from_nanos(1)));
    }

    fn open_sockets(&self) -> usize {
        self.world().socks.len()
    }
}

impl StreamHost for SimHost {
    fn connect(&mut self, to: SocketAddrV4, token: Token) -> io::Result<SockId> {
        let mut world = self.world();
        if to.port() == 53 {
            world.fault(&CONNECT_ERRORS)?;
            return world.dial_server(token).map(SockId);
        }
        let flow = flow_of(to);
        let opened = world
            .fault(&CONNECT_ERRORS)
            .and_then(|()| world.insert(Kind::Connecting, Some(token), flow))
            .inspect_err(|_| world.remotes[flow].failed = true);
        let num = opened?;
        let uid = world.socks[&num].uid;
        world.remotes[flow] = Remote { failed: world.remotes[flow].failed, ..Remote::default() };
        let delay = world.plans[flow].delay;
        world.at(delay, Action::Connected(num, uid));
        Ok(SockId(num))
    }

    fn stream_pair(&mut self, token: Token) -> io::Result<(SockId, SockId)> {
        self.world().pair(token).map(|(ours, theirs)| (SockId(ours), SockId(theirs)))
    }

    fn connected(&mut self, sock: SockId) -> io::Result<()> {
        self.world().sock(sock).error.take().map_or(Ok(()), |errno| Err(os(errno)))
    }

    fn listen(&mut self, _at: SocketAddrV4, token: Token) -> io::Result<SockId> {
        self.world().insert(Kind::Listener, Some(token), 0).map(SockId)
    }

    fn local_addr(&mut self, _sock: SockId) -> io::Result<SocketAddrV4> {
        Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080))
    }

    fn accept(&mut self, _listener: SockId) -> io::Result<(SockId, SocketAddrV4)> {
        let mut world = self.world();
        let flow = *world.backlog.front().ok_or(io::ErrorKind::WouldBlock)?;
        if let Err(error) = world.fault(&ACCEPT_ERRORS) {
            world.backlog.pop_front();
            world.remotes[flow].failed = true;
            return Err(error);
        }
        let num = world.insert(Kind::Stream, None, flow)?;
        world.backlog.pop_front();
        let uid = world.socks[&num].uid;
        world.remotes[flow].connected = true;
        world.at(Duration::ZERO, Action::Step(num, uid, Duration::from_micros(100)));
        Ok((SockId(num), world_addr(flow)))
    }

    fn watch(&mut self, sock: SockId, token: Token) -> io::Result<()> {
        let mut world = self.world();
        if let Err(error) = world.fault(&[libc::ENOSPC, libc::ENOMEM]) {
            let flow = world.sock(sock).flow;
            if let Some(remote) = world.remotes.get_mut(flow) {
                remote.failed = true;
            }
            return Err(error);
        }
        world.sock(sock).token = Some(token);
        if !world.levels(sock.0).is_empty() {
            world.wake(sock.0);
        }
        Ok(())
    }

    fn want_write(&mut self, sock: SockId, _token: Token) {
        let mut world = self.world();
        let levels = world.levels(sock.0);
        if !levels.contains(Events::WRITE) {
            world.sock(sock).nospace = true;
        }
        if !levels.is_empty() {
            world.wake(sock.0);
        }
    }

    fn send(&mut self, id: SockId, parts: &mut dyn Iterator<Item = VolatileSlice<'_>>) -> io::Result<usize> {
        let mut guard = self.world();
        let world = &mut *guard;
        if world.has_bytes(id) {
            return world.bytes_send(id.0, parts);
        }
        let mut room = world.room(&world.socks[&id.0]);
        let sock = world.socks.get_mut(&id.0).expect("open");
        if sock.dead {
            return Err(os(sock.error.take().unwrap_or(libc::EPIPE)));
        }
        assert!(!sock.write_closed, "flow {}: data behind a FIN", sock.flow);
        if world.rng.chance(10) {
            room = world.rng.below(room + 1);
        }
        let mut sent = 0;
        for part in parts {
            let len = part.len().min(usize::try_from(room).unwrap());
            let mut bytes = vec![0; len];
            part.read_slice(&mut bytes, 0).unwrap();
            for byte in bytes {
                assert_eq!(
                    byte,
                    pattern(sock.flow, false, sock.taken),
                    "flow {} at {}",
                    sock.flow,
                    sock.taken
                );
                sock.taken += 1;
            }
            room -= len as u64;
            sent += len;
            if len < part.len() {
                sock.nospace = true;
                break;
            }
        }
        assert!(sock.taken <= world.plans[sock.flow].to_world);
        if sent == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(sent) }
    }

    fn peek(
        &mut self,
        id: SockId,
        offset: u32,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
    ) -> io::Result<usize> {
        let mut guard = self.world();
        let world = &mut *guard;
        if world.has_bytes(id) {
            return world.bytes_peek(id.0, offset, (parts, skip, max));
        }
        let sock = world.socks.get_mut(&id.0).expect("open");
        let sent = world.remotes[sock.flow].sent;
        if offset > 0 && world.rng.chance(world.faults) {
            return Err(io::ErrorKind::ResourceBusy.into()); // as without SO_PEEK_OFF
        }
        let from = sock.discarded + u64::from(offset);
        assert!(from <= sent, "flow {}: peeked at {from} of {sent}", sock.flow);
        let len = (sent - from).min(max as u64);
        if len == 0 {
            return match sock.error.take() {
                Some(errno) => Err(os(errno)),
                None if sock.eof || sock.dead => Ok(0),
                None => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let mut bytes = vec![0; skip];
        bytes.extend((from..from + len).map(|at| pattern(sock.flow, true, at)));
        copy_into(parts, &bytes);
        Ok(usize::try_from(len).unwrap())
    }

    fn discard(&mut self, id: SockId, len: u32) {
        let mut guard = self.world();
        let world = &mut *guard;
        if world.has_bytes(id) {
            return world.bytes_discard(id.0, len);
        }
        let sock = world.socks.get_mut(&id.0).expect("open");
        sock.discarded += u64::from(len);
        assert!(sock.discarded <= world.remotes[sock.flow].sent, "discarded what was never there");
    }

    fn send_space(&mut self, id: SockId) -> SendSpace {
        let world = self.world();
        let sock = &world.socks[&id.0];
        let number = |n: u64| u32::try_from(n).unwrap();
        if world.has_bytes(id) {
            let free = number(world.bytes_room(sock) as u64);
            return SendSpace { free, size: 50_000, writable: free > 0 };
        }
        let free = world.room(sock);
        SendSpace { free: number(free - free / 8), size: number(sock.size), writable: world.writable(sock) }
    }

    fn shutdown_write(&mut self, id: SockId) {
        let mut guard = self.world();
        let world = &mut *guard;
        let sock = world.sock(id);
        sock.write_closed = true;
        if let Kind::Bytes(Far::End(num, uid)) = sock.kind {
            world.arrive(num, uid, &[], true);
        }
    }

    fn close(&mut self, id: SockId, how: Close) {
        let mut world = self.world();
        let sock = world.socks.remove(&id.0).expect("closed twice");
        if !sock.is_of_a_service() {
            world.unread += sock.inbox.len() as u64;
        }
        if let Kind::Bytes(Far::End(num, uid)) = sock.kind {
            world.hang_up(num, uid);
        }
        if !matches!(sock.kind, Kind::Stream) || sock.dead {
            return;
        }
        let flow = sock.flow;
        let remote = &mut world.remotes[flow];
        // The kernel resets a connection whose data nobody will read.
        let unread = remote.sent > sock.discarded;
        if how == Close::Reset || unread || !remote.fin {
            remote.reset = true;
        } else {
            remote.got = sock.taken;
            remote.eof = true;
        }
        let line = format!("flow {flow}: closed {how:?}, unread {unread}: {remote:?}");
        world.log(|| line);
    }
}

impl DatagramHost for SimHost {
    fn udp_open(&mut self, _at: SocketAddrV4, _tell_local: bool, token: Token) -> io::Result<SockId> {
        self.world().insert(Kind::Datagram, Some(token), 0).map(SockId)
    }

    fn ping_open(&mut self, _id: u16, token: Token) -> io::Result<(SockId, PingKind)> {
        Ok((SockId(self.world().insert(Kind::Ping, Some(token), 0)?), PingKind::Datagram))
    }

    fn send_datagram(
        &mut self,
        id: SockId,
        out: &Outgoing,
        parts: &mut dyn Iterator<Item = VolatileSlice<'_>>,
    ) -> io::Result<()> {
        let mut world = self.world();
        let sock = world.sock(id);
        let (uid, ping) = (sock.uid, matches!(sock.kind, Kind::Ping));
        let (service, echo) =
            (sock.is_of_a_service(), sock.token.is_some_and(|t| t.owner == Owner::UdpListener));
        if let Some(errno) = sock.error.take() {
            return Err(os(errno));
        }
        let mut data = Vec::new();
        for part in parts {
            let at = data.len();
            data.resize(at + part.len(), 0);
            part.read_slice(&mut data[at..], 0).unwrap();
        }
        let number = data.first_chunk().copied().map_or(0, u16::from_be_bytes);
        if let Err(error) = world.fault(&SEND_ERRORS) {
            if echo {
                world.failed_echoes.insert(number);
            }
            return Err(error);
        }
        if ping {
            data[0] = 0;
            data[2..4].fill(0);
            let sum = crate::checksum::checksum(&data);
            data[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let delay = Duration::from_micros(world.rng.below(100_000));
        if echo {
            world.echoes.insert(number);
            return Ok(());
        }
        if service {
            for (from, answer) in services::server(&mut world.rng, out.to, &data) {
                world.at(delay, Action::Answer(id.0, uid, from, answer));
            }
            return Ok(());
        }
        match world.rng.below(10) {
            0 => {}
            1 if !ping => world.at(delay, Action::Refuse(id.0, uid, out.to)),
            _ => world.at(delay, Action::Answer(id.0, uid, out.to, data)),
        }
        Ok(())
    }

    fn recv_datagram(
        &mut self,
        id: SockId,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
        rest: &mut Vec<u8>,
    ) -> io::Result<Incoming> {
        let mut world = self.world();
        let sock = world.sock(id);
        if let Some(errno) = sock.error.take() {
            return Err(os(errno));
        }
        let (from, data) = sock.inbox.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        rest.clear();
        let fits = data.len().min(max);
        rest.extend_from_slice(&data[fits..]);
        let mut frame = vec![0; skip];
        frame.extend_from_slice(&data[..fits]);
        copy_into(parts, &frame);
        Ok(Incoming { from, len: data.len(), ttl: 60, tos: 0, to: None })
    }

    fn take_error(&mut self, id: SockId) -> Option<SocketError> {
        let mut world = self.world();
        let sock = world.sock(id);
        sock.error = None;
        sock.errors.pop_front()
    }
}
