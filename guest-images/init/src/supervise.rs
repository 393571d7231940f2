//! Processes: the one command, and everybody else's orphans.
//!
//! Init learns of everything by signals that it blocks and waits for: SIGCHLD, and what `halt`, `poweroff` and `reboot` of busybox
//! send to PID 1 (SIGUSR1, SIGUSR2, SIGTERM), ctrl-alt-del (SIGINT), the power button and a failing power supply (SIGPWR).

use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::button::Button;
use crate::power::End;
use crate::request::Request;
use crate::{agent, say, sys};

/// The signals that init waits for.
const SIGNALS: [i32; 6] =
    [libc::SIGCHLD, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM, libc::SIGINT, libc::SIGPWR];

/// From here on signals are waited for; what init starts must get an empty mask again ([`sys::with_clean_signals`]).
///
/// SIGTTOU is blocked and never waited for: init uses the terminal while another group is in its foreground.
pub(crate) fn block_signals() {
    if let Err(error) = sys::block_signals(&SIGNALS).and_then(|()| sys::block_signals(&[libc::SIGTTOU])) {
        say!("cannot block signals: {error}");
    }
}

/// Runs the request's command, or a login shell, to its end.
pub(crate) fn run(request: &Request, button: &Button) -> End {
    let mut command = match request.argv.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => {
            let mut command = Command::new("/bin/sh");
            command.arg0("-sh");
            command
        }
    };
    let home = std::path::Path::new("/root");
    if home.is_dir() {
        command.current_dir(home);
    }
    command
        .env_clear()
        .envs(default_environment())
        .envs(request.env.iter().map(|(name, value)| (name, value)));
    sys::in_foreground(&mut command);
    sys::with_clean_signals(&mut command);
    match command.spawn() {
        Ok(child) => wait_for_main(child.id(), button),
        Err(error) => {
            say!("cannot run {}: {error}", command.get_program().display());
            End::Status(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
        }
    }
}

/// What a login on a Debian console has, the terminal's type included if the kernel command line names one (TERM=).
fn default_environment() -> [(&'static str, String); 6] {
    let term =
        std::env::var("TERM").ok().filter(|term| term != "linux").unwrap_or_else(|| "vt220".to_owned());
    [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("HOME", "/root".to_owned()),
        ("USER", "root".to_owned()),
        ("LOGNAME", "root".to_owned()),
        ("SHELL", "/bin/sh".to_owned()),
        ("TERM", term),
    ]
}

/// Waits, at most `limit`, until each of `pids` has ended; reaps whatever else ends.
pub(crate) fn wait_for(mut pids: Vec<u32>, limit: Duration) {
    let deadline = Instant::now() + limit;
    while !pids.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        // Any signal but SIGCHLD means nothing yet; the loop looks at children and clock anyway.
        let _ = sys::wait_signal(&SIGNALS, Some(left));
        while let Some((pid, status)) = sys::reap() {
            pids.retain(|&waited| waited != pid);
            agent::reaped(pid, status);
        }
    }
}

/// Waits, at most `limit`, until init has no child left.
pub(crate) fn wait_for_all(limit: Duration) {
    let deadline = Instant::now() + limit;
    while sys::reap().is_some() {}
    while sys::has_children() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let _ = sys::wait_signal(&SIGNALS, Some(left));
        while sys::reap().is_some() {}
    }
}

fn wait_for_main(main: u32, button: &Button) -> End {
    if button.pressed() {
        return End::PowerOff;
    }
    loop {
        match sys::wait_signal(&SIGNALS, None) {
            Some(libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGPWR) => return End::PowerOff,
            Some(libc::SIGTERM | libc::SIGINT) => return End::Reboot,
            Some(_) | None => {}
        }
        // One SIGCHLD may stand for several children.
        while let Some((pid, status)) = sys::reap() {
            if pid == main {
                return End::Status(shell_status(ExitStatus::from_raw(status)));
            }
            agent::reaped(pid, status);
        }
    }
}

/// The status as a shell would put it into `$?`.
fn shell_status(status: ExitStatus) -> u8 {
    let number = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255);
    u8::try_from(number).unwrap_or(255)
}
