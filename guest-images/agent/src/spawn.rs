//! A command's start: streams or a terminal, user, folder, environment, program.

use core::ffi::CStr;

use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::sys;
use crate::text::Text;
use crate::users::User;
use crate::wire::{Exec, MAX_STRINGS, Strings};

/// The shell's statuses for a program that is not there, and for one that can't be executed.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
/// Where programs are looked for unless the request has a PATH.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command under way, and our ends of its streams.
pub(crate) struct Running {
    pub(crate) pid: Pid,
    /// Readable when it has ended.
    pub(crate) ended: OwnedFd,
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    /// A terminal has none.
    pub(crate) stderr: Option<OwnedFd>,
    /// Our end of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Why a command did not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotStarted {
    /// What a shell would return.
    pub(crate) status: u8,
    pub(crate) doing: &'static str,
    pub(crate) errno: Option<Errno>,
}

impl NotStarted {
    fn because(doing: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self { status: NOT_EXECUTABLE, doing, errno: Some(errno) }
    }
}

/// What the child does before it is the command, as it reports where it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    Terminal = 1,
    Streams = 2,
    User = 3,
    Folder = 4,
    Program = 5,
}

impl Stage {
    fn not_started(stage: u8, errno: Errno) -> NotStarted {
        let doing = match stage {
            1 => "give it its terminal",
            2 => "give it its streams",
            3 => "become its user",
            4 => "enter its folder",
            _ => "run it",
        };
        let is_absent = stage == Self::Program as u8 && matches!(errno, Errno::NOENT | Errno::NOTDIR);
        NotStarted { status: if is_absent { NOT_FOUND } else { NOT_EXECUTABLE }, doing, errno: Some(errno) }
    }
}

/// The ends that the command gets.
struct Ends {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    is_terminal: bool,
}

/// Starts the command.
pub(crate) fn start(request: &Exec<'_>) -> Result<Running, NotStarted> {
    let user = User::find(request.user).ok_or(NotStarted {
        status: NOT_EXECUTABLE,
        doing: "become its user, whom /etc/passwd does not have",
        errno: None,
    })?;
    let streams = NotStarted::because("make its streams");
    let (report, reported) = pipe_with(PipeFlags::CLOEXEC).map_err(streams)?;
    let (ours, theirs) = match request.terminal {
        Some((rows, columns)) => {
            terminal(rows, columns, &user).map_err(NotStarted::because("make its terminal"))
        }
        None => pipes().map_err(NotStarted::because("make its streams")),
    }?;
    let forked = sys::fork().map_err(NotStarted::because("make a process"))?;
    let Some(pid) = forked else {
        let (stage, errno) = become_command(request, &user, &theirs);
        let mut message = [stage as u8, 0, 0, 0, 0];
        message[1..].copy_from_slice(&errno.raw_os_error().to_le_bytes());
        let _ = rustix::io::write(&reported, &message);
        sys::exit(NOT_FOUND)
    };
    drop((theirs, reported));
    let mut message = [0; 5];
    // Five bytes arrive at once, or the end: the descriptor is closed by the program's start.
    let length = loop {
        match rustix::io::read(&report, &mut message) {
            Err(Errno::INTR) => {}
            other => break other.unwrap_or(0),
        }
    };
    if length == message.len() {
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        let [stage, errno @ ..] = message;
        return Err(Stage::not_started(stage, Errno::from_raw_os_error(i32::from_le_bytes(errno))));
    }
    let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        NotStarted::because("watch it")(errno)
    })?;
    let (stdin, stdout, stderr, terminal) = ours;
    Ok(Running { pid, ended, stdin, stdout, stderr, terminal })
}

/// Our ends: standard input, output, error, the terminal.
type OurEnds = (OwnedFd, OwnedFd, Option<OwnedFd>, Option<OwnedFd>);

fn not_blocking(fd: &OwnedFd) -> Result<(), Errno> {
    rustix::fs::fcntl_setfl(fd, rustix::fs::fcntl_getfl(fd)? | OFlags::NONBLOCK)
}

fn pipes() -> Result<(OurEnds, Ends), Errno> {
    let (theirs_in, ours_in) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours_out, theirs_out) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours_err, theirs_err) = pipe_with(PipeFlags::CLOEXEC)?;
    for fd in [&ours_in, &ours_out, &ours_err] {
        not_blocking(fd)?;
    }
    let theirs = Ends { stdin: theirs_in, stdout: theirs_out, stderr: theirs_err, is_terminal: false };
    Ok(((ours_in, ours_out, Some(ours_err), None), theirs))
}

