//! The console: the terminal that the kernel prints on and that the command talks to.
//!
//! The kernel starts init with `/dev/console`, which can't be a controlling terminal (no ctrl-C, no job control). The device behind
//! it can; `/sys/class/tty/console/active` names it, the preferred one last.
//!
//! Init itself leads the session, and the command is only the foreground process group in it: when a session's leader
//! ends, the kernel hangs the terminal up and throws away what has not been sent yet, which would be the command's last output.

use std::fmt::Arguments;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;

use crate::sys;

/// How the console treats what passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Mode {
    /// A terminal: echo, line editing, ctrl-C, newline to CR LF.
    #[default]
    Terminal,
    /// Eight clean bits each way, for a command whose output is captured.
    Bytes,
}

/// Makes the device behind the console the standard streams of init and of what it starts, and init's controlling terminal.
pub(crate) fn take() {
    let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let name = active.split_whitespace().last().unwrap_or("console");
    let open = |name: &str| File::options().read(true).write(true).open(format!("/dev/{name}"));
    match open(name).or_else(|_| open("console")) {
        Ok(file) => {
            if let Err(error) = sys::become_stdio(file.as_fd()).and_then(|()| sys::lead_session()) {
                say(format_args!("/dev/{name} is no controlling terminal: {error}"));
            }
        }
        Err(error) => say(format_args!("cannot open the console /dev/{name}: {error}")),
    }
}

/// Puts the console into the mode that the command, and init's own lines, are to find.
pub(crate) fn prepare(mode: Mode) {
    let done = match mode {
        Mode::Terminal => Ok(()),
        Mode::Bytes => sys::set_raw(std::io::stdin().as_fd()),
    };
    if let Err(error) = done {
        say(format_args!("the console stays a terminal: {error}"));
    }
    // Pontoon holds what is piped in until then. Another console (a hypervisor's, a real one) knows no such line.
    let _ = sys::set_out1(std::io::stdin().as_fd());
}

/// Waits until everything that was written has left the machine.
pub(crate) fn drain() {
    let _ = sys::drain(std::io::stdout().as_fd());
}

/// Prints one line. Where even that fails nobody is left to tell.
pub(crate) fn say(text: Arguments<'_>) {
    let _ = std::io::stderr().write_all(format!("pontoon: {text}\n").as_bytes());
}
