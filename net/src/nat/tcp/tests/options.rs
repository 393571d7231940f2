//! Timestamps and SACK: when they are agreed, and what they change.

use std::time::Duration;

use super::bench::{Bench, Seg, Talk, seg, stamp};
use crate::nat::config::NatConfig;
use crate::nat::poller::Events;
use crate::nat::tcp::flow::Flow;
use crate::nat::tcp::options::{Options, Stamp};
use crate::nat::tcp::segment::Flags;
use crate::{DropReason, GsoType, Offloads};

const NOTHING: [&str; 0] = [];
const STAMPS: Talk = Talk { stamps: true, sack: false };
const SACK: Talk = Talk { stamps: false, sack: true };
const BOTH: Talk = Talk { stamps: true, sack: true };

/// An ACK of the guest's at time `value` of its clock, `later` after ours began.
fn ack(bench: &Bench, ack: u32, value: u32, later: u32) -> Seg {
    seg(Flags::ACK, 1, ack).options(&[&stamp(value, bench.clock.wrapping_add(later))])
}

fn dup(blocks: &[(u32, u32)]) -> Seg {
    seg(Flags::ACK, 1, 1).sack(blocks)
}

/// Ten segments of 1000 bytes on their way to a guest with SACK.
fn ten_segments() -> Bench {
    let mut bench = Bench::talking(SACK);
    bench.world_sends(&[9; 10_000]);
    bench.config.limits.frames_per_turn = 100;
    while bench.turn().len() > 1 {}
    bench
}

#[test]
fn a_syn_ack_has_what_the_syn_had() {
    for (stamps, sack) in [(false, false), (true, false), (false, true), (true, true)] {
        let bench_talk = Talk { stamps, sack };
        let mut bench = Bench::new();
        let mut syn = seg(Flags::SYN, 0, 0);
        if stamps {
            syn.options.extend(stamp(77, 0));
        }
        if sack {
            syn.options.extend([1, 1, 4, 2]);
        }
        bench.send(&syn);
        bench.event(Events::WRITE);
        bench.turn();
        let answer = bench.options[0];
        assert_eq!(answer.stamp.map(|stamp| stamp.echo), stamps.then_some(77), "{bench_talk:?}");
        assert_eq!((answer.sack_permitted, answer.shift), (sack, None), "{bench_talk:?}");
    }
}

#[test]
fn our_syn_offers_all_and_the_guest_chooses() {
    for stamps in [false, true] {
        let config = NatConfig { publish: vec!["8080:80".parse().unwrap()], ..NatConfig::default() };
        let mut bench = Bench::with(config);
        bench.cx(|tcp, cx, _| tcp.open_listeners(cx)).unwrap();
        bench.host.backlog.push_back("10.1.2.3:6000".parse().unwrap());
        bench.listener_event();
        assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
        let offer = bench.options[0];
        assert!(offer.sack_permitted && offer.shift.is_some());
        let sent = offer.stamp.expect("it is offered");
        assert_eq!(sent.echo, 0);
        let mut answer = seg(Flags::SYN | Flags::ACK, 0, 1).to("10.1.2.3:6000".parse().unwrap());
        answer.from.set_port(80);
        if stamps {
            answer.options.extend(stamp(5, sent.value));
        }
        bench.send(&answer);
        assert_eq!(bench.turn(), ["ACK 1+0 ack 1"]);
        assert_eq!(bench.options[0].stamp.map(|stamp| stamp.echo), stamps.then_some(5));
        bench.world_sends(&[9; 600]);
        let len = if stamps { 536 - 12 } else { 536 };
        assert_eq!(bench.turn()[0], format!("ACK 1+{len} ack 1"), "536 of RFC 9293, less the option");
    }
}

#[test]
fn every_segment_but_a_rst_has_a_timestamp() {
    let mut bench = Bench::talking(STAMPS);
    bench.world_sends(b"hello");
    bench.send(&ack(&bench, 1, 1001, 0).data(b"x"));
    assert_eq!(bench.turn(), ["ACK 1+5 ack 2"]);
    assert_eq!(bench.options[0].stamp, Some(Stamp { value: bench.clock, echo: 1001 }));
    bench.pass(Duration::from_millis(1500));
    bench.world_closes();
    let lines = bench.turn();
    assert!(lines.len() >= 2, "{lines:?}");
    let expected = Some(Stamp { value: bench.clock.wrapping_add(1500), echo: 1001 });
    assert!(bench.options.iter().all(|options| options.stamp == expected));
    bench.sock().error = Some(libc::ECONNRESET);
    bench.event(Events::ERROR);
    let lines = bench.turn();
    let rst = lines.iter().position(|line| line.starts_with("RST")).expect("a RST");
    assert_eq!(bench.options[rst].stamp, None);
}

