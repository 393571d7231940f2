//! Whatever a guest sends: nothing panics, nothing grows, no byte is lost or invented.

use std::time::Duration;

use proptest::prelude::*;

use super::bench::{Bench, Seg, seg};
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
    let options = prop_oneof![Just(vec![]), proptest::collection::vec(any::<u8>(), 8)];
    let what = (any::<u8>(), near(), near(), any::<u16>(), 0usize..2000, options, 0u16..3);
    what.prop_map(|(flags, seq, ack, window, len, options, port)| {
        let mut seg = seg(Flags::from_bits_truncate(flags), seq, ack).window(window).data(&vec![1; len]);
        seg.options = options;
        seg.from.set_port(40_000 + port);
        seg
    })
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
    ) {
        let mut config = NatConfig::default();
        config.limits.tcp_flows = 2;
        let mut bench = Bench::with(config);
        if offloads {
            bench.guest = Offloads::CSUM | Offloads::TSO4;
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
    ) {
        let mut bench = Bench::established();
        if big {
            bench.guest = Offloads::CSUM | Offloads::TSO4;
        }
        let mut losses = losses.into_iter();
        let mut lose = move || losses.next() == Some(0);
        let mut rooms = rooms.into_iter();
        let (mut sent, mut acked) = (0usize, 0usize);
        let mut got: Vec<u8> = Vec::new();
        bench.sock().inbox.extend(&down);
        bench.sock().room = 0;
        bench.event(Events::READ);
        for _ in 0..500 {
            bench.sock().room += rooms.next().unwrap_or(1000);
            bench.event(Events::WRITE);
            // The guest sends what the window allows, cut at 700 bytes, from what is not acknowledged when time passes.
            let end = up.len().min(acked + 2000);
            while sent < end {
                let upto = end.min(sent + 700);
                if !lose() {
                    let at = u32::try_from(sent).unwrap() + 1;
                    let ack = u32::try_from(got.len()).unwrap() + 1;
                    bench.send(&seg(Flags::ACK, at, ack).data(&up[sent..upto]));
                }
                sent = upto;
            }
            for line in bench.turn_frames() {
                if lose() {
                    continue;
                }
                acked = acked.max(line.ack as usize - 1);
                if line.seq as usize - 1 == got.len() {
                    got.extend_from_slice(&line.data);
                }
                let ack = u32::try_from(got.len()).unwrap() + 1;
                if !line.data.is_empty() && !lose() {
                    bench.send(&seg(Flags::ACK, u32::try_from(sent).unwrap() + 1, ack));
                }
            }
            if acked == up.len() && got.len() == down.len() {
                break;
            }
            bench.pass(Duration::from_millis(300));
            sent = acked;
        }
        prop_assert_eq!(&bench.sock().received, &up);
        prop_assert_eq!(got, down);
    }
}
