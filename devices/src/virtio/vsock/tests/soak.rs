//! Hundreds of connections at once, which begin and end in every way, with a guest that behaves as Linux does: whatever was
//! promised arrives whole, and in the end nothing is left.

use super::streams::{End, Program};
use super::*;

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Each end shuts its own way when it has sent all.
    InOrder,
    /// The host closes when it has sent all, and reads nothing.
    HostLeaves,
    /// The guest closes when it has sent all; the host reads when it pleases.
    GuestLeaves,
    /// The guest resets it in the middle.
    GuestAborts,
}

struct Session {
    end: End,
    /// `None` when the host has closed.
    program: Option<Program>,
    ending: Ending,
    to_host: usize,
    to_guest: usize,
    /// The guest's kernel has forgotten it.
    forgotten: bool,
}

impl Session {
    /// Something that one of both ends does next.
    fn step(&mut self, lab: &mut Lab, random: &mut Random) {
        let len = 1 + random.below(9000);
        match random.below(4) {
            0 => self.host_writes(len),
            1 => {
                if let Some(program) = self.program.as_mut().filter(|_| self.ending != Ending::HostLeaves) {
                    program.read(len);
                }
            }
            2 if !self.forgotten => self.guest_writes(lab, len, random),
            3 if !self.forgotten => self.end.forward(lab, len),
            _ => {}
        }
    }

    fn host_writes(&mut self, len: usize) {
        let Some(program) = &mut self.program else { return };
        match self.ending {
            Ending::HostLeaves => {
                let before = program.sent;
                // Never all of it by `write`, which would shut its own way only.
                program.write(len.min(self.to_guest - before), usize::MAX);
                if program.sent == self.to_guest {
                    self.program = None;
                }
            }
            Ending::InOrder => program.write(len, self.to_guest),
            // The guest does not wait for what these send, so they send nothing.
            Ending::GuestLeaves | Ending::GuestAborts => {}
        }
    }

    fn guest_writes(&mut self, lab: &mut Lab, len: usize, random: &mut Random) {
        match self.ending {
            Ending::HostLeaves => {}
            Ending::InOrder => self.end.write(lab, len, self.to_host),
            Ending::GuestLeaves => {
                self.end.write(lab, len.min(self.to_host - self.end.sent), usize::MAX);
                if self.end.sent == self.to_host && !self.end.shut {
                    self.end.shut = true;
                    lab.send_shutdown(self.end.key, Shutdown::all());
                }
            }
            Ending::GuestAborts => {
                self.end.write(lab, len, usize::MAX);
                if random.below(8) == 0 {
                    lab.send(self.end.key, Op::Rst);
                    self.forgotten = true;
                }
            }
        }
    }

    /// As Linux does: a connection that the host has shut both ways is answered by RST once all of it was read.
    fn react(&mut self, lab: &mut Lab) {
        if self.end.reset {
            self.forgotten = true;
        }
        if !self.forgotten && self.end.peer_shut.is_all() {
            lab.send(self.end.key, Op::Rst);
            self.forgotten = true;
        }
    }

    /// Both ends are through. Checks what arrived.
    fn is_over(&self) -> bool {
        let host_is_through = self.program.as_ref().is_none_or(|program| program.at_end);
        if !(self.forgotten && host_is_through) {
            return false;
        }
        let got = self.program.as_ref().map_or(&[][..], |program| &program.received);
        let (to_host, to_guest) = match self.ending {
            Ending::InOrder => (self.to_host, self.to_guest),
            Ending::HostLeaves => (0, self.to_guest),
            Ending::GuestLeaves => (self.to_host, 0),
            // Some of what was sent, but nothing else.
            Ending::GuestAborts => (got.len(), 0),
        };
        assert!(got == pattern(0, to_host), "the host lost something: {:?}", self.ending);
        assert!(self.end.received == pattern(0, to_guest), "the guest lost something: {:?}", self.ending);
        true
    }
}

/// A generator that gives the same each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// Host port that is served in all of it.
const SERVED: u32 = 7;

struct Soak {
    lab: Lab,
    server: UnixListener,
    sessions: Vec<Session>,
    random: Random,
    begun: u32,
    credit: u32,
}

impl Soak {
    fn new(features: u64, seed: u64) -> Self {
        let mut lab = Lab::starved(features);
        lab.post(64);
        let server = lab.server(SERVED);
        let credit = [700, 5000, 60_000][seed as usize % 3];
        Self { lab, server, sessions: Vec::new(), random: Random(0x9e37 + seed), begun: 0, credit }
    }

