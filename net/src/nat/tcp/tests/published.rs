//! Published ports: connections that begin outside.

use std::net::SocketAddrV4;
use std::time::Duration;

use super::bench::{Bench, GUEST, MAC, Seg, seg};
use crate::DropReason;
use crate::nat::config::{NatConfig, NatError, PublishTo};
use crate::nat::host::Close;
use crate::nat::tcp::segment::Flags;

const NOTHING: [&str; 0] = [];
const LOCAL: &str = "127.0.0.1:55000";

fn published() -> Bench {
    let config = NatConfig { publish: vec!["8080:80".parse().unwrap()], ..NatConfig::default() };
    let mut bench = Bench::with(config);
    bench.cx(|tcp, cx, _| tcp.open_listeners(cx)).unwrap();
    bench
}

fn client(bench: &mut Bench, addr: &str) {
    bench.host.backlog.push_back(addr.parse().unwrap());
    bench.listener_event();
}

/// From port 80 of the guest to a client, as the guest sees it.
fn answer(flags: Flags, seq: u32, ack: u32, to: &str) -> Seg {
    Seg { from: SocketAddrV4::new(*GUEST.ip(), 80), ..seg(flags, seq, ack).to(to.parse().unwrap()) }
}

#[test]
fn a_client_on_loopback_appears_as_the_gateway() {
    let mut bench = published();
    client(&mut bench, LOCAL);
    assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
    assert_eq!(bench.tcp.flows()[0].world, "192.168.122.1:55000".parse().unwrap());
    bench.send(&answer(Flags::SYN | Flags::ACK, 0, 1, "192.168.122.1:55000"));
    assert_eq!(bench.turn(), ["ACK 1+0 ack 1"]);
    bench.world_sends(b"GET");
    assert_eq!(bench.turn(), ["ACK 1+3 ack 1"]);
    bench.send(&answer(Flags::ACK, 1, 4, "192.168.122.1:55000").data(b"200"));
    bench.turn();
    assert_eq!(bench.sock().received, b"200");
    assert!(bench.sock().inbox.is_empty());
}

#[test]
fn a_client_from_elsewhere_keeps_its_address() {
    let mut bench = published();
    client(&mut bench, "10.1.2.3:6000");
    bench.turn();
    assert_eq!(bench.tcp.flows()[0].world, "10.1.2.3:6000".parse().unwrap());
}

#[test]
fn a_closed_port_of_the_guest_becomes_rst_to_the_client() {
    let mut bench = published();
    client(&mut bench, LOCAL);
    bench.turn();
    bench.send(&answer(Flags::RST | Flags::ACK, 0, 1, "192.168.122.1:55000"));
    assert_eq!(bench.host.closed, [(1, Close::Reset)]);
    assert_eq!(bench.tcp.len(), 0);
}

#[test]
fn a_silent_guest_is_asked_four_times() {
    let mut bench = published();
    client(&mut bench, LOCAL);
    let start = bench.now;
    for _ in 0..4 {
        assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
        bench.pass_to_deadline();
    }
    assert_eq!(bench.now - start, Duration::from_secs(15));
    assert_eq!(bench.host.closed, [(1, Close::Reset)]);
}

#[test]
fn a_guest_without_a_buffer_for_the_syn_has_not_ignored_it() {
    let mut bench = published();
    bench.ring.free = 0;
    client(&mut bench, LOCAL);
    for _ in 0..10 {
        assert_eq!(bench.turn(), NOTHING);
        bench.pass_to_deadline();
    }
    assert!(bench.host.closed.is_empty());
    bench.ring.free = 1;
    assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
}

#[test]
fn a_client_waits_for_a_guest_to_appear() {
    let mut bench = published();
    bench.neighbours.release(*GUEST.ip());
    client(&mut bench, LOCAL);
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.host.backlog.len(), 1, "it is still in the backlog");
    assert!(bench.neighbours.check(*GUEST.ip(), MAC, bench.now));
    assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
}

