//! Standard input and output, joined to a stream: a console, or a connection into a guest.
//!
//! The end of the input is passed on, and output goes on; the end of the stream is the end. Nothing is read that could not
//! be passed on at once.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use vmm::console::{Escape, Key};

const CHUNK: usize = 64 << 10;

/// What the joining was ended by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The other end has closed.
    Closed,
    /// It has closed without a word, before we had said anything, or all that we had to.
    Refused,
    /// The escape was typed.
    Detached,
    /// Nobody takes our output any more.
    NoReader,
}

/// What one turn found.
enum Turn {
    GoOn,
    End(Ended),
}

struct Relay<'a> {
    stream: &'a UnixStream,
    escape: Option<Escape>,
    /// Called when ctrl-A x is typed, which stops machines elsewhere and must not here.
    on_quit: &'a dyn Fn(),
    /// Typed and not sent yet.
    pending: Vec<u8>,
    input: bool,
    /// Something has come from the other end.
    heard: bool,
    /// Something went there.
    said: bool,
}

/// Joins `stream` until one of them ends. With `escape`, ctrl-A d detaches.
pub(crate) fn relay(stream: &UnixStream, escape: Option<Escape>, on_quit: &dyn Fn()) -> io::Result<Ended> {
    stream.set_nonblocking(true)?;
    let mut relay =
        Relay { stream, escape, on_quit, pending: Vec::new(), input: true, heard: false, said: false };
    let stdin = io::stdin();
    loop {
        let mut stream_wants = PollFlags::IN;
        stream_wants.set(PollFlags::OUT, !relay.pending.is_empty());
        let mut fds = vec![PollFd::from_borrowed_fd(stream.as_fd(), stream_wants)];
        if relay.input && relay.pending.is_empty() {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<_> = fds.iter().map(PollFd::revents).collect();
        if ready[0].intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
            && let Turn::End(ended) = relay.output()?
        {
            return Ok(ended);
        }
        if ready.get(1).is_some_and(|events| !events.is_empty())
            && let Turn::End(ended) = relay.take_input()?
        {
            return Ok(ended);
        }
        relay.send()?;
    }
}

impl Relay<'_> {
    /// From the stream to standard output.
    fn output(&mut self) -> io::Result<Turn> {
        let mut chunk = [0; CHUNK];
        let len = match self.stream.read(&mut chunk) {
            Ok(0) if !self.heard && (self.input || !self.said) => return Ok(Turn::End(Ended::Refused)),
            Ok(0) => return Ok(Turn::End(Ended::Closed)),
            Ok(len) => len,
            Err(error) if is_later(&error) => return Ok(Turn::GoOn),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Ok(Turn::End(if self.heard { Ended::Closed } else { Ended::Refused }));
            }
            Err(error) => return Err(error),
        };
        self.heard = true;
        let mut out = io::stdout().lock();
        match out.write_all(&chunk[..len]).and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Turn::End(Ended::NoReader)),
            other => other.map(|()| Turn::GoOn),
        }
    }

    fn take_input(&mut self) -> io::Result<Turn> {
        let mut chunk = [0; CHUNK];
        // Not through std's buffer, which would hold bytes that poll does not see.
        let len = match rustix::io::read(io::stdin(), &mut chunk) {
            Ok(len) => len,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(Turn::GoOn),
            Err(rustix::io::Errno::IO) => 0, // The terminal is gone.
            Err(error) => return Err(error.into()),
        };
        if len == 0 {
            self.input = false;
            // It fails when the other end is gone, which is told to `output`.
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
        let Some(escape) = &mut self.escape else {
            self.pending.extend_from_slice(&chunk[..len]);
            return Ok(Turn::GoOn);
        };
        for byte in &chunk[..len] {
            match escape.key(*byte) {
                Key::Detach => return Ok(Turn::End(Ended::Detached)),
                Key::Quit => (self.on_quit)(),
                key @ Key::Send(..) => self.pending.extend(key.bytes()),
            }
        }
        Ok(Turn::GoOn)
    }

    /// Sends what the stream takes now.
    fn send(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            match self.stream.write(&self.pending) {
                Ok(sent) => {
                    self.said = true;
                    self.pending.drain(..sent);
                }
                Err(error) if is_later(&error) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    // It reads no more; what it has still to say is read.
                    self.pending.clear();
                    self.input = false;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
