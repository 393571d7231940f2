//! One connection: a stream between a port of the guest and a Unix socket of the host.
//!
//! ```text
//!   state        entered when                                 left when
//!   Greeting     a client connected to PATH                   its line is read: Requesting; else freed
//!   Requesting   its line named a port; REQUEST is due        RESPONSE: Open; RST or hang-up: freed
//!   Open         both sides agreed                            RST: freed or Lingering; the guest's last SHUTDOWN, which
//!                                                             is answered by RST: freed or Lingering; ours: Closing
//!   Closing      the host is gone, the guest was told         RST: freed
//!   Lingering    the guest is gone, the host has yet to take  the backlog is empty, or the host is gone: freed
//!                what the guest had sent
//! ```
//!
//! **To the guest.** Nothing is read ahead: bytes go from the host's socket into a receive buffer of the guest, and
//! only when there are both a buffer and credit. What can't be read now stays in the socket, whose owner then blocks.
//!
//! **From the guest.** Bytes go from the guest's buffers into the socket; what it does not take is kept in `backlog`,
//! which credit bounds by [`super::BUF_ALLOC`], and counts as forwarded when the socket has taken it.
//!
//! **Half-close.** The host's end of stream, when all before it has been passed on, becomes `SHUTDOWN(SEND)`; a host that
//! takes nothing any more (`EPIPE`, hang-up) becomes `SHUTDOWN(RCV)`. The guest's `SHUTDOWN(SEND)` becomes `SHUT_WR` behind
//! the backlog, its `SHUTDOWN(RCV)` becomes `SHUT_RD`. A guest that has shut down its sending and then resets was
//! done in order: its backlog is still delivered.
//!
//! **Polling.** [`Connection::interest`] is what the socket is polled for: never for what would not be acted upon,
//! and not at all once it has hung up and nothing more is wanted from it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use event_manager::EventSet;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown as Half};
use vm_memory::VolatileSlice;

use super::counters::Refusal;
use super::credit::{FromGuest, ToGuest};
use super::host::{Greeted, Greeting};
use super::packet::{Header, Op, Shutdown};
use super::sys;
use crate::virtio::pieces::take_front;

/// Bytes of the backlog that are copied at a time.
const CHUNK: usize = 4096;

/// Both ends' ports: what tells one connection from another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// See the module's documentation.
#[derive(Debug)]
enum State {
    Greeting(Greeting),
    Requesting {
        /// The guest has the REQUEST.
        sent: bool,
    },
    Open,
    Closing,
    Lingering,
}

/// What becomes of a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// It goes on.
    Keep,
    /// It is over; the guest need not be told.
    Free,
    /// It is over for the guest, which knows. What it had sent is still delivered.
    Gone,
    /// As `Gone`, but the guest is to be told by RST.
    Reset,
    /// It is over because of this. Nothing is delivered; the guest is told unless it said so itself.
    Refuse(Refusal),
    /// The client wants this port of the guest.
    Wants(u32),
}

/// A packet for the guest, without addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Bytes of payload, which are in the buffer already.
    pub(super) len: u32,
    pub(super) fwd_cnt: u32,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    socket: OwnedFd,
    state: State,
    to_guest: ToGuest,
    from_guest: FromGuest,
    backlog: VecDeque<u8>,
    /// RESPONSE is due.
    respond: bool,
    /// The socket may have bytes, an end or an error for us.
    readable: bool,
    /// The host sends no more, and all that it sent was passed on.
    host_sent_all: bool,
    /// The host takes no more.
    host_deaf: bool,
    /// The socket hung up; it says so for ever.
    hung_up: bool,
    /// What the guest shut down.
    guest: Shutdown,
    /// What we told the guest of the host's shutting down.
    told: Shutdown,
    /// What the event loop polls the socket for; kept by the worker.
    pub(super) polled: Option<EventSet>,
    /// It stands in the list of those that have something for the guest; kept by the table.
    pub(super) queued: bool,
    /// It stands in the list of those whose polling may have to change; kept by the table.
    pub(super) touched: bool,
}

