//! Questions that the network answers later: what connections there are.
//!
//! [`NatHandle::flows`] answers when the network is served, which is after our turn. The answer goes through a mailbox whose
//! eventfd the server polls. A question that is dropped is answered, too: with no connections.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use net::nat::{NatHandle, TcpFlow};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::protocol::Flow;

/// Most connections in an answer.
const FLOWS_MAX: usize = 256;

struct Shared {
    letters: Mutex<Vec<(u64, Vec<Flow>)>>,
    bell: EventFd,
}

/// Where answers arrive.
pub(super) struct Mailbox(Arc<Shared>);

/// Somebody's question; its drop is its answer.
struct Question {
    whose: u64,
    flows: Vec<Flow>,
    mailbox: Arc<Shared>,
}

impl Drop for Question {
    fn drop(&mut self) {
        let letter = (self.whose, std::mem::take(&mut self.flows));
        self.mailbox.letters.lock().unwrap_or_else(PoisonError::into_inner).push(letter);
        // It fails only when the counter is full, and then the bell has been heard.
        let _ = self.mailbox.bell.write(1);
    }
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { letters: Mutex::default(), bell })))
    }

    pub(super) fn bell(&self) -> RawFd {
        self.0.bell.as_raw_fd()
    }

    /// Asks the network; the answer arrives for `whose`, exactly once.
    pub(super) fn ask(&self, nat: &NatHandle, whose: u64) {
        let mut question = Question { whose, flows: Vec::new(), mailbox: Arc::clone(&self.0) };
        nat.flows(move |flows| {
            question.flows = flows.iter().take(FLOWS_MAX).map(Flow::from).collect();
            drop(question);
        });
    }

    /// What has arrived, and for whom.
    pub(super) fn empty(&self) -> Vec<(u64, Vec<Flow>)> {
        let _ = self.0.bell.read();
        std::mem::take(&mut *self.0.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl From<&TcpFlow> for Flow {
    fn from(flow: &TcpFlow) -> Self {
        Self { guest: flow.guest.to_string(), world: flow.world.to_string(), state: flow.state.to_owned() }
    }
}
