//! A guest's TCP connection to the gateway's port 53, without sockets or clocks (RFC 1035 §4.2.2, RFC 7766).
//!
//! Each message has its length in two bytes in front. Several questions may be under way ([`MAX_PENDING`]; no more is
//! read until one is answered), and answers go out in the order in which they come in. Limits: [`MAX_OUT`] bytes of
//! answers that the guest has not taken; a connection without a question for [`IDLE`] is closed.

use std::time::{Duration, Instant};

use crate::nat::host::SockId;

/// Questions of one connection under way.
pub(crate) const MAX_PENDING: usize = 16;
/// Bytes of answers that wait for the guest.
pub(crate) const MAX_OUT: usize = 256 << 10;
/// How long a connection may be silent.
pub(crate) const IDLE: Duration = Duration::from_secs(15);

/// The service's end of a guest's connection.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) sock: SockId,
    pub(crate) used: Instant,
    /// Questions under way.
    pub(crate) pending: usize,
    /// The guest will send no more.
    pub(crate) ended: bool,
    received: Vec<u8>,
    out: Vec<u8>,
}

impl Stream {
    pub(crate) fn new(sock: SockId, now: Instant) -> Self {
        Self { sock, used: now, pending: 0, ended: false, received: Vec::new(), out: Vec::new() }
    }

    /// Whether another question may be under way.
    pub(crate) fn may_ask(&self) -> bool {
        self.pending < MAX_PENDING && self.out.len() < MAX_OUT
    }

    /// Whether more may be read.
    pub(crate) fn wants_input(&self) -> bool {
        !self.ended && self.may_ask()
    }

    /// Whether something is to be done for it: more may be read, or a question that has come may be asked.
    pub(crate) fn wants_turn(&self) -> bool {
        self.may_ask() && (!self.ended || self.has_question())
    }

    /// A whole question has come that was not asked yet.
    fn has_question(&self) -> bool {
        message_end(&self.received).is_some_and(|end| end <= self.received.len())
    }

    /// Adds bytes that the guest sent.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
    }

    /// Takes the next whole question out.
    pub(crate) fn question(&mut self) -> Option<Vec<u8>> {
        take_message(&mut self.received)
    }

    /// Queues an answer of at most 65,535 bytes.
    pub(crate) fn answer(&mut self, message: &[u8]) {
        self.out.extend(frame(message));
    }

    /// What is to be sent.
    pub(crate) fn out(&self) -> &[u8] {
        &self.out
    }

    /// The first `n` bytes of it have been sent.
    pub(crate) fn sent(&mut self, n: usize) {
        self.out.drain(..n.min(self.out.len()));
    }

    /// Nothing is left to do for a guest that has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.ended && self.pending == 0 && self.out.is_empty() && !self.has_question()
    }
}

/// A message with its length in front.
pub(crate) fn frame(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&len.to_be_bytes()[..], &message[..usize::from(len)]].concat()
}

/// Takes a whole message out of a stream's bytes.
pub(crate) fn take_message(received: &mut Vec<u8>) -> Option<Vec<u8>> {
    let end = message_end(received)?;
    let message = received.get(2..end)?.to_vec();
    received.drain(..end);
    Some(message)
}

/// Where the first message of a stream's bytes ends, which may be behind what has come.
fn message_end(received: &[u8]) -> Option<usize> {
    Some(2 + usize::from(u16::from_be_bytes(*received.first_chunk()?)))
}
