//! One command: started, fed, listened to, and reported.
//!
//! One loop polls the connection, the command's streams and its end. Nothing in it waits for one of them alone: a signal
//! reaches a command that does not read, and a host that does not listen does not keep its signals from the command.
//!
//! **Back-pressure.** A stream is read only while the host has room for it (its window) and the outbox is empty; so a slow
//! reader fills the pipe, and the pipe stops the command. Standard input is at most a window, which waits here until the command
//! takes it.
//!
//! **The end.** The command's own end is what counts, not that of processes that it leaves behind with its streams: what is in
//! the pipes by then is sent, then its status. When the host goes first, the command's process group gets SIGHUP, and SIGKILL
//! after [`GRACE`] if the command still lives then.

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, waitid};

use crate::link::{Broken, Link, errno_number, wait};
use crate::queue::Queue;
use crate::spawn::{self, NotStarted, Running};
use crate::wire::{self, Encoder, Exec, Exit, Failure, Kind, MAX_FRAME, WINDOW};

/// What a command gets between SIGHUP and SIGKILL.
const GRACE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };
/// What a terminal may still hold when its command has ended, more than the kernel's buffers.
const TERMINAL_REST: u64 = 64 << 10;
/// `^D`: what ends the input of a terminal (VEOF of termios(3), as a new terminal has it).
const END_OF_INPUT: &[u8] = b"\x04";

/// Runs the command of this request over this connection.
pub(crate) fn run(link: &mut Link, request: &Exec<'_>) -> Result<(), Broken> {
    let running = match spawn::start(request) {
        Ok(running) => running,
        Err(problem) => return not_started(link, problem),
    };
    let pid = running.pid;
    let mut session = Session::new(link, running);
    let served = session.link.say(Kind::Started, &[]).and_then(|()| session.serve());
    let (ended, status) = session.close();
    if status.is_none() {
        hang_up(pid, &ended);
    }
    served?;
    link.drain()
}

fn not_started(link: &mut Link, problem: NotStarted) -> Result<(), Broken> {
    let mut payload = [0; 64];
    let mut encoder = Encoder::new(&mut payload);
    encoder.bytes(&[problem.status]);
    let errno = errno_number(problem.errno);
    Failure { errno, doing: problem.doing.as_bytes() }.encode(&mut encoder);
    let length = encoder.finish(Kind::NotStarted)?;
    link.say(Kind::NotStarted, payload.get(..length).unwrap_or_default())?;
    link.drain()
}

/// Ends a command whose host has gone, and reaps it.
fn hang_up(pid: Pid, ended: &OwnedFd) {
    let _ = kill_process_group(pid, Signal::HUP);
    // One that is stopped would not see it.
    let _ = kill_process_group(pid, Signal::CONT);
    if !wait(&mut [PollFd::new(ended, PollFlags::IN)], Some(&GRACE)) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    let _ = waitid(WaitId::PidFd(ended.as_fd()), WaitIdOptions::EXITED);
}

/// One of the command's outputs.
struct Output {
    /// Until its end.
    fd: Option<OwnedFd>,
    kind: Kind,
    /// How much the host has room for.
    window: usize,
    /// Once the command has ended: how much of it is still to be sent.
    left: Option<u64>,
    /// Its end is still to be told.
    owes_end: bool,
}

impl Output {
    fn new(fd: Option<OwnedFd>, kind: Kind) -> Self {
        Self { fd, kind, window: WINDOW, left: None, owes_end: false }
    }

    /// How much may be read now.
    fn limit(&self) -> usize {
        let left = self.left.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));
        self.window.min(left).min(MAX_FRAME)
    }

    fn wants_to_read(&self) -> bool {
        self.fd.is_some() && self.limit() > 0
    }

    fn close(&mut self) {
        self.owes_end |= self.fd.take().is_some();
    }
}

struct Session<'l> {
    link: &'l mut Link,
    pid: Pid,
    ended: OwnedFd,
    /// Until it is closed by either side.
    stdin: Option<OwnedFd>,
    /// Standard input that the command has not taken yet.
    unread: Queue,
    stdin_ended: bool,
    /// Standard input that was taken, or thrown away, and not yet confirmed.
    owed: usize,
    owes_closed: bool,
    outputs: [Output; 2],
    terminal: Option<OwnedFd>,
    status: Option<Exit>,
}

/// What poll reported.
#[derive(Default)]
struct Events {
    link: bool,
    stdin: bool,
    stdin_broken: bool,
    outputs: [bool; 2],
    ended: bool,
}

