//! Whatever a guest sends: nothing panics, nothing grows, no byte is lost or invented.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::bench::{Bench, Seg, Talk, seg, stamp};
use crate::Offloads;
use crate::nat::config::NatConfig;
use crate::nat::poller::Events;
use crate::nat::tcp::segment::Flags;

/// Something that happens.
#[derive(Clone, Debug)]
enum Step {
    Guest(Seg),
    Event(u8),
    World(usize),
    WorldCloses,
    Error(i32),
    Room(usize),
    Ring(usize),
    Pass(u64),
    Turn,
}

fn near() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..4, 0u32..4000, any::<u32>()]
}

fn segment() -> impl Strategy<Value = Seg> {
    let options = prop_oneof![
        2 => Just(vec![]),
        1 => proptest::collection::vec(any::<u8>(), 8),
        1 => any::<(u32, u32)>().prop_map(|(value, echo)| stamp(value, echo)),
        1 => Just(vec![1, 1, 4, 2]),
    ];
    let blocks = proptest::collection::vec((near(), near()), 0..3);
    let what = (any::<u8>(), near(), near(), any::<u16>(), 0usize..2000, (options, blocks), 0u16..3);
    what.prop_map(|(flags, seq, ack, window, len, (options, blocks), port)| {
        let mut seg = seg(Flags::from_bits_truncate(flags), seq, ack).window(window).data(&vec![1; len]);
        seg.options = options;
        seg.blocks = blocks;
        seg.from.set_port(40_000 + port);
        seg
    })
}

fn talk() -> impl Strategy<Value = Talk> {
    any::<(bool, bool)>().prop_map(|(stamps, sack)| Talk { stamps, sack })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => segment().prop_map(Step::Guest),
        3 => any::<u8>().prop_map(Step::Event),
        2 => (0usize..70_000).prop_map(Step::World),
        1 => Just(Step::WorldCloses),
        1 => (1i32..120).prop_map(Step::Error),
        1 => (0usize..50_000).prop_map(Step::Room),
        1 => (0usize..20).prop_map(Step::Ring),
        2 => (0u64..100_000).prop_map(Step::Pass),
        4 => Just(Step::Turn),
    ]
}

