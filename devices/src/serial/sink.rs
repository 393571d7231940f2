//! Output to a descriptor, by the I/O thread.
//!
//! What enters is what the UART's buffer holds; what leaves are non-blocking writes. While the descriptor takes nothing, it is
//! polled for room and the buffer is left to fill. The user's own descriptor is never made non-blocking: that flag
//! belongs to the open file, which the shell and everybody else on that terminal or pipe have, too. So
//!
//! | descriptor | is written |
//! |---|---|
//! | terminal, pipe, FIFO | through an open file of our own, opened anew by `/proc/self/fd`, non-blocking |
//! | socket | with `MSG_DONTWAIT` |
//! | `/dev/null` | as it is: it never blocks |
//! | all others, and those that cannot be opened anew (another user's terminal, no `/proc`) | not here: [`Sink::of`] makes a thread's sink of them |
//!
//! At most [`BATCHES`] batches are written in a turn, so that a guest that does nothing but print does not keep the I/O
//! thread from the other devices. When the worker is dropped, it writes the rest, for at most [`CLOSE_WAIT`].

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open};
use rustix::net::{SendFlags, send};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::CLOSE_WAIT;
use super::output::{Output, Shared};

/// Most batches that are written in a turn.
const BATCHES: usize = 8;

/// Where output goes.
///
/// ```
/// use devices::serial::Sink;
///
/// let (reader, writer) = std::io::pipe()?;
/// assert!(matches!(Sink::of(writer.into()), Sink::Polled(_)));
/// // A disk may be slow, and a file can't be polled: it gets a thread.
/// let file = tempfile::tempfile()?;
/// assert!(matches!(Sink::of(file.into()), Sink::Blocking(_)));
/// # drop(reader);
/// # Ok::<(), std::io::Error>(())
/// ```
pub enum Sink {
    /// Nobody looks at it.
    Nowhere,
    /// A descriptor that never blocks: the I/O thread writes to it.
    Polled(Polled),
    /// Something that may block: a thread of its own writes to it.
    Blocking(Box<dyn Write + Send>),
}

impl Sink {
    /// The sink that suits this descriptor.
    pub fn of(fd: OwnedFd) -> Self {
        match Polled::of(fd) {
            Ok(polled) => Self::Polled(polled),
            Err(fd) => Self::Blocking(Box::new(File::from(fd))),
        }
    }
}

/// A descriptor to which a write never blocks.
///
/// ```
/// use std::fs::File;
/// use std::io::Write;
///
/// use devices::serial::Polled;
///
/// let (reader, writer) = std::io::pipe()?;
/// assert!(Polled::of(writer.into()).is_ok());
/// // What may block comes back as it was.
/// let file = Polled::of(tempfile::tempfile()?.into()).expect_err("a file is no sink for the I/O thread");
/// File::from(file).write_all(b"still open")?;
/// # drop(reader);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Polled {
    fd: OwnedFd,
    socket: bool,
}

impl Polled {
    /// A descriptor for the same terminal, pipe, socket or `/dev/null`; others come back.
    ///
    /// # Errors
    /// The descriptor itself.
    pub fn of(fd: OwnedFd) -> Result<Self, OwnedFd> {
        /// `/dev/null` (linux/Documentation/admin-guide/devices.txt).
        const NULL: (u32, u32) = (1, 3);
        let Ok(stat) = fstat(&fd) else { return Err(fd) };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => Ok(Self { fd, socket: true }),
            FileType::CharacterDevice if (major(stat.st_rdev), minor(stat.st_rdev)) == NULL => {
                Ok(Self { fd, socket: false })
            }
            FileType::Fifo => Self::opened_anew(fd),
            FileType::CharacterDevice if rustix::termios::isatty(&fd) => Self::opened_anew(fd),
            _ => Err(fd),
        }
    }

    fn opened_anew(fd: OwnedFd) -> Result<Self, OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, socket: false }),
            Err(_) => Err(fd),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let written = if self.socket {
            send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
        } else {
            rustix::io::write(&self.fd, bytes)
        };
        Ok(written?)
    }
}

/// How a turn of writing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing is left.
    Done,
    /// The sink is full.
    Full,
    /// There is more, and the other devices' turn has come.
    More,
}

