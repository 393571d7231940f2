//! [`Thread`]: requests done one after the other, where nobody waits for them.
//!
//! One thread per disk, named `disk`, made when it is first needed and ended with its owner. Requests come in by a channel,
//! results go out by another and ring an eventfd. Transfers that are short or interrupted go on until they are done.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::ring::Finished;
use super::{Operation, Request, Storage};

/// A thread for one disk's requests. See the module's documentation.
pub(super) struct Thread {
    /// `None` when it is to end.
    requests: Option<Sender<(usize, Request)>>,
    results: Receiver<Finished>,
    handle: Option<JoinHandle<()>>,
    in_flight: usize,
}

impl Thread {
    /// Starts the thread; each result writes `eventfd`.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub(super) fn start(storage: Arc<dyn Storage>, eventfd: EventFd) -> io::Result<Self> {
        let (requests, orders) = channel::<(usize, Request)>();
        let (answers, results) = channel();
        let handle = Builder::new().name("disk".into()).spawn(move || {
            for (number, mut request) in orders {
                let result = perform(&*storage, &mut request);
                // Guest memory is let go of before anybody hears that it is.
                drop(request);
                if answers.send((number, result)).is_err() {
                    return;
                }
                // Fails only when the counter is at its limit, and then it is readable anyway.
                let _ = eventfd.write(1);
            }
        })?;
        Ok(Self { requests: Some(requests), results, handle: Some(handle), in_flight: 0 })
    }

    /// Lets the thread do `request`, behind all that it has.
    ///
    /// # Errors
    /// When there is no thread any more: it panicked.
    pub(super) fn push(&mut self, number: usize, request: Request) -> io::Result<()> {
        let sent = self.requests.as_ref().map(|requests| requests.send((number, request)));
        match sent {
            Some(Ok(())) => {
                self.in_flight += 1;
                Ok(())
            }
            Some(Err(_)) | None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Takes what is done.
    pub(super) fn reap(&mut self, finished: &mut Vec<Finished>) {
        while let Ok(result) = self.results.try_recv() {
            self.in_flight -= 1;
            finished.push(result);
        }
    }

    /// Waits until everything is done, and forgets the results.
    pub(super) fn drain(&mut self) {
        while self.in_flight > 0 && self.results.recv().is_ok() {
            self.in_flight -= 1;
        }
        self.in_flight = 0;
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(handle) = self.handle.take() {
            // It ends with its channel. A panic of it has been told by the panic hook.
            let _ = handle.join();
        }
    }
}

/// Does a request to its end.
fn perform(storage: &dyn Storage, request: &mut Request) -> io::Result<()> {
    match &request.operation {
        Operation::Read => {
            transfer(request, io::ErrorKind::UnexpectedEof, |buffers, at| storage.read(buffers, at))
        }
        &Operation::Write { durable } => {
            transfer(request, io::ErrorKind::WriteZero, |buffers, at| storage.write(buffers, at, durable))
        }
        Operation::Flush => again(|| storage.flush()),
        Operation::Discard { ranges, durable } => {
            ranges.iter().try_for_each(|range| again(|| storage.discard(range.at, range.len)))?;
            if *durable { again(|| storage.flush()) } else { Ok(()) }
        }
        Operation::Zero { ranges, unmap, durable } => {
            ranges.iter().try_for_each(|range| again(|| storage.zero(range.at, range.len, *unmap)))?;
            if *durable { again(|| storage.flush()) } else { Ok(()) }
        }
    }
}

/// Repeats `step` until all buffers are done with; a step without a byte is the error `stuck`.
fn transfer(
    request: &mut Request,
    stuck: io::ErrorKind,
    step: impl Fn(&super::GuestBuffers, u64) -> io::Result<usize>,
) -> io::Result<()> {
    while !request.buffers.is_empty() {
        match step(&request.buffers, request.at) {
            Ok(0) => return Err(stuck.into()),
            Ok(n) => {
                request.buffers.advance(n);
                request.at += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn again(mut step: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match step() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
