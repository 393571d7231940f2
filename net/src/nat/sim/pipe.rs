//! Streams of real bytes: the two ends of a socketpair, and connections to the world's DNS servers.

use std::io;
use std::time::Duration;

use vm_memory::{Bytes, VolatileSlice};

use super::services;
use super::world::{Action, Kind, Sock, World, os};
use crate::nat::host::SockId;
use crate::nat::outbox::copy_into;
use crate::nat::poller::{Events, Token};

/// Bytes that wait for a reader.
const CAPACITY: usize = 50_000;

/// What is on the other side of such a stream.
#[derive(Debug)]
pub(super) enum Far {
    /// The other end of a socketpair: its number, and which socket of that number.
    End(u32, u64),
    Server {
        manner: Manner,
        /// What has come of the next question.
        asked: Vec<u8>,
        answers: usize,
    },
}

/// How a server serves a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    Answers,
    ClosesAfterOne,
    FallsSilentAfterOne,
}

impl World {
    pub(super) fn pair(&mut self, token: Token) -> io::Result<(u32, u32)> {
        let ours = self.insert(Kind::Connecting, Some(token), usize::MAX)?;
        let theirs = self.insert(Kind::Connecting, None, usize::MAX).inspect_err(|_| {
            self.socks.remove(&ours);
        })?;
        for (end, other) in [(ours, theirs), (theirs, ours)] {
            let uid = self.socks[&other].uid;
            self.socks.get_mut(&end).expect("open").kind = Kind::Bytes(Far::End(other, uid));
        }
        self.wake(ours); // it is registered, and there is room
        Ok((ours, theirs))
    }

    /// Starts to connect to a server.
    pub(super) fn dial_server(&mut self, token: Token) -> io::Result<u32> {
        let num = self.insert(Kind::Connecting, Some(token), usize::MAX)?;
        let (uid, delay) = (self.socks[&num].uid, Duration::from_micros(self.rng.below(100_000)));
        self.at(delay, Action::Server(num, uid));
        Ok(num)
    }

    /// The connect to a server has ended.
    pub(super) fn server(&mut self, num: u32, uid: u64) {
        let manner = match self.rng.below(6) {
            0 => Manner::ClosesAfterOne,
            1 => Manner::FallsSilentAfterOne,
            _ => Manner::Answers,
        };
        let refuses = self.rng.chance(10);
        let Some(sock) = self.get(num, uid) else { return };
        sock.kind = Kind::Bytes(Far::Server { manner, asked: Vec::new(), answers: 0 });
        if refuses {
            (sock.error, sock.dead) = (Some(libc::ECONNREFUSED), true);
        }
        self.wake(num);
    }

    /// Bytes arrive from the other side, or its end.
    pub(super) fn arrive(&mut self, num: u32, uid: u64, bytes: &[u8], end: bool) {
        if let Some(sock) = self.get(num, uid) {
            sock.bytes.extend(bytes);
            sock.eof |= end;
            self.wake(num);
        }
    }

    pub(super) fn bytes_room(&self, sock: &Sock) -> usize {
        match sock.kind {
            Kind::Bytes(Far::End(num, uid)) => {
                let other = self.socks.get(&num).filter(|other| other.uid == uid);
                other.map_or(CAPACITY, |other| CAPACITY.saturating_sub(other.bytes.len()))
            }
            _ => CAPACITY,
        }
    }

    pub(super) fn bytes_levels(&self, sock: &Sock) -> Events {
        let mut events = Events::empty();
        events.set(Events::READ, !sock.bytes.is_empty() || sock.eof || sock.dead);
        events.set(Events::WRITE, sock.dead || self.bytes_room(sock) > 0);
        events.set(Events::READ_CLOSED, sock.eof || sock.dead);
        events.set(Events::CLOSED, sock.dead || sock.eof && sock.write_closed);
        events.set(Events::ERROR, sock.error.is_some());
        events
    }

