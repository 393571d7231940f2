//! Whole streams, whatever the sizes of buffers, reads and writes, with a guest that keeps to the rules.

use super::*;
use proptest::prelude::*;

/// What the guest's end of a connection knows: its own credit, and the device's.
pub(super) struct End {
    pub(super) key: Key,
    /// Bytes that this end holds at most, and what it has not forwarded.
    buf_alloc: u32,
    pub(super) received: Vec<u8>,
    forwarded: usize,
    pub(super) sent: usize,
    peer_forwarded: u32,
    peer_alloc: u32,
    pub(super) shut: bool,
    /// What the device said of the host's shutting down.
    pub(super) peer_shut: Shutdown,
    /// The device said RST.
    pub(super) reset: bool,
}

impl End {
    pub(super) fn new(key: Key, buf_alloc: u32) -> Self {
        Self {
            key,
            buf_alloc,
            received: Vec::new(),
            forwarded: 0,
            sent: 0,
            peer_forwarded: 0,
            peer_alloc: BUF_ALLOC,
            shut: false,
            peer_shut: Shutdown::empty(),
            reset: false,
        }
    }

    pub(super) fn header(&self, lab: &Lab, op: Op) -> Header {
        Header { buf_alloc: self.buf_alloc, fwd_cnt: self.forwarded as u32, ..lab.header(self.key, op) }
    }

    /// Takes the packets that came; answers questions.
    pub(super) fn take(&mut self, lab: &mut Lab, packets: &[(Header, Vec<u8>)]) {
        let key = self.key;
        let mine = |header: &Header| (header.src_port, header.dst_port) == (key.host, key.guest);
        for (header, payload) in packets.iter().filter(|(header, _)| mine(header)) {
            self.peer_alloc = header.buf_alloc;
            self.peer_forwarded = header.fwd_cnt;
            match Op::parse(header.op).unwrap() {
                Op::Rw => {
                    assert!(!self.peer_shut.contains(Shutdown::SEND), "data behind the end");
                    self.received.extend(payload);
                    assert!(
                        self.received.len() - self.forwarded <= self.buf_alloc as usize,
                        "beyond the credit"
                    );
                }
                Op::Shutdown => self.peer_shut |= Shutdown::from_bits(header.flags).unwrap(),
                Op::Rst => self.reset = true,
                Op::CreditRequest => {
                    let answer = self.header(lab, Op::CreditUpdate);
                    lab.send_header(answer, &[]);
                }
                Op::CreditUpdate => {}
                op => panic!("{op:?}"),
            }
        }
    }

    fn credit(&self) -> usize {
        (self.peer_alloc - (self.sent as u32 - self.peer_forwarded)) as usize
    }

    /// The guest's program reads `len` bytes; the device is told.
    pub(super) fn forward(&mut self, lab: &mut Lab, len: usize) {
        let len = len.min(self.received.len() - self.forwarded);
        if len > 0 {
            self.forwarded += len;
            let update = self.header(lab, Op::CreditUpdate);
            lab.send_header(update, &[]);
        }
    }

    /// The guest's program writes up to `len` bytes of a stream of `total`, then ends it.
    pub(super) fn write(&mut self, lab: &mut Lab, len: usize, total: usize) {
        let len = len.min(self.credit()).min(total - self.sent);
        if len > 0 {
            let header = Header { len: len as u32, ..self.header(lab, Op::Rw) };
            lab.send_header(header, &pattern(self.sent, len));
            self.sent += len;
        }
        if self.sent == total && !self.shut {
            self.shut = true;
            let header = Header { flags: Shutdown::SEND.bits(), ..self.header(lab, Op::Shutdown) };
            lab.send_header(header, &[]);
        }
    }
}

/// The host's end.
pub(super) struct Program {
    stream: UnixStream,
    pub(super) sent: usize,
    pub(super) received: Vec<u8>,
    pub(super) shut: bool,
    pub(super) at_end: bool,
}