#[test]
fn a_client_does_not_wait_for_ever() {
    let mut bench = published();
    bench.neighbours.release(*GUEST.ip());
    client(&mut bench, LOCAL);
    bench.turn();
    bench.pass(Duration::from_secs(9));
    bench.turn();
    assert!(bench.host.closed.is_empty());
    bench.pass_to_deadline();
    bench.turn();
    assert_eq!(bench.host.closed, [(1, Close::Reset)]);
    assert_eq!(bench.dropped(DropReason::NoFlow), 1);
    assert_eq!(bench.tcp.deadline(), None);
}

#[test]
fn a_guest_whose_ethernet_address_is_unknown_is_asked_for() {
    let mut config = NatConfig { publish: vec!["8080:80".parse().unwrap()], ..NatConfig::default() };
    config.publish[0].to = PublishTo::Addr("192.168.122.9".parse().unwrap());
    let mut bench = Bench::with(config);
    bench.cx(|tcp, cx, _| tcp.open_listeners(cx)).unwrap();
    client(&mut bench, LOCAL);
    assert_eq!(bench.turn(), NOTHING);
    assert_eq!(bench.neighbours.take_wanted(), ["192.168.122.9".parse::<std::net::Ipv4Addr>().unwrap()]);
    assert!(bench.neighbours.check("192.168.122.9".parse().unwrap(), MAC, bench.now));
    bench.pass_to_deadline();
    assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
}

#[test]
fn two_clients_with_the_same_port_are_told_apart() {
    let mut bench = published();
    client(&mut bench, "127.0.0.1:55000");
    client(&mut bench, "127.0.0.2:55000");
    assert_eq!(bench.turn().len(), 2);
    assert_eq!(bench.tcp.len(), 2);
}

#[test]
fn a_full_table_resets_clients() {
    let mut bench = published();
    bench.config.limits.tcp_flows = 1;
    client(&mut bench, LOCAL);
    client(&mut bench, "127.0.0.1:55001");
    bench.turn();
    assert_eq!(bench.tcp.len(), 1);
    assert_eq!(bench.host.closed, [(2, Close::Reset)]);
}

#[test]
fn a_client_waits_while_the_host_has_no_descriptor_for_it() {
    let mut bench = published();
    bench.host.accept_errors.extend([(libc::EMFILE, false), (libc::ENOMEM, false)]);
    client(&mut bench, LOCAL);
    for refused in 1..=2 {
        assert_eq!(bench.turn(), NOTHING);
        assert_eq!((bench.host.backlog.len(), bench.dropped(DropReason::TableFull)), (1, refused));
        bench.pass_to_deadline();
    }
    assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
    assert_eq!(bench.tcp.len(), 1);
}

#[test]
fn a_client_that_is_gone_before_it_is_accepted_keeps_nobody_waiting() {
    let mut bench = published();
    bench.host.accept_errors.push_back((libc::ECONNABORTED, true));
    bench.host.backlog.push_back("10.0.0.1:1000".parse().unwrap());
    client(&mut bench, LOCAL);
    assert_eq!(bench.turn(), ["SYN 0+0 ack 0"]);
    assert_eq!(bench.tcp.flows()[0].world, "192.168.122.1:55000".parse().unwrap());
}

#[test]
fn a_flood_of_clients_is_served_in_turns() {
    let mut bench = published();
    for port in 1000..1100 {
        bench.host.backlog.push_back(SocketAddrV4::new("10.0.0.1".parse().unwrap(), port));
    }
    bench.listener_event();
    assert_eq!(bench.turn().len(), 64);
    assert_eq!(bench.received, crate::Received::Again);
    assert_eq!(bench.turn().len(), 36);
}

#[test]
fn errors_of_the_listener_say_what_to_do() {
    let error = |errno: i32| {
        let config = NatConfig { publish: vec!["80:80".parse().unwrap()], ..NatConfig::default() };
        let mut bench = Bench::with(config);
        bench.host.connect_error = Some(errno);
        bench.cx(|tcp, cx, _| tcp.open_listeners(cx)).unwrap_err()
    };
    assert!(matches!(error(libc::EADDRINUSE), NatError::PortInUse { .. }));
    assert!(matches!(error(libc::EADDRNOTAVAIL), NatError::NoSuchAddress { .. }));
    let text = error(libc::EACCES).to_string();
    assert!(text.contains("port 80") && text.contains("ip_unprivileged_port_start"), "{text}");
}
