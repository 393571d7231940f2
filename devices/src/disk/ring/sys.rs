//! The submission queue of io_uring.
#![allow(unsafe_code, reason = "what is pushed to the submission queue must stay alive until it completes")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::{LARGE, Transfer};
use crate::disk::Access;

/// A ring, and what is in flight on it. See the module's documentation.
pub(in crate::disk) struct Ring {
    ring: IoUring,
    /// By the number that the kernel knows them by.
    transfers: Vec<Option<Transfer>>,
    in_flight: usize,
}

/// A transfer that is done: its number, and how it ended.
pub(in crate::disk) type Finished = (usize, io::Result<()>);

impl Ring {
    /// A ring for `entries` transfers, whose completions write `eventfd`, which must outlive it.
    ///
    /// # Errors
    /// What the host says when it has no io_uring for us.
    pub(in crate::disk) fn new(entries: usize, eventfd: RawFd) -> io::Result<Self> {
        let size = u32::try_from(entries).map_err(io::Error::other)?;
        let mut ring: IoUring = IoUring::builder().dontfork().build(size)?;
        // Older kernels lose completions, or need iovecs to live longer.
        if !(ring.params().is_feature_nodrop() && ring.params().is_feature_submit_stable()) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Setting up may be allowed where entering is not.
        // SAFETY: a no-op refers to nothing.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        match ring.completion().next().map(|answer| answer.result()) {
            Some(0..) => {}
            Some(error) => return Err(io::Error::from_raw_os_error(-error)),
            None => return Err(io::ErrorKind::Unsupported.into()),
        }
        ring.submitter().register_eventfd(eventfd)?;
        let mut transfers = Vec::new();
        transfers.resize_with(entries, || None);
        Ok(Self { ring, transfers, in_flight: 0 })
    }

    /// Queues a transfer as number `number`, which is free and below the ring's size. The kernel sees it at [`Self::submit`].
    ///
    /// # Errors
    /// The transfer, when it can't be queued.
    pub(in crate::disk) fn push(&mut self, number: usize, transfer: Transfer) -> Result<(), Transfer> {
        let Some(slot @ None) = self.transfers.get_mut(number) else { return Err(transfer) };
        let entry = entry(&transfer).user_data(number as u64);
        *slot = Some(transfer);
        // SAFETY: the entry refers to the file and to the iovecs of the transfer that now is in its slot, and through them
        // to guest memory that the transfer keeps mapped. The iovecs are on the heap and are not changed while it is there. It
        // leaves its slot only when its completion was seen (`reap`), and drop waits for all of them.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => {
                self.in_flight += 1;
                Ok(())
            }
            Err(_) => match self.transfers.get_mut(number).and_then(Option::take) {
                Some(transfer) => Err(transfer),
                None => Ok(()),
            },
        }
    }

    /// Tells the kernel of what was queued. True if that has to be tried again.
    pub(in crate::disk) fn submit(&mut self) -> bool {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Want of memory (EAGAIN, EBUSY). Nothing else is possible on a ring that has answered once.
                Err(_) => return true,
            }
        }
        false
    }

    /// Takes what is done; transfers that were short go on, and are queued again.
    pub(in crate::disk) fn reap(&mut self, finished: &mut Vec<Finished>) {
        while let Some((number, answer)) = self.next_answer() {
            let Some(mut transfer) = self.transfers.get_mut(number).and_then(Option::take) else { continue };
            self.in_flight -= 1;
            match progress(&mut transfer, answer) {
                Some(result) => finished.push((number, result)),
                None => {
                    if self.push(number, transfer).is_err() {
                        finished.push((number, Err(io::ErrorKind::ResourceBusy.into())));
                    }
                }
            }
        }
    }

    /// A transfer's number, and the kernel's answer to it.
    fn next_answer(&mut self) -> Option<(usize, i32)> {
        let answer = self.ring.completion().next()?;
        Some((usize::try_from(answer.user_data()).unwrap_or(usize::MAX), answer.result()))
    }

    /// Waits until the kernel accesses nothing any more. What was in flight is forgotten.
    pub(in crate::disk) fn drain(&mut self) {
        while self.in_flight > 0 {
            // An error is one of those that `submit` tells of; there is nothing to do but to wait.
            if self.ring.submit_and_wait(1).is_err() {
                std::thread::yield_now();
            }
            while let Some((number, _)) = self.next_answer() {
                if self.transfers.get_mut(number).and_then(Option::take).is_some() {
                    self.in_flight -= 1;
                }
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}

fn entry(transfer: &Transfer) -> squeue::Entry {
    let fd = Fd(transfer.file.as_raw_fd());
    let iov = transfer.buffers.iovecs();
    let count = u32::try_from(iov.len()).unwrap_or(u32::MAX);
    let entry = match transfer.access {
        Access::Read => opcode::Readv::new(fd, iov.as_ptr(), count).offset(transfer.at).build(),
        Access::Write => {
            let flags = if transfer.durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(fd, iov.as_ptr(), count).offset(transfer.at).rw_flags(flags).build()
        }
        Access::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
    };
    let large = transfer.buffers.len() >= LARGE;
    if large { entry.flags(squeue::Flags::ASYNC) } else { entry }
}

/// What the kernel's answer means: the end, or `None` if the rest is to be transferred.
fn progress(transfer: &mut Transfer, answer: i32) -> Option<io::Result<()>> {
    let Ok(n) = usize::try_from(answer) else {
        let error = io::Error::from_raw_os_error(-answer);
        let again = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
        return (!again).then_some(Err(error));
    };
    match transfer.access {
        Access::Flush => return Some(Ok(())),
        Access::Read if n == 0 => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
        Access::Write if n == 0 => return Some(Err(io::ErrorKind::WriteZero.into())),
        Access::Read | Access::Write => {}
    }
    transfer.buffers.advance(n);
    transfer.at += n as u64;
    transfer.buffers.is_empty().then_some(Ok(()))
}
