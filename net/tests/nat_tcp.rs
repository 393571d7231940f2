//! TCP through the NAT with real sockets: this kernel as a guest behind a TAP, and smoltcp as another.
//!
//! The world is the test's own namespace, at an address that is not loopback.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "nat_tcp/kernel.rs"]
mod kernel;
#[path = "nat_tcp/smol.rs"]
mod smol;
#[path = "nat_tcp/sys.rs"]
mod sys;
#[path = "nat_tcp/world.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod world;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;

use common::ip;
use kernel::Network;
use net::nat::{Nat, NatConfig};
use net::{DropReason, FramePort, Offloads};
use smol::{Faults, Smol};
use world::{ALL, WORLD, exchange, pattern, server, world};

/// Megabytes each way over a faulty wire: as many as an unoptimised build moves in some ten seconds.
const FAULTY_MEGABYTES: usize = 100;

fn ten_megabytes_each_way(config: NatConfig, offloads: Offloads) {
    const LEN: usize = 10 << 20;
    if !common::has_tun() {
        return;
    }
    world();
    let (done, result) = mpsc::channel();
    let addr = server(move |stream| drop(done.send(exchange(stream, pattern(LEN, 1)))));
    let network = Network::new(config, offloads);
    let got = network.guest(move || exchange(TcpStream::connect(addr).unwrap(), pattern(LEN, 2)));
    assert!(got == pattern(LEN, 1), "world to guest: {} bytes", got.len());
    let got = result.recv().unwrap();
    assert!(got == pattern(LEN, 2), "guest to world: {} bytes", got.len());
    network.until_no_flows();
}

