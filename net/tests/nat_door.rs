//! Streams of this host that a handle leads into a guest, with this kernel as the guest, and what a handle tells.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "nat_tcp/kernel.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod kernel;
#[path = "nat_tcp/sys.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod sys;
#[path = "nat_tcp/world.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod world;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use kernel::Network;
use net::nat::{ConnectError, Nat, NatConfig};
use world::{ALL, exchange, pattern};

const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 2);

/// Sends all of `data`, and its end, while it reads to the other's end.
fn exchange_local(stream: UnixStream, data: Vec<u8>) -> Vec<u8> {
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let (mut stream, mut got) = (stream, Vec::new());
    stream.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    got
}

in_namespace! {
    fn a_stream_of_this_host_reaches_a_port_of_the_guest() {
        const LEN: usize = 24 << 20;
        if !common::has_tun() {
            return;
        }
        let network = Network::new(NatConfig::default(), ALL);
        let handle = network.nat(|nat| nat.handle().unwrap());
        let (ready, listening) = mpsc::channel();
        let served = network.start(move || {
            let listener = TcpListener::bind("0.0.0.0:22").unwrap();
            ready.send(()).unwrap();
            let (stream, peer) = listener.accept().unwrap();
            (exchange(stream, pattern(LEN, 5)), peer.ip())
        });
        listening.recv().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        handle.connect(Some(GUEST), 22, theirs.into()).unwrap();
        assert!(exchange_local(ours, pattern(LEN, 6)) == pattern(LEN, 5));
        let (got, peer) = served.recv().unwrap();
        assert!(got == pattern(LEN, 6));
        assert_eq!(peer, Ipv4Addr::new(192, 168, 122, 1), "it comes from the gateway");
        network.until_no_flows();
        assert_eq!(network.nat(|nat| nat.open_sockets()), 0);
    }

    fn a_closed_port_of_the_guest_is_the_streams_end() {
        if !common::has_tun() {
            return;
        }
        let network = Network::new(NatConfig::default(), ALL);
        let handle = network.nat(|nat| nat.handle().unwrap());
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        handle.connect(None, 23, theirs.into()).unwrap();
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
        network.until_no_flows();
    }

    fn the_flows_are_told_by_whoever_serves_the_network() {
        if !common::has_tun() {
            return;
        }
        let network = Network::new(NatConfig::default(), ALL);
        let handle = network.nat(|nat| nat.handle().unwrap());
        let (ready, listening) = mpsc::channel();
        let served = network.start(move || {
            let listener = TcpListener::bind("0.0.0.0:24").unwrap();
            ready.send(()).unwrap();
            listener.accept().unwrap().0.read_to_end(&mut Vec::new())
        });
        listening.recv().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        handle.connect(None, 24, theirs.into()).unwrap();
        ours.write_all(b"x").unwrap();
        let (tell, told) = mpsc::channel();
        handle.flows(move |flows| tell.send(flows).unwrap());
        let flows = told.recv().unwrap();
        assert!(flows.iter().any(|flow| flow.guest == SocketAddrV4::new(GUEST, 24)), "{flows:?}");
        drop(ours);
        served.recv().unwrap().unwrap();
        network.until_no_flows();
    }
}

#[test]
fn a_handle_tells_that_its_network_has_ended_and_closes_what_waits() {
    let mut nat = Nat::new(NatConfig::default()).unwrap();
    let handle = nat.handle().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    handle.connect(None, 22, theirs.into()).unwrap();
    drop(nat);
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(matches!(handle.connect(None, 22, theirs.into()), Err(ConnectError::Ended)));
}

#[test]
fn an_address_that_no_guest_can_have_is_refused_and_so_are_too_many_streams() {
    let mut nat = Nat::new(NatConfig::default()).unwrap();
    let handle = nat.handle().unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let outside = Some(Ipv4Addr::new(10, 0, 0, 1));
    assert!(matches!(handle.connect(outside, 22, theirs.into()), Err(ConnectError::NoGuest { .. })));
    let mut kept = Vec::new();
    let refused = (0..100).find_map(|_| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        kept.push(ours);
        handle.connect(None, 22, theirs.into()).err()
    });
    assert!(matches!(refused, Some(ConnectError::Busy)));
    assert_eq!(kept.len(), 65);
    let mut refused = kept.pop().unwrap();
    refused.set_nonblocking(true).unwrap();
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0, "a refused stream is closed");
    kept[0].set_nonblocking(true).unwrap();
    assert_eq!(kept[0].read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock, "the others wait");
}
