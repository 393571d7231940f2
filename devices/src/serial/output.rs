//! The buffer between the UART's transmitter and a sink that may block.
//!
//! One mutex guards the buffer; the thread that owns the sink takes everything there is, writes it without the
//! lock, and comes back. `moved` wakes whoever waits for room or for the end.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{CLOSE_WAIT, OUTPUT_BUFFER, STALL_WAIT};

/// Pause before a non-blocking sink that was full is tried again.
const RETRY: Duration = Duration::from_millis(5);

#[derive(Default)]
struct State {
    waiting: VecDeque<u8>,
    /// Bytes that the thread has taken and not yet written.
    in_flight: usize,
    /// The sink let a vCPU wait in vain; cleared when it moves.
    stalled: bool,
    /// The sink has failed; everything is dropped.
    failed: bool,
    /// No more bytes will come; the thread ends when it has written the rest.
    closed: bool,
    lost: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    filled: Condvar,
    moved: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
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
pub(super) struct Output(Arc<Shared>);

impl Output {
    pub(super) fn new(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        // Not joined: a sink may block for ever, and then only the process's end gets the thread out of it.
        std::thread::Builder::new().name("console".into()).spawn(move || drain(&theirs, sink))?;
        Ok(Self(shared))
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.0.lock();
        let full = |s: &State| s.waiting.len() + bytes.len() > OUTPUT_BUFFER;
        if full(&state) && !state.stalled && !state.failed {
            state = self.0.wait_while(state, STALL_WAIT, |s| full(s) && !s.failed);
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
            self.0.filled.notify_one();
        }
    }

    pub(super) fn flush_within(&self, limit: Duration) -> bool {
        let idle = |s: &State| s.failed || (s.waiting.is_empty() && s.in_flight == 0);
        idle(&self.0.wait_while(self.0.lock(), limit, |s| !idle(s)))
    }

    pub(super) fn lost(&self) -> u64 {
        self.0.lock().lost
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // The thread flushes when it has caught up; the UART asks after every byte.
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.filled.notify_one();
        if !self.flush_within(CLOSE_WAIT) {
            tracing::warn!("the console's sink did not take the last of the output");
        }
    }
}

/// The thread: writes what there is until closed.
fn drain(shared: &Shared, mut sink: Box<dyn Write + Send>) {
    let mut batch = Vec::new();
    let mut state = shared.lock();
    loop {
        while state.waiting.is_empty() && !state.closed {
            state = shared.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.waiting.is_empty() {
            return;
        }
        batch.clear();
        batch.extend(state.waiting.drain(..));
        state.in_flight = batch.len();
        // The taken bytes are the sink's now: the buffer has room again.
        shared.moved.notify_all();
        drop(state);
        let result = write_out(&mut *sink, &batch);
        state = shared.lock();
        state.in_flight = 0;
        state.stalled = false;
        if let Err(error) = result {
            tracing::warn!(%error, "writing the console's output failed; the rest of it is dropped");
            state.failed = true;
            state.lost += state.waiting.len() as u64;
            state.waiting.clear();
        }
        shared.moved.notify_all();
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
