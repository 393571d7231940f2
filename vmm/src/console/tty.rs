//! A terminal in raw mode, and the ways back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use super::sys;

/// Why a terminal was not put into raw mode.
///
/// ```no_run
/// use vmm::console::{RawMode, TtyError};
///
/// let terminal = RawMode::enter(std::io::stdin())?.expect("standard input is a terminal");
/// assert!(matches!(RawMode::enter(std::io::stdin()), Err(TtyError::Busy)));
/// drop(terminal);
/// RawMode::enter(std::io::stdin())?;
/// # Ok::<(), TtyError>(())
/// ```
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
///
/// ```no_run
/// use std::os::fd::AsFd;
///
/// use vmm::console::RawMode;
/// use vmm::machine::Machine;
///
/// let machine = Machine::builder()
///     .kernel("vmlinuz")
///     .serial_input(std::io::stdin().as_fd().try_clone_to_owned()?)
///     .serial_output(std::io::stdout())
///     .console_escape(true)
///     .build()?;
/// // None where standard input is no terminal: a pipe serves as well.
/// let terminal = RawMode::enter(std::io::stdin())?;
/// let reason = machine.start()?.wait();
/// drop(terminal);
/// println!("{reason}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs::File;
    use std::process::{Command, ExitStatus, Stdio};

    use rustix::fs::{Mode, OFlags, open};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;

    /// Set in the child of a test: how it is to end.
    const CHILD: &str = "PONTOON_TEST_TTY_CHILD";

    /// Both ends of a new terminal, cooked.
    fn terminal() -> (OwnedFd, OwnedFd) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        (master, slave)
    }

    fn is_raw(terminal: &OwnedFd) -> bool {
        !tcgetattr(terminal)
            .unwrap()
            .local_modes
            .intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }

    /// Runs the test `child` in a process of its own that ends in this way, its input a terminal, and says how it
    /// ended and whether the terminal was left raw.
    fn child_that(ends: &str) -> (ExitStatus, bool) {
        let (_master, slave) = terminal();
        let status = Command::new(env::current_exe().unwrap())
            .args(["--exact", "console::tty::tests::child"])
            .env(CHILD, ends)
            .stdin(Stdio::from(File::from(slave.try_clone().unwrap())))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        (status, is_raw(&slave))
    }

    /// The body of [`child_that`]'s process; nothing in an ordinary run.
    #[test]
    fn child() {
        let Ok(ends) = env::var(CHILD) else { return };
        let guard = RawMode::enter(io::stdin()).unwrap().expect("stdin is a terminal");
        assert!(is_raw(&io::stdin().as_fd().try_clone_to_owned().unwrap()));
        match ends.as_str() {
            "exit" => std::process::exit(3),
            "abort" => std::process::abort(),
            "SIGTERM" => signal_hook::low_level::raise(libc::SIGTERM).unwrap(),
            other => panic!("{other}"),
        }
        drop(guard);
    }

    #[test]
    fn a_terminal_is_raw_while_the_guard_lives_and_one_at_a_time() {
        let (_master, slave) = terminal();
        assert!(!is_raw(&slave));
        let guard = RawMode::enter(&slave).unwrap();
        assert!(guard.is_some() && is_raw(&slave));
        assert!(matches!(RawMode::enter(&slave), Err(TtyError::Busy)));
        drop(guard);
        assert!(!is_raw(&slave));
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(RawMode::enter(&reader).unwrap().is_none());
    }

    #[test]
    fn exit_restores_the_terminal() {
        let (status, raw) = child_that("exit");
        assert_eq!((status.code(), raw), (Some(3), false));
    }

    #[test]
    fn abort_restores_the_terminal_and_still_aborts() {
        use std::os::unix::process::ExitStatusExt;
        let (status, raw) = child_that("abort");
        assert_eq!((status.signal(), raw), (Some(libc::SIGABRT), false));
    }

    #[test]
    fn a_fatal_signal_restores_the_terminal_and_still_kills() {
        use std::os::unix::process::ExitStatusExt;
        let (status, raw) = child_that("SIGTERM");
        assert_eq!((status.signal(), raw), (Some(libc::SIGTERM), false));
    }
}
