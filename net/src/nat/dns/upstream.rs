//! Connections to the host's servers, for questions that came over TCP (RFC 7766).
//!
//! One connection carries the questions of all guests to a server, several at once (§6.2.1.1). Answers come in any order
//! and are told apart by identifier and question (§7), so no two questions under way have the same identifier. When
//! the last one is answered the connection stays for [`IDLE`], or as long as the server likes.
//!
//! Not every server keeps to that: some answer one question and close, or forget the others. So a question that was
//! not answered is asked again on a connection of its own, and a connection on which one timed out takes no new ones.
//!
//! **Limits**: [`MAX_WAITING`] questions on one connection; one more gets its own. What nobody asked is passed over.

use std::io;
use std::net::SocketAddrV4;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::transaction::{ATTEMPT, Verdict};
use super::{Conn, Dns, TURN, read_some, stream};
use crate::nat::cx::Cx;
use crate::nat::host::{Close, SockId};
use crate::nat::poller::{Events, Owner, Token};

/// Questions under way on one connection.
pub(crate) const MAX_WAITING: usize = 64;
/// How long a connection stays without a question.
pub(crate) const IDLE: Duration = Duration::from_secs(5);
/// Bytes that are read before the answers among them are looked at.
const PIECE: usize = 64 << 10;

/// A connection to a server.
#[derive(Debug)]
pub(crate) struct Upstream {
    sock: SockId,
    server: SocketAddrV4,
    /// Whether more questions may join; if not, it ends with its last one.
    shared: bool,
    connected: bool,
    /// What is still to be sent.
    out: Vec<u8>,
    /// What has come of the next answer.
    received: Vec<u8>,
    /// The slots of its questions.
    waiting: Vec<u32>,
}

impl Upstream {
    fn takes(&self, server: SocketAddrV4) -> bool {
        self.shared && self.server == server && self.waiting.len() < MAX_WAITING
    }
}

impl Dns {
    /// Asks `server` the question in `slot`, which came over a stream.
    pub(super) fn ask_over_stream(
        &mut self,
        cx: &mut Cx<'_>,
        slot: u32,
        server: SocketAddrV4,
    ) -> io::Result<()> {
        let Some(Conn::Ask(ask)) = self.conns.get(slot) else { return Ok(()) };
        let (frame, share) = (stream::frame(&ask.message), ask.is_first_attempt());
        let open = |conn: &Conn| matches!(conn, Conn::Upstream(upstream) if upstream.takes(server));
        let open = self.conns.iter().find(|(_, conn)| share && open(conn)).map(|(slot, _)| slot);
        let token = match open {
            Some(slot) => self.conns.token(slot, Owner::Dns),
            None => self.connect(cx, server, share)?,
        };
        if let Some(Conn::Ask(ask)) = self.conns.get_mut(slot) {
            ask.via = Some(token);
        }
        if let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) {
            upstream.out.extend(frame);
            upstream.waiting.push(slot);
        }
        self.timers.remove(token.slot);
        self.timers.set(slot, cx.now + ATTEMPT);
        self.flush_upstream(cx, token);
        Ok(())
    }

    fn connect(&mut self, cx: &mut Cx<'_>, server: SocketAddrV4, shared: bool) -> io::Result<Token> {
        let token = self.conns.next_token(Owner::Dns);
        let sock = cx.host.connect(server, token)?;
        let (out, received, waiting) = (Vec::new(), Vec::new(), Vec::new());
        self.conns.insert(Conn::Upstream(Upstream {
            sock,
            server,
            shared,
            connected: false,
            out,
            received,
            waiting,
        }));
        self.upstreams += 1;
        Ok(token)
    }

    /// Something happened on a connection to a server.
    pub(super) fn upstream(&mut self, cx: &mut Cx<'_>, token: Token, events: Events) {
        let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) else { return };
        let failed = !upstream.connected && cx.host.connected(upstream.sock).is_err();
        if failed || events.contains(Events::ERROR) {
            return self.lose(cx, token);
        }
        upstream.connected = true;
        self.flush_upstream(cx, token);
        for _ in 0..TURN {
            let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) else { return };
            let before = upstream.received.len();
            let ended = read_some(cx, upstream.sock, &mut upstream.received, PIECE);
            let nothing = upstream.received.len() == before;
            while let Some(Conn::Upstream(upstream)) = self.conns.by_token(token)
                && let Some(answer) = stream::take_message(&mut upstream.received)
            {
                self.answered(cx, token, &answer);
            }
            if ended {
                return self.lose(cx, token);
            }
            if nothing {
                return;
            }
        }
        if let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) {
            cx.host.want_write(upstream.sock, token); // the rest has a turn of its own
        }
    }

    /// Finds the question that a message answers.
    fn answered(&mut self, cx: &mut Cx<'_>, token: Token, answer: &[u8]) {
        let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) else { return };
        let server = upstream.server;
        for slot in upstream.waiting.clone() {
            let Some(Conn::Ask(ask)) = self.conns.get_mut(slot) else { continue };
            match ask.judge(answer) {
                Verdict::Foreign => {}
                Verdict::Failure => return self.try_next(cx, slot),
                Verdict::Final(answer) => {
                    self.good = Some(server);
                    return self.finish(cx, slot, &answer);
                }
            }
        }
    }

    fn flush_upstream(&mut self, cx: &mut Cx<'_>, token: Token) {
        let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) else { return };
        while upstream.connected && !upstream.out.is_empty() {
            let out = VolatileSlice::from(&mut upstream.out[..]);
            match cx.host.send(upstream.sock, &mut std::iter::once(out)) {
                Ok(0) => return,
                Ok(sent) => drop(upstream.out.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.lose(cx, token),
            }
        }
    }

    /// The connection takes no more questions.
    pub(super) fn retire(&mut self, token: Token) {
        if let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) {
            upstream.shared = false;
        }
    }

    /// The question in `slot` does not wait on its connection any more.
    pub(super) fn leave(&mut self, cx: &mut Cx<'_>, slot: u32, token: Token) {
        let Some(Conn::Upstream(upstream)) = self.conns.by_token(token) else { return };
        upstream.waiting.retain(|waiting| *waiting != slot);
        if !upstream.waiting.is_empty() {
            return;
        }
        if upstream.shared {
            self.timers.set(token.slot, cx.now + IDLE);
        } else {
            self.hang_up(cx, token);
        }
    }

    /// The connection is of no use any more: its questions go on without it.
    fn lose(&mut self, cx: &mut Cx<'_>, token: Token) {
        for slot in self.hang_up(cx, token) {
            self.try_next(cx, slot);
        }
    }

    /// Closes a connection and says whose it was.
    pub(super) fn hang_up(&mut self, cx: &mut Cx<'_>, token: Token) -> Vec<u32> {
        if !matches!(self.conns.by_token(token), Some(Conn::Upstream(_))) {
            return Vec::new();
        }
        let Some(Conn::Upstream(upstream)) = self.conns.remove(token.slot) else { return Vec::new() };
        self.upstreams -= 1;
        self.timers.remove(token.slot);
        cx.host.close(upstream.sock, Close::Graceful);
        upstream.waiting
    }
}
