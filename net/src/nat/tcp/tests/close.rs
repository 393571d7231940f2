//! How connections end.

use super::bench::{Bench, seg};
use crate::nat::host::Close;
use crate::nat::poller::Events;
use crate::nat::tcp::segment::Flags;

const NOTHING: [&str; 0] = [];
const FIN: Flags = Flags::FIN.union(Flags::ACK);

#[test]
fn the_guests_fin_is_passed_on_and_the_world_may_still_send() {
    let mut bench = Bench::established();
    bench.send(&seg(FIN, 1, 1).data(b"bye"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 5"]);
    assert!(bench.sock().write_closed);
    assert_eq!(bench.state(), "CLOSE-WAIT");
    bench.world_sends(b"an answer");
    assert_eq!(bench.turn(), ["ACK 1+9 ack 5"]);
    bench.send(&seg(Flags::ACK, 5, 10));
    bench.world_closes();
    assert_eq!(bench.turn(), ["FIN ACK 10+0 ack 5"]);
    assert_eq!(bench.state(), "LAST-ACK");
    bench.send(&seg(Flags::ACK, 5, 11));
    assert_eq!(bench.state(), "none");
    assert_eq!(bench.host.closed, [(0, Close::Graceful)]);
}

#[test]
fn the_worlds_end_becomes_a_fin_behind_the_last_byte_and_the_guest_may_still_send() {
    let mut bench = Bench::established();
    bench.sock().inbox.extend(b"all");
    bench.world_closes();
    assert_eq!(bench.turn(), ["ACK 1+3 ack 1", "FIN ACK 4+0 ack 1"]);
    bench.send(&seg(Flags::ACK, 1, 5));
    assert_eq!(bench.state(), "FIN-WAIT-2");
    bench.send(&seg(Flags::ACK, 1, 5).data(b"more"));
    assert_eq!(bench.turn(), ["ACK 5+0 ack 5"]);
    assert_eq!(bench.sock().received, b"more");
    bench.send(&seg(FIN, 5, 5));
    assert_eq!(bench.turn(), ["ACK 5+0 ack 6"]);
    assert_eq!(bench.state(), "none");
    assert_eq!(bench.host.closed, [(0, Close::Graceful)]);
}

#[test]
fn fins_that_cross_end_the_connection() {
    let mut bench = Bench::established();
    bench.world_closes();
    assert_eq!(bench.turn(), ["FIN ACK 1+0 ack 1"]);
    bench.send(&seg(FIN, 1, 1));
    assert_eq!(bench.turn(), ["ACK 2+0 ack 2"]);
    assert_eq!(bench.state(), "CLOSING");
    bench.send(&seg(Flags::ACK, 2, 2));
    bench.turn();
    assert_eq!(bench.state(), "none");
}

#[test]
fn a_lost_fin_is_sent_again() {
    let mut bench = Bench::established();
    bench.sock().inbox.extend(b"all");
    bench.world_closes();
    bench.turn();
    bench.pass_to_deadline();
    assert_eq!(bench.turn(), ["ACK 1+3 ack 1", "FIN ACK 4+0 ack 1"]);
    bench.send(&seg(FIN, 1, 5));
    assert_eq!(bench.turn(), ["ACK 5+0 ack 2"]);
    assert_eq!(bench.state(), "none");
}

#[test]
fn a_fin_waits_for_a_guest_whose_window_is_closed_to_take_the_data() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).window(0));
    bench.sock().inbox.extend(b"all");
    bench.world_closes();
    assert_eq!(bench.turn(), NOTHING);
    bench.send(&seg(Flags::ACK, 1, 1).window(100));
    assert_eq!(bench.turn(), ["ACK 1+3 ack 1", "FIN ACK 4+0 ack 1"]);
}

#[test]
fn the_guests_rst_reaches_the_world_as_rst() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::RST, 1, 0));
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.host.closed, [(0, Close::Reset)]);
}

#[test]
fn a_rst_that_is_only_near_is_challenged() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::RST, 100, 0));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 1"]);
    bench.send(&seg(Flags::RST, 100_000, 0));
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.state(), "ESTABLISHED");
}

#[test]
fn a_syn_on_an_open_connection_is_challenged_and_the_guests_rst_makes_room() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::SYN, 5000, 0));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 1"]);
    bench.send(&seg(Flags::RST, 1, 0));
    bench.syn();
    assert_eq!(bench.state(), "DIALING");
}

#[test]
fn the_worlds_rst_reaches_the_guest_behind_the_data() {
    let mut bench = Bench::established();
    bench.sock().inbox.extend(b"last");
    bench.sock().error = Some(libc::ECONNRESET);
    bench.event(Events::READ | Events::ERROR | Events::CLOSED);
    assert_eq!(bench.turn(), ["ACK 1+4 ack 1", "RST ACK 5+0 ack 1"]);
    assert_eq!(bench.state(), "none");
}

#[test]
fn data_in_front_of_the_worlds_rst_wait_for_the_guests_window() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).window(0));
    bench.sock().inbox.extend(b"last");
    bench.sock().error = Some(libc::ECONNRESET);
    bench.event(Events::READ | Events::ERROR | Events::CLOSED);
    assert_eq!(bench.turn(), NOTHING);
    bench.send(&seg(Flags::ACK, 1, 1).window(100));
    assert_eq!(bench.turn(), ["ACK 1+4 ack 1", "RST ACK 5+0 ack 1"]);
}

#[test]
fn a_rst_behind_the_worlds_fin_leaves_the_guest_its_data_and_the_fin() {
    let mut bench = Bench::established();
    bench.send(&seg(Flags::ACK, 1, 1).window(0));
    bench.sock().inbox.extend(b"all");
    bench.world_closes();
    bench.sock().error = Some(libc::ECONNRESET);
    bench.event(Events::READ | Events::READ_CLOSED | Events::ERROR | Events::CLOSED);
    assert_eq!(bench.turn(), NOTHING);
    bench.send(&seg(Flags::ACK, 1, 1).window(100));
    assert_eq!(bench.turn(), ["ACK 1+3 ack 1", "FIN ACK 4+0 ack 1"]);
    // Only whoever still sends is told.
    bench.send(&seg(Flags::ACK, 1, 5).data(b"more"));
    assert_eq!(bench.turn(), ["ACK 5+0 ack 1", "RST ACK 5+0 ack 1"]);
}

#[test]
fn data_for_a_world_that_is_gone_become_a_rst() {
    let mut bench = Bench::established();
    bench.sock().error = Some(libc::EPIPE);
    bench.send(&seg(Flags::ACK, 1, 1).data(b"hello?"));
    bench.turn();
    bench.turn();
    assert_eq!(bench.state(), "none");
    assert!(bench.host.open.is_empty());
}

#[test]
fn data_behind_the_guests_fin_are_ignored() {
    let mut bench = Bench::established();
    bench.send(&seg(FIN, 1, 1));
    bench.send(&seg(Flags::ACK, 2, 1).data(b"ghost"));
    bench.turn();
    assert!(bench.sock().received.is_empty());
}

#[test]
fn an_event_of_a_closed_socket_does_not_reach_the_flow_that_has_its_slot_now() {
    let mut bench = Bench::established();
    let old = bench.sock().token.unwrap();
    bench.send(&seg(Flags::RST, 1, 0));
    bench.syn();
    bench.event_for(old, Events::WRITE);
    assert_eq!(bench.state(), "DIALING");
}
