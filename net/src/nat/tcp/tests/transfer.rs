//! Data both ways, back-pressure, loss.

use std::time::Duration;

use super::bench::{Bench, seg};
use crate::nat::poller::Events;
use crate::nat::tcp::segment::Flags;
use crate::{DropReason, GsoType, Offloads, Received, VnetFlags};

const NOTHING: [&str; 0] = [];

#[test]
fn data_in_order_are_acknowledged_once_per_turn() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).data(b"hello "));
    bench.send(&seg(Flags::ACK, 7, 1).data(b"world"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 12"]);
    assert_eq!(bench.sock().received, b"hello world");
}

#[test]
fn data_sent_twice_are_taken_once() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).data(b"hello"));
    bench.send(&seg(Flags::ACK, 1, 1).data(b"hello"));
    bench.send(&seg(Flags::ACK, 3, 1).data(b"llo world"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 12"]);
    assert_eq!(bench.sock().received, b"hello world");
}

#[test]
fn data_out_of_order_make_a_duplicate_ack_each() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 6, 1).data(b"later"));
    bench.send(&seg(Flags::ACK, 11, 1).data(b"still"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 1", "ACK 1+0 ack 1"]);
    assert!(bench.sock().received.is_empty());
}

#[test]
fn urgent_data_are_delivered_in_line() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK | Flags::URG, 1, 1).data(b"now!"));
    assert_eq!(bench.sock().received, b"now!");
}

#[test]
fn only_what_the_socket_took_is_acknowledged() {
    let mut bench = Bench::established();
    bench.sock().room = 3;
    bench.send(&seg(Flags::ACK | Flags::FIN, 1, 1).data(b"hello"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 4"]);
    assert!(bench.sock().wants_write && !bench.sock().write_closed);
    // The event makes the guest send again: a new window, and three duplicates that it counts.
    bench.sock().room = 50_000;
    bench.event(Events::WRITE);
    assert_eq!(bench.turn(), ["ACK 1+0 ack 4"; 4]);
    bench.send(&seg(Flags::ACK | Flags::FIN, 4, 1).data(b"lo"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 7"]);
    assert_eq!(bench.sock().received, b"hello");
    assert!(bench.sock().write_closed);
}

#[test]
fn the_window_is_the_room_in_the_socket_and_opens_with_it() {
    let mut bench = Bench::established();
    for at in 0..50 {
        bench.send(&seg(Flags::ACK, 1 + at * 1000, 1).data(&[7; 1000]));
        bench.turn();
        assert!(u64::from(bench.window) <= bench.sock().room as u64);
    }
    assert_eq!(bench.window, 0);
    assert!(bench.sock().wants_write);
    bench.event(Events::READ);
    assert_eq!(bench.turn(), NOTHING, "a full socket is no news");
    bench.sock().room = 40_000;
    bench.event(Events::WRITE);
    assert_eq!(bench.turn(), ["ACK 1+0 ack 50001"]);
    assert_eq!(bench.window, 39_936);
}

#[test]
fn a_window_is_never_taken_back_when_the_socket_has_less_room_than_it_said() {
    let mut bench = Bench::established();
    let (edge, units) = (1 + 50_000, 255);
    bench.sock().room = 2500;
    for at in [0, 1000] {
        bench.send(&seg(Flags::ACK, 1 + at, 1).data(&[7; 1000]));
        bench.turn();
        assert!(1 + at + 1000 + bench.window + units >= edge, "{}", bench.window);
    }
    // The third segment is cut, and the one behind it has to come again; neither is lost.
    bench.send(&seg(Flags::ACK, 2001, 1).data(&[7; 1000]));
    bench.send(&seg(Flags::ACK, 3001, 1).data(&[7; 1000]));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 2501"; 2]);
    assert_eq!(bench.dropped(DropReason::Tcp), 1);
    assert!(bench.sock().wants_write);
}

#[test]
fn what_was_announced_once_is_taken_whatever_rounding_hides() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).data(&[7; 100]));
    bench.turn();
    assert_eq!(bench.window, 49_664, "49,900 bytes in units of 256");
    for at in 0..499 {
        bench.send(&seg(Flags::ACK, 101 + at * 100, 1).data(&[7; 100]));
    }
    assert_eq!(bench.turn(), ["ACK 1+0 ack 50001"]);
    assert_eq!(bench.dropped(DropReason::Tcp), 0);
    assert_eq!(bench.sock().received.len(), 50_000);
}

#[test]
fn a_probe_of_a_closed_window_and_a_keepalive_are_answered() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 0, 1));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 1"]);
    bench.send(&seg(Flags::ACK, 0, 1).data(b"k"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 1"]);
}

#[test]
fn the_worlds_data_stay_in_the_socket_until_they_are_acknowledged() {
    let mut bench = Bench::established();
    bench.world_sends(b"hello");
    assert_eq!(bench.turn(), ["ACK 1+5 ack 1"]);
    assert_eq!(bench.data, b"hello");
    assert_eq!(bench.sock().inbox.len(), 5);
    bench.send(&seg(Flags::ACK, 1, 4));
    bench.turn();
    assert_eq!(bench.sock().inbox, b"lo");
    bench.send(&seg(Flags::ACK, 1, 6));
    bench.turn();
    assert!(bench.sock().inbox.is_empty());
}

#[test]
fn an_answer_carries_the_ack_of_the_question() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).data(b"?"));
    bench.world_sends(b"!");
    assert_eq!(bench.turn(), ["ACK 1+1 ack 2"]);
}

