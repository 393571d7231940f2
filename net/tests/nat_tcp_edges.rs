//! TCP through the NAT at its edges: windows that stay closed, ends that close at once, urgent data, probes, and a full
//! table. The guest is this kernel behind a TAP.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "nat_tcp/kernel.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod kernel;
#[path = "nat_tcp/sys.rs"]
mod sys;
#[path = "nat_tcp/world.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod world;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use kernel::Network;
use net::nat::NatConfig;
use net::{DropReason, FramePort, Offloads};
use rustix::net::{SendFlags, sockopt};
use world::{ALL, descriptors, echo, exchange, pattern, read_all, send_and_tell, server, world};

/// More than all buffers between two ends hold.
const LEN: usize = 24 << 20;

/// Sends `before!after`, the `!` as urgent data, and closes.
fn send_urgent(mut stream: TcpStream) {
    stream.write_all(b"before").unwrap();
    assert_eq!(rustix::net::send(&stream, b"!", SendFlags::OOB).unwrap(), 1);
    stream.write_all(b"after").unwrap();
}

fn read_urgent(stream: TcpStream) -> Vec<u8> {
    sockopt::set_socket_oobinline(&stream, true).unwrap();
    read_all(stream)
}

/// The world sends, and the guest does not read for so long after everything is full.
fn the_guest_stops_reading_for(hold: Duration) {
    if !common::has_tun() {
        return;
    }
    world();
    let (full, is_full) = mpsc::channel();
    let addr = server(move |stream| send_and_tell(stream, &pattern(LEN, 4), &full));
    let network = Network::new(NatConfig::default(), ALL);
    let got = network.guest(move || {
        let stream = TcpStream::connect(addr).unwrap();
        assert!(is_full.recv().unwrap() < LEN);
        // How long the window is closed is what this is about.
        thread::sleep(hold);
        read_all(stream)
    });
    assert!(got == pattern(LEN, 4), "{} bytes", got.len());
    network.until_no_flows();
}

/// The guest sends, and the world does not read for so long after everything is full.
fn the_world_stops_reading_for(hold: Duration) {
    if !common::has_tun() {
        return;
    }
    world();
    let (go, wait) = mpsc::channel::<()>();
    let wait = Arc::new(Mutex::new(wait));
    let (done, result) = mpsc::channel();
    let addr = server(move |stream| {
        wait.lock().unwrap().recv().unwrap();
        done.send(read_all(stream)).unwrap();
    });
    let network = Network::new(NatConfig::default(), ALL);
    let (full, is_full) = mpsc::channel();
    let sender =
        network.start(move || send_and_tell(TcpStream::connect(addr).unwrap(), &pattern(LEN, 3), &full));
    assert!(is_full.recv().unwrap() < LEN);
    thread::sleep(hold);
    go.send(()).unwrap();
    sender.recv().unwrap();
    assert!(result.recv().unwrap() == pattern(LEN, 3));
    network.until_no_flows();
}

/// Half a megabyte each way over a wire that loses every `nth` frame of each direction.
fn nothing_is_lost_with(offloads: Offloads, nth: u64) {
    const LEN: usize = 512 << 10;
    if !common::has_tun() {
        return;
    }
    world();
    let (done, result) = mpsc::channel();
    let addr = server(move |stream| drop(done.send(exchange(stream, pattern(LEN, 5)))));
    let network = Network::lossy(NatConfig::default(), offloads, nth);
    let got = network.guest(move || exchange(TcpStream::connect(addr).unwrap(), pattern(LEN, 6)));
    assert!(got == pattern(LEN, 5), "world to guest: {} bytes", got.len());
    assert!(result.recv().unwrap() == pattern(LEN, 6), "guest to world");
    assert!(network.guest(retransmitted) > 0, "the guest sent nothing again: the wire lost nothing");
}

/// How many segments this namespace's TCP has sent again.
fn retransmitted() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let tcp: Vec<Vec<&str>> =
        text.lines().filter(|l| l.starts_with("Tcp:")).map(|l| l.split(' ').collect()).collect();
    let at = tcp[0].iter().position(|name| *name == "RetransSegs").unwrap();
    tcp[1][at].parse().unwrap()
}

/// Waits until the end of the connection at `port` has sent a FIN that the other end's kernel has acknowledged.
fn until_fin_is_acknowledged(port: u16) {
    let here = format!(":{port:04X} ");
    let is_in_fin_wait_2 = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        line.contains(&here) && fields[3] == "05"
    };
    while !fs::read_to_string("/proc/thread-self/net/tcp").unwrap().lines().any(is_in_fin_wait_2) {}
}

