//! The connection to the host: frames out of what arrives, and frames into what leaves.
//!
//! The descriptor does not block. Arriving bytes wait in the inbox until their frame is whole; leaving ones in the outbox, which
//! holds one full frame and a few small ones. Nothing else is buffered: who fills the outbox first waits until it is empty.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

use crate::tree;
use crate::wire::{self, Encoder, Failure, HEAD, Kind, MAX_FRAME, MAX_REQUEST, Refused, VERSION};

/// A host that connects sends its request at once; nobody waits longer for it.
const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
/// Room for two full frames.
const INBOX: usize = 2 * (HEAD + MAX_FRAME);
/// Room behind a full frame for the small ones.
const SMALL: usize = 64;

/// The connection can't be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The host has closed it.
    Gone,
    /// The host sent what it may not.
    Nonsense,
}

impl From<Refused> for Broken {
    fn from(_: Refused) -> Self {
        Self::Nonsense
    }
}

/// A connection with its buffers: 0.1 MB.
pub(crate) struct Link {
    fd: OwnedFd,
    inbox: [u8; INBOX],
    start: usize,
    end: usize,
    outbox: [u8; 1 + HEAD + MAX_FRAME + SMALL],
    sent: usize,
    queued: usize,
}

impl Link {
    /// A link over this connection, which must not block; our version is the first thing to leave.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let (inbox, mut outbox) = ([0; INBOX], [0; 1 + HEAD + MAX_FRAME + SMALL]);
        outbox[0] = VERSION;
        Self { fd, inbox, start: 0, end: 0, outbox, sent: 0, queued: 1 }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads what has arrived.
    pub(crate) fn fill(&mut self) -> Result<(), Broken> {
        if self.start > 0 {
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match rustix::io::read(&self.fd, self.inbox.get_mut(self.end..).unwrap_or_default()) {
            Ok(0) => Err(Broken::Gone),
            Ok(length) => {
                self.end += length;
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(Broken::Gone),
        }
    }

    /// The next frame, if it is whole.
    pub(crate) fn take(&mut self) -> Result<Option<(Kind, &[u8])>, Broken> {
        let bytes = self.inbox.get(self.start..self.end).unwrap_or_default();
        let Some((kind, payload, length)) = wire::parse(bytes, MAX_FRAME)? else { return Ok(None) };
        self.start += length;
        Ok(Some((kind, payload)))
    }

    /// Waits for the host's version and its request, whose payload is put into `room`.
    pub(crate) fn request<'r>(
        &mut self,
        room: &'r mut [u8; MAX_REQUEST],
    ) -> Result<(Kind, &'r [u8]), Broken> {
        let mut start = [0; 1 + HEAD];
        self.exact(&mut start)?;
        let [version, head @ ..] = start;
        if version != VERSION {
            // Ours goes out: the host sees the difference and says so.
            self.flush()?;
            return Err(Broken::Nonsense);
        }
        wire::parse(&head, MAX_REQUEST)?;
        let [kind, length @ ..] = head;
        let kind = Kind::from_byte(kind).ok_or(Broken::Nonsense)?;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        let payload = room.get_mut(..length).ok_or(Broken::Nonsense)?;
        self.exact(payload)?;
        Ok((kind, payload))
    }

    /// Reads exactly so many bytes, before anything was read into the inbox.
    fn exact(&mut self, mut room: &mut [u8]) -> Result<(), Broken> {
        while !room.is_empty() {
            if !wait(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&PATIENCE)) {
                return Err(Broken::Gone);
            }
            match rustix::io::read(&self.fd, &mut *room) {
                Ok(0) => return Err(Broken::Gone),
                Ok(length) => room = room.get_mut(length..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return Err(Broken::Gone),
            }
        }
        Ok(())
    }

    /// Whether everything queued has left.
    pub(crate) fn is_flushed(&self) -> bool {
        self.sent == self.queued
    }

    /// Queues a frame that is small, or that follows an empty outbox; false if there is no room for it now.
    pub(crate) fn queue(&mut self, kind: Kind, payload: &[u8]) -> bool {
        let end = self.queued + HEAD + payload.len();
        let Some(room) = self.outbox.get_mut(self.queued..end) else { return false };
        let (head, body) = room.split_at_mut(HEAD);
        head.copy_from_slice(&wire::head(kind, payload.len()));
        body.copy_from_slice(payload);
        self.queued = end;
        true
    }

    /// Reads once, at most `limit` bytes, from `source` straight into a frame: how many.
    /// The outbox must be flushed.
    pub(crate) fn queue_from(
        &mut self,
        kind: Kind,
        source: BorrowedFd<'_>,
        limit: usize,
    ) -> Result<usize, Errno> {
        let start = self.queued + HEAD;
        let room = self.outbox.get_mut(start..start + limit.min(MAX_FRAME)).ok_or(Errno::AGAIN)?;
        let length = rustix::io::read(source, room)?;
        if length > 0 {
            let head = self.outbox.get_mut(self.queued..start).ok_or(Errno::AGAIN)?;
            head.copy_from_slice(&wire::head(kind, length));
            self.queued = start + length;
        }
        Ok(length)
    }

    /// Sends what can be sent now.
    pub(crate) fn try_flush(&mut self) -> Result<(), Broken> {
        while !self.is_flushed() {
            match rustix::io::write(&self.fd, self.outbox.get(self.sent..self.queued).unwrap_or_default()) {
                Ok(length) => self.sent += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Broken::Gone),
            }
        }
        (self.sent, self.queued) = (0, 0);
        Ok(())
    }

