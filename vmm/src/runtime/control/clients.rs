//! One client of the control socket: what it may still send, and what it has still to read.

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;

use super::super::scrollback::Scrollback;
use super::LINE_MAX;

/// Bytes that one client gets per turn: the devices wait.
const TURN: usize = 64 << 10;
/// Bytes that are moved at once.
const CHUNK: usize = 8 << 10;

/// What a client is here for.
pub(super) enum Role {
    /// It asks.
    Asking {
        /// What came since the last whole line.
        line: Vec<u8>,
    },
    /// It is to become a connection into the guest.
    Joining {
        /// The guest, if it said which.
        guest: Option<Ipv4Addr>,
        /// The guest's port.
        port: u16,
        /// What it sent without waiting for the answer.
        early: bool,
    },
    /// It reads the console.
    Watching {
        /// Up to where it has got the output.
        at: u64,
        /// Whether it may type.
        writer: bool,
        /// What it typed and the guest has not taken.
        typed: Vec<u8>,
        /// It types no more.
        done: bool,
    },
}

/// Whether a client stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Stays,
    Leaves,
}

/// A connected client.
pub(super) struct Client {
    pub(super) stream: UnixStream,
    pub(super) role: Role,
    /// What it has still to read before anything else.
    pub(super) answer: Vec<u8>,
    /// Which one it is: a number that no other client of this machine gets.
    pub(super) id: u64,
    /// Its question is with somebody else.
    pub(super) waits: bool,
    /// It goes when it has read its answer.
    pub(super) leaving: bool,
    /// Its socket is full.
    blocked: bool,
    /// What is polled now.
    pub(super) polled: EventSet,
    /// When it came or last asked: a count of such events.
    pub(super) last_asked: u64,
}

impl Client {
    /// `now` counts what clients do.
    pub(super) fn new(stream: UnixStream, now: u64) -> Self {
        Self {
            stream,
            role: Role::Asking { line: Vec::new() },
            answer: Vec::new(),
            id: now,
            waits: false,
            leaving: false,
            blocked: false,
            polled: EventSet::IN,
            last_asked: now,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// What is to be polled.
    pub(super) fn wanted(&self) -> EventSet {
        let mut wanted = EventSet::empty();
        let takes = match &self.role {
            Role::Asking { .. } => self.answer.is_empty() && !self.leaving && !self.waits,
            Role::Joining { .. } => false,
            Role::Watching { typed, done, .. } => typed.is_empty() && !done,
        };
        wanted.set(EventSet::IN, takes);
        wanted.set(EventSet::OUT, self.blocked);
        wanted
    }

    /// The next whole request, reading once if there is none; `Err` when it has gone, or asks for nothing that makes sense.
    pub(super) fn next_line(&mut self) -> Result<Option<Vec<u8>>, &'static str> {
        let Role::Asking { line } = &mut self.role else { return Ok(None) };
        if let Some(end) = line.iter().position(|b| *b == b'\n') {
            let rest = line.split_off(end + 1);
            return Ok(Some(std::mem::replace(line, rest)));
        }
        let mut chunk = [0; LINE_MAX];
        let room = LINE_MAX - line.len();
        match self.stream.read(&mut chunk[..room]) {
            Ok(0) => Err("gone"),
            Ok(n) => {
                line.extend_from_slice(&chunk[..n]);
                if line.contains(&b'\n') {
                    self.next_line()
                } else if line.len() >= LINE_MAX {
                    Err("a request has at most 4096 bytes")
                } else {
                    Ok(None)
                }
            }
            Err(e) if is_later(&e) => Ok(None),
            Err(_) => Err("gone"),
        }
    }

    /// Gives it what it has to read: the answer, then the console's output.
    pub(super) fn give(&mut self, scrollback: Option<&Scrollback>) -> Fate {
        self.blocked = false;
        while !self.answer.is_empty() {
            match self.stream.write(&self.answer) {
                Ok(0) => return Fate::Leaves,
                Ok(n) => drop(self.answer.drain(..n)),
                Err(e) => return self.later(&e),
            }
        }
        if self.leaving {
            return Fate::Leaves;
        }
        let (Role::Watching { at, .. }, Some(scrollback)) = (&mut self.role, scrollback) else {
            return Fate::Stays;
        };
        let mut chunk = [0; CHUNK];
        let turn_ends = *at + TURN as u64;
        while *at < turn_ends {
            match scrollback.read(*at, &mut chunk) {
                None => {
                    tracing::info!("a console's reader did not keep up and was cut off");
                    return Fate::Leaves;
                }
                Some(0) => return Fate::Stays,
                Some(len) => match self.stream.write(&chunk[..len]) {
                    Ok(0) => return Fate::Leaves,
                    Ok(n) => *at += n as u64,
                    Err(e) => return self.later(&e),
                },
            }
        }
        // There is more: the socket has room, so the next turn comes at once.
        self.blocked = true;
        Fate::Stays
    }

    fn later(&mut self, error: &io::Error) -> Fate {
        if is_later(error) {
            self.blocked = true;
            Fate::Stays
        } else {
            Fate::Leaves
        }
    }

    /// Takes what it types, once the guest has taken what it typed before.
    pub(super) fn take_typed(&mut self) -> Fate {
        let Role::Watching { writer, typed, done, .. } = &mut self.role else { return Fate::Stays };
        if *done || !typed.is_empty() {
            return Fate::Stays;
        }
        let mut chunk = [0; LINE_MAX];
        match self.stream.read(&mut chunk) {
            Ok(0) => *done = true,
            Ok(n) if *writer => typed.extend_from_slice(&chunk[..n]),
            // It was told that it only reads.
            Ok(_) => {}
            Err(e) if is_later(&e) => {}
            Err(_) => return Fate::Leaves,
        }
        Fate::Stays
    }
}

pub(super) fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