impl Program {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, sent: 0, received: Vec::new(), shut: false, at_end: false }
    }

    pub(super) fn write(&mut self, len: usize, total: usize) {
        let len = len.min(total - self.sent);
        if len > 0 {
            self.sent += stuff(&mut self.stream, self.sent, len);
        }
        if self.sent == total && !self.shut {
            self.shut = true;
            self.stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
    }

    pub(super) fn read(&mut self, len: usize) {
        let mut bytes = vec![0; len.max(1)];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.at_end = true,
            Ok(len) => self.received.extend(&bytes[..len]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

/// One connection from accepting it to both ends of stream.
fn transfer(features: u64, buffer: usize, credit: u32, totals: (usize, usize), steps: &[(u8, usize)]) {
    let mut lab = Lab::starved(features);
    // One buffer for the answer, then small ones.
    lab.post(1);
    let mut client = lab.stranger();
    client.write_all(b"CONNECT 52\n").unwrap();
    lab.guest.run();
    lab.fetch(false);
    let key = Key { host: lab.inbox.pop().unwrap().0.src_port, guest: 52 };
    let mut end = End::new(key, credit);
    lab.send_header(end.header(&lab, Op::Response), &[]);
    read(&mut client);
    let (mut program, mut outstanding) = (Program::new(client), 0usize);
    let done = |end: &End, program: &Program| {
        end.peer_shut.contains(Shutdown::SEND) && end.shut && program.at_end && end.received.len() == totals.1
    };
    // After the given steps, everybody does what they can until all is through.
    let rest = [(0, 1 << 16), (1, 1 << 16), (2, 1 << 16), (3, 1 << 16), (4, 8)];
    let limit = steps.len() + 20_000;
    for (n, (what, len)) in steps.iter().chain(rest.iter().cycle()).enumerate() {
        assert!(
            n < limit,
            "stuck: the guest has {} of {}, the host {} of {}",
            end.received.len(),
            totals.1,
            program.received.len(),
            totals.0
        );
        match what {
            0 => program.write(*len, totals.1),
            1 => program.read(*len),
            2 => end.write(&mut lab, *len, totals.0),
            3 => end.forward(&mut lab, *len),
            _ => {
                for _ in 0..(*len % 9).min(200 - outstanding) {
                    lab.post_of(buffer);
                    outstanding += 1;
                }
                lab.guest.kick(RX);
            }
        }
        lab.guest.run();
        lab.fetch(false);
        let packets = std::mem::take(&mut lab.inbox);
        outstanding -= packets.len();
        end.take(&mut lab, &packets);
        if done(&end, &program) {
            break;
        }
    }
    // Not assert_eq: nobody reads a megabyte of differences.
    assert!(program.received == pattern(0, totals.0), "what the host got is not what the guest sent");
    assert!(end.received == pattern(0, totals.1), "what the guest got is not what the host sent");
}

#[test]
fn half_a_megabyte_goes_both_ways_through_small_buffers() {
    transfer(F_EVENT_IDX, 300, 5000, (1 << 19, 1 << 19), &[]);
}

#[test]
fn a_buffer_of_one_byte_is_enough() {
    transfer(0, HEADER_LEN + 1, 1, (100, 100), &[]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn streams_arrive_whole_whatever_the_sizes(
        event_idx in any::<bool>(),
        buffer in prop_oneof![HEADER_LEN + 1..HEADER_LEN + 20, HEADER_LEN + 100..BUFFER],
        credit in prop_oneof![1u32..50, 1000u32..100_000],
        scale in prop_oneof![Just(300usize), Just(20_000)],
        totals in (0usize..20, 0usize..20),
        steps in prop::collection::vec((0u8..5, prop_oneof![1usize..30, 1usize..70_000]), 0..300),
    ) {
        // A credit of a few bytes is for streams of a few hundred.
        let scale = if credit < 50 || buffer < HEADER_LEN + 20 { 30 } else { scale };
        let features = if event_idx { F_EVENT_IDX } else { 0 };
        transfer(features, buffer, credit, (totals.0 * scale, totals.1 * scale), &steps);
    }
}