fn terminal(rows: u16, columns: u16, user: &User) -> Result<(OurEnds, Ends), Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    resize(&ours, rows, columns)?;
    // A terminal that can't change hands still works.
    let _ = rustix::fs::fchown(&theirs, Some(user.uid), None);
    not_blocking(&ours)?;
    let again = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
    let ends = Ends { stdin: again(&theirs)?, stdout: again(&theirs)?, stderr: theirs, is_terminal: true };
    Ok(((again(&ours)?, again(&ours)?, None, Some(ours)), ends))
}

/// Tells a terminal its size.
pub(crate) fn resize(terminal: &OwnedFd, rows: u16, columns: u16) -> Result<(), Errno> {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })
}

/// In the child: becomes the command. Returns only what went wrong, and at which stage.
fn become_command(request: &Exec<'_>, user: &User, ends: &Ends) -> (Stage, Errno) {
    sys::default_signals();
    // Its session, so that signals for it reach what it starts, and nothing of ours.
    let _ = rustix::process::setsid();
    if ends.is_terminal
        && let Err(errno) = rustix::process::ioctl_tiocsctty(&ends.stdin)
    {
        return (Stage::Terminal, errno);
    }
    let streams = rustix::stdio::dup2_stdin(&ends.stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(&ends.stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(&ends.stderr));
    if let Err(errno) = streams {
        return (Stage::Streams, errno);
    }
    // Without a wish it stays what the agent is: then nothing has to be permitted.
    if !request.user.is_empty() {
        let became = rustix::thread::set_thread_groups(user.groups())
            .and_then(|()| rustix::thread::set_thread_gid(user.gid))
            .and_then(|()| rustix::thread::set_thread_uid(user.uid));
        if let Err(errno) = became {
            return (Stage::User, errno);
        }
    }
    let entered = if request.cwd.is_empty() {
        // A home that is not there is not the request's fault.
        rustix::process::chdir(user.home.as_c_str()).or_else(|_| rustix::process::chdir(c"/"))
    } else {
        rustix::process::chdir(request.cwd)
    };
    if let Err(errno) = entered {
        return (Stage::Folder, errno);
    }
    (Stage::Program, execute(request, user))
}

/// Pointers for execve(2): a null ends them.
type Pointers = [*const u8; MAX_STRINGS + 8];

/// Executes the program; returns only why not.
fn execute(request: &Exec<'_>, user: &User) -> Errno {
    let mut arguments: Pointers = [core::ptr::null(); MAX_STRINGS + 8];
    fill(&mut arguments, request.argv);
    let mut variables: Pointers = [core::ptr::null(); MAX_STRINGS + 8];
    let mut count = fill(&mut variables, request.env);
    let defaults = default_environment(request, user);
    for variable in &defaults {
        if !has_variable(request.env, variable.as_bytes())
            && let Some(place) = variables.get_mut(count)
        {
            *place = variable.as_c_str().as_ptr().cast();
            count += 1;
        }
    }
    let Some(program) = { request.argv }.next() else { return Errno::INVAL };
    let run = |path: &CStr| sys::execute(path, &arguments, &variables);
    if program.to_bytes().contains(&b'/') {
        return run(program);
    }
    let own = { request.env }.find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="));
    let mut answer = Errno::NOENT;
    for folder in own.unwrap_or(PATH).split(|byte| *byte == b':') {
        let mut path = Text::<4096>::new();
        // An empty entry means the working directory.
        let fits =
            path.push(folder) && (folder.is_empty() || path.push(b"/")) && path.push(program.to_bytes());
        if !fits || program.is_empty() {
            continue;
        }
        match run(path.as_c_str()) {
            Errno::NOENT | Errno::NOTDIR => {}
            errno => answer = errno,
        }
    }
    answer
}

fn fill(pointers: &mut Pointers, strings: Strings<'_>) -> usize {
    let mut count = 0;
    // The last place stays null.
    let places = pointers.split_last_mut().map(|(_, places)| places).unwrap_or_default();
    for (place, string) in places.iter_mut().zip(strings) {
        *place = string.as_ptr().cast();
        count += 1;
    }
    count
}

/// What a login has.
fn default_environment(request: &Exec<'_>, user: &User) -> [Text<1100>; 6] {
    let term: &[u8] = if request.terminal.is_some() { b"vt220" } else { b"dumb" };
    [
        (&b"PATH="[..], PATH),
        (b"HOME=", user.home.as_bytes()),
        (b"USER=", user.name.as_bytes()),
        (b"LOGNAME=", user.name.as_bytes()),
        (b"SHELL=", user.shell.as_bytes()),
        (b"TERM=", term),
    ]
    .map(|(name, value)| {
        let mut variable = Text::new();
        variable.push_cut(name);
        variable.push_cut(value);
        variable
    })
}

/// Whether one of the strings sets the variable that `variable` sets.
fn has_variable(mut strings: Strings<'_>, variable: &[u8]) -> bool {
    let name = variable.split_inclusive(|byte| *byte == b'=').next().unwrap_or_default();
    strings.any(|string| string.to_bytes().starts_with(name))
}
