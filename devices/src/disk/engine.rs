//! [`Engine`]: a storage without waiting.
//!
//! A request goes in with a *ticket* of its caller's, and comes out with it: at [`Engine::reap`], in the order in which requests are
//! done, which need not be the order in which they came. The eventfd is written for everything that is done outside of
//! [`Engine::submit`] and [`Engine::commit`]; after those, `reap` may have something without it.
//!
//! Which way a request goes:
//!
//! | request | way |
//! |---|---|
//! | read, write, flush that [`Storage::direct`] knows a file for | io_uring, if there is one |
//! | flush of a storage that needs none | done at once |
//! | anything else | the thread |

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::ring::{Finished, Ring, Transfer};
use super::thread::Thread;
use super::{Access, GuestBuffers, Storage};

/// Most requests in flight.
pub const MAX_IN_FLIGHT: usize = 256;

/// Part of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// First byte.
    pub(crate) at: u64,
    /// Bytes.
    pub(crate) len: u64,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// From the disk into the buffers.
    Read,
    /// From the buffers to the disk.
    Write {
        /// It is on the medium when it is done.
        durable: bool,
    },
    /// What is done already gets onto the medium.
    Flush,
    /// The ranges are not needed any more.
    Discard {
        /// Which.
        ranges: Vec<Range>,
        /// It is on the medium when it is done.
        durable: bool,
    },
    /// The ranges read as zeros.
    Zero {
        /// Which.
        ranges: Vec<Range>,
        /// They need not take space.
        unmap: bool,
        /// It is on the medium when it is done.
        durable: bool,
    },
}

/// One request. Everything in it lies within the disk: the caller has checked.
pub(crate) struct Request {
    /// What is to be done.
    pub(crate) operation: Operation,
    /// First byte, of a read or a write.
    pub(crate) at: u64,
    /// Guest memory, of a read or a write.
    pub(crate) buffers: GuestBuffers,
}

/// Whether there is an io_uring.
enum Uring {
    Untried,
    Refused,
    Made(Box<Ring>),
}

/// A storage, and what it is doing. See the module's documentation. Dropping it waits for what is in flight.
pub(crate) struct Engine<T> {
    // Dropped in this order: first both stop accessing, then the eventfd goes.
    ring: Uring,
    thread: Option<Thread>,
    storage: Arc<dyn Storage>,
    done: EventFd,
    tickets: Vec<Option<T>>,
    free: Vec<usize>,
    /// Done without either.
    at_once: Vec<Finished>,
    finished: Vec<Finished>,
}

impl<T> Engine<T> {
    /// An engine for `storage` that announces results on `done`. `uring` says whether io_uring is tried.
    pub(crate) fn new(storage: Arc<dyn Storage>, done: EventFd, uring: bool) -> Self {
        Self {
            ring: if uring { Uring::Untried } else { Uring::Refused },
            thread: None,
            storage,
            done,
            tickets: Vec::new(),
            free: Vec::new(),
            at_once: Vec::new(),
            finished: Vec::new(),
        }
    }

    /// The storage.
    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// Requests that were submitted and not reaped.
    pub(crate) fn in_flight(&self) -> usize {
        self.tickets.len() - self.free.len()
    }

    /// Whether there is room for another request.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight() < MAX_IN_FLIGHT
    }

    /// Begins `request`. Call it only if [`Self::has_room`], and [`Self::commit`] after a batch.
    pub(crate) fn submit(&mut self, request: Request, ticket: T) {
        let number = self.free.pop().unwrap_or_else(|| {
            self.tickets.push(None);
            self.tickets.len() - 1
        });
        if let Some(slot) = self.tickets.get_mut(number) {
            *slot = Some(ticket);
        }
        if request.operation == Operation::Flush && !self.storage.needs_flush() {
            return self.at_once.push((number, Ok(())));
        }
        let Some(request) = self.try_ring(number, request) else { return };
        if let Err(error) = self.push_to_thread(number, request) {
            self.at_once.push((number, Err(error)));
        }
    }

    /// Gives the request to the ring, or back.
    fn try_ring(&mut self, number: usize, request: Request) -> Option<Request> {
        let (access, durable) = match request.operation {
            Operation::Read => (Access::Read, false),
            Operation::Write { durable } => (Access::Write, durable && self.storage.needs_flush()),
            Operation::Flush => (Access::Flush, false),
            Operation::Discard { .. } | Operation::Zero { .. } => return Some(request),
        };
        if matches!(self.ring, Uring::Untried) {
            self.ring = match Ring::new(MAX_IN_FLIGHT, self.done.as_raw_fd()) {
                Ok(ring) => Uring::Made(Box::new(ring)),
                Err(error) => {
                    tracing::info!(%error, "no io_uring here; a thread does the disk's requests");
                    Uring::Refused
                }
            };
        }
        let Uring::Made(ring) = &mut self.ring else { return Some(request) };
        let Some(file) = self.storage.direct(access, request.at, request.buffers.len() as u64) else {
            return Some(request);
        };
        let Request { operation, at, buffers } = request;
        let refused = ring.push(number, Transfer { access, file, at, buffers, durable }).err()?;
        Some(Request { operation, at: refused.at, buffers: refused.buffers })
    }

    fn push_to_thread(&mut self, number: usize, request: Request) -> io::Result<()> {
        let thread = match &mut self.thread {
            Some(thread) => thread,
            none => {
                let thread = Thread::start(Arc::clone(&self.storage), self.done.try_clone()?)?;
                none.insert(thread)
            }
        };
        thread.push(number, request)
    }

    /// Hands the kernel what was submitted.
    pub(crate) fn commit(&mut self) {
        if let Uring::Made(ring) = &mut self.ring
            && ring.submit()
        {
            // Come back for it, behind the other events.
            let _ = self.done.write(1);
        }
    }

    /// Takes what is done.
    pub(crate) fn reap(&mut self, results: &mut Vec<(T, io::Result<()>)>) {
        self.finished.append(&mut self.at_once);
        if let Uring::Made(ring) = &mut self.ring {
            ring.reap(&mut self.finished);
        }
        if let Some(thread) = &mut self.thread {
            thread.reap(&mut self.finished);
        }
        for (number, result) in self.finished.drain(..) {
            if let Some(ticket) = self.tickets.get_mut(number).and_then(Option::take) {
                self.free.push(number);
                results.push((ticket, result));
            }
        }
        // What was short goes on.
        self.commit();
    }

    /// Waits until nothing is in flight, and forgets it: guest memory is accessed no more.
    pub(crate) fn drain(&mut self) {
        if let Uring::Made(ring) = &mut self.ring {
            ring.drain();
        }
        if let Some(thread) = &mut self.thread {
            thread.drain();
        }
        self.at_once.clear();
        self.tickets.clear();
        self.free.clear();
    }
}
