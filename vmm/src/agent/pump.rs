//! The host's end of a command: one loop that polls the connection, the streams and what the caller wants.
//!
//! **Windows.** Of each output at most [`WINDOW`] bytes are under way or held here: the agent sends on when what came has been
//! written. So a reader that is slow stops its stream at the command, the other stream flows on, and a hostile agent
//! that sends more is cut off. Standard input is read only while the agent has room for it.
//!
//! **Order.** Nothing but `Started` or `NotStarted` comes first, nothing follows the end of a stream, `Exit` ends it all:
//! anything else is [`AgentError::Protocol`].

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::termios::tcgetwinsize;

use super::client::ANSWER;
use super::error::{AgentError, failure, local};
use super::exec::ExitStatus;
use super::link::{Link, refused};
use super::wire::{self, Exit, Failure, Kind, MAX_FRAME, WINDOW};
use crate::deadline;

/// What poll's readiness of a descriptor that blocks is good for: a pipe has room for as much (PIPE_BUF).
const SURE: usize = 4096;
/// Beyond this nothing more is queued for an agent that does not read.
const ENOUGH: usize = 2 * MAX_FRAME;

/// Where standard input comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// A descriptor.
    Fd(OwnedFd),
    /// Bytes, of which so many have been sent.
    Bytes(Vec<u8>, usize),
    /// Its end has been told.
    Ended,
}

impl Source {
    pub(super) fn bytes(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes, 0)
    }

    /// A descriptor that others have too.
    pub(super) fn shared(fd: OwnedFd) -> Self {
        Self::Fd(fd)
    }

    /// A pipe of ours.
    pub(super) fn pipe(fd: OwnedFd) -> Result<Self, AgentError> {
        not_blocking(&fd).map(|()| Self::Fd(fd))
    }
}

/// Where an output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// A descriptor, and how much is written to it at once.
    Fd(OwnedFd, usize),
    /// Memory, up to a limit.
    Capture {
        /// What came.
        bytes: Vec<u8>,
        /// How much may come.
        limit: usize,
    },
    /// Nobody reads it any more.
    Closed,
}

impl Sink {
    /// A descriptor that others have too: it may block.
    pub(super) fn shared(fd: OwnedFd) -> Self {
        Self::Fd(fd, SURE)
    }

    /// A pipe of ours.
    pub(super) fn pipe(fd: OwnedFd) -> Result<Self, AgentError> {
        not_blocking(&fd).map(|()| Self::Fd(fd, MAX_FRAME))
    }
}

fn not_blocking(fd: &OwnedFd) -> Result<(), AgentError> {
    rustix::io::ioctl_fionbio(fd, true).map_err(|errno| local("use a pipe")(errno.into()))
}

/// One of the command's outputs.
#[derive(Debug)]
struct Stream {
    kind: Kind,
    sink: Sink,
    /// What came and has not been written.
    held: VecDeque<u8>,
    /// What came and has not been given back to the agent's window.
    under_way: usize,
    /// What of it was written, or thrown away.
    owed: usize,
    /// The agent has told its end.
    ended: bool,
    /// That nobody reads it is still to be told.
    owes_closed: bool,
}

impl Stream {
    fn new(kind: Kind, sink: Sink) -> Self {
        Self { kind, sink, held: VecDeque::new(), under_way: 0, owed: 0, ended: false, owes_closed: false }
    }

    fn take(&mut self, payload: &[u8]) -> Result<(), AgentError> {
        if self.ended {
            return Err(AgentError::Protocol(format!("{:?} after its end", self.kind)));
        }
        if payload.is_empty() {
            self.ended = true;
            return Ok(());
        }
        self.under_way += payload.len();
        if self.under_way > WINDOW {
            return Err(AgentError::Protocol(format!("more {:?} than its window", self.kind)));
        }
        match &mut self.sink {
            Sink::Fd(..) => self.held.extend(payload),
            Sink::Closed => self.owed += payload.len(),
            Sink::Capture { bytes, limit } => {
                if bytes.len() + payload.len() > *limit {
                    return Err(AgentError::OutputLimit { limit: *limit });
                }
                bytes.extend_from_slice(payload);
                self.owed += payload.len();
            }
        }
        Ok(())
    }