impl<'l> Session<'l> {
    fn new(link: &'l mut Link, running: Running) -> Self {
        let Running { pid, ended, stdin, stdout, stderr, terminal } = running;
        Self {
            link,
            pid,
            ended,
            stdin: Some(stdin),
            unread: Queue::new(),
            stdin_ended: false,
            owed: 0,
            owes_closed: false,
            outputs: [Output::new(Some(stdout), Kind::Stdout), Output::new(stderr, Kind::Stderr)],
            terminal,
            status: None,
        }
    }

    /// Closes the command's streams: its readers see their end, and a terminal hangs up.
    fn close(self) -> (OwnedFd, Option<Exit>) {
        let Self { ended, status, .. } = self;
        (ended, status)
    }

    /// Carries everything both ways until the status is sent.
    fn serve(&mut self) -> Result<(), Broken> {
        loop {
            self.obey_all()?;
            self.settle();
            self.link.try_flush()?;
            if let Some(status) = self.status.filter(|_| !self.outputs.iter().any(Output::is_pending)) {
                return self.link.say(Kind::Exit, &status.encode());
            }
            let events = self.wait();
            if events.stdin_broken {
                self.close_stdin();
            } else if events.stdin {
                self.feed();
            }
            for (at, ready) in events.outputs.into_iter().enumerate() {
                if ready {
                    self.forward(at)?;
                }
            }
            if events.ended {
                self.reap();
            }
            if events.link {
                self.link.fill()?;
            }
        }
    }

    fn wait(&self) -> Events {
        let link = if self.link.is_flushed() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let wants_stdin = !self.unread.is_empty() || self.stdin_ended;
        let stdin = if wants_stdin { PollFlags::OUT } else { PollFlags::empty() };
        let idle = self.link.is_flushed();
        let output = |output: &'_ Output| output.wants_to_read() && idle;
        let [stdout, stderr] = &self.outputs;
        // A descriptor that is not waited for stands as the connection without a wish: its place is kept.
        let ours = self.link.fd();
        fn place<'a>(fd: Option<&'a OwnedFd>, ours: BorrowedFd<'a>, flags: PollFlags) -> PollFd<'a> {
            match fd {
                Some(fd) => PollFd::new(fd, flags),
                None => PollFd::from_borrowed_fd(ours, PollFlags::empty()),
            }
        }
        let mut fds = [
            PollFd::from_borrowed_fd(ours, link),
            place(self.stdin.as_ref(), ours, stdin),
            place(stdout.fd.as_ref().filter(|_| output(stdout)), ours, PollFlags::IN),
            place(stderr.fd.as_ref().filter(|_| output(stderr)), ours, PollFlags::IN),
            place(Some(&self.ended).filter(|_| self.status.is_none()), ours, PollFlags::IN),
        ];
        // What an ended command has left in its streams is read at once, or not at all: somebody else may hold them.
        let hurry = |one: &Output| output(one) && one.left.is_some();
        let no_time = Timespec { tv_sec: 0, tv_nsec: 0 };
        wait(&mut fds, (hurry(stdout) || hurry(stderr)).then_some(&no_time));
        let happened = |at: usize| fds.get(at).map_or(PollFlags::empty(), PollFd::revents);
        let broken = PollFlags::ERR | PollFlags::HUP;
        Events {
            link: happened(0).intersects(PollFlags::IN | broken),
            stdin: self.stdin.is_some() && happened(1).contains(PollFlags::OUT),
            stdin_broken: self.stdin.is_some() && happened(1).intersects(broken),
            outputs: [
                output(stdout) && (hurry(stdout) || !happened(2).is_empty()),
                output(stderr) && (hurry(stderr) || !happened(3).is_empty()),
            ],
            ended: self.status.is_none() && !happened(4).is_empty(),
        }
    }