in_namespace! {
    fn ten_megabytes_each_way_in_super_segments() {
        ten_megabytes_each_way(NatConfig::default(), ALL);
    }

    fn ten_megabytes_each_way_without_any_offload() {
        ten_megabytes_each_way(NatConfig::default(), Offloads::empty());
    }

    fn ten_megabytes_each_way_with_the_largest_mtu() {
        ten_megabytes_each_way(NatConfig { mtu: 65_520, ..NatConfig::default() }, Offloads::CSUM);
    }

    fn ten_megabytes_each_way_for_another_tcp() {
        const LEN: usize = 10 << 20;
        world();
        let (done, result) = mpsc::channel();
        let addr = server(move |stream| drop(done.send(exchange(stream, pattern(LEN, 1)))));
        let mut guest = Smol::new(Nat::new(NatConfig::default()).unwrap());
        let handle = guest.connect(addr, 40_000);
        let (data, mut sent, mut got) = (pattern(LEN, 2), 0, Vec::new());
        guest.until(|guest| {
            let socket = guest.socket(handle);
            if socket.can_send() && sent < LEN {
                sent += socket.send_slice(&data[sent..]).unwrap();
                if sent == LEN {
                    socket.close();
                }
            }
            while socket.can_recv() {
                socket.recv(|bytes| { got.extend_from_slice(bytes); (bytes.len(), ()) }).unwrap();
            }
            sent == LEN && !socket.may_recv() && !socket.is_active() || got.len() == LEN && sent == LEN && !socket.may_recv()
        });
        assert!(got == pattern(LEN, 1) && result.recv().unwrap() == data);
        guest.until(|guest| guest.nat.tcp_flows().is_empty());
    }

    fn the_worlds_answer_comes_after_the_guest_has_closed_its_half() {
        if !common::has_tun() {
            return;
        }
        world();
        let addr = server(|mut stream| {
            let mut question = String::new();
            stream.read_to_string(&mut question).unwrap();
            stream.write_all(question.to_uppercase().as_bytes()).unwrap();
        });
        let network = Network::new(NatConfig::default(), ALL);
        let answer = network.guest(move || {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.write_all(b"half").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        assert_eq!(answer, "HALF");
        network.until_no_flows();
    }

    fn a_failed_connect_is_the_guests_own_error() {
        if !common::has_tun() {
            return;
        }
        world();
        ip("route add unreachable 10.78.0.0/16");
        ip("route add prohibit 10.79.0.0/16");
        let network = Network::new(NatConfig::default(), ALL);
        let connect = |to: &'static str| network.guest(move || TcpStream::connect(to).unwrap_err().kind());
        assert_eq!(connect("10.77.0.1:9"), ErrorKind::ConnectionRefused);
        assert_eq!(connect("10.78.0.1:9"), ErrorKind::HostUnreachable);
        assert_eq!(connect("10.80.0.1:9"), ErrorKind::NetworkUnreachable);
        assert_eq!(connect("10.79.0.1:9"), ErrorKind::HostUnreachable, "Linux has one word for both");
        assert_eq!(connect("169.254.169.254:80"), ErrorKind::ConnectionRefused);
        network.until_no_flows();
    }

    fn a_rst_is_a_rst_on_the_other_side_both_ways() {
        if !common::has_tun() {
            return;
        }
        world();
        let (done, result) = mpsc::channel();
        let addr = server(move |mut stream| {
            let mut first = [0];
            stream.read_exact(&mut first).unwrap();
            if first == *b"a" {
                stream.write_all(b"unread").unwrap();
                done.send(stream.read(&mut first).unwrap_err().kind()).unwrap();
            } else {
                // Closing with unread data is how a kernel comes to send a RST.
                done.send(ErrorKind::Other).unwrap();
                let mut more = [0; 1];
                stream.peek(&mut more).unwrap();
            }
        });
        let network = Network::new(NatConfig::default(), ALL);
        network.guest(move || {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.write_all(b"a").unwrap();
            stream.peek(&mut [0; 1]).unwrap();
        });
        assert_eq!(result.recv().unwrap(), ErrorKind::ConnectionReset);
        let error = network.guest(move || {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.write_all(b"bc").unwrap();
            stream.read(&mut [0; 1]).unwrap_err().kind()
        });
        assert_eq!(error, ErrorKind::ConnectionReset);
        network.until_no_flows();
    }

    fn a_published_port_leads_to_the_guest_and_a_closed_one_is_reset() {
        if !common::has_tun() {
            return;
        }
        world();
        let mut config = NatConfig::default();
        for guest_port in [80, 81] {
            let mut publish: net::nat::Publish = format!("1:{guest_port}").parse().unwrap();
            publish.host_port = 0;
            config.publish.push(publish);
        }
        let network = Network::new(config, ALL);
        let (ready, listening) = mpsc::channel();
        let served = network.start(move || {
            let listener = TcpListener::bind("0.0.0.0:80").unwrap();
            ready.send(()).unwrap();
            let (stream, peer) = listener.accept().unwrap();
            (exchange(stream, pattern(1 << 20, 5)), peer.ip())
        });
        listening.recv().unwrap();
        assert!(network.published[0].ip().is_loopback());
        let got = exchange(TcpStream::connect(network.published[0]).unwrap(), pattern(1 << 20, 6));
        assert!(got == pattern(1 << 20, 5));
        let (got, peer) = served.recv().unwrap();
        assert!(got == pattern(1 << 20, 6));
        assert_eq!(peer, Ipv4Addr::new(192, 168, 122, 1), "loopback is the gateway");
        let mut closed = TcpStream::connect(network.published[1]).unwrap();
        assert_eq!(closed.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        network.until_no_flows();
    }

    fn the_hosts_loopback_is_closed_unless_it_is_opened() {
        if !common::has_tun() {
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        for (host_access, opens) in [(false, false), (true, true)] {
            let network = Network::new(NatConfig { host_access, ..NatConfig::default() }, ALL);
            let at_gateway = network.guest(move || TcpStream::connect(("192.168.122.1", port)).is_ok());
            assert_eq!(at_gateway, opens);
        }
    }

    fn neither_root_nor_a_capability_is_needed() {
        const INNER: &str = "unprivileged";
        if std::env::var("PONTOON_TEST_IN_NAMESPACE").unwrap() == INNER {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
            let addr: SocketAddrV4 = std::env::var("WORLD_SERVER").unwrap().parse().unwrap();
            let mut guest = Smol::new(Nat::new(NatConfig::default()).unwrap());
            let handle = guest.connect(addr, 40_000);
            let mut got = Vec::new();
            guest.until(|guest| {
                let socket = guest.socket(handle);
                if socket.can_recv() {
                    socket.recv(|bytes| { got.extend_from_slice(bytes); (bytes.len(), ()) }).unwrap();
                }
                got == b"hello"
            });
            return;
        }
        world();
        let addr = server(|mut stream| {
            stream.write_all(b"hello").unwrap();
            let _ = stream.read(&mut [0]);
        });
        let exe = std::env::current_exe().unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
        command.arg(exe).args(["--exact", "neither_root_nor_a_capability_is_needed", "--nocapture"]);
        command.env("PONTOON_TEST_IN_NAMESPACE", INNER).env("WORLD_SERVER", addr.to_string());
        let done = command.status();
        match done {
            Ok(status) => assert!(status.success()),
            Err(error) => common::skip::skip(format_args!("setpriv: {error}")),
        }
    }

    fn a_wire_that_loses_reorders_repeats_and_corrupts_loses_no_byte() {
        world();
        let len = FAULTY_MEGABYTES << 20;
        let (done, result) = mpsc::channel();
        let addr = server(move |stream| drop(done.send(exchange(stream, pattern(len, 1)))));
        let mut guest = Smol::new(Nat::new(NatConfig::default()).unwrap());
        let handle = guest.connect(addr, 40_000);
        guest.faults(Some([Faults::new(1), Faults::new(2)]));
        let (data, mut sent, mut got) = (pattern(len, 2), 0, Vec::new());
        guest.until(|guest| {
            let socket = guest.socket(handle);
            if socket.can_send() && sent < len {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            while socket.can_recv() {
                socket.recv(|bytes| { got.extend_from_slice(bytes); (bytes.len(), ()) }).unwrap();
            }
            sent == len && got.len() == len && socket.send_queue() == 0
        });
        assert!(guest.nat.counters().dropped(DropReason::BadChecksum) > 0, "the NAT saw corrupted frames");
        // A lost FIN and its answer would only make the end longer.
        guest.faults(None);
        guest.socket(handle).close();
        guest.until(|guest| guest.nat.tcp_flows().is_empty());
        assert!(got == pattern(len, 1), "world to guest");
        assert!(result.recv().unwrap() == data, "guest to world");
    }

    fn loopback_is_closed_to_a_guest_that_sends_there() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut guest = Smol::new(Nat::new(NatConfig::default()).unwrap());
        let handle = guest.connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), 40_000);
        guest.until(|guest| !guest.socket(handle).is_open());
        assert_eq!(guest.nat.counters().dropped(DropReason::Policy), 1, "refused at the first SYN");
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    fn a_client_of_a_published_port_is_seen_at_its_own_address() {
        if !common::has_tun() {
            return;
        }
        world();
        let mut publish: net::nat::Publish = "0.0.0.0:1:80".parse().unwrap();
        publish.host_port = 0;
        let network = Network::new(NatConfig { publish: vec![publish], ..NatConfig::default() }, ALL);
        let (ready, listening) = mpsc::channel();
        let seen = network.start(move || {
            let listener = TcpListener::bind("0.0.0.0:80").unwrap();
            ready.send(()).unwrap();
            listener.accept().unwrap().1
        });
        listening.recv().unwrap();
        let client = TcpStream::connect((WORLD, network.published[0].port())).unwrap();
        assert_eq!(seen.recv().unwrap(), client.local_addr().unwrap(), "address and port");
        assert_eq!(client.local_addr().unwrap().ip(), WORLD);
    }
}
