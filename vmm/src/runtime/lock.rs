//! The two kinds of locks: a machine's, held for its life, and the outer folder's, held for moments.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;

use super::error::RuntimeError;

/// How long the outer lock is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(2);

fn open_lock(path: &Path, create: OFlags) -> Result<OwnedFd, Errno> {
    open(path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | create, Mode::RUSR | Mode::WUSR)
}

/// The outer folder's lock: while it lives, nobody claims a name, tidies up, or looks a process up.
pub(super) struct Outer(#[allow(dead_code, reason = "held for its lock")] OwnedFd);

impl Outer {
    pub(super) fn take(base: &Path) -> Result<Self, RuntimeError> {
        let path = base.join(".lock");
        let fd = open_lock(&path, OFlags::CREATE).map_err(RuntimeError::io("opening", &path))?;
        let until = Instant::now() + PATIENCE;
        loop {
            match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(fd)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < until => std::thread::sleep(PAUSE),
                Err(Errno::AGAIN) => return Err(RuntimeError::Busy(path)),
                Err(e) => return Err(RuntimeError::io("locking", &path)(e)),
            }
        }
    }
}

/// Takes the lock of a machine; `None` when a machine holds it. Only under [`Outer`]: whoever else holds it then only looks,
/// and is waited out.
pub(super) fn take(path: &Path, _: &Outer) -> Result<Option<OwnedFd>, Errno> {
    let fd = open_lock(path, OFlags::CREATE)?;
    match retry(|| flock(&fd, FlockOperation::NonBlockingLockExclusive)) {
        Ok(()) => return Ok(Some(fd)),
        Err(Errno::AGAIN) => {}
        Err(e) => return Err(e),
    }
    match retry(|| flock(&fd, FlockOperation::NonBlockingLockShared)) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Ok(None),
        Err(e) => return Err(e),
    }
    retry(|| flock(&fd, FlockOperation::LockExclusive))?;
    Ok(Some(fd))
}

/// Whether a machine holds the lock.
pub(super) fn is_held(path: &Path) -> io::Result<bool> {
    let fd = match open_lock(path, OFlags::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    match retry(|| flock(&fd, FlockOperation::NonBlockingLockShared)) {
        Ok(()) => Ok(false),
        Err(Errno::AGAIN) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
