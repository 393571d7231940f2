//! A terminal in raw mode, and the ways back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use super::sys;

/// Why a terminal was not put into raw mode.
#[derive(Debug, thiserror::Error)]
pub enum TtyError {
    /// A system call failed.
    #[error("could not {what}: {source}; run without a console on this terminal")]
    System {
        /// What was to be done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Another terminal is in raw mode.
    #[error("this process has a terminal in raw mode already; drop its guard first")]
    Busy,
}

/// A terminal in raw mode. Dropping it puts the terminal back.
///
/// It is also put back when the process exits, and by those fatal signals that nobody handled when the guard was made
/// (a panic that aborts included). A program that handles signals itself installs its handlers before. One
/// terminal per process at a time.
#[derive(Debug)]
pub struct RawMode {
    fd: OwnedFd,
    cooked: Termios,
}

impl RawMode {
    /// Puts the terminal `fd` into raw mode; `None` when it is no terminal.
    ///
    /// # Errors
    /// [`TtyError`]; the terminal is as it was then.
    pub fn enter(fd: impl AsFd) -> Result<Option<Self>, TtyError> {
        let fd = fd.as_fd();
        if !isatty(fd) {
            return Ok(None);
        }
        let system = |what| move |source: io::Error| TtyError::System { what, source };
        let fd = fd.try_clone_to_owned().map_err(system("duplicate the terminal's descriptor"))?;
        let cooked = tcgetattr(&fd).map_err(|e| system("read the terminal's settings")(e.into()))?;
        // Armed before the change: a signal in between restores what is still there.
        sys::arm(fd.as_raw_fd())?;
        let mut raw = cooked.clone();
        raw.make_raw();
        // Not OPOST off: lines that this program prints to the same terminal would step down like stairs.
        raw.output_modes = cooked.output_modes;
        if let Err(e) = tcsetattr(&fd, OptionalActions::Now, &raw) {
            sys::disarm();
            return Err(system("put the terminal into raw mode")(e.into()));
        }
        Ok(Some(Self { fd, cooked }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // It fails when the terminal is gone, and then there is nothing to restore.
        let _ = tcsetattr(&self.fd, OptionalActions::Now, &self.cooked);
        sys::disarm();
    }
}