    /// Sends everything.
    pub(crate) fn flush(&mut self) -> Result<(), Broken> {
        loop {
            self.try_flush()?;
            if self.is_flushed() {
                return Ok(());
            }
            wait(&mut [PollFd::new(&self.fd, PollFlags::OUT)], None);
        }
    }

    /// Sends a frame, after everything that was queued.
    pub(crate) fn say(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Broken> {
        self.flush()?;
        self.queue(kind, payload);
        self.flush()
    }

    /// Says that the request failed, and reads on until the host closes: bytes that nobody has read could make
    /// the close overtake the message.
    pub(crate) fn fail(&mut self, errno: Option<Errno>, doing: &[u8]) -> Result<(), Broken> {
        let mut payload = [0; 1024];
        let cut = doing.get(..doing.len().min(1000)).unwrap_or_default();
        let mut encoder = Encoder::new(&mut payload);
        Failure { errno: errno_number(errno), doing: cut }.encode(&mut encoder);
        let length = encoder.finish(Kind::Failed)?;
        self.say(Kind::Failed, payload.get(..length).unwrap_or_default())?;
        self.drain()
    }

    /// Everything has been said: reads and discards until the host closes, for a while.
    pub(crate) fn drain(&mut self) -> Result<(), Broken> {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
        loop {
            (self.start, self.end) = (0, 0);
            if !wait(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&PATIENCE)) || self.fill().is_err() {
                return Ok(());
            }
        }
    }
}

/// The number that goes over the wire.
pub(crate) fn errno_number(errno: Option<Errno>) -> u16 {
    errno.and_then(|errno| u16::try_from(errno.raw_os_error()).ok()).unwrap_or(0)
}

/// Waits until something is ready; false after the time-out.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> bool {
    loop {
        match poll(fds, timeout) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            // Out of memory in the kernel: what is tried next will tell.
            Err(_) => return true,
        }
    }
}

impl tree::Link for Link {
    type Error = Broken;

    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Broken> {
        // Filled before it is flushed: a frame's head alone would be a packet of its own.
        if !self.queue(kind, payload) {
            self.say(kind, payload)?;
        }
        match kind {
            Kind::End => self.flush(),
            _ => self.try_flush(),
        }
    }

    fn receive(&mut self, payload: &mut [u8]) -> Result<(Kind, usize), Broken> {
        loop {
            if let Some((kind, bytes)) = self.take()? {
                payload.get_mut(..bytes.len()).ok_or(Broken::Nonsense)?.copy_from_slice(bytes);
                return Ok((kind, bytes.len()));
            }
            wait(&mut [PollFd::new(&self.fd, PollFlags::IN)], None);
            self.fill()?;
        }
    }

    fn skipped(&mut self, _path: &[u8], _why: &[u8]) {
        // The host counts and names them itself, from the same entries.
    }
}

/// Joins words into a message.
pub(crate) fn words<const N: usize>(parts: &[&[u8]]) -> crate::text::Text<N> {
    let mut text = crate::text::Text::new();
    for part in parts {
        text.push_cut(part);
    }
    text
}