/// The half for the I/O thread.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// use std::io::Read;
/// use std::sync::Arc;
///
/// use devices::BusDevice;
/// use devices::serial::{Serial, Sink};
/// use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
///
/// let (mut reader, writer) = std::io::pipe()?;
/// let (mut com1, worker) = Serial::new(Arc::new(Quiet), Sink::of(writer.into()))?;
/// let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// events.add_subscriber(Box::new(worker.expect("a pipe is polled")));
/// com1.write(0, b"!"); // the guest's byte waits for the I/O thread
/// events.run_with_timeout(0)?;
/// let mut printed = [0];
/// reader.read_exact(&mut printed)?;
/// assert_eq!(&printed, b"!");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SinkWorker {
    shared: Arc<Shared>,
    filled: EventFd,
    sink: Polled,
    batch: Vec<u8>,
    written: usize,
    polling: bool,
}

impl SinkWorker {
    pub(super) fn new(sink: Polled) -> io::Result<(Output, Self)> {
        let filled = EventFd::new(EFD_NONBLOCK)?;
        let (output, shared) = Output::for_loop(filled.try_clone()?);
        Ok((output, Self { shared, filled, sink, batch: Vec::new(), written: 0, polling: false }))
    }

    /// Writes what the sink takes now.
    fn turn(&mut self) -> Turn {
        for _ in 0..BATCHES {
            if self.written == self.batch.len() {
                self.batch.clear();
                self.written = 0;
                let mut state = self.shared.lock();
                state.take(&mut self.batch);
                if self.batch.is_empty() {
                    return Turn::Done;
                }
                drop(state);
                // The taken bytes are the sink's now: the buffer has room again.
                self.shared.tell_moved();
            }
            match self.sink.write(&self.batch[self.written..]) {
                Ok(len) => {
                    self.written += len;
                    self.shared.lock().moved(self.batch.len() - self.written);
                    self.shared.tell_moved();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Turn::Full,
                Err(error) => {
                    tracing::warn!(%error, "writing the console's output failed; the rest of it is dropped");
                    self.give_up();
                    return Turn::Done;
                }
            }
        }
        let nothing = self.written == self.batch.len() && self.shared.lock().is_empty();
        if nothing { Turn::Done } else { Turn::More }
    }

    fn give_up(&mut self) {
        self.batch.clear();
        self.written = 0;
        self.shared.lock().fail();
        self.shared.tell_moved();
    }

    /// Polls the sink exactly while it is full.
    fn repoll(&mut self, ops: &mut EventOps<'_>, full: bool) {
        if full == self.polling {
            return;
        }
        let room = Events::new(&self.sink.fd, EventSet::OUT);
        let done = if full { ops.add(room) } else { ops.remove(room) };
        self.polling = full;
        if let Err(error) = done {
            tracing::warn!(%error, "the console's sink cannot be polled; the rest of its output is dropped");
            self.polling = false;
            self.give_up();
        }
    }
}

impl MutEventSubscriber for SinkWorker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.filled.as_raw_fd() {
            // Cleared before the buffer is looked at: a byte that comes later announces itself again.
            let _ = self.filled.read();
        }
        let turn = self.turn();
        if turn == Turn::More {
            let _ = self.filled.write(1);
        }
        self.repoll(ops, turn == Turn::Full);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.filled, EventSet::IN)) {
            tracing::warn!(%error, "the console has no output");
            self.give_up();
        }
    }
}

impl Drop for SinkWorker {
    fn drop(&mut self) {
        let until = Instant::now() + CLOSE_WAIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.turn() {
                Turn::Done => return,
                Turn::More if !left.is_zero() => {}
                Turn::Full if !left.is_zero() => {
                    let left = Timespec {
                        tv_sec: i64::from(left.as_secs() > 0),
                        tv_nsec: left.subsec_nanos().into(),
                    };
                    // Whatever it says, the next write knows better.
                    let _ = poll(
                        &mut [PollFd::from_borrowed_fd(self.sink.fd.as_fd(), PollFlags::OUT)],
                        Some(&left),
                    );
                }
                Turn::More | Turn::Full => {
                    tracing::warn!("the console's sink did not take the last of the output");
                    self.give_up();
                    return;
                }
            }
        }
    }
}
