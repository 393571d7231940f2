//! One question on its way through the host's servers, without sockets or clocks.
//!
//! Servers are asked one after the other, the one that answered last first. The next one is asked when one is silent for
//! [`ATTEMPT`], refuses the connection, or fails (SERVFAIL, NOTIMP, REFUSED); then all of them once more, at most
//! [`MAX_ATTEMPTS`] times in all: a guest's resolver gives up after 5 to 10 seconds. If nobody knew better, the guest gets
//! the failure of the last one that failed, or our own SERVFAIL.
//!
//! An answer counts if it comes from the server that was asked, has the identifier that we chose at random, and repeats
//! the question; anything else is passed over, because it is somebody's guess (RFC 5452 §4).

use std::net::SocketAddrV4;
use std::time::Duration;

use super::wire::{self, Query};
use crate::MacAddr;
use crate::nat::host::SockId;
use crate::nat::poller::Token;

/// How long a server may think.
pub(crate) const ATTEMPT: Duration = Duration::from_millis(1500);
/// How often servers are asked.
pub(crate) const MAX_ATTEMPTS: usize = 6;
/// How often each server is asked.
const ROUNDS: usize = 2;

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// A datagram.
    Udp(SocketAddrV4, MacAddr),
    /// A stream, by the token of its socket.
    Stream(Token),
}

/// What an answer is worth.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is no answer to this question.
    Foreign,
    /// Another server may know better.
    Failure,
    /// This goes to the client.
    Final(Vec<u8>),
}

/// A question that waits for its answer.
#[derive(Debug)]
pub(crate) struct Transaction {
    pub(crate) client: Client,
    pub(crate) query: Query,
    /// The question as it is sent, under our identifier.
    pub(crate) message: Vec<u8>,
    pub(crate) id: u16,
    servers: Vec<SocketAddrV4>,
    attempt: usize,
    failure: Option<Vec<u8>>,
    pub(crate) sock: Option<SockId>,
    /// The connection on which a server is asked over TCP.
    pub(crate) via: Option<Token>,
}

impl Transaction {
    /// The question `bytes`, which is `query`, for `servers`; `first` of them is asked first if it is one of them.
    pub(crate) fn new(
        client: Client,
        query: Query,
        bytes: &[u8],
        id: u16,
        servers: &[SocketAddrV4],
        first: Option<SocketAddrV4>,
    ) -> Self {
        let mut servers = servers.to_vec();
        let at = servers.iter().position(|server| Some(*server) == first).unwrap_or(0);
        servers.rotate_left(at);
        let message = wire::with_id(bytes, id);
        Self { client, query, message, id, servers, attempt: 0, failure: None, sock: None, via: None }
    }

    /// Whom to ask now; nobody when all have been asked often enough.
    pub(crate) fn server(&self) -> Option<SocketAddrV4> {
        let most = (self.servers.len() * ROUNDS).min(MAX_ATTEMPTS);
        if self.attempt >= most {
            return None;
        }
        self.servers.get(self.attempt % self.servers.len().max(1)).copied()
    }

    /// The server that was asked was no help.
    pub(crate) fn next(&mut self) {
        self.attempt += 1;
    }

    /// Whether nobody has been asked in vain.
    pub(crate) fn is_first_attempt(&self) -> bool {
        self.attempt == 0
    }

    /// Bytes that the client takes.
    pub(crate) fn max_size(&self) -> usize {
        match self.client {
            Client::Udp(..) => self.query.max_size(),
            Client::Stream(_) => usize::from(u16::MAX),
        }
    }

    /// Judges what the server that was asked has sent.
    pub(crate) fn judge(&mut self, answer: &[u8]) -> Verdict {
        if !self.query.is_answered_by(answer, self.id) {
            return Verdict::Foreign;
        }
        let fit = self.query.passed_on(answer, self.max_size());
        if wire::is_failure(answer) {
            self.failure = Some(fit);
            return Verdict::Failure;
        }
        Verdict::Final(fit)
    }

    /// What the client gets when nobody knew.
    pub(crate) fn give_up(&mut self) -> Vec<u8> {
        self.failure.take().unwrap_or_else(|| self.query.answer(wire::Rcode::ServFail, false, &[]))
    }

    /// Whether `client` asks the same again: it did not want to wait.
    pub(crate) fn is(&self, client: Client, query: &Query) -> bool {
        self.client == client && self.query == *query
    }
}