in_namespace! {
    fn nothing_is_lost_on_a_wire_that_loses_every_fiftieth_packet() {
        nothing_is_lost_with(Offloads::empty(), 50);
    }

    fn nothing_is_lost_on_a_wire_that_loses_every_eighth_super_segment() {
        nothing_is_lost_with(ALL, 8);
    }

    fn a_rst_behind_the_worlds_fin_takes_no_data_from_a_guest_that_reads_late() {
        if !common::has_tun() {
            return;
        }
        // More than the guest's kernel takes before the guest reads, and less than the host's socket does.
        const LEN: usize = 40_000;
        world();
        let (reset, is_reset) = mpsc::channel();
        let addr = server(move |mut stream| {
            stream.write_all(&pattern(LEN, 7)).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            until_fin_is_acknowledged(stream.local_addr().unwrap().port());
            sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
            drop(stream);
            reset.send(()).unwrap();
        });
        let network = Network::new(NatConfig::default(), ALL);
        let stream = network.guest(move || {
            fs::write("/proc/sys/net/ipv4/tcp_rmem", "4096 8192 8192").unwrap();
            TcpStream::connect(addr).unwrap()
        });
        is_reset.recv().unwrap();
        assert_eq!(network.nat(|nat| nat.tcp_flows().len()), 1, "it has seen the RST, and waits for the guest");
        let (got, error) = network.guest(move || {
            let got = read_all(stream.try_clone().unwrap());
            let mut stream = stream;
            let error = loop {
                if let Err(error) = stream.write_all(b"more") {
                    break error.kind();
                }
            };
            (got, error)
        });
        assert!(got == pattern(LEN, 7), "{} bytes", got.len());
        assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
        network.until_no_flows();
    }

    fn a_world_that_does_not_read_stops_the_guest_and_loses_nothing() {
        the_world_stops_reading_for(Duration::ZERO);
    }

    fn a_world_that_does_not_read_for_seconds_loses_nothing() {
        the_world_stops_reading_for(Duration::from_secs(5));
    }

    fn a_guest_that_does_not_read_stops_the_world_and_loses_nothing() {
        the_guest_stops_reading_for(Duration::ZERO);
    }

    fn a_guest_that_does_not_read_for_a_minute_loses_nothing() {
        the_guest_stops_reading_for(Duration::from_secs(60));
    }

    fn both_ends_close_at_the_same_moment_and_nothing_is_left() {
        if !common::has_tun() {
            return;
        }
        const TIMES: usize = 200;
        world();
        let (meet, (done, result)) = (Arc::new(Barrier::new(2)), mpsc::channel());
        let at_server = Arc::clone(&meet);
        let addr = server(move |mut stream| {
            at_server.wait();
            let closed = stream.shutdown(Shutdown::Write);
            done.send(closed.and_then(|()| stream.read(&mut [0]))).unwrap();
        });
        let network = Network::new(NatConfig::default(), ALL);
        network.guest(move || {
            for _ in 0..TIMES {
                let mut stream = TcpStream::connect(addr).unwrap();
                meet.wait();
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(stream.read(&mut [0]).unwrap(), 0);
            }
        });
        for end in result.iter().take(TIMES) {
            assert_eq!(end.unwrap(), 0);
        }
        network.until_no_flows();
        assert_eq!(network.nat(|nat| nat.open_sockets()), 0);
    }

    fn the_guests_urgent_data_arrive_in_line() {
        if !common::has_tun() {
            return;
        }
        world();
        let (done, result) = mpsc::channel();
        let addr = server(move |stream| done.send(read_urgent(stream)).unwrap());
        let network = Network::new(NatConfig::default(), ALL);
        network.guest(move || send_urgent(TcpStream::connect(addr).unwrap()));
        assert_eq!(String::from_utf8(result.recv().unwrap()).unwrap(), "before!after");
    }

    fn the_worlds_urgent_data_arrive_in_line() {
        if !common::has_tun() {
            return;
        }
        world();
        let addr = server(send_urgent);
        let network = Network::new(NatConfig::default(), ALL);
        let got = network.guest(move || read_urgent(TcpStream::connect(addr).unwrap()));
        assert_eq!(String::from_utf8(got).unwrap(), "before!after");
    }

    fn the_guests_keepalives_are_answered() {
        if !common::has_tun() {
            return;
        }
        world();
        let addr = server(echo);
        let network = Network::new(NatConfig::default(), ALL);
        let mut stream = network.guest(move || {
            let stream = TcpStream::connect(addr).unwrap();
            let second = Duration::from_secs(1);
            sockopt::set_tcp_keepidle(&stream, second).unwrap();
            sockopt::set_tcp_keepintvl(&stream, second).unwrap();
            sockopt::set_tcp_keepcnt(&stream, 2).unwrap();
            sockopt::set_socket_keepalive(&stream, true).unwrap();
            stream
        });
        // Without an answer, the kernel gives the connection up after three seconds.
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "it is alive, and nothing came");
        stream.set_read_timeout(None).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }

    fn ten_thousand_short_connections_leave_nothing() {
        if !common::has_tun() {
            return;
        }
        world();
        let addr = server(echo);
        let network = Network::new(NatConfig::default(), ALL);
        network.until_no_flows();
        let (before, sockets) = (descriptors(), network.nat(|nat| nat.open_sockets()));
        network.guest(move || {
            for n in 0..10_000u32 {
                let mut stream = TcpStream::connect(addr).unwrap();
                stream.write_all(&[n as u8]).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(read_all(stream), [n as u8]);
            }
        });
        network.until_no_flows();
        assert_eq!(network.nat(|nat| nat.open_sockets()), sockets);
        // Threads of the server may still be closing theirs.
        assert!(descriptors() <= before + 8, "{before} before, {} now", descriptors());
    }

    fn a_full_table_answers_rst_at_the_first_syn_and_the_others_go_on() {
        if !common::has_tun() {
            return;
        }
        world();
        let addr = server(echo);
        let mut config = NatConfig::default();
        config.limits.tcp_flows = 8;
        let network = Network::new(config, ALL);
        let mut open: Vec<TcpStream> =
            network.guest(move || (0..8).map(|_| TcpStream::connect(addr).unwrap()).collect());
        for refused in 1..=3 {
            let error = network.guest(move || TcpStream::connect(addr).unwrap_err().kind());
            assert_eq!(error, ErrorKind::ConnectionRefused);
            assert_eq!(network.nat(|nat| nat.counters().dropped(DropReason::TableFull)), refused);
        }
        for stream in &mut open {
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        drop(open);
        network.until_no_flows();
        network.guest(move || drop(TcpStream::connect(addr).unwrap()));
    }
}
