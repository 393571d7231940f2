//! One run: a machine is resumed, given its job, listened to, and killed.
//!
//! A single poll loop carries the port, the console, standard input and the terminal's signals. Writes to
//! the port are queued, so that a machine which does not read never blocks the loop; writes to
//! our own output do block it, which is the back-pressure that a slow reader of ours is entitled to.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::{LabError, RESUMING, at, emulator};
use super::qemu::{Machine, OpenDisk, Purpose};
use super::snapshot::Snapshot;
use super::terminal::RawMode;
use super::wire::{self, Exit, Job, Kind, STDIN_WINDOW};
use super::{Disk, DiskAccess, ExitStatus, MAX_DISKS, Run, archive};

/// How long a resumed machine may take to its first word: 0.3 s on an idle host.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// How much is read at once, in bytes.
const CHUNK: usize = 16 << 10;

/// A disk's size is a multiple of this, in bytes.
const SECTOR: u64 = 512;

/// This side's ends of the command's streams.
pub(super) struct Streams<'a> {
    /// Where its standard input comes from; without, it is empty.
    pub(super) stdin: Option<&'a dyn Input>,
    pub(super) stdout: &'a mut dyn Write,
    pub(super) stderr: &'a mut dyn Write,
    /// The terminal that the command shall own.
    pub(super) terminal: Option<&'a RawMode>,
}

/// Something to read standard input from.
pub(super) trait Input {
    fn fd(&self) -> BorrowedFd<'_>;
}

impl<T: AsFd> Input for T {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

/// Resumes the snapshot and runs the command in it.
pub(super) fn run(
    snapshot: &Snapshot,
    run: &Run,
    files: &File,
    streams: &mut Streams<'_>,
) -> Result<ExitStatus, LabError> {
    let paths = snapshot.paths();
    let disks = open_disks(&run.disks)?;
    let purpose = Purpose::Resume { files, publish: &run.publish, disks: &disks };
    let mut machine = Machine::start(&snapshot.hardware(&paths), &purpose)?;
    if let Err(error) = machine.restore(&snapshot.state) {
        // The console says more than a broken pipe does.
        let console = machine.console.tail();
        if console.contains("host forwarding rule") {
            return Err(LabError::Publish { console });
        }
        if console.contains("/dev/fdset/") {
            return Err(LabError::Disk { console });
        }
        return Err(LabError::NotResumed { reason: error.to_string(), console });
    }
    let fetched = if run.get.is_empty() {
        None
    } else {
        Some(tempfile::tempfile().map_err(at("make a file in", &std::env::temp_dir()))?)
    };
    let mut session = Session {
        machine,
        outgoing: VecDeque::new(),
        incoming: Vec::new(),
        stdin_open: true,
        stdin_credit: STDIN_WINDOW,
        answered: false,
        deadline: Instant::now() + ANSWER_PATIENCE,
        timeout: run.timeout,
        fetched,
        end: None,
    };
    let job = job(run, streams.terminal);
    session.queue(Kind::Start, &job.encode())?;
    let exit = session.attend(streams)?;
    if let Some(fetched) = session.fetched.take() {
        let destinations: Vec<PathBuf> = run.get.iter().map(|(_, here)| here.clone()).collect();
        archive::unpack(fetched, &destinations)?;
    }
    Ok(ExitStatus { code: exit.status, oom_kills: exit.oom_kills })
}

/// The run's disks, open as they are to be used.
fn open_disks(disks: &[Disk]) -> Result<Vec<OpenDisk>, LabError> {
    if disks.len() > MAX_DISKS {
        return Err(LabError::Config(format!("the lab can have {MAX_DISKS} disks, not {}", disks.len())));
    }
    let open = |Disk { path, access }: &Disk| {
        let mut files = vec![File::open(path).map_err(at("open the disk", path))?];
        if *access == DiskAccess::ReadWrite {
            let file = File::options().read(true).write(true).open(path);
            files.push(file.map_err(at("open for writing the disk", path))?);
        }
        // Seeking tells the size of block devices, too.
        let length = (&files[0]).seek(SeekFrom::End(0)).map_err(at("look at the disk", path))?;
        if !length.is_multiple_of(SECTOR) {
            // The emulator would round it up for reading and refuse it for writing.
            return Err(LabError::Config(format!(
                "{} has {length} bytes, which is no whole number of sectors; run: truncate -s %512 {}",
                path.display(),
                path.display()
            )));
        }
        Ok(OpenDisk { files, access: *access })
    };
    disks.iter().map(open).collect()
}

/// The job that the outer machine gets.
fn job(run: &Run, terminal: Option<&RawMode>) -> Job {
    let home = if run.uid == 0 { "/root" } else { "/home/user" };
    let user = if run.uid == 0 { "root" } else { "user" };
    let term = std::env::var_os("TERM").filter(|_| terminal.is_some()).unwrap_or_else(|| "dumb".into());
    let defaults: [(&str, &std::ffi::OsStr); 5] = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".as_ref()),
        ("HOME", home.as_ref()),
        ("USER", user.as_ref()),
        ("LANG", "C.UTF-8".as_ref()),
        ("TERM", &term),
    ];
    let defaults = defaults.into_iter().map(|(name, value)| (name.as_ref(), value));
    let asked = run.env.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()));
    let variable = |(name, value): (&std::ffi::OsStr, &std::ffi::OsStr)| {
        [name.as_bytes(), b"=", value.as_bytes()].concat()
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Job {
        argv: run.argv.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
        env: defaults.chain(asked).map(variable).collect(),
        cwd: run.cwd.as_os_str().as_bytes().to_vec(),
        uid: run.uid,
        terminal: terminal.map(RawMode::size),
        now: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        fetch: run.get.iter().map(|(there, _)| there.as_os_str().as_bytes().to_vec()).collect(),
    }
}

