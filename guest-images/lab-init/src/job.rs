//! One command: started, fed, listened to, and reported.
//!
//! One loop polls the port and the command's ends; a second thread does nothing but reap, since PID 1 is
//! the parent of every orphan. The command's end is what ends the job, not that of its descendants: what
//! is in the pipes by then is sent, and the machine goes.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::link::{CHUNK, Fetched, Link};
use crate::wire::{Exit, Job, Kind};
use crate::{Context, Error, archive};

/// The shell's statuses for a command that is not there, and for one that cannot be executed.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// Runs the job's command and reports its end.
pub(crate) fn run(job: &Job, link: &mut Link) -> Result<(), Error> {
    let oom_before = oom_kills()?;
    let status = match start(job)? {
        Ok(mut running) => running.attend(link)?,
        Err(error) => {
            let program =
                job.argv.first().map(|program| String::from_utf8_lossy(program)).unwrap_or_default();
            link.send(Kind::Stderr, format!("lab: cannot run {program}: {error}\n").as_bytes())?;
            if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE }
        }
    };
    if !job.fetch.is_empty() {
        archive::send(&job.fetch, Fetched(link))?;
    }
    // The emulator is killed when it has answered: what the command wrote to a disk of the host's is in the host's hands by then.
    rustix::fs::sync();
    let exit = Exit { status, oom_kills: oom_kills()?.saturating_sub(oom_before) };
    link.send(Kind::Exit, &exit.encode())?;
    Ok(())
}

/// A command under way and our ends of its streams.
struct Running {
    pid: Pid,
    /// Its standard input, until that is closed by either side.
    stdin: Option<OwnedFd>,
    /// Standard input that the host has sent and the command has not yet taken.
    unread: VecDeque<u8>,
    /// The host has sent everything.
    stdin_ended: bool,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// The terminal's other end, if the command has one.
    terminal: Option<OwnedFd>,
    /// One byte arrives when the command has ended: its status.
    ended: PipeReader,
}

/// Starts the command. The inner error says that it could not be executed.
fn start(job: &Job) -> Result<io::Result<Running>, Error> {
    let (program, arguments) = job.argv.split_first().ok_or("the command is empty")?;
    let mut command = Command::new(OsStr::from_bytes(program));
    command.args(arguments.iter().map(|argument| OsStr::from_bytes(argument)));
    command.env_clear();
    for variable in &job.env {
        let at = variable.iter().position(|byte| *byte == b'=');
        let (name, value) = variable.split_at(at.ok_or("an environment variable has no '='")?);
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(value.get(1..).unwrap_or_default()));
    }
    let cwd = OsStr::from_bytes(&job.cwd);
    if !fs::metadata(cwd).is_ok_and(|metadata| metadata.is_dir()) {
        return Err(format!("the working directory {} is not there", cwd.display()).into());
    }
    command.current_dir(cwd);
    if job.uid != 0 {
        // Without privileges the standard library also drops the supplementary groups.
        command.uid(job.uid).gid(job.uid);
    }
    let mut terminal = None;
    if let Some((rows, columns)) = job.terminal {
        let (ours, theirs) = open_terminal(rows, columns)?;
        rustix::fs::fchown(&theirs, Some(rustix::fs::Uid::from_raw(job.uid)), None)?;
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
        terminal = Some(ours);
    } else {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    crate::sys::in_own_session(&mut command, terminal.is_some());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(Err(error)),
    };
    // The command holds our copies of the terminal's other end; without this it would never hang up.
    drop(command);
    let pid = Pid::from_raw(i32::try_from(child.id())?).ok_or("the command has no process id")?;
    let (stdin, stdout) = match &terminal {
        Some(ours) => (Some(ours.try_clone()?), Some(ours.try_clone()?)),
        None => (child.stdin.take().map(OwnedFd::from), child.stdout.take().map(OwnedFd::from)),
    };
    let stderr = child.stderr.take().map(OwnedFd::from);
    for fd in [&stdin, &stdout, &stderr].into_iter().flatten() {
        fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
    }
    let unread = VecDeque::new();
    Ok(Ok(Running { pid, stdin, unread, stdin_ended: false, stdout, stderr, terminal, ended: reap(pid)? }))
}

/// A new terminal: our end and the command's.
fn open_terminal(rows: u16, columns: u16) -> Result<(OwnedFd, OwnedFd), Error> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags).context(|| "open a terminal".into())?;
    rustix::pty::unlockpt(&ours).context(|| "unlock the terminal".into())?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags).context(|| "open the terminal's end".into())?;
    resize(&ours, rows, columns)?;
    Ok((ours, theirs))
}

fn resize(terminal: &OwnedFd, rows: u16, columns: u16) -> Result<(), Error> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).context(|| format!("set the terminal to {rows}x{columns}"))
}

/// Reaps every child of PID 1 on a thread of its own, until `command` has ended; its status is the one
/// byte in the pipe.
fn reap(command: Pid) -> Result<PipeReader, Error> {
    let (reader, mut writer) = io::pipe()?;
    let reaper = move || {
        loop {
            let ended = match wait(WaitOptions::empty()) {
                Ok(Some((pid, status))) if pid == command => Some(status_byte(status)),
                Ok(_) | Err(rustix::io::Errno::INTR) => None,
                Err(_) => Some(NOT_EXECUTABLE),
            };
            if let Some(status) = ended {
                // The reader lives as long as the job does.
                let _ = writer.write_all(&[status]);
                return;
            }
        }
    };
    thread::Builder::new().name("reaper".into()).spawn(reaper)?;
    Ok(reader)
}