impl Connection {
    fn new(socket: OwnedFd, key: Key, state: State) -> Self {
        Self {
            key,
            socket,
            state,
            to_guest: ToGuest::default(),
            from_guest: FromGuest::default(),
            backlog: VecDeque::new(),
            respond: false,
            readable: false,
            host_sent_all: false,
            host_deaf: false,
            hung_up: false,
            guest: Shutdown::empty(),
            told: Shutdown::empty(),
            polled: None,
            queued: false,
            touched: false,
        }
    }

    /// A client of the listening socket.
    pub(super) fn client(socket: OwnedFd) -> Self {
        Self::new(socket, Key::default(), State::Greeting(Greeting::default()))
    }

    /// A connection that the guest asked for by `request`, and `socket` accepted.
    pub(super) fn accepted(socket: OwnedFd, key: Key, request: &Header) -> Self {
        let mut connection = Self::new(socket, key, State::Open);
        connection.to_guest.update(request.buf_alloc, request.fwd_cnt);
        connection.respond = true;
        connection
    }

    /// The client gets `key`; the guest will be asked.
    pub(super) fn request(&mut self, key: Key) {
        self.key = key;
        self.state = State::Requesting { sent: false };
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The guest may know of it under its key.
    pub(super) fn is_known(&self) -> bool {
        matches!(self.state, State::Requesting { sent: true } | State::Open | State::Closing)
    }

    /// Nothing is left of it but the guest's last word.
    pub(super) fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing)
    }

    // The host's side.

    /// The socket is ready for something.
    pub(super) fn host_event(&mut self, set: EventSet) -> After {
        let gone = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match &mut self.state {
            State::Greeting(greeting) => match greeting.read(self.socket.as_fd()) {
                Greeted::More => After::Keep,
                Greeted::Port(port) => After::Wants(port),
                Greeted::Bad => After::Refuse(Refusal::BadLine),
                Greeted::Gone => After::Free,
            },
            State::Requesting { sent } if gone => {
                if *sent {
                    After::Reset
                } else {
                    After::Free
                }
            }
            State::Requesting { .. } | State::Closing => After::Keep,
            State::Open => {
                if gone {
                    self.hung_up = true;
                    self.host_goes_deaf();
                    // Nobody wants what may still be in the socket.
                    self.host_sent_all |= self.guest.contains(Shutdown::RCV);
                } else if set.contains(EventSet::OUT) {
                    self.flush();
                }
                self.readable |= set.contains(EventSet::IN) || gone;
                After::Keep
            }
            State::Lingering => {
                if gone {
                    return After::Free;
                }
                self.flush();
                if self.is_drained() { After::Free } else { After::Keep }
            }
        }
    }

    /// The host takes nothing any more: what is kept for it is thrown away.
    fn host_goes_deaf(&mut self) {
        self.host_deaf = true;
        self.from_guest.forward(self.backlog.len() as u32);
        self.backlog = VecDeque::new();
    }

    fn is_drained(&self) -> bool {
        self.host_deaf || self.backlog.is_empty()
    }

    /// Writes what the socket takes of the backlog.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, self.backlog.as_slices().0, flags) {
                Ok(taken) => {
                    self.backlog.drain(..taken);
                    self.from_guest.forward(taken as u32);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => return self.host_goes_deaf(),
            }
        }
        // A burst's allocation is not kept by a connection that is idle.
        self.backlog = VecDeque::new();
        if self.guest.contains(Shutdown::SEND) {
            // A socket that is dead already needs none.
            let _ = rustix::net::shutdown(&self.socket, Half::Write);
        }
    }

    /// What the socket is to be polled for; `None` for not at all.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let wants = |wanted: bool, set: EventSet| if wanted { set } else { EventSet::empty() };
        let set = match self.state {
            State::Greeting(_) => EventSet::IN,
            State::Requesting { .. } => EventSet::empty(),
            State::Open => {
                wants(self.reads() && !self.readable, EventSet::IN)
                    | wants(!self.backlog.is_empty(), EventSet::OUT)
            }
            State::Closing => return None,
            State::Lingering => EventSet::OUT,
        };
        // A hang-up is always reported, so without it even an empty set tells of the peer's death.
        if self.hung_up && set.is_empty() { None } else { Some(set) }
    }

    /// The host may have more for a guest that takes it.
    fn reads(&self) -> bool {
        !self.host_sent_all && !self.guest.contains(Shutdown::RCV)
    }

    // The guest's side.

    /// A packet of the guest; its payload is `pieces[start..]`, as long as the header says. `Op::Request` does not come here.
    pub(super) fn packet(
        &mut self,
        op: Op,
        header: &Header,
        pieces: &mut [VolatileSlice<'_>],
        start: usize,
    ) -> After {
        match (&self.state, op) {
            (State::Closing, Op::Rst) => return After::Free,
            // Sent before the guest had our SHUTDOWN.
            (State::Closing, _) => return After::Keep,
            (State::Open, Op::Rst) => {
                let in_order = self.guest.contains(Shutdown::SEND);
                return if in_order { After::Gone } else { After::Free };
            }
            (State::Requesting { sent: true }, Op::Rst) => return After::Refuse(Refusal::GuestRefused),
            (State::Requesting { sent: true }, Op::Response) => {
                self.to_guest.update(header.buf_alloc, header.fwd_cnt);
                return self.open();
            }
            (State::Open, Op::Shutdown | Op::Rw | Op::CreditUpdate | Op::CreditRequest) => {}
            _ => return After::Refuse(Refusal::OutOfState),
        }
        self.to_guest.update(header.buf_alloc, header.fwd_cnt);
        match op {
            Op::Rw => self.data(header.len, pieces, start),
            Op::Shutdown => self.guest_shuts(Shutdown::from_bits_truncate(header.flags)),
            Op::CreditRequest => {
                self.from_guest.ask();
                After::Keep
            }
            _ => After::Keep,
        }
    }

    /// The guest accepted: the client is told.
    fn open(&mut self) -> After {
        let line = format!("OK {}\n", self.key.host);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::send(&self.socket, line.as_bytes(), flags) {
            Ok(taken) if taken == line.len() => {
                self.state = State::Open;
                After::Keep
            }
            // It has gone: nothing was ever sent to it, so there is room for a line.
            _ => After::Reset,
        }
    }

    fn guest_shuts(&mut self, flags: Shutdown) -> After {
        self.guest |= flags;
        if flags.contains(Shutdown::RCV) {
            let _ = rustix::net::shutdown(&self.socket, Half::Read);
            self.host_sent_all |= self.hung_up;
        }
        if self.guest.is_all() {
            return After::Reset;
        }
        if flags.contains(Shutdown::SEND) {
            self.flush();
        }
        After::Keep
    }

    /// The connection is over for the guest, and its key is free. True when there is a backlog to deliver first.
    pub(super) fn linger(&mut self) -> bool {
        let lingers = matches!(self.state, State::Open) && !self.is_drained();
        if lingers {
            self.state = State::Lingering;
            // A client that writes first and reads later must not wait for us.
            let _ = rustix::net::shutdown(&self.socket, Half::Read);
        }
        lingers
    }

    fn data(&mut self, len: u32, pieces: &mut [VolatileSlice<'_>], mut start: usize) -> After {
        if self.guest.contains(Shutdown::SEND) {
            return After::Refuse(Refusal::OutOfState);
        }
        if !self.from_guest.receive(len) {
            return After::Refuse(Refusal::OverCredit);
        }
        let mut left = len as usize;
        while left > 0 && !self.host_deaf && self.backlog.is_empty() {
            match sys::send(self.fd(), &pieces[start..], left) {
                Ok(taken) => {
                    take_front(pieces, &mut start, taken, |_| ());
                    left -= taken;
                    self.from_guest.forward(taken as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_goes_deaf(),
            }
        }
        if self.host_deaf {
            self.from_guest.forward(left as u32);
            return After::Keep;
        }
        let backlog = &mut self.backlog;
        take_front(pieces, &mut start, left, |piece| {
            let mut chunk = [0; CHUNK];
            let mut at = 0;
            while at < piece.len() {
                let Ok(rest) = piece.offset(at) else { return };
                let copied = rest.copy_to(&mut chunk[..]);
                backlog.extend(&chunk[..copied]);
                at += copied;
            }
        });
        After::Keep
    }

    /// What the guest is to be told of the host's shutting down.
    fn due(&self) -> Shutdown {
        let mut due = Shutdown::empty();
        due.set(Shutdown::SEND, self.host_sent_all);
        due.set(Shutdown::RCV, self.host_deaf);
        due
    }

    /// It has a packet for the guest, or may have when the socket is read.
    pub(super) fn has_work(&self) -> bool {
        match self.state {
            State::Requesting { sent } => !sent,
            State::Open => {
                let data = self.readable && self.reads();
                self.respond
                    || self.due() != self.told
                    || self.from_guest.must_tell()
                    || (data && (self.to_guest.free() > 0 || self.to_guest.must_ask()))
            }
            State::Greeting(_) | State::Closing | State::Lingering => false,
        }
    }

    /// The next packet for the guest. Payload goes into `room`, which holds `bytes` > 0 bytes.
    pub(super) fn produce(&mut self, room: &[VolatileSlice<'_>], bytes: usize) -> Option<Outgoing> {
        match &mut self.state {
            State::Requesting { sent: sent @ false } => {
                *sent = true;
                return Some(self.outgoing(Op::Request, 0, 0));
            }
            State::Open => {}
            _ => return None,
        }
        if std::mem::take(&mut self.respond) {
            return Some(self.outgoing(Op::Response, 0, 0));
        }
        let data = self.readable && self.reads() && self.to_guest.free() > 0;
        // A host that has gone has little left: both ends are told at once behind it.
        if !(data && self.hung_up)
            && let Some(shutdown) = self.tell_shutdown()
        {
            return Some(shutdown);
        }
        if data {
            let len = self.read(room, bytes);
            if len > 0 {
                self.to_guest.sent(len);
                return Some(self.outgoing(Op::Rw, 0, len));
            }
            if let Some(shutdown) = self.tell_shutdown() {
                return Some(shutdown);
            }
        }
        if self.readable && self.reads() && self.to_guest.must_ask() {
            self.to_guest.asked();
            return Some(self.outgoing(Op::CreditRequest, 0, 0));
        }
        self.from_guest.must_tell().then(|| self.outgoing(Op::CreditUpdate, 0, 0))
    }

    /// SHUTDOWN, if the guest does not know all that is due.
    fn tell_shutdown(&mut self) -> Option<Outgoing> {
        if self.due() == self.told {
            return None;
        }
        self.told = self.due();
        if self.told.is_all() {
            self.state = State::Closing;
        }
        Some(self.outgoing(Op::Shutdown, self.told.bits(), 0))
    }

    fn outgoing(&mut self, op: Op, flags: u32, len: u32) -> Outgoing {
        Outgoing { op, flags, len, fwd_cnt: self.from_guest.tell() }
    }

    /// Reads from the socket into the guest's buffer: as much as fits and the guest has credit for.
    fn read(&mut self, room: &[VolatileSlice<'_>], bytes: usize) -> u32 {
        let max = bytes.min(self.to_guest.free() as usize);
        loop {
            match sys::recv(self.fd(), room, max) {
                Ok(0) => self.host_sent_all = true,
                Ok(len) => {
                    // A short read has taken all there was; if more comes, or the end, the poll will tell.
                    self.readable = len == max;
                    return len as u32;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                // The peer closed without reading all (ECONNRESET): it is gone.
                Err(_) => {
                    self.host_sent_all = true;
                    self.host_goes_deaf();
                }
            }
            return 0;
        }
    }
}
