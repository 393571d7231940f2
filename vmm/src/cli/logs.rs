//! `pontoon logs`: what a machine wrote to its console, and what it goes on writing.
//!
//! Following watches the machine's folder (inotify) and its process (pidfd): nothing is polled. A log that becomes the old
//! one is read to its end before the new one is begun.

use std::fs::{self, File};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use vmm::runtime::{CONSOLE_LOG, CONSOLE_LOG_OLD, Entry, Runtime, VMM_LOG};

use super::Failure;
use super::machine_args::LogsArgs;
use super::registry::failure;

pub(crate) fn logs(args: &LogsArgs) -> Result<u8, Failure> {
    let entry = Runtime::open().and_then(|runtime| runtime.find(&args.name)).map_err(failure)?;
    let (old, path) = files(&entry, args.vmm)?;
    // Watched before anything is read: what comes between is seen.
    let follower = args.follow.then(|| Follower::new(&entry, &path)).transpose()?.flatten();
    let done = show(old.as_deref(), &path, follower.as_ref());
    match done {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        Err(error) => Err(Failure::machine(anyhow!(error).context(format!("showing {}", path.display())))),
        Ok(()) => Ok(0),
    }
}

/// The log, and what came before it.
fn files(entry: &Entry, vmm: bool) -> Result<(Option<PathBuf>, PathBuf), Failure> {
    if vmm {
        return Ok((None, entry.file(VMM_LOG)));
    }
    let log = entry.state().ok().and_then(|state| state.console_log.clone());
    match log {
        Some(path) if path != entry.file(CONSOLE_LOG) => Ok((None, path)),
        Some(path) => Ok((Some(entry.file(CONSOLE_LOG_OLD)), path)),
        None => Err(Failure::usage(anyhow!(
            "{name} has no log: its console is the terminal where it was started (pontoon run --detach keeps one)",
            name = entry.name()
        ))),
    }
}

fn show(old: Option<&Path>, path: &Path, follower: Option<&Follower>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    // The newer one is opened first: should it become the old one now, it is shown twice rather than not at all.
    let mut file = open(path)?;
    if let Some(mut old) = old.map(open).transpose()?.flatten() {
        io::copy(&mut old, &mut out)?;
    }
    loop {
        let ended = follower.is_none_or(Follower::has_ended);
        if let Some(file) = &mut file {
            io::copy(file, &mut out)?;
        }
        out.flush()?;
        if is_another(path, file.as_ref()) {
            // The old one was written to until it was renamed.
            if let Some(file) = &mut file {
                io::copy(file, &mut out)?;
            }
            file = open(path)?;
            continue;
        }
        match follower {
            Some(follower) if !ended => follower.wait()?,
            _ => return Ok(()),
        }
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the path leads to a file that is not this one.
fn is_another(path: &Path, file: Option<&File>) -> bool {
    let Ok(there) = fs::metadata(path) else { return false };
    file.and_then(|file| file.metadata().ok())
        .is_none_or(|ours| (ours.dev(), ours.ino()) != (there.dev(), there.ino()))
}

/// Wakes when something is written, and knows when nothing more will be.
struct Follower {
    changes: OwnedFd,
    process: vmm::runtime::Process,
}

impl Follower {
    /// `None` for a machine that has ended.
    fn new(entry: &Entry, path: &Path) -> Result<Option<Self>, Failure> {
        let Ok(process) = entry.process() else { return Ok(None) };
        let folder = path.parent().unwrap_or(Path::new("/"));
        let changes = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)
            .and_then(|changes| {
                let what = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
                inotify::add_watch(&changes, folder, what)?;
                Ok(changes)
            })
            .with_context(|| format!("watching {}", folder.display()))
            .map_err(Failure::machine)?;
        Ok(Some(Self { changes, process }))
    }

    fn has_ended(&self) -> bool {
        self.process.wait(std::time::Duration::ZERO)
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.changes, PollFlags::IN), PollFd::new(&self.process, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.changes, &mut space);
        // Which file it was does not matter: the log is looked at anyway.
        while events.next().is_ok() {}
        Ok(())
    }
}