    fn obey_all(&mut self) -> Result<(), Broken> {
        while let Some((kind, payload)) = self.link.take()? {
            match kind {
                Kind::Stdin if payload.is_empty() => self.stdin_ended = true,
                Kind::Stdin => {
                    if self.stdin_ended || payload.len() + self.owed + self.unread.front().len() > WINDOW {
                        return Err(Broken::Nonsense);
                    }
                    if self.stdin.is_none() {
                        self.owed += payload.len();
                    } else if !self.unread.push(payload) {
                        return Err(Broken::Nonsense);
                    }
                }
                Kind::Window => {
                    let (stream, bytes) = wire::decode_window(payload)?;
                    let output = output(&mut self.outputs, stream)?;
                    output.window = (output.window + bytes).min(WINDOW);
                }
                Kind::Closed => {
                    let &[stream] = payload else { return Err(Broken::Nonsense) };
                    output(&mut self.outputs, wire::decode_stream(kind, stream)?)?.close();
                }
                Kind::Resize => {
                    let &[r0, r1, c0, c1] = payload else { return Err(Broken::Nonsense) };
                    if let Some(terminal) = &self.terminal {
                        let (rows, columns) = (u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]));
                        // One that is gone has no size.
                        let _ = spawn::resize(terminal, rows, columns);
                    }
                }
                Kind::Signal => {
                    let &[number] = payload else { return Err(Broken::Nonsense) };
                    let signal = Signal::from_named_raw(number.into()).ok_or(Broken::Nonsense)?;
                    if self.status.is_none() {
                        // It may have ended meanwhile, which is what was wanted.
                        let _ = kill_process_group(self.pid, signal);
                    }
                }
                _ => return Err(Broken::Nonsense),
            }
        }
        Ok(())
    }

    /// Says what has been taken and what has ended, as far as there is room to say it.
    fn settle(&mut self) {
        if self.stdin_ended && self.unread.is_empty() {
            if let (Some(_), Some(stdin)) = (&self.terminal, &self.stdin) {
                let _ = rustix::io::write(stdin, END_OF_INPUT);
            }
            self.stdin = None;
        }
        // Told late enough to be worth a frame, early enough that the host need not stop.
        if self.owed >= WINDOW / 4 || (self.owed > 0 && self.unread.is_empty()) {
            let [a, b, c, d] = u32::try_from(self.owed).unwrap_or(0).to_le_bytes();
            if self.link.queue(Kind::Window, &[Kind::Stdin as u8, a, b, c, d]) {
                self.owed = 0;
            }
        }
        if self.owes_closed && self.link.queue(Kind::Closed, &[Kind::Stdin as u8]) {
            self.owes_closed = false;
        }
        for output in &mut self.outputs {
            if output.owes_end && self.link.queue(output.kind, &[]) {
                output.owes_end = false;
            }
        }
    }

    /// Moves standard input on.
    fn feed(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        if self.unread.is_empty() {
            return;
        }
        match rustix::io::write(stdin, self.unread.front()) {
            Ok(taken) => {
                self.unread.take(taken);
                self.owed += taken;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.close_stdin(),
        }
    }

    /// Nobody reads standard input any more.
    fn close_stdin(&mut self) {
        self.owed += self.unread.clear();
        self.owes_closed |= self.stdin.take().is_some();
    }

    /// Sends what can be read from an output.
    fn forward(&mut self, at: usize) -> Result<(), Broken> {
        let Some(output) = self.outputs.get_mut(at) else { return Ok(()) };
        // The other one may have filled the outbox in this turn.
        let (Some(fd), true) = (&output.fd, self.link.is_flushed()) else { return Ok(()) };
        match self.link.queue_from(output.kind, fd.as_fd(), output.limit()) {
            Ok(0) => output.close(),
            Ok(length) => {
                output.window = output.window.saturating_sub(length);
                output.left = output.left.map(|left| left.saturating_sub(length as u64));
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if output.left.is_none() => {}
            // A terminal whose last holder has gone answers EIO; after the command's end an empty one is done.
            Err(_) => output.close(),
        }
        self.link.try_flush()
    }

    /// The command has ended: takes its status, and how much of its output is still to come.
    fn reap(&mut self) {
        let waited = waitid(WaitId::PidFd(self.ended.as_fd()), WaitIdOptions::EXITED);
        let status = match waited {
            Ok(Some(status)) => exit_of(&status),
            Ok(None) | Err(Errno::INTR) => return,
            // Somebody else has reaped it: its status is lost.
            Err(_) => Exit::Code(255),
        };
        self.status = Some(status);
        let is_terminal = self.terminal.take().is_some();
        for output in &mut self.outputs {
            let Some(fd) = &output.fd else { continue };
            let left = rustix::io::ioctl_fionread(fd).unwrap_or(0);
            output.left = Some(if is_terminal { TERMINAL_REST } else { left });
        }
    }
}

impl Output {
    /// Whether something of it is still to be sent before the status.
    fn is_pending(&self) -> bool {
        self.owes_end || (self.fd.is_some() && self.left != Some(0))
    }
}

fn output(outputs: &mut [Output; 2], stream: Kind) -> Result<&mut Output, Broken> {
    outputs.iter_mut().find(|output| output.kind == stream).ok_or(Broken::Nonsense)
}

fn exit_of(status: &WaitIdStatus) -> Exit {
    let byte = |number: i32| u8::try_from(number).unwrap_or(255);
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(byte(code)),
        (None, Some(signal)) => Exit::Signal(byte(signal)),
        (None, None) => Exit::Code(255),
    }
}
