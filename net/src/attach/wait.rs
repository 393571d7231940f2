//! Waiting for two ports and the caller's descriptors, with one system call a turn.
//!
//! The descriptors stay registered, so a wait does not depend on how many there are; the kernel is told of a
//! change only when a direction gets stuck or free again.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

/// Something can be received.
pub(super) const INPUT: EventFlags = EventFlags::IN;
/// Something can be sent again.
pub(super) const OUTPUT: EventFlags = EventFlags::OUT;
/// Events of one wait; what does not fit comes with the next.
const MAX_EVENTS: usize = 16;

/// What a wait found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready {
    /// The guest's port reports that it is of no use any more.
    pub(super) broken: bool,
    /// This one of the caller's descriptors is readable, or broken.
    pub(super) stopped: Option<usize>,
}

/// The registered descriptors: the two ports under 0 and 1, the caller's behind them.
pub(super) struct Waiter {
    epoll: OwnedFd,
    wanted: [EventFlags; 2],
    events: Vec<epoll::Event>,
}

impl Waiter {
    /// Registers the guest's and the network's port, and what stops the turns.
    pub(super) fn new(ports: [BorrowedFd<'_>; 2], stops: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (at, fd) in (0..).zip(ports.iter().chain(stops)) {
            epoll::add(&epoll, fd, EventData::new_u64(at), INPUT)?;
        }
        Ok(Self { epoll, wanted: [INPUT; 2], events: Vec::with_capacity(MAX_EVENTS) })
    }

    /// Waits until a port has one of the events that it wants, or anything else happened.
    ///
    /// # Errors
    /// As epoll_wait(2) has; a signal only ends the wait.
    pub(super) fn wait(&mut self, ports: [BorrowedFd<'_>; 2], wanted: [EventFlags; 2]) -> io::Result<Ready> {
        for (at, fd) in ports.into_iter().enumerate() {
            if self.wanted[at] != wanted[at] {
                epoll::modify(&self.epoll, fd, EventData::new_u64(at as u64), wanted[at])?;
                self.wanted[at] = wanted[at];
            }
        }
        self.events.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = Ready::default();
        for event in &self.events {
            // The kernel's structure is packed: its fields are copied out.
            let (which, flags) = (event.data.u64(), event.flags);
            match which {
                0 => ready.broken = flags.intersects(EventFlags::ERR | EventFlags::HUP),
                1 => {}
                stop => ready.stopped = usize::try_from(stop - 2).ok(),
            }
        }
        Ok(ready)
    }
}
