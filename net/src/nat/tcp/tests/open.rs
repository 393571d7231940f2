//! How connections begin, and how they do not.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::bench::{Bench, GUEST, WORLD, seg};
use crate::DropReason;
use crate::nat::config::NatConfig;
use crate::nat::host::Close;
use crate::nat::poller::Events;
use crate::nat::tcp::segment::Flags;

const NOTHING: [&str; 0] = [];

fn dial_fails_with(error: i32) -> (Bench, Vec<String>) {
    let mut bench = Bench::new();
    bench.syn();
    bench.sock().error = Some(error);
    bench.event(Events::WRITE | Events::ERROR | Events::CLOSED);
    let answer = bench.turn();
    assert_eq!(bench.state(), "none");
    assert!(bench.host.open.is_empty());
    (bench, answer)
}

#[test]
fn the_guest_hears_nothing_before_the_world_has_accepted() {
    let mut bench = Bench::new();
    bench.syn();
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.sock().to, Some(WORLD));
    bench.event(Events::WRITE);
    assert_eq!(bench.turn(), ["SYN ACK 0+0 ack 1"]);
    bench.send(&seg(Flags::ACK, 1, 1));
    assert_eq!(bench.state(), "ESTABLISHED");
}

#[test]
fn a_syn_sent_again_while_dialing_opens_no_second_connection() {
    let mut bench = Bench::new();
    bench.syn();
    bench.syn();
    assert_eq!((bench.host.open.len(), bench.tcp.len()), (1, 1));
    assert_eq!(bench.turn(), NOTHING);
}

#[test]
fn refused_connect_becomes_rst() {
    assert_eq!(dial_fails_with(libc::ECONNREFUSED).1, ["RST ACK 0+0 ack 1"]);
}

#[test]
fn no_route_becomes_an_icmp_unreachable() {
    assert_eq!(dial_fails_with(libc::EHOSTUNREACH).1, ["ICMP 3/1"]);
    assert_eq!(dial_fails_with(libc::ENETUNREACH).1, ["ICMP 3/0"]);
    let mut bench = Bench::new();
    bench.host.connect_error = Some(libc::ENETUNREACH);
    bench.syn();
    assert_eq!(bench.turn(), ["ICMP 3/0"]);
}

#[test]
fn the_hosts_firewall_becomes_an_icmp_prohibited() {
    assert_eq!(dial_fails_with(libc::EACCES).1, ["ICMP 3/13"]);
}

#[test]
fn a_time_out_is_left_to_the_guests_own_timer() {
    let (mut bench, answer) = dial_fails_with(libc::ETIMEDOUT);
    assert_eq!(answer, NOTHING);
    bench.syn();
    assert_eq!(bench.state(), "DIALING");
}

#[test]
fn no_more_descriptors_becomes_rst_and_is_counted_as_a_full_table() {
    let mut bench = Bench::new();
    bench.host.connect_error = Some(libc::EMFILE);
    bench.syn();
    assert_eq!(bench.turn(), ["RST ACK 0+0 ack 1"]);
    assert_eq!(bench.dropped(DropReason::TableFull), 1);
}

#[test]
fn a_full_table_answers_rst() {
    let mut config = NatConfig::default();
    config.limits.tcp_flows = 1;
    let mut bench = Bench::with(config);
    bench.open();
    let mut other = seg(Flags::SYN, 0, 0);
    other.from = SocketAddrV4::new(*GUEST.ip(), 40_001);
    bench.send(&other);
    assert_eq!(bench.turn().len(), 1);
    assert_eq!(bench.dropped(DropReason::TableFull), 1);
    assert_eq!(bench.tcp.len(), 1);
}

#[test]
fn closed_destinations_answer_rst_and_are_never_dialed() {
    for addr in ["127.0.0.1", "169.254.169.254", "192.168.122.1", "0.0.0.0"] {
        let mut bench = Bench::new();
        bench.send(&seg(Flags::SYN, 0, 0).to(SocketAddrV4::new(addr.parse().unwrap(), 80)));
        assert_eq!(bench.turn(), ["RST ACK 0+0 ack 1"], "{addr}");
        assert_eq!(bench.dropped(DropReason::Policy), 1, "{addr}");
        assert!(bench.host.open.is_empty());
    }
}

