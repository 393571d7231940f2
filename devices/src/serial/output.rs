//! The buffer between the UART's transmitter and the sink.
//!
//! One mutex guards the buffer; whoever owns the sink (a thread, or [`SinkWorker`](super::SinkWorker) on the I/O thread) takes
//! everything there is, writes it without the lock, and comes back. `moved` wakes whoever waits for room or for the end.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::{CLOSE_WAIT, OUTPUT_BUFFER, STALL_WAIT};

/// Pause before a non-blocking sink that was full is tried again.
const RETRY: Duration = Duration::from_millis(5);

#[derive(Default)]
pub(super) struct State {
    waiting: VecDeque<u8>,
    /// Bytes that the owner has taken and not yet written.
    in_flight: usize,
    /// The sink let a vCPU wait in vain; cleared when it moves.
    stalled: bool,
    /// The sink has failed; everything is dropped.
    failed: bool,
    /// No more bytes will come; the thread ends when it has written the rest.
    closed: bool,
    lost: u64,
}

impl State {
    /// Moves everything that waits into `batch`, which must be empty.
    pub(super) fn take(&mut self, batch: &mut Vec<u8>) {
        batch.extend(self.waiting.drain(..));
        self.in_flight = batch.len();
    }

    /// Notes that of what was taken `left` bytes are not yet written.
    pub(super) fn moved(&mut self, left: usize) {
        self.in_flight = left;
        self.stalled = false;
    }

    /// Drops everything, from now on, too.
    pub(super) fn fail(&mut self) {
        self.failed = true;
        self.lost += (self.waiting.len() + self.in_flight) as u64;
        self.waiting.clear();
        self.in_flight = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// How the sink's owner learns of the first byte.
enum Filled {
    Thread(Condvar),
    Loop(EventFd),
}

pub(super) struct Shared {
    state: Mutex<State>,
    filled: Filled,
    moved: Condvar,
}

impl Shared {
    fn new(filled: Filled) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), filled, moved: Condvar::new() })
    }

    /// Tells the owner that there is something to write, or that there will be no more.
    fn wake_owner(&self) {
        match &self.filled {
            Filled::Thread(condition) => condition.notify_one(),
            // Fails only when the counter is at its limit, and then it is readable anyway.
            Filled::Loop(event) => drop(event.write(1)),
        }
    }

    /// Tells whoever waits that bytes have moved on.
    pub(super) fn tell_moved(&self) {
        self.moved.notify_all();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits on `moved` while `busy`, for at most `limit`; the state after it, still locked.
    fn wait_while<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        limit: Duration,
        busy: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.moved.wait_timeout_while(state, limit, busy).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// What the UART writes to. Never fails and never blocks for longer than [`STALL_WAIT`].
pub(super) enum Output {
    To(Arc<Shared>),
    Nowhere,
}

impl Output {
    /// Output for a worker of the I/O thread, which finds its bytes in the second and is woken by `filled`.
    pub(super) fn for_loop(filled: EventFd) -> (Self, Arc<Shared>) {
        let shared = Shared::new(Filled::Loop(filled));
        (Self::To(Arc::clone(&shared)), shared)
    }

    /// Output with a thread that writes it to `sink`.
    pub(super) fn with_thread(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let shared = Shared::new(Filled::Thread(Condvar::new()));
        let theirs = Arc::clone(&shared);
        // Not joined: a sink may block for ever, and then only the process's end gets the thread out of it.
        std::thread::Builder::new().name("console".into()).spawn(move || drain(&theirs, sink))?;
        Ok(Self::To(shared))
    }

    fn push(&self, bytes: &[u8]) {
        let Self::To(shared) = self else { return };
        let mut state = shared.lock();
        let full = |s: &State| s.waiting.len() + bytes.len() > OUTPUT_BUFFER;
        if full(&state) && !state.stalled && !state.failed {
            state = shared.wait_while(state, STALL_WAIT, |s| full(s) && !s.failed);
            if full(&state) && !state.failed {
                state.stalled = true;
                tracing::warn!("the console's sink takes no more bytes; output is dropped until it does");
            }
        }
        if state.failed || full(&state) {
            state.lost += bytes.len() as u64;
            return;
        }
        let wake = state.waiting.is_empty() && state.in_flight == 0;
        state.waiting.extend(bytes);
        drop(state);
        if wake {
            shared.wake_owner();
        }
    }

    pub(super) fn flush_within(&self, limit: Duration) -> bool {
        let Self::To(shared) = self else { return true };
        let idle = |s: &State| s.failed || (s.waiting.is_empty() && s.in_flight == 0);
        idle(&shared.wait_while(shared.lock(), limit, |s| !idle(s)))
    }

    pub(super) fn lost(&self) -> u64 {
        match self {
            Self::To(shared) => shared.lock().lost,
            Self::Nowhere => 0,
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // The owner of the sink flushes when it has caught up; the UART asks after every byte.
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let Self::To(shared) = self else { return };
        shared.lock().closed = true;
        shared.wake_owner();
        if !self.flush_within(CLOSE_WAIT) {
            tracing::warn!("the console's sink did not take the last of the output");
        }
    }
}

/// The thread: writes what there is until closed.
fn drain(shared: &Shared, mut sink: Box<dyn Write + Send>) {
    let Filled::Thread(filled) = &shared.filled else { return };
    let mut batch = Vec::new();
    let mut state = shared.lock();
    loop {
        while state.waiting.is_empty() && !state.closed {
            state = filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.waiting.is_empty() {
            return;
        }
        batch.clear();
        state.take(&mut batch);
        // The taken bytes are the sink's now: the buffer has room again.
        shared.tell_moved();
        drop(state);
        let result = write_out(&mut *sink, &batch);
        state = shared.lock();
        state.moved(0);
        if let Err(error) = result {
            tracing::warn!(%error, "writing the console's output failed; the rest of it is dropped");
            state.fail();
        }
        shared.tell_moved();
        if state.failed {
            return;
        }
    }
}

/// Writes and flushes everything, trying again while a non-blocking sink is full.
fn write_out(sink: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) => retry(e)?,
        }
    }
    while let Err(e) = sink.flush() {
        retry(e)?;
    }
    Ok(())
}

fn retry(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => {
            std::thread::sleep(RETRY);
            Ok(())
        }
        _ => Err(error),
    }
}