    fn begin(&mut self) {
        let all = [Ending::InOrder, Ending::HostLeaves, Ending::GuestLeaves, Ending::GuestAborts];
        let ending = all[self.random.below(all.len())];
        let (end, stream) = if self.random.below(2) == 0 { self.ask() } else { self.dial() };
        // Some are longer than a socket's buffer and the credit together.
        let scale = if self.random.below(10) == 0 { 600_000 } else { 20_000 };
        let (to_host, to_guest) = (self.random.below(scale), self.random.below(scale));
        let program = Some(Program::new(stream));
        self.sessions.push(Session { end, program, ending, to_host, to_guest, forgotten: false });
        self.begun += 1;
    }

    /// A client of the host asks for the guest's port.
    fn ask(&mut self) -> (End, UnixStream) {
        let mut stream = self.lab.stranger();
        stream.write_all(b"CONNECT 52\n").unwrap();
        let key = loop {
            let packets = self.exchange(64);
            let asks = |header: &Header| header.op == Op::Request as u16;
            if let Some((request, _)) = packets.iter().find(|(header, _)| asks(header)) {
                break Key { host: request.src_port, guest: 52 };
            }
        };
        let end = End::new(key, self.credit);
        self.lab.send_header(end.header(&self.lab, Op::Response), &[]);
        assert_eq!(read(&mut stream), format!("OK {}\n", key.host).as_bytes());
        (end, stream)
    }

    /// The guest dials the host's port.
    fn dial(&mut self) -> (End, UnixStream) {
        let key = Key { host: SERVED, guest: 10_000 + self.begun };
        let end = End::new(key, self.credit);
        self.lab.send_header(end.header(&self.lab, Op::Request), &[]);
        let (stream, _) = self.server.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        loop {
            let accepts = |header: &Header| header.op == Op::Response as u16 && header.dst_port == key.guest;
            if self.exchange(64).iter().any(|(header, _)| accepts(header)) {
                return (end, stream);
            }
        }
    }

    /// Hands out what came, lets the guest's kernel react, and makes up to so many buffers available.
    fn exchange(&mut self, buffers: usize) -> Vec<(Header, Vec<u8>)> {
        self.lab.guest.run();
        self.lab.fetch(false);
        let packets = std::mem::take(&mut self.lab.inbox);
        let is_answer = |header: &Header| [Op::Request as u16, Op::Response as u16].contains(&header.op);
        let rest: Vec<_> = packets.iter().filter(|(header, _)| !is_answer(header)).cloned().collect();
        for session in &mut self.sessions {
            session.end.take(&mut self.lab, &rest);
            session.react(&mut self.lab);
        }
        for _ in 0..buffers.min(128 - self.lab.posted.len()) {
            self.lab.post_of(BUFFER);
        }
        self.lab.guest.kick_and_run(RX);
        packets
    }

    fn run(&mut self, total: u32, at_once: usize) {
        let mut rounds = 0;
        while self.begun < total || !self.sessions.is_empty() {
            rounds += 1;
            assert!(rounds < 400_000, "stuck with {} connections", self.sessions.len());
            if self.begun < total && self.sessions.len() < at_once {
                self.begin();
            }
            for _ in 0..8.min(self.sessions.len()) {
                let which = self.random.below(self.sessions.len());
                self.sessions[which].step(&mut self.lab, &mut self.random);
            }
            let buffers = self.random.below(20);
            self.exchange(buffers);
            self.sessions.retain(|session| !session.is_over());
        }
        // Those that the guest reset while the host had nothing to say are seen by now, too.
        self.lab.guest.run();
        let totals = self.lab.totals();
        assert_eq!((totals.open, totals.opened), (0, u64::from(total)));
        let ordinary = [Refusal::NoConnection];
        for why in Refusal::ALL.into_iter().filter(|why| !ordinary.contains(why)) {
            assert_eq!(totals.refused(why), 0, "{why:?}");
        }
    }
}

#[test]
fn hundreds_of_connections_at_once_all_end_well() {
    for (features, seed) in [(0, 0), (F_EVENT_IDX, 1), (F_EVENT_IDX, 2)] {
        Soak::new(features, seed).run(500, 200);
    }
}