#[test]
fn no_frame_is_longer_than_the_mtu_or_a_super_segment_may_be() {
    let mut bench = Bench::new();
    let syn = seg(Flags::SYN, 0, 0).options(&[&[2, 4, 0xff, 0xff, 3, 3, 7, 1], &stamp(1, 0)]);
    bench.send(&syn);
    bench.event(Events::WRITE);
    bench.turn();
    bench.clock = bench.options[0].stamp.unwrap().value;
    bench.send(&ack(&bench, 1, 1, 0));
    bench.world_sends(&[9; 200_000]);
    let mtu = usize::from(bench.config.mtu);
    bench.turn();
    assert_eq!(bench.longest, 14 + mtu);
    bench.guest = Offloads::CSUM | Offloads::TSO4;
    bench.world_sends(&[9; 200_000]);
    bench.turn();
    let mss = mtu - 52;
    assert_eq!(bench.longest, 14 + 52 + 65_483 / mss * mss);
    let hdr = bench.hdrs[0];
    assert_eq!((hdr.gso_type, usize::from(hdr.gso_size), hdr.hdr_len), (GsoType::Tcp4, mss, 66));
}

#[test]
fn a_segment_from_the_past_is_answered_and_not_taken() {
    let mut bench = Bench::talking(STAMPS);
    bench.send(&ack(&bench, 1, 2000, 0).data(b"new"));
    bench.turn();
    bench.send(&ack(&bench, 1, 1999, 0).data(b"old"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 4"]);
    assert_eq!(bench.dropped(DropReason::Tcp), 1);
    let mut old = ack(&bench, 1, 1999, 0).data(b"old");
    old.seq = 4;
    bench.send(&old);
    assert_eq!(bench.turn(), ["ACK 1+0 ack 4"]);
    assert_eq!(bench.sock().received, b"new");
}

#[test]
fn a_rst_from_the_past_is_believed() {
    let mut bench = Bench::talking(STAMPS);
    bench.send(&seg(Flags::RST, 1, 0).options(&[&stamp(1, 0)]));
    assert_eq!(bench.state(), "none");
}

#[test]
fn a_segment_that_forgot_its_timestamp_is_taken() {
    let mut bench = Bench::talking(STAMPS);
    bench.send(&seg(Flags::ACK, 1, 1).data(b"hello"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 6"]);
    assert_eq!(bench.options[0].stamp.map(|stamp| stamp.echo), Some(1000));
}

#[test]
fn a_timestamp_that_was_not_agreed_is_ignored() {
    let mut bench = Bench::established();
    bench.send(&ack(&bench, 1, 5, 0).data(b"a"));
    let mut second = ack(&bench, 1, 4, 0).data(b"b");
    second.seq = 2;
    bench.send(&second);
    assert_eq!(bench.turn(), ["ACK 1+0 ack 3"]);
    assert_eq!(bench.options, [Options::default()]);
}

#[test]
fn a_round_trip_is_measured_although_the_data_were_sent_twice() {
    for stamps in [true, false] {
        let mut bench = Bench::talking(Talk { stamps, sack: false });
        bench.world_sends(b"hello");
        bench.turn();
        bench.pass_to_deadline();
        assert_eq!(bench.turn(), ["ACK 1+5 ack 1"]);
        bench.pass(Duration::from_secs(1));
        // The guest answers what was sent 200 ms after the beginning.
        bench.send(&ack(&bench, 6, 1001, 200));
        bench.world_sends(b"hello");
        bench.turn();
        let start = bench.now;
        while bench.turn().is_empty() {
            bench.pass_to_deadline();
        }
        let timeout = bench.now - start;
        // After the handshake's 0 ms: srtt is 125 ms, its variance 250 ms.
        assert_eq!(timeout.as_millis(), if stamps { 1124 } else { 200 });
    }
}

#[test]
fn only_the_hole_is_sent_again() {
    let mut bench = ten_segments();
    for end in [3001, 4001] {
        bench.send(&dup(&[(2001, end)]));
        assert_eq!(bench.turn(), NOTHING);
    }
    bench.send(&dup(&[(2001, 5001)]));
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"], "half of ten are under way behind the hole");
    bench.send(&dup(&[(2001, 9001)]));
    assert_eq!(bench.turn(), ["ACK 1001+1000 ack 1"]);
    bench.send(&dup(&[(2001, 10_001)]));
    assert_eq!(bench.turn(), NOTHING, "each hole once");
    bench.send(&seg(Flags::ACK, 1, 10_001));
    assert_eq!(bench.turn(), NOTHING);
    assert!(bench.sock().inbox.is_empty());
}

#[test]
fn holes_that_come_to_light_later_are_sent_again_too() {
    let mut bench = ten_segments();
    bench.send(&dup(&[(1001, 5001)]));
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"]);
    bench.send(&dup(&[(6001, 8001), (1001, 5001)]));
    assert_eq!(bench.turn(), ["ACK 5001+1000 ack 1"]);
    bench.world_sends(&[8; 1000]);
    assert_eq!(bench.turn(), ["ACK 10001+1000 ack 1"], "and new data go on");
}

#[test]
fn more_than_two_segments_in_one_block_need_no_three_acks() {
    let mut bench = ten_segments();
    bench.send(&dup(&[(1001, 3001)]));
    assert_eq!(bench.turn(), NOTHING);
    bench.send(&dup(&[(1001, 4001)]));
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"]);
}

#[test]
fn a_tail_that_nobody_told_of_is_sent_again_behind_the_last_hole() {
    let mut bench = ten_segments();
    bench.send(&dup(&[(1001, 8001)]));
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"]);
    bench.send(&seg(Flags::ACK, 1, 8001));
    assert_eq!(bench.turn(), ["ACK 8001+1000 ack 1", "ACK 9001+1000 ack 1"]);
}

#[test]
fn a_time_out_forgets_what_the_guest_told() {
    let mut bench = ten_segments();
    bench.send(&dup(&[(1001, 10_001)]));
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"]);
    bench.pass_to_deadline();
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"]);
    // It has thrown the rest away.
    bench.send(&seg(Flags::ACK, 1, 1001));
    assert_eq!(bench.turn(), ["ACK 1001+1000 ack 1", "ACK 2001+1000 ack 1"]);
    // It has not, and says so: what it has is left out.
    bench.send(&seg(Flags::ACK, 1, 2001).sack(&[(3001, 9001)]));
    assert_eq!(bench.turn(), ["ACK 9001+1000 ack 1"]);
}

#[test]
fn blocks_of_a_guest_that_did_not_agree_mean_nothing() {
    let mut bench = Bench::established();
    bench.world_sends(&[9; 3000]);
    bench.turn();
    for _ in 0..3 {
        bench.send(&dup(&[(1001, 3001)]));
    }
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1", "ACK 1001+1000 ack 1"], "as without blocks");
}

#[test]
fn a_guest_that_agreed_and_tells_nothing_is_served_by_counting() {
    let mut bench = Bench::talking(BOTH);
    bench.world_sends(&[9; 2900]);
    bench.turn();
    for _ in 0..3 {
        bench.send(&ack(&bench, 1, 1001, 0));
    }
    assert_eq!(bench.turn(), ["ACK 1+988 ack 1", "ACK 989+988 ack 1"]);
}

#[test]
fn a_dsack_takes_the_loss_back() {
    for needless in [false, true] {
        let mut bench = ten_segments();
        bench.send(&dup(&[(1001, 5001)]));
        assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"]);
        bench.send(&seg(Flags::ACK, 1, 10_001));
        if needless {
            bench.send(&seg(Flags::ACK, 1, 10_001).sack(&[(1, 1001)]));
        }
        bench.world_sends(&[9; 50_000]);
        let mut sent = 0;
        while let Some(got) = Some(bench.turn_frames()).filter(|got| !got.is_empty()) {
            sent += got.iter().map(|got| got.data.len()).sum::<usize>();
        }
        assert_eq!(sent, if needless { 50_000 } else { 15_000 });
    }
}

#[test]
fn a_flow_is_about_300_bytes() {
    assert!(size_of::<Flow>() <= 320, "{}", size_of::<Flow>());
}