    /// Writes what poll says can be written.
    fn write(&mut self) {
        let Sink::Fd(fd, at_once) = &self.sink else { return };
        let (front, _) = self.held.as_slices();
        match rustix::io::write(fd, &front[..front.len().min(*at_once)]) {
            Ok(length) => {
                self.held.drain(..length);
                self.owed += length;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A pipe without readers, a terminal that has gone, a full disk: the command learns what a local one would.
            Err(_) => {
                self.owed += self.held.len();
                self.held.clear();
                self.sink = Sink::Closed;
                self.owes_closed = !self.ended;
            }
        }
    }

    /// Gives back what was taken, and tells that nobody reads.
    fn settle(&mut self, link: &mut Link) {
        if link.queued() > ENOUGH || self.ended {
            return;
        }
        if self.owes_closed {
            link.queue(Kind::Closed, &[self.kind as u8]);
            self.owes_closed = false;
        }
        if self.owed >= WINDOW / 4 || (self.owed > 0 && self.held.is_empty()) {
            let [a, b, c, d] = u32::try_from(self.owed).unwrap_or(0).to_le_bytes();
            link.queue(Kind::Window, &[self.kind as u8, a, b, c, d]);
            self.under_way -= self.owed;
            self.owed = 0;
        }
    }
}

/// What a watched descriptor means when it can be read.
#[derive(Debug)]
pub(super) enum Event {
    /// The size of this terminal may have changed.
    Resized(OwnedFd),
    /// The command gets this signal.
    Signal(u8),
    /// It carries orders; its end is the caller's farewell.
    Orders,
}

/// What a caller on another thread wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Signal(u8),
    Resize(u16, u16),
}

/// Less than PIPE_BUF: written and read whole.
const ORDER: usize = 5;

impl Order {
    pub(super) fn encode(self) -> [u8; ORDER] {
        match self {
            Self::Signal(signal) => [0, signal, 0, 0, 0],
            Self::Resize(rows, columns) => {
                let ([a, b], [c, d]) = (rows.to_le_bytes(), columns.to_le_bytes());
                [1, a, b, c, d]
            }
        }
    }

    fn decode([kind, a, b, c, d]: [u8; ORDER]) -> Self {
        match kind {
            0 => Self::Signal(a),
            _ => Self::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
        }
    }
}

/// A command that runs, and this side's ends of its streams.
#[derive(Debug)]
pub(super) struct Pump {
    link: Link,
    source: Source,
    /// How much standard input the agent has room for.
    credit: usize,
    streams: [Stream; 2],
    watched: Vec<(OwnedFd, Event)>,
    timeout: Option<(Instant, Duration)>,
    exit: Option<Exit>,
}

impl Pump {
    /// Waits until the command, whose request is queued, runs.
    pub(super) fn start(
        mut link: Link,
        source: Source,
        [stdout, stderr]: [Sink; 2],
        timeout: Option<Duration>,
        program: &str,
    ) -> Result<Self, AgentError> {
        let timeout = timeout.map(|limit| (deadline::after(limit), limit));
        match link.answer(ANSWER)? {
            (Kind::Started, _) => {}
            (Kind::NotStarted, payload) => {
                let (status, rest) = payload.split_first().unwrap_or((&126, &[]));
                let reason = failure(&Failure::decode(Kind::NotStarted, rest).map_err(refused)?);
                return Err(AgentError::NotStarted { program: program.to_owned(), status: *status, reason });
            }
            (kind, _) => return Err(AgentError::Protocol(format!("{kind:?} in answer to Exec"))),
        }
        let streams = [Stream::new(Kind::Stdout, stdout), Stream::new(Kind::Stderr, stderr)];
        Ok(Self { link, source, credit: WINDOW, streams, watched: Vec::new(), timeout, exit: None })
    }

    /// Acts on this descriptor from now on.
    pub(super) fn watch(&mut self, fd: OwnedFd, event: Event) {
        self.watched.push((fd, event));
    }

    /// What was captured of standard output and standard error.
    pub(super) fn captured(self) -> [Vec<u8>; 2] {
        self.streams.map(|stream| match stream.sink {
            Sink::Capture { bytes, .. } => bytes,
            Sink::Fd(..) | Sink::Closed => Vec::new(),
        })
    }

    /// Carries everything both ways until the command has ended and its output is written.
    pub(super) fn run(&mut self) -> Result<ExitStatus, AgentError> {
        loop {
            self.obey_all()?;
            if let Some(exit) = self.exit.filter(|_| self.streams.iter().all(|stream| stream.held.is_empty()))
            {
                return Ok(ExitStatus::new(exit));
            }
            for stream in &mut self.streams {
                stream.settle(&mut self.link);
            }
            self.link.try_flush()?;
            // What is at hand wakes nobody: it is sent until the agent, or the connection, has no room.
            while self.feed_bytes() {
                self.link.try_flush()?;
            }
            self.turn()?;
        }
    }

    fn wants_stdin(&self) -> bool {
        self.exit.is_none() && self.credit > 0 && self.link.queued() == 0
    }