#[test]
fn a_neighbour_that_is_not_there_is_unreachable() {
    let mut bench = Bench::new();
    bench.send(&seg(Flags::SYN, 0, 0).to("192.168.122.77:80".parse().unwrap()));
    assert_eq!(bench.turn(), ["ICMP 3/1"]);
}

#[test]
fn host_access_opens_the_loopback_at_the_gateway() {
    let mut bench = Bench::with(NatConfig { host_access: true, ..NatConfig::default() });
    bench.send(&seg(Flags::SYN, 0, 0).to("192.168.122.1:8000".parse().unwrap()));
    assert_eq!(bench.sock().to, Some(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8000)));
}

#[test]
fn dns_over_tcp_at_the_gateway_is_a_stream_of_this_process() {
    let mut bench = Bench::new();
    bench.send(&seg(Flags::SYN, 0, 0).to("192.168.122.1:53".parse().unwrap()));
    assert_eq!(bench.streams.len(), 1);
    assert_eq!((bench.streams[0].guest, bench.streams[0].port), (*GUEST.ip(), 53));
    bench.event(Events::WRITE);
    assert_eq!(bench.turn(), ["SYN ACK 0+0 ack 1"]);
}

#[test]
fn a_lost_syn_ack_is_sent_again_and_given_up_in_the_end() {
    let mut bench = Bench::new();
    bench.syn();
    bench.event(Events::WRITE);
    bench.turn();
    for _ in 0..3 {
        bench.pass_to_deadline();
        assert_eq!(bench.turn(), ["SYN ACK 0+0 ack 1"]);
    }
    bench.syn();
    assert_eq!(bench.turn(), ["SYN ACK 0+0 ack 1"]);
    bench.pass_to_deadline();
    assert_eq!(bench.turn(), ["RST ACK 1+0 ack 1"]);
    assert_eq!(bench.host.closed.last().map(|c| c.1), Some(Close::Reset));
}

#[test]
fn a_rst_while_dialing_gives_up_the_connect() {
    let mut bench = Bench::new();
    bench.syn();
    bench.send(&seg(Flags::RST, 1, 0));
    assert_eq!(bench.turn(), NOTHING);
    assert!(bench.host.open.is_empty());
}

#[test]
fn a_segment_without_a_connection_is_answered_with_rst_and_a_rst_with_nothing() {
    let mut bench = Bench::new();
    bench.send(&seg(Flags::ACK, 5, 9).data(b"late"));
    assert_eq!(bench.turn(), ["RST 9+0 ack 0"]);
    bench.send(&seg(Flags::RST, 5, 0));
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.dropped(DropReason::NoFlow), 2);
}

#[test]
fn flags_that_mean_nothing_are_refused() {
    let mut bench = Bench::new();
    for flags in [Flags::SYN | Flags::FIN, Flags::SYN | Flags::RST, Flags::empty()] {
        bench.send(&seg(flags, 0, 0));
    }
    assert_eq!(bench.dropped(DropReason::Malformed), 3);
    assert_eq!(bench.turn(), NOTHING);
    assert!(bench.host.open.is_empty());
}

#[test]
fn data_on_a_syn_are_not_taken_before_the_connection_is_open() {
    let mut bench = Bench::new();
    bench.send(&seg(Flags::SYN, 0, 0).data(b"early"));
    bench.event(Events::WRITE);
    assert_eq!(bench.turn(), ["SYN ACK 0+0 ack 1"]);
    bench.send(&seg(Flags::ACK, 1, 1).data(b"early"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 6"]);
    assert_eq!(bench.sock().received, b"early");
}

#[test]
fn without_window_scale_the_window_is_not_scaled() {
    let mut bench = Bench::new();
    bench.send(&seg(Flags::SYN, 0, 0));
    bench.event(Events::WRITE);
    bench.turn();
    bench.send(&seg(Flags::ACK, 1, 1).data(b"x"));
    bench.turn();
    assert_eq!(bench.window, 49_999);
}