    pub(super) fn bytes_send(
        &mut self,
        num: u32,
        parts: &mut dyn Iterator<Item = VolatileSlice<'_>>,
    ) -> io::Result<usize> {
        let mut room = self.bytes_room(&self.socks[&num]);
        if self.rng.chance(10) {
            room = self.rng.below(room as u64 + 1) as usize;
        }
        let sock = self.socks.get_mut(&num).expect("open");
        if sock.dead {
            return Err(os(sock.error.take().unwrap_or(libc::EPIPE)));
        }
        assert!(!sock.write_closed, "data behind a FIN");
        let mut data = Vec::new();
        for part in parts {
            let (at, len) = (data.len(), part.len().min(room - data.len()));
            data.resize(at + len, 0);
            part.read_slice(&mut data[at..], 0).expect("it is as long");
            if len < part.len() {
                sock.nospace = true;
                break;
            }
        }
        if data.is_empty() {
            // Linux tells a writer that there is room when there is some again.
            self.at(Duration::from_micros(50), Action::Room(num, self.socks[&num].uid));
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let partial = sock.nospace;
        let uid = sock.uid;
        let to = match &mut sock.kind {
            Kind::Bytes(Far::End(num, uid)) => Some((*num, *uid)),
            Kind::Bytes(Far::Server { asked, .. }) => {
                asked.extend(&data);
                None
            }
            _ => unreachable!("it is a stream of bytes"),
        };
        match to {
            Some((to, other)) => self.arrive(to, other, &data, false),
            None => self.asked(num, uid),
        }
        if partial {
            self.at(Duration::from_micros(50), Action::Room(num, uid));
        }
        Ok(data.len())
    }

    /// A server looks at what it was asked.
    fn asked(&mut self, num: u32, uid: u64) {
        while let Some(Kind::Bytes(Far::Server { manner, asked, answers })) =
            self.socks.get_mut(&num).map(|sock| &mut sock.kind)
        {
            let Some(question) = services::take(asked) else { return };
            let (manner, first) = (*manner, *answers == 0);
            *answers += 1;
            if !first && manner != Manner::Answers {
                continue;
            }
            let delay = Duration::from_micros(self.rng.below(100_000));
            let server = services::servers()[0];
            for (_, answer) in services::server(&mut self.rng, server, &question) {
                let end = manner == Manner::ClosesAfterOne;
                self.at(delay, Action::Bytes(num, uid, services::framed(&answer), end));
            }
        }
    }

    pub(super) fn bytes_peek(
        &mut self,
        num: u32,
        offset: u32,
        (parts, skip, max): (&[VolatileSlice<'_>], usize, usize),
    ) -> io::Result<usize> {
        let sock = self.socks.get_mut(&num).expect("open");
        let len = (sock.bytes.len() - offset as usize).min(max);
        if len == 0 {
            return match sock.error.take() {
                Some(errno) => Err(os(errno)),
                None if sock.eof || sock.dead => Ok(0),
                None => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let mut bytes = vec![0; skip];
        bytes.extend(sock.bytes.iter().skip(offset as usize).take(len));
        copy_into(parts, &bytes);
        Ok(len)
    }

    pub(super) fn bytes_discard(&mut self, num: u32, len: u32) {
        let sock = self.socks.get_mut(&num).expect("open");
        sock.bytes.drain(..len as usize);
        if let Kind::Bytes(Far::End(writer, uid)) = sock.kind {
            self.room_again(writer, uid);
        }
    }

    /// A writer that met a full buffer hears that it may write.
    pub(super) fn room_again(&mut self, num: u32, uid: u64) {
        let Some(sock) = self.socks.get(&num).filter(|sock| sock.uid == uid) else { return };
        if sock.nospace && self.bytes_room(sock) > 0 {
            self.socks.get_mut(&num).expect("open").nospace = false;
            self.wake(num);
        }
    }

    /// The other end of a pair is closed.
    pub(super) fn hang_up(&mut self, num: u32, uid: u64) {
        if let Some(sock) = self.get(num, uid) {
            (sock.eof, sock.dead) = (true, true);
            self.wake(num);
        }
    }

    pub(super) fn has_bytes(&self, id: SockId) -> bool {
        matches!(self.socks[&id.0].kind, Kind::Bytes(_))
    }
}
