//! Waiting for a machine's end while signals ask for it and a deadline approaches.
//!
//! SIGINT, SIGTERM and SIGHUP stop the machine in order: the TAP goes, the terminal is restored, the exit
//! status says which signal it was. The handlers only write a byte into a socket that `poll` watches here, so no
//! thread is spent on them.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmm::machine::Running;

/// What the wait was ended by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// The machine has ended.
    Ended,
    /// This signal came.
    Signal(i32),
    /// The deadline passed.
    Deadline,
}

/// The signals that end us, from now on caught.
pub(crate) struct Signals {
    sockets: Vec<(i32, UnixStream)>,
}

impl Signals {
    /// Catches the signals.
    pub(crate) fn catch() -> io::Result<Self> {
        let mut sockets = Vec::new();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let (ours, handlers) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(signal, handlers)?;
            sockets.push((signal, ours));
        }
        Ok(Self { sockets })
    }

    /// Waits for the machine's end, a signal or the deadline.
    pub(crate) fn wait(&self, machine: &Running, deadline: Option<Instant>) -> io::Result<Wake> {
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let mut fds = vec![PollFd::from_borrowed_fd(machine.as_fd(), PollFlags::IN)];
            fds.extend(self.sockets.iter().map(|(_, s)| PollFd::from_borrowed_fd(s.as_fd(), PollFlags::IN)));
            let ready = match poll(&mut fds, left.map(timespec).as_ref()) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if ready == 0 {
                return Ok(Wake::Deadline);
            }
            if !fds[0].revents().is_empty() {
                return Ok(Wake::Ended);
            }
            let signalled = fds[1..].iter().position(|fd| !fd.revents().is_empty());
            if let Some(at) = signalled {
                return Ok(Wake::Signal(self.sockets[at].0));
            }
        }
    }
}

fn timespec(left: Duration) -> Timespec {
    // Whole milliseconds, rounded up: a wait that ends early would only loop.
    let millis = i64::try_from(left.as_millis()).unwrap_or(i64::MAX / 2).saturating_add(1);
    Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 }
}
