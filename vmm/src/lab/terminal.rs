//! This process's terminal while a command in the lab owns it: raw, its size followed, restored at the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};

use super::error::LabError;

/// The terminal in raw mode; the old mode comes back when this is dropped.
#[derive(Debug)]
pub(super) struct RawMode {
    before: Termios,
    /// One byte per change of size.
    resized: UnixStream,
    /// One byte when somebody wants this process to end, which then has to restore the terminal first.
    ending: UnixStream,
}

impl RawMode {
    pub(super) fn enter() -> Result<Self, LabError> {
        Self::try_enter().map_err(LabError::Stream)
    }

    fn try_enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let (resized, ours) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(SIGWINCH, ours)?;
        let (ending, ours) = UnixStream::pair()?;
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::low_level::pipe::register(signal, ours.try_clone()?)?;
        }
        resized.set_nonblocking(true)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before, resized, ending })
    }

    /// Rows and columns.
    pub(super) fn size(&self) -> (u16, u16) {
        // A terminal that does not know its size gets the size that everything can live with.
        tcgetwinsize(io::stdin()).map_or((24, 80), |size| (size.ws_row, size.ws_col))
    }

    /// Readable when the size has changed.
    pub(super) fn resized(&self) -> &UnixStream {
        &self.resized
    }

    /// Readable when this process was asked to end.
    pub(super) fn ending(&self) -> BorrowedFd<'_> {
        self.ending.as_fd()
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that has gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