    /// Waits for something and does it.
    fn turn(&mut self) -> Result<(), AgentError> {
        let connection = match (&self.exit, self.link.queued()) {
            (Some(_), _) => PollFlags::empty(),
            (None, 0) => PollFlags::IN,
            (None, _) => PollFlags::IN | PollFlags::OUT,
        };
        let mut fds = vec![PollFd::from_borrowed_fd(self.link.fd(), connection)];
        let stdin = match &self.source {
            Source::Fd(fd) if self.wants_stdin() => Some(fd),
            _ => None,
        };
        fds.extend(stdin.map(|fd| PollFd::new(fd, PollFlags::IN)));
        let mut written = Vec::new();
        for (at, stream) in self.streams.iter().enumerate() {
            if let (Sink::Fd(fd, _), false) = (&stream.sink, stream.held.is_empty()) {
                written.push(at);
                fds.push(PollFd::new(fd, PollFlags::OUT));
            }
        }
        fds.extend(self.watched.iter().map(|(fd, _)| PollFd::new(fd, PollFlags::IN)));
        self.poll(&mut fds)?;
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>().into_iter();
        let readable = fds[0].revents().intersects(!PollFlags::OUT) && self.exit.is_none();
        ready.next();
        let stdin = stdin.is_some() && ready.next() == Some(true);
        let written: Vec<usize> = written.into_iter().filter(|_| ready.next() == Some(true)).collect();
        let knocked: Vec<usize> = (0..self.watched.len()).filter(|_| ready.next() == Some(true)).collect();
        for at in written {
            self.streams[at].write();
        }
        if stdin {
            self.read_stdin()?;
        }
        for at in knocked.into_iter().rev() {
            self.attend(at)?;
        }
        if readable {
            self.link.fill()?;
        }
        Ok(())
    }

    fn poll(&self, fds: &mut [PollFd<'_>]) -> Result<(), AgentError> {
        let left = self.timeout.map(|(deadline, _)| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 }));
        match (poll(fds, left.as_ref()), self.timeout) {
            (Ok(0), Some((deadline, limit))) if Instant::now() >= deadline => {
                Err(AgentError::TimedOut { seconds: limit.as_secs_f64() })
            }
            (Ok(_) | Err(Errno::INTR), _) => Ok(()),
            (Err(errno), _) => Err(local("wait for the command")(errno.into())),
        }
    }

    /// Queues a frame of standard input that is at hand; false if there is none, or no room for it.
    fn feed_bytes(&mut self) -> bool {
        if !self.wants_stdin() {
            return false;
        }
        let Source::Bytes(bytes, sent) = &mut self.source else { return false };
        let length = (bytes.len() - *sent).min(MAX_FRAME).min(self.credit);
        self.link.queue(Kind::Stdin, &bytes[*sent..*sent + length]);
        *sent += length;
        self.credit -= length;
        if length == 0 {
            self.source = Source::Ended;
        }
        true
    }

    fn read_stdin(&mut self) -> Result<(), AgentError> {
        let Source::Fd(fd) = &self.source else { return Ok(()) };
        let mut room = [0; MAX_FRAME];
        let limit = self.credit.min(MAX_FRAME);
        let length = match rustix::io::read(fd, &mut room[..limit]) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            // A terminal whose session has ended answers EIO: nothing more comes.
            Err(Errno::IO) => 0,
            Err(errno) => return Err(local("read standard input")(errno.into())),
        };
        self.link.queue(Kind::Stdin, &room[..length]);
        self.credit -= length;
        if length == 0 {
            self.source = Source::Ended;
        }
        Ok(())
    }

    /// Does what a watched descriptor asks for.
    fn attend(&mut self, at: usize) -> Result<(), AgentError> {
        let (fd, event) = &self.watched[at];
        let mut room = [0; 16 * ORDER];
        let length = match rustix::io::read(fd, &mut room) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => 0,
        };
        let mut orders = Vec::new();
        match event {
            Event::Orders if length == 0 => return Err(AgentError::Ended),
            Event::Orders => {
                let (whole, _) = room[..length].as_chunks::<ORDER>();
                orders.extend(whole.iter().copied().map(Order::decode));
            }
            Event::Signal(signal) if length > 0 => orders.push(Order::Signal(*signal)),
            Event::Resized(terminal) if length > 0 => {
                if let Ok(size) = tcgetwinsize(terminal.as_fd()) {
                    orders.push(Order::Resize(size.ws_row, size.ws_col));
                }
            }
            Event::Signal(_) | Event::Resized(_) => drop(self.watched.remove(at)),
        }
        for order in orders.into_iter().filter(|_| self.exit.is_none()) {
            let [kind, payload @ ..] = order.encode();
            match kind {
                0 => self.link.queue(Kind::Signal, &payload[..1]),
                _ => self.link.queue(Kind::Resize, &payload),
            }
        }
        Ok(())
    }

    /// Everything that has arrived whole.
    fn obey_all(&mut self) -> Result<(), AgentError> {
        while self.exit.is_none() {
            let Some((kind, payload)) = self.link.take()? else { break };
            match kind {
                Kind::Stdout => self.streams[0].take(payload)?,
                Kind::Stderr => self.streams[1].take(payload)?,
                Kind::Window => {
                    let (stream, bytes) = wire::decode_window(payload).map_err(refused)?;
                    if stream != Kind::Stdin {
                        return Err(AgentError::Protocol(format!("a window of {stream:?}")));
                    }
                    self.credit = (self.credit + bytes).min(WINDOW);
                }
                // The writer of our source learns it when the source is closed.
                Kind::Closed => self.source = Source::Ended,
                Kind::Exit => self.exit = Some(Exit::decode(payload).map_err(refused)?),
                other => return Err(AgentError::Protocol(format!("{other:?} while a command runs"))),
            }
        }
        Ok(())
    }
}
