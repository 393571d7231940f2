//! The most recent output of a console, for whoever attaches to it.
//!
//! The console's thread puts output in ([`Scrollback::tee`]); the control socket's worker takes it out, for each reader from a place of
//! its own. Places count bytes since the machine's start. Nobody waits for anybody: a reader that is more than
//! [`KEPT`] bytes behind has lost its place, and is cut off by the worker.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of output that are kept.
pub(super) const KEPT: usize = 128 << 10;
/// Bytes of earlier output that a reader gets first. Less than is kept, so that nobody begins on the brink.
pub(super) const SHOWN: usize = 64 << 10;

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// The place behind the last byte.
    end: u64,
}

struct Shared {
    ring: Mutex<Ring>,
    wake: EventFd,
    /// Whether somebody wants to be woken.
    watched: AtomicBool,
}

/// The recent output. Clones are the same one.
///
/// ```
/// use std::io::Write;
///
/// use vmm::runtime::Scrollback;
///
/// let scrollback = Scrollback::new()?;
/// let mut console = scrollback.tee(Vec::new());
/// console.write_all(b"what the guest says goes on, and is kept for those who attach")?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct Scrollback(Arc<Shared>);

impl Scrollback {
    /// An empty one.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { ring: Mutex::default(), wake, watched: AtomicBool::new(false) })))
    }

    /// A sink that writes to `sink` and puts what that took in here.
    pub fn tee<W: Write>(&self, sink: W) -> Tee<W> {
        Tee { sink, scrollback: self.clone() }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.0.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, bytes: &[u8]) {
        let mut ring = self.ring();
        ring.end += bytes.len() as u64;
        let fresh = &bytes[bytes.len().saturating_sub(KEPT)..];
        let surplus = (ring.bytes.len() + fresh.len()).saturating_sub(KEPT);
        ring.bytes.drain(..surplus);
        ring.bytes.extend(fresh);
        drop(ring);
        if self.0.watched.load(Ordering::Acquire) {
            // It fails only when the counter is full, and then the reader has been woken.
            let _ = self.0.wake.write(1);
        }
    }

    /// Says whether somebody reads. What is pushed after this returns wakes.
    pub(super) fn watch(&self, watched: bool) {
        self.0.watched.store(watched, Ordering::Release);
    }

    /// Readable when something was pushed while it was watched.
    pub(super) fn wake_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }

    /// To be called before the pushed bytes are read, so that none is overlooked.
    pub(super) fn clear_wake(&self) {
        let _ = self.0.wake.read();
    }

    /// The place where a new reader begins.
    pub(super) fn start(&self) -> u64 {
        let ring = self.ring();
        ring.end - ring.bytes.len().min(SHOWN) as u64
    }

    /// Copies output from the place `from` on and says how much; `None` when that has been forgotten.
    pub(super) fn read(&self, from: u64, into: &mut [u8]) -> Option<usize> {
        let ring = self.ring();
        let first = ring.end - ring.bytes.len() as u64;
        let skip = usize::try_from(from.checked_sub(first)?).ok()?;
        let len = ring.bytes.len().checked_sub(skip)?.min(into.len());
        for (to, byte) in into[..len].iter_mut().zip(ring.bytes.range(skip..skip + len)) {
            *to = *byte;
        }
        Some(len)
    }
}

/// See [`Scrollback::tee`].
///
/// ```
/// use std::io::Write;
///
/// use vmm::runtime::Scrollback;
///
/// let log = std::fs::File::create("/dev/null")?;
/// let mut console = Scrollback::new()?.tee(log);
/// // As much as the file took is kept, no more.
/// assert_eq!(console.write(b"login: ")?, 7);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Tee<W> {
    sink: W,
    scrollback: Scrollback,
}

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.sink.write(bytes)?;
        self.scrollback.push(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_what_is_recent_and_what_comes_and_is_told_when_it_lost_its_place() {
        let scrollback = Scrollback::new().unwrap();
        let mut console = scrollback.tee(Vec::new());
        console.write_all(&[b'a'; KEPT]).unwrap();
        console.write_all(b"new").unwrap();
        let start = scrollback.start();
        assert_eq!(start, (KEPT + 3 - SHOWN) as u64);
        let mut got = vec![0; KEPT];
        assert_eq!(scrollback.read(start, &mut got), Some(SHOWN));
        assert_eq!(&got[SHOWN - 4..SHOWN], b"anew");
        let at = start + SHOWN as u64;
        assert_eq!(scrollback.read(at, &mut got), Some(0));
        console.write_all(b"more").unwrap();
        assert_eq!((scrollback.read(at, &mut got), &got[..4]), (Some(4), &b"more"[..]));
        assert_eq!(scrollback.read(6, &mut got), None);
        assert_eq!(scrollback.read(at + 100, &mut got), None, "nobody can be ahead");
        assert_eq!(console.sink.len(), KEPT + 7);
    }

    #[test]
    fn only_who_watches_is_woken() {
        let scrollback = Scrollback::new().unwrap();
        scrollback.push(b"x");
        assert!(scrollback.0.wake.read().is_err());
        scrollback.watch(true);
        scrollback.push(b"x");
        assert!(scrollback.0.wake.read().is_ok());
    }
}