fn act(bench: &mut Bench, step: Step) {
    let alive = !bench.host.open.is_empty();
    match step {
        Step::Guest(seg) => bench.send(&seg),
        Step::Event(bits) if alive => bench.event(Events::from_bits_truncate(bits)),
        Step::World(len) if alive => bench.world_sends(&vec![2; len]),
        Step::WorldCloses if alive => bench.world_closes(),
        Step::Error(error) if alive => bench.sock().error = Some(error),
        Step::Room(room) if alive => bench.sock().room = room,
        Step::Ring(free) => bench.ring.free = free,
        Step::Pass(millis) => bench.pass(Duration::from_millis(millis)),
        Step::Turn => drop(bench.turn()),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_segments_and_events_keep_the_table_within_its_bounds(
        steps in proptest::collection::vec(step(), 0..120), offloads in any::<bool>(),
        talk in proptest::option::of(talk()),
    ) {
        let mut config = NatConfig::default();
        config.limits.tcp_flows = 2;
        let mut bench = Bench::with(config);
        if offloads {
            bench.guest = Offloads::CSUM | Offloads::TSO4;
        }
        if let Some(talk) = talk {
            bench.open_with(talk);
        }
        for step in steps {
            act(&mut bench, step);
            prop_assert!(bench.tcp.len() <= 2);
            prop_assert_eq!(bench.tcp.len(), bench.host.open.len(), "a flow is a socket");
            prop_assert!(bench.tcp.dirty.len() <= bench.tcp.len());
        }
    }

    /// A guest that keeps to the rules, and a wire that loses frames in both directions.
    #[test]
    fn no_byte_is_lost_or_invented_on_a_wire_that_loses(
        up in proptest::collection::vec(any::<u8>(), 0..9000),
        down in proptest::collection::vec(any::<u8>(), 0..9000),
        losses in proptest::collection::vec(0u8..4, 0..60),
        rooms in proptest::collection::vec(0usize..3000, 0..10),
        big in any::<bool>(),
        talk in talk(),
        keeps in any::<bool>(),
    ) {
        let mut wire = Wire::new(losses, big, talk, keeps);
        wire.run(&up, &down, rooms);
        prop_assert_eq!(&wire.bench.sock().received, &up);
        prop_assert_eq!(wire.got, down);
    }
}

/// Losses on end after which the wire lets a frame pass: a flow that heard nothing 12 times would rightly give up.
const MOST_LOSSES: u32 = 10;
/// Longest time that a flow with something to deliver may be silent: the largest retransmission time-out.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);

/// A connection over a wire that loses what it is told to.
struct Wire {
    bench: Bench,
    losses: std::vec::IntoIter<u8>,
    lost: u32,
    /// Of the guest's data: sent, and acknowledged.
    sent: usize,
    acked: usize,
    /// Of the world's data, what the guest has.
    got: Vec<u8>,
    talk: Talk,
    /// The guest keeps what it receives out of order, and says so if SACK is agreed.
    keeps: bool,
    kept: BTreeMap<u32, Vec<u8>>,
    /// Our clock, as the guest last saw it.
    clock: u32,
}

impl Wire {
    fn new(losses: Vec<u8>, big: bool, talk: Talk, keeps: bool) -> Self {
        let mut bench = Bench::talking(talk);
        if big {
            bench.guest = Offloads::CSUM | Offloads::TSO4;
        }
        let (losses, clock) = (losses.into_iter(), bench.clock);
        let (got, kept) = (Vec::new(), BTreeMap::new());
        Self { bench, losses, lost: 0, sent: 0, acked: 0, got, talk, keeps, kept, clock }
    }

    fn loses(&mut self) -> bool {
        let loses = self.losses.next() == Some(0) && self.lost < MOST_LOSSES;
        self.lost += u32::from(loses);
        loses
    }

    fn guest_sends(&mut self, at: usize, data: &[u8]) {
        if self.loses() {
            return;
        }
        self.lost = 0;
        let (seq, ack) = (u32::try_from(at).unwrap() + 1, u32::try_from(self.got.len()).unwrap() + 1);
        let mut seg = seg(Flags::ACK, seq, ack).data(data);
        if self.talk.stamps {
            seg.options = stamp(1000, self.clock);
        }
        if self.talk.sack {
            let kept = self.kept.iter().rev().take(3);
            seg.blocks = kept.map(|(seq, data)| (*seq, seq + u32::try_from(data.len()).unwrap())).collect();
        }
        self.bench.send(&seg);
    }

    fn guest_takes(&mut self, seq: u32, data: Vec<u8>) {
        if data.is_empty() {
            return;
        }
        let next = |got: &Vec<u8>| u32::try_from(got.len()).unwrap() + 1;
        if seq > next(&self.got) {
            if self.keeps {
                self.kept.insert(seq, data);
            }
            return;
        }
        self.kept.insert(seq, data);
        while let Some(first) = self.kept.first_entry()
            && *first.key() <= next(&self.got)
        {
            let (seq, data) = first.remove_entry();
            let known = (next(&self.got) - seq) as usize;
            self.got.extend_from_slice(data.get(known..).unwrap_or_default());
        }
    }

    /// The guest takes what a turn brings, and acknowledges data. Says whether anything was sent at all.
    fn guest_receives(&mut self) -> bool {
        let lines = self.bench.turn_frames();
        let any = !lines.is_empty();
        for line in lines {
            if self.loses() {
                continue;
            }
            self.acked = self.acked.max(line.ack as usize - 1);
            assert_eq!(line.options.stamp.is_some(), self.talk.stamps);
            self.clock = line.options.stamp.map_or(0, |stamp| stamp.value);
            let answers = !line.data.is_empty();
            self.guest_takes(line.seq, line.data);
            if answers {
                self.guest_sends(self.sent, &[]);
            }
        }
        any
    }

    /// Until all has arrived on both sides. Time passes as fast as somebody has something to do.
    fn run(&mut self, up: &[u8], down: &[u8], rooms: Vec<usize>) {
        let mut rooms = rooms.into_iter();
        self.bench.sock().inbox.extend(down);
        self.bench.sock().room = 0;
        self.bench.event(Events::READ);
        while self.acked < up.len() || self.got.len() < down.len() {
            self.bench.sock().room += rooms.next().unwrap_or(1000);
            self.bench.event(Events::WRITE);
            // The guest sends again what was not acknowledged when time had passed, 2000 bytes cut at 700.
            let mut busy = self.acked < up.len();
            self.sent = self.acked;
            let end = up.len().min(self.acked + 2000);
            while self.sent < end {
                let upto = end.min(self.sent + 700);
                self.guest_sends(self.sent, &up[self.sent..upto]);
                self.sent = upto;
            }
            busy |= self.guest_receives();
            if busy {
                self.bench.pass(Duration::from_millis(300));
            } else if self.got.len() < down.len() {
                let deadline = self.bench.tcp.deadline().expect("data are on their way");
                let silence = deadline.saturating_duration_since(self.bench.now);
                assert!(silence <= LONGEST_SILENCE, "stalled with {} of {}", self.got.len(), down.len());
                self.bench.pass(silence);
            }
        }
    }
}

#[test]
fn ten_losses_on_end_are_waited_out() {
    let mut wire = Wire::new(vec![0; 10], false, Talk::default(), false);
    wire.run(&[], &[7; 3000], vec![]);
    assert_eq!(wire.got, [7; 3000]);
}