#[test]
fn segments_are_cut_to_the_guests_mss() {
    let mut bench = Bench::established();
    bench.world_sends(&[9; 2500]);
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1", "ACK 1001+1000 ack 1", "ACK 2001+500 ack 1"]);
}

#[test]
fn a_guest_with_offloads_gets_one_super_segment_with_a_partial_checksum() {
    let mut bench = Bench::established();
    bench.guest = Offloads::CSUM | Offloads::TSO4;
    bench.world_sends(&[9; 40_500]);
    assert_eq!(bench.turn(), ["ACK 1+40500 ack 1"]);
    let hdr = bench.hdrs[0];
    assert_eq!(hdr.flags, VnetFlags::NEEDS_CSUM);
    assert_eq!((hdr.gso_type, hdr.gso_size, hdr.hdr_len), (GsoType::Tcp4, 1000, 54));
    assert_eq!((hdr.csum_start, hdr.csum_offset), (34, 16));
}

#[test]
fn the_guests_window_holds_the_world_back() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).window(1500));
    bench.world_sends(&[9; 5000]);
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"], "no silly 500");
    bench.send(&seg(Flags::ACK, 1, 1001).window(0));
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.sock().inbox.len(), 4000);
    bench.send(&seg(Flags::ACK, 1, 1001).window(3000));
    assert_eq!(bench.turn().len(), 3);
}

#[test]
fn a_closed_window_is_probed_and_the_probes_become_rare() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).window(0));
    bench.world_sends(b"hello");
    assert_eq!(bench.turn(), NOTHING);
    let mut last = Duration::ZERO;
    for _ in 0..4 {
        let before = bench.now;
        bench.pass_to_deadline();
        assert_eq!(bench.turn(), ["ACK 0+0 ack 1"]);
        assert!(bench.now - before > last);
        last = bench.now - before;
    }
    bench.send(&seg(Flags::ACK, 1, 1).window(100));
    assert_eq!(bench.turn(), ["ACK 1+5 ack 1"]);
}

#[test]
fn lost_data_are_sent_again_from_the_socket() {
    let mut bench = Bench::established();
    bench.world_sends(&[9; 3000]);
    assert_eq!(bench.turn().len(), 3);
    bench.send(&seg(Flags::ACK, 1, 1001));
    assert_eq!(bench.turn(), NOTHING);
    bench.pass_to_deadline();
    assert_eq!(bench.turn(), ["ACK 1001+1000 ack 1"], "one segment after a time-out");
    bench.send(&seg(Flags::ACK, 1, 3001));
    assert_eq!(bench.turn(), NOTHING);
    assert!(bench.sock().inbox.is_empty());
}