struct Session {
    machine: Machine,
    /// Frames on their way to the machine.
    outgoing: VecDeque<u8>,
    /// Bytes from the machine that are not yet a whole frame.
    incoming: Vec<u8>,
    stdin_open: bool,
    /// How many bytes of standard input may be sent before the next confirmation.
    stdin_credit: usize,
    /// The machine has said `Hello`.
    answered: bool,
    /// When patience ends: with the answer at first, with the command later.
    deadline: Instant,
    timeout: Option<Duration>,
    fetched: Option<File>,
    end: Option<Exit>,
}

/// What poll reported.
#[derive(Default)]
struct Events {
    from_port: bool,
    to_port: bool,
    console: bool,
    stdin: bool,
    resized: bool,
    ending: bool,
}

impl Session {
    fn queue(&mut self, kind: Kind, payload: &[u8]) -> Result<(), LabError> {
        wire::write_frame(&mut self.outgoing, kind, payload)
            .map_err(emulator("send the job to the outer machine"))
    }

    /// Carries everything both ways until the command has ended.
    fn attend(&mut self, streams: &mut Streams<'_>) -> Result<Exit, LabError> {
        loop {
            self.check_time()?;
            let events = self.wait(streams)?;
            if events.ending {
                return Err(LabError::Interrupted);
            }
            if events.console {
                self.machine.console.drain();
            }
            if events.to_port {
                self.write_port()?;
            }
            if events.stdin {
                self.read_stdin(streams)?;
            }
            if events.resized {
                self.resize(streams)?;
            }
            if events.from_port {
                self.read_port()?;
                self.obey_all(streams)?;
            }
            if let Some(exit) = self.end {
                return Ok(exit);
            }
        }
    }

    fn check_time(&mut self) -> Result<(), LabError> {
        if Instant::now() < self.deadline {
            return Ok(());
        }
        match (self.answered, self.timeout) {
            (false, _) => {
                let console = self.machine.console.tail();
                Err(LabError::NotAnswered { seconds: ANSWER_PATIENCE.as_secs(), console })
            }
            (true, Some(timeout)) => Err(LabError::TimedOut { seconds: timeout.as_secs_f64() }),
            (true, None) => {
                // Without a limit the deadline only bounds one wait.
                self.deadline = Instant::now() + ANSWER_PATIENCE;
                Ok(())
            }
        }
    }