/// The status as a shell gives it.
fn status_byte(status: WaitStatus) -> u8 {
    let number = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 0,
    };
    number as u8
}

/// What poll reported.
#[derive(Default)]
struct Events {
    link: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
    ended: bool,
}

impl Running {
    /// Carries everything both ways until the command ends, and returns its status.
    fn attend(&mut self, link: &mut Link) -> Result<u8, Error> {
        loop {
            while let Some((kind, payload)) = link.take()? {
                self.obey(kind, &payload)?;
            }
            let events = self.wait(link)?;
            if events.stdin {
                self.feed(link)?;
            }
            if events.stdout {
                forward(&mut self.stdout, Kind::Stdout, link)?;
            }
            if events.stderr {
                forward(&mut self.stderr, Kind::Stderr, link)?;
            }
            if events.ended {
                let mut status = [0];
                self.ended.read_exact(&mut status)?;
                while forward(&mut self.stdout, Kind::Stdout, link)? {}
                while forward(&mut self.stderr, Kind::Stderr, link)? {}
                return Ok(status[0]);
            }
            if events.link {
                link.fill()?;
            }
        }
    }

    fn wait(&self, link: &Link) -> io::Result<Events> {
        let wants_stdin = !self.unread.is_empty() || self.stdin_ended;
        let interests = [
            (Some(link.as_fd()), PollFlags::IN),
            (self.stdin.as_ref().filter(|_| wants_stdin).map(AsFd::as_fd), PollFlags::OUT),
            (self.stdout.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (self.stderr.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (Some(self.ended.as_fd()), PollFlags::IN),
        ];
        let present = interests.iter().filter_map(|(fd, flags)| Some((fd.as_ref()?, *flags)));
        let mut fds: Vec<PollFd<'_>> = present.map(|(fd, flags)| PollFd::new(fd, flags)).collect();
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Events::default()),
            Err(error) => return Err(error.into()),
        }
        let mut polled = fds.iter();
        let mut happened = |(fd, _): &(Option<_>, _)| {
            fd.is_some() && polled.next().is_some_and(|fd| !fd.revents().is_empty())
        };
        let [link, stdin, stdout, stderr, ended] = &interests;
        Ok(Events {
            link: happened(link),
            stdin: happened(stdin),
            stdout: happened(stdout),
            stderr: happened(stderr),
            ended: happened(ended),
        })
    }

    fn obey(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Error> {
        match (kind, payload) {
            (Kind::Stdin, bytes) => self.unread.extend(bytes),
            (Kind::StdinEnd, _) => self.stdin_ended = true,
            (Kind::Resize, &[r0, r1, c0, c1]) => {
                if let Some(terminal) = &self.terminal {
                    resize(terminal, u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]))?;
                }
            }
            (Kind::Signal, &[number]) => {
                if let Some(signal) = Signal::from_named_raw(number.into()) {
                    // The group may have ended meanwhile, which is what was wanted.
                    let _ = kill_process_group(self.pid, signal);
                }
            }
            (other, payload) => {
                return Err(format!("the host sent a {other:?} frame of {} bytes", payload.len()).into());
            }
        }
        Ok(())
    }

    /// Moves standard input on. A command that has closed its end swallows the rest, as a pipe would.
    fn feed(&mut self, link: &mut Link) -> Result<(), Error> {
        let Some(stdin) = &self.stdin else { return Ok(()) };
        if self.unread.is_empty() {
            if self.stdin_ended {
                self.end_stdin()?;
            }
            return Ok(());
        }
        let (front, _) = self.unread.as_slices();
        let taken = match rustix::io::write(stdin, front) {
            Ok(taken) => taken,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            Err(_) => {
                self.stdin = None;
                self.unread.len()
            }
        };
        self.unread.drain(..taken);
        link.send(Kind::StdinTaken, &u32::try_from(taken)?.to_le_bytes())?;
        Ok(())
    }

    /// End of file: closing the pipe, or what ^D does on a terminal.
    fn end_stdin(&mut self) -> Result<(), Error> {
        if let (Some(_), Some(stdin)) = (&self.terminal, &self.stdin) {
            match rustix::io::write(stdin, b"\x04") {
                Ok(_) | Err(_) => {}
            }
        }
        self.stdin = None;
        Ok(())
    }
}

/// Sends what can be read from `from`; true if there may be more.
fn forward(from: &mut Option<OwnedFd>, kind: Kind, link: &mut Link) -> Result<bool, Error> {
    let Some(fd) = from else { return Ok(false) };
    let mut buffer = [0; CHUNK];
    match rustix::io::read(fd, &mut buffer) {
        Ok(length) if length > 0 => {
            link.send(kind, buffer.get(..length).unwrap_or_default())?;
            Ok(true)
        }
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(rustix::io::Errno::AGAIN) => Ok(false),
        // End of file, or EIO: the last holder of a terminal's other end has closed it.
        Ok(_) | Err(_) => {
            *from = None;
            Ok(false)
        }
    }
}

/// Processes killed for want of memory since the machine's boot.
fn oom_kills() -> Result<u32, Error> {
    let text = fs::read_to_string("/proc/vmstat").context(|| "read /proc/vmstat".into())?;
    let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    Ok(value.and_then(|value| value.trim().parse().ok()).unwrap_or(0))
}