#[test]
fn three_duplicate_acks_are_enough() {
    let mut bench = Bench::established();
    bench.world_sends(&[9; 3000]);
    bench.turn();
    for _ in 0..3 {
        assert_eq!(bench.turn(), NOTHING);
        bench.send(&seg(Flags::ACK, 1, 1));
    }
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1", "ACK 1001+1000 ack 1"]);
    bench.send(&seg(Flags::ACK, 1, 1));
    assert_eq!(bench.turn(), NOTHING, "once per loss");
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let mut bench = Bench::established();
    bench.world_sends(b"hello");
    bench.turn();
    for _ in 0..11 {
        bench.pass_to_deadline();
        assert_eq!(bench.turn(), ["ACK 1+5 ack 1"]);
    }
    bench.pass_to_deadline();
    assert_eq!(bench.turn(), ["RST ACK 6+0 ack 1"]);
    assert!(bench.host.open.is_empty());
}

#[test]
fn a_full_ring_loses_nothing() {
    let mut bench = Bench::established();
    bench.ring.free = 1;
    bench.world_sends(&[9; 3000]);
    assert_eq!(bench.turn(), ["ACK 1+1000 ack 1"]);
    assert_eq!(bench.received, Received::RingFull);
    bench.ring.free = 100;
    assert_eq!(bench.turn(), ["ACK 1001+1000 ack 1", "ACK 2001+1000 ack 1"]);
}

#[test]
fn a_turn_has_a_budget() {
    let mut bench = Bench::established();
    bench.config.limits.frames_per_turn = 5;
    bench.world_sends(&[9; 20_000]);
    for _ in 0..4 {
        assert_eq!(bench.turn().len(), 5);
        assert_eq!(bench.received, Received::Again);
    }
    assert_eq!(bench.turn(), NOTHING);
}

#[test]
fn an_ack_of_what_was_never_sent_is_not_believed() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 500).data(b"x"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 1"]);
    assert_eq!(bench.dropped(DropReason::Tcp), 1);
}

#[test]
fn an_idle_connection_is_probed_and_lives_as_long_as_the_guest_answers() {
    let mut bench = Bench::established();
    bench.pass(Duration::from_secs(7199));
    assert_eq!(bench.turn(), NOTHING);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.turn(), ["ACK 0+0 ack 1"]);
    bench.send(&seg(Flags::ACK, 1, 1));
    bench.pass(Duration::from_secs(7000));
    assert_eq!(bench.turn(), NOTHING);
    for _ in 0..12 {
        bench.pass_to_deadline();
    }
    assert_eq!(bench.state(), "none");
}

#[test]
fn a_network_that_stood_still_for_a_day_asks_before_it_gives_a_guest_up() {
    let mut bench = Bench::established();
    bench.pass(Duration::from_secs(86_400));
    assert_eq!(bench.turn(), ["ACK 0+0 ack 1"], "one probe, not all of them at once");
    bench.pass(Duration::from_secs(74));
    assert_eq!(bench.turn(), NOTHING);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.turn(), ["ACK 0+0 ack 1"]);
    bench.send(&seg(Flags::ACK, 1, 1));
    bench.pass(Duration::from_secs(7199));
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.state(), "ESTABLISHED");
}

#[test]
fn data_that_wait_for_an_ack_while_the_network_stands_still_are_sent_once_more() {
    let mut bench = Bench::established();
    bench.world_sends(b"hello");
    bench.turn();
    bench.pass(Duration::from_secs(3600));
    assert_eq!(bench.turn(), ["ACK 1+5 ack 1"]);
    assert_eq!(bench.turn(), NOTHING);
    bench.send(&seg(Flags::ACK, 1, 6));
    assert_eq!(bench.state(), "ESTABLISHED");
}