    fn wait(&self, streams: &Streams<'_>) -> Result<Events, LabError> {
        let port = if self.outgoing.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let wants_stdin = self.answered && self.stdin_open && self.stdin_credit > 0;
        let interests = [
            (Some(self.machine.port.as_fd()), port),
            (Some(self.machine.console.as_fd()), PollFlags::IN),
            (streams.stdin.filter(|_| wants_stdin).map(Input::fd), PollFlags::IN),
            (streams.terminal.map(|terminal| terminal.resized().as_fd()), PollFlags::IN),
            (streams.terminal.map(RawMode::ending), PollFlags::IN),
        ];
        let present = interests.iter().filter_map(|(fd, flags)| Some((fd.as_ref()?, *flags)));
        let mut fds: Vec<PollFd<'_>> = present.map(|(fd, flags)| PollFd::new(fd, flags)).collect();
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Events::default()),
            Err(error) => return Err(emulator("wait for the emulator")(error)),
        }
        let mut polled = fds.iter();
        let mut happened = |(fd, _): &(Option<_>, _)| match fd {
            Some(_) => polled.next().map_or(PollFlags::empty(), PollFd::revents),
            None => PollFlags::empty(),
        };
        let [port, console, stdin, resized, ending] = &interests;
        let port = happened(port);
        Ok(Events {
            from_port: port.intersects(!PollFlags::OUT),
            to_port: port.contains(PollFlags::OUT),
            console: !happened(console).is_empty(),
            stdin: !happened(stdin).is_empty() || (wants_stdin && streams.stdin.is_none()),
            resized: !happened(resized).is_empty(),
            ending: !happened(ending).is_empty(),
        })
    }

    fn write_port(&mut self) -> Result<(), LabError> {
        let (front, _) = self.outgoing.as_slices();
        match (&self.machine.port).write(front) {
            Ok(length) => {
                self.outgoing.drain(..length);
                Ok(())
            }
            Err(error) if is_temporary(&error) => Ok(()),
            Err(_) => Err(self.ended()),
        }
    }

    fn read_port(&mut self) -> Result<(), LabError> {
        let mut buffer = [0; 64 << 10];
        match (&self.machine.port).read(&mut buffer) {
            Ok(0) => Err(self.ended()),
            Ok(length) => {
                self.incoming.extend_from_slice(buffer.get(..length).unwrap_or_default());
                Ok(())
            }
            Err(error) if is_temporary(&error) => Ok(()),
            Err(_) => Err(self.ended()),
        }
    }

    /// The emulator has gone before its time.
    fn ended(&mut self) -> LabError {
        let phase = if self.answered { "the command ran" } else { RESUMING };
        LabError::Ended { phase, console: self.machine.console.tail() }
    }

    fn read_stdin(&mut self, streams: &Streams<'_>) -> Result<(), LabError> {
        let mut buffer = [0; CHUNK];
        let want = CHUNK.min(self.stdin_credit);
        let space = buffer.get_mut(..want).unwrap_or_default();
        let length = match streams.stdin {
            None => 0,
            Some(stdin) => match rustix::io::read(stdin.fd(), space) {
                Ok(length) => length,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(()),
                // A terminal whose session has ended answers EIO: nothing more comes.
                Err(rustix::io::Errno::IO) => 0,
                Err(error) => return Err(LabError::Stream(error.into())),
            },
        };
        if length == 0 {
            self.stdin_open = false;
            return self.queue(Kind::StdinEnd, &[]);
        }
        self.stdin_credit -= length;
        self.queue(Kind::Stdin, buffer.get(..length).unwrap_or_default())
    }

    fn resize(&mut self, streams: &Streams<'_>) -> Result<(), LabError> {
        let Some(terminal) = streams.terminal else { return Ok(()) };
        // Several changes count as one; what is read is only the fact.
        match terminal.resized().read(&mut [0; 64]) {
            Ok(_) | Err(_) => {}
        }
        let (rows, columns) = terminal.size();
        let payload = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
        self.queue(Kind::Resize, &payload)
    }

    /// Everything that has arrived whole.
    fn obey_all(&mut self, streams: &mut Streams<'_>) -> Result<(), LabError> {
        let incoming = std::mem::take(&mut self.incoming);
        let mut rest = incoming.as_slice();
        while let Some((kind, payload, length)) =
            wire::parse_frame(rest).map_err(emulator("understand the outer machine"))?
        {
            self.obey(kind, payload, streams)?;
            rest = rest.get(length..).unwrap_or_default();
        }
        self.incoming = rest.to_vec();
        Ok(())
    }

    fn obey(&mut self, kind: Kind, payload: &[u8], streams: &mut Streams<'_>) -> Result<(), LabError> {
        match kind {
            Kind::Hello => {
                self.answered = true;
                self.deadline = Instant::now() + self.timeout.unwrap_or(ANSWER_PATIENCE);
            }
            Kind::Stdout => pass_on(streams.stdout, payload)?,
            Kind::Stderr => pass_on(streams.stderr, payload)?,
            Kind::StdinTaken => {
                let taken = <[u8; 4]>::try_from(payload).map_or(0, u32::from_le_bytes) as usize;
                self.stdin_credit = STDIN_WINDOW.min(self.stdin_credit + taken);
            }
            Kind::Fetched => {
                if let Some(file) = &mut self.fetched {
                    file.write_all(payload).map_err(at("write a file in", &std::env::temp_dir()))?;
                }
            }
            Kind::Exit => {
                self.end = Some(Exit::decode(payload).map_err(emulator("understand the outer machine"))?);
            }
            Kind::Failed => return Err(LabError::Job(String::from_utf8_lossy(payload).into_owned())),
            Kind::Ready | Kind::Start | Kind::Stdin | Kind::StdinEnd | Kind::Resize | Kind::Signal => {
                return Err(LabError::Job(format!("it sent an unexpected {kind:?}")));
            }
        }
        Ok(())
    }
}

fn pass_on(to: &mut dyn Write, bytes: &[u8]) -> Result<(), LabError> {
    to.write_all(bytes).and_then(|()| to.flush()).map_err(LabError::Stream)
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
