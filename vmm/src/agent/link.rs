//! A connection to an agent: frames out of what arrives, and frames into what leaves.
//!
//! The descriptor does not block. Nothing of what arrives is believed: a length above the limit, an unknown kind, another version end
//! the connection with an error that says so. At most two frames' worth is held of what arrives; what leaves is bounded by who
//! queues it (windows for streams, one frame at a time for copies).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::error::{AgentError, failure, local};
use super::tree;
use super::wire::{self, Failure, HEAD, Kind, MAX_FRAME, VERSION};

/// How much is read at once, in bytes: two frames.
const CHUNK: usize = 2 * (HEAD + MAX_FRAME);

/// A connection with its buffers.
#[derive(Debug)]
pub(super) struct Link {
    fd: OwnedFd,
    incoming: Vec<u8>,
    /// How much of `incoming` has been taken.
    taken: usize,
    outgoing: Vec<u8>,
    sent: usize,
    /// The agent's first byte has come.
    greeted: bool,
    /// Nothing can be sent any more; what was said before that may still be there to read.
    deaf: bool,
    /// A copy makes some progress within this time.
    pub(super) patience: Duration,
    /// What a copy left out: path and reason.
    pub(super) skipped: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The most left-out files that are named.
const MAX_NAMED: usize = 100;

impl Link {
    /// A link over a connection that nothing has been sent on.
    pub(super) fn new(fd: OwnedFd, patience: Duration) -> Result<Self, AgentError> {
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|errno| local("use the connection to the agent")(errno.into()))?;
        let (incoming, outgoing) = (Vec::new(), vec![VERSION]);
        Ok(Self {
            fd,
            incoming,
            taken: 0,
            outgoing,
            sent: 0,
            greeted: false,
            deaf: false,
            patience,
            skipped: Vec::new(),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Queues a frame.
    pub(super) fn queue(&mut self, kind: Kind, payload: &[u8]) {
        self.outgoing.extend(wire::head(kind, payload.len()));
        self.outgoing.extend(payload);
    }

    /// Bytes that wait to be sent.
    pub(super) fn queued(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Sends what can be sent now.
    pub(super) fn try_flush(&mut self) -> Result<(), AgentError> {
        while self.queued() > 0 {
            match rustix::net::send(&self.fd, &self.outgoing[self.sent..], SendFlags::NOSIGNAL) {
                Ok(length) => self.sent += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => {
                    self.deaf = true;
                    break;
                }
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// Reads what has arrived.
    pub(super) fn fill(&mut self) -> Result<(), AgentError> {
        self.incoming.drain(..self.taken);
        self.taken = 0;
        let length = self.incoming.len();
        self.incoming.resize(length.max(CHUNK), 0);
        let answer = rustix::io::read(&self.fd, &mut self.incoming[length..]);
        self.incoming.truncate(length + *answer.as_ref().unwrap_or(&0));
        match answer {
            Ok(0) => Err(AgentError::Ended),
            Ok(_) => self.greet(),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(AgentError::Ended),
        }
    }

    /// Takes the version off the front.
    fn greet(&mut self) -> Result<(), AgentError> {
        if self.greeted {
            return Ok(());
        }
        match self.incoming.first() {
            Some(&VERSION) => {
                (self.greeted, self.taken) = (true, 1);
                Ok(())
            }
            Some(&theirs) => Err(AgentError::Version { theirs }),
            None => Ok(()),
        }
    }

    /// The next frame, if it is whole. `Failed` is an error.
    pub(super) fn take(&mut self) -> Result<Option<(Kind, &[u8])>, AgentError> {
        if !self.greeted {
            return Ok(None);
        }
        let parsed = wire::parse(&self.incoming[self.taken..], MAX_FRAME).map_err(refused)?;
        let Some((kind, payload, length)) = parsed else { return Ok(None) };
        self.taken += length;
        if kind == Kind::Failed {
            let failed = Failure::decode(kind, payload).map_err(refused)?;
            return Err(AgentError::Guest(failure(&failed)));
        }
        Ok(Some((kind, payload)))
    }

    /// Waits until the connection can be read, or, if something is queued and `to_write`, written: what can be done.
    fn wait(&self, to_write: bool, deadline: Instant, patience: Duration) -> Result<PollFlags, AgentError> {
        let flags =
            if to_write && self.queued() > 0 { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
            let mut fds = [PollFd::new(&self.fd, flags)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Err(AgentError::NoAnswer { seconds: patience.as_secs() }),
                Ok(_) => return Ok(fds[0].revents()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(local("wait for the agent")(errno.into())),
            }
        }
    }

    /// Sends what is queued and waits for the next frame, at most `patience`: its kind and payload.
    pub(super) fn answer(&mut self, patience: Duration) -> Result<(Kind, Vec<u8>), AgentError> {
        let deadline = Instant::now() + patience;
        loop {
            self.try_flush()?;
            if let Some((kind, payload)) = self.take()? {
                return Ok((kind, payload.to_vec()));
            }
            if self.wait(true, deadline, patience)?.intersects(!PollFlags::OUT) {
                self.fill()?;
            }
        }
    }

    /// Sends everything that is queued, listening meanwhile: the agent says early that it can't go on.
    pub(super) fn flush(&mut self) -> Result<(), AgentError> {
        loop {
            self.try_flush()?;
            if self.queued() == 0 && !self.deaf {
                return Ok(());
            }
            if self.wait(true, Instant::now() + self.patience, self.patience)?.intersects(!PollFlags::OUT) {
                self.fill()?;
                if let Some((kind, _)) = self.take()? {
                    return Err(AgentError::Protocol(format!("a {kind:?} frame out of turn")));
                }
            }
        }
    }
}

/// What the agent sent is no protocol.
pub(super) fn refused(refused: wire::Refused) -> AgentError {
    AgentError::Protocol(refused.to_string())
}

impl tree::Link for Link {
    type Error = AgentError;

    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), AgentError> {
        self.queue(kind, payload);
        if self.queued() >= MAX_FRAME || kind == Kind::End {
            self.flush()?;
        }
        Ok(())
    }

    fn receive(&mut self, payload: &mut [u8]) -> Result<(Kind, usize), AgentError> {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some((kind, bytes)) = self.take()? {
                // Both have room for a frame of the largest size.
                payload[..bytes.len()].copy_from_slice(bytes);
                return Ok((kind, bytes.len()));
            }
            self.wait(false, deadline, self.patience)?;
            self.fill()?;
        }
    }

    fn skipped(&mut self, path: &[u8], why: &[u8]) {
        if self.skipped.len() < MAX_NAMED {
            self.skipped.push((path.to_vec(), why.to_vec()));
        }
    }
}
