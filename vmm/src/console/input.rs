//! From a descriptor to the guest's COM1, on the I/O thread.
//!
//! At most [`CHUNK`] bytes are read ahead. While some of them wait for the guest, the descriptor is not polled; when the
//! UART announces room ([`Serial::room`]), they are passed on and polling goes on. A regular file or `/dev/null` cannot
//! be polled; it is read whenever there is room instead.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::serial::Serial;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{Escape, Key};

/// Most bytes that are read ahead of the guest.
pub const CHUNK: usize = 64;

/// How the source is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Its readability is polled.
    Polled,
    /// It is not polled, since bytes from it wait for the guest.
    Paused,
    /// It cannot be polled: it is read whenever there is room.
    Unpollable,
    /// Its end was reached, or reading failed.
    Ended,
}

/// What a turn ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    GoOn,
    Quit,
}

/// The subscriber. Calls `quit` when the escape is typed.
pub(crate) struct SerialInput {
    fd: OwnedFd,
    serial: Arc<Mutex<Serial>>,
    escape: Option<Escape>,
    quit: Box<dyn Fn() + Send>,
    state: Source,
    pending: Vec<u8>,
}

impl SerialInput {
    /// Input from `fd`; with `escape`, Ctrl-A x calls `quit`.
    pub(crate) fn new(
        fd: OwnedFd,
        serial: Arc<Mutex<Serial>>,
        escape: bool,
        quit: Box<dyn Fn() + Send>,
    ) -> Self {
        let escape = escape.then(Escape::default);
        Self { fd, serial, escape, quit, state: Source::Polled, pending: Vec::with_capacity(2 * CHUNK) }
    }

    fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what waits; true when nothing waits any more.
    fn flush(&mut self) -> bool {
        if !self.pending.is_empty() {
            let taken = self.serial().input(&self.pending);
            self.pending.drain(..taken);
        }
        self.pending.is_empty()
    }

    /// Reads once and passes on what the guest takes.
    fn read(&mut self) -> Turn {
        let mut chunk = [0; CHUNK];
        let len = match rustix::io::read(&self.fd, &mut chunk) {
            Ok(0) => {
                self.state = Source::Ended;
                return Turn::GoOn;
            }
            Ok(len) => len,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Turn::GoOn,
            Err(e) => {
                tracing::info!(error = %e, "the console's input failed; the machine goes on without");
                self.state = Source::Ended;
                return Turn::GoOn;
            }
        };
        for byte in &chunk[..len] {
            match self.escape.as_mut().map(|escape| escape.key(*byte)) {
                None => self.pending.push(*byte),
                Some(Key::Quit | Key::Detach) => return Turn::Quit,
                Some(key) => self.pending.extend(key.bytes()),
            }
        }
        self.flush();
        Turn::GoOn
    }

    /// Reads what can be read now without waiting.
    fn serve(&mut self) -> Turn {
        if !self.flush() {
            return Turn::GoOn;
        }
        match self.state {
            Source::Polled => self.read(),
            Source::Unpollable => {
                // The source always has more, or its end: until the guest's FIFO is full.
                while self.state == Source::Unpollable && self.pending.is_empty() {
                    if self.read() == Turn::Quit {
                        return Turn::Quit;
                    }
                }
                Turn::GoOn
            }
            Source::Paused | Source::Ended => Turn::GoOn,
        }
    }

    /// Polls the source exactly while nothing waits.
    fn repoll(&mut self, ops: &mut EventOps<'_>, was: Source) {
        let wanted = match self.state {
            Source::Polled | Source::Paused if self.pending.is_empty() => Source::Polled,
            Source::Polled | Source::Paused => Source::Paused,
            other => other,
        };
        let done = match (was, wanted) {
            (Source::Polled, Source::Paused | Source::Ended) => ops.remove(self.readable()),
            (Source::Paused, Source::Polled) => ops.add(self.readable()),
            _ => Ok(()),
        };
        self.state = wanted;
        if let Err(e) = done {
            tracing::warn!(error = %e, "the console's input cannot be polled any more");
            self.state = Source::Ended;
        }
    }

    fn readable(&self) -> Events {
        Events::new(&self.fd, EventSet::IN)
    }
}

impl MutEventSubscriber for SerialInput {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let was = self.state;
        let turn = if events.fd() == self.fd.as_raw_fd() {
            self.serve()
        } else {
            // Cleared before the room is looked at: room that comes later announces itself again.
            let _ = self.serial().room().read();
            if was == Source::Unpollable { self.serve() } else { self.flush_only() }
        };
        if turn == Turn::Quit {
            (self.quit)();
            self.state = Source::Ended;
        }
        self.repoll(ops, was);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let room = Events::new(self.serial().room(), EventSet::IN);
        if let Err(e) = ops.add(room) {
            tracing::warn!(error = %e, "the console has no input");
            self.state = Source::Ended;
            return;
        }
        match ops.add(self.readable()) {
            Ok(()) => {}
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EPERM => {
                self.state = Source::Unpollable;
                if self.serve() == Turn::Quit {
                    (self.quit)();
                }
            }
            Err(e) => {
                let e = io::Error::other(e);
                tracing::warn!(error = %e, "the console's input cannot be polled");
                self.state = Source::Ended;
            }
        }
    }
}

impl SerialInput {
    fn flush_only(&mut self) -> Turn {
        self.flush();
        Turn::GoOn
    }
}
