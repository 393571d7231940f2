//! The NAT against a world of namespaces: what a guest sends arrives, and what the world says comes back.
//!
//! ```text
//!   guest (this test's frames) ── Nat, in the test's namespace ── 10.0.0.1 ── router ── 10.0.1.2 world
//!                                                                     10.0.0.254  10.0.1.254, MTU 1280
//! ```

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that can't go on says where")]

mod common;
#[path = "nat_world/guest.rs"]
mod guest;
#[path = "nat_tcp/smol.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod smol;
#[path = "nat_tcp/sys.rs"]
mod sys;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::ip;
use guest::{Guest, Icmp, Udp};
use net::nat::{Nat, NatConfig};
use net::{DropReason, FramePort};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
const WORLD: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 2);

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread in it.
struct Place(mpsc::Sender<Job>, libc::pid_t);

impl Place {
    fn new() -> Self {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (ready, tid) = mpsc::channel();
        thread::spawn(move || {
            common::sys::new_namespace().unwrap();
            ready.send(common::sys::thread_id()).unwrap();
            inbox.into_iter().for_each(|job| job());
        });
        Self(jobs, tid.recv().unwrap())
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.0.send(Box::new(move || drop(done.send(job())))).unwrap();
        result.recv().expect("the job panicked")
    }

    /// A UDP socket at the world's address.
    fn socket(&self, port: u16) -> UdpSocket {
        self.run(move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            socket
        })
    }
}

struct World {
    _router: Place,
    world: Place,
}

impl World {
    fn new() -> Self {
        let (router, world) = (Place::new(), Place::new());
        ip("link add host type veth peer name near");
        ip(&format!("link set near netns {}", router.1));
        ip("address add 10.0.0.1/24 dev host");
        ip("link set host up");
        let tid = world.1;
        router.run(move || {
            ip("link set lo up");
            ip("address add 10.0.0.254/24 dev near");
            ip("link set near up");
            ip("link add far type veth peer name eth0");
            ip(&format!("link set eth0 netns {tid}"));
            ip("address add 10.0.1.254/24 dev far");
            ip("link set far mtu 1280 up");
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            // The kernel's own limits would make a second error wait.
            std::fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0").unwrap();
        });
        world.run(|| {
            ip("link set lo up");
            ip("address add 10.0.1.2/24 dev eth0");
            ip("link set eth0 mtu 1280 up");
            ip("route add default via 10.0.1.254");
            std::fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0").unwrap();
        });
        ip("route add 10.0.1.0/24 via 10.0.0.254");
        Self { _router: router, world }
    }
}

fn allow_ping_sockets() {
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
}

fn guest() -> Guest {
    Guest::new(Nat::new(NatConfig::default()).unwrap())
}

in_namespace! {
    fn a_datagram_keeps_its_port_and_loses_a_hop_and_the_answer_comes_back() {
        let world = World::new();
        let (mut guest, server) = (guest(), world.world.socket(700));
        guest.send(&Udp::new(4000, WORLD, 700, b"question"));
        let mut buf = [0; 100];
        let (n, from) = server.recv_from(&mut buf).unwrap();
        assert_eq!((&buf[..n], from.to_string().as_str()), (&b"question"[..], "10.0.0.1:4000"));
        server.set_ttl(50).unwrap();
        server.send_to(b"answer", from).unwrap();
        let answer = guest.udp();
        assert_eq!((answer.from, answer.to), (SocketAddrV4::new(WORLD, 700), SocketAddrV4::new(guest.addr, 4000)));
        assert_eq!((answer.payload.as_slice(), answer.ttl), (&b"answer"[..], 50 - 1 - 1), "the router's hop and ours");
    }

    fn nobody_but_the_one_who_was_asked_may_answer() {
        let world = World::new();
        let mut guest = guest();
        let other = Ipv4Addr::new(10, 0, 1, 3);
        let [server, elsewhere] = world.world.run(move || {
            ip(&format!("address add {other}/24 dev eth0"));
            [WORLD, other].map(|addr| UdpSocket::bind((addr, 700)).unwrap())
        });
        guest.send(&Udp::new(4000, WORLD, 700, b"x"));
        let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
        world.world.socket(701).send_to(b"from another port", from).unwrap();
        elsewhere.send_to(b"from another address", from).unwrap();
        server.send_to(b"from the right one", from).unwrap();
        assert_eq!(guest.udp().payload, b"from the right one");
        assert_eq!(guest.nat.counters().dropped(DropReason::NoFlow), 2);
    }

    fn a_closed_port_of_the_world_becomes_port_unreachable() {
        let _world = World::new();
        let mut guest = guest();
        let sent = guest.send(&Udp::new(4000, WORLD, 9, b"anybody?"));
        let error = guest.icmp();
        assert_eq!((error.from, error.kind, error.code), (WORLD, 3, 3));
        assert_eq!(error.body, sent[14..42], "it quotes the guest's own headers");
    }

    fn a_ttl_that_runs_out_is_reported_by_the_hop_where_it_did() {
        let _world = World::new();
        allow_ping_sockets();
        let mut guest = guest();
        for (ttl, hop) in [(1, GATEWAY), (2, ROUTER)] {
            let sent = guest.send(&Udp { ttl, ..Udp::new(4000, WORLD, 33434, b"trace") });
            let error = guest.icmp();
            assert_eq!((error.from, error.kind, error.code), (hop, 11, 0));
            assert_eq!(error.body[..28], sent[14..42]);
            let sent = guest.send(&Icmp { ttl, ..Icmp::echo(WORLD, 77, 5, b"trace") });
            let error = guest.icmp();
            assert_eq!((error.from, error.kind, error.code), (hop, 11, 0));
            assert_eq!(error.body[..28], sent[14..42], "identifier and sequence number are the guest's");
        }
        guest.send(&Icmp { ttl: 3, ..Icmp::echo(WORLD, 77, 6, b"trace") });
        assert_eq!((guest.icmp().kind, guest.nat.counters().dropped(DropReason::TtlExceeded)), (0, 2));
    }

    fn where_the_host_knows_no_way_the_gateway_says_so() {
        let _world = World::new();
        allow_ping_sockets();
        let mut guest = guest();
        let nowhere = Ipv4Addr::new(203, 0, 113, 1);
        let sent = guest.send(&Udp::new(4000, nowhere, 9, b"x"));
        let error = guest.icmp();
        assert_eq!((error.from, error.kind, error.code), (GATEWAY, 3, 0));
        assert_eq!(error.body[..28], sent[14..42]);
        guest.send(&Icmp::echo(nowhere, 1, 1, b""));
        let error = guest.icmp();
        assert_eq!((error.from, error.kind, error.code), (GATEWAY, 3, 0));
    }

    fn a_datagram_too_big_for_the_way_is_reported_with_the_mtu() {
        let world = World::new();
        let (mut guest, server) = (guest(), world.world.socket(700));
        let big = Udp { dont_fragment: true, ..Udp::new(4000, WORLD, 700, &[7; 1400]) };
        let sent = guest.send(&big);
        let error = guest.icmp();
        assert_eq!((error.from, error.kind, error.code, error.rest), (ROUTER, 3, 4, 1280));
        assert_eq!(error.body[..28], sent[14..42]);
        // Now the host knows the way's MTU itself.
        guest.send(&big);
        let error = guest.icmp();
        assert_eq!((error.from, error.kind, error.code, error.rest), (GATEWAY, 3, 4, 1280));
        guest.send(&Udp { dont_fragment: true, ..Udp::new(4000, WORLD, 700, &[7; 1252]) });
        assert_eq!(server.recv_from(&mut [0; 2000]).unwrap().0, 1252);
        guest.send(&Udp::new(4000, WORLD, 700, &[7; 1400]));
        assert_eq!(server.recv_from(&mut [0; 2000]).unwrap().0, 1400, "without DF it is cut on the way");
    }

    fn a_connection_finds_the_mtu_of_the_way() {
        const LEN: usize = 1 << 20;
        let world = World::new();
        let listener = world.world.run(|| {
            // It does not let on how small its own MTU is.
            ip("route change default via 10.0.1.254 advmss 1460");
            TcpListener::bind((WORLD, 80)).unwrap()
        });
        let received = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = vec![0; LEN];
            stream.read_exact(&mut got).unwrap();
            stream.write_all(&got).unwrap();
            got
        });
        let mut guest = smol::Smol::new(Nat::new(NatConfig::default()).unwrap());
        let handle = guest.connect(SocketAddrV4::new(WORLD, 80), 40_000);
        let data: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
        let (mut sent, mut got) = (0, Vec::new());
        guest.until(|guest| {
            let socket = guest.socket(handle);
            if socket.can_send() && sent < LEN {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            while socket.can_recv() {
                socket.recv(|bytes| { got.extend_from_slice(bytes); (bytes.len(), ()) }).unwrap();
            }
            got.len() == LEN
        });
        assert!(got == data && received.join().unwrap() == data);
        assert!(ip(&format!("route get {WORLD}")).contains("mtu 1280"), "the host was told by the router");
    }

    fn datagrams_of_any_size_cross_in_fragments() {
        let world = World::new();
        let (mut guest, server) = (guest(), world.world.socket(700));
        let mut buf = vec![0; 70_000];
        for len in [1472, 1473, 9000, 65_507] {
            let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            guest.send_fragments(&Udp::new(4000, WORLD, 700, &payload));
            let (n, from) = server.recv_from(&mut buf).unwrap();
            assert!(buf[..n] == payload, "{len} bytes out");
            server.send_to(&payload, from).unwrap();
            let answer = guest.udp();
            assert!(answer.payload == payload, "{len} bytes back");
        }
    }

    fn a_row_of_datagrams_arrives_one_by_one() {
        let world = World::new();
        let (mut guest, server) = (guest(), world.world.socket(700));
        let mut buf = [0; 2000];
        // The host does not cut the second row, whose datagrams are larger than its MTU; the third has nothing to be cut.
        for (size, len) in [(1200, 5 * 1200 + 7), (1480, 3 * 1480), (1000, 1000), (1000, 400)] {
            let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            guest.send_row(&Udp::new(4000, WORLD, 700, &payload), size);
            for sent in payload.chunks(size.into()) {
                let (n, from) = server.recv_from(&mut buf).unwrap();
                assert_eq!((&buf[..n], from.port()), (sent, 4000), "{len} bytes in rows of {size}");
            }
        }
        guest.send_row(&Udp::new(4000, WORLD, 700, &[1; 129]), 1);
        assert_eq!(guest.nat.counters().dropped(DropReason::BadVnetHdr), 1, "one frame, more work than Linux asks for");
    }

    fn a_ping_is_answered_by_the_one_it_asked() {
        let _world = World::new();
        // First through a raw socket, then through a ping socket, as the host allows it.
        for ping_sockets in [false, true] {
            if ping_sockets {
                allow_ping_sockets();
            }
            let mut guest = guest();
            for (seq, len) in [(1, 0), (2, 56), (3, 1472), (4, 4000)] {
                let data: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                guest.send_fragments(&Icmp::echo(WORLD, 4711, seq, &data));
                let reply = guest.icmp();
                assert_eq!((reply.from, reply.kind, reply.code), (WORLD, 0, 0), "{len} bytes");
                assert_eq!(reply.rest, u32::from(4711_u16) << 16 | u32::from(seq));
                assert!(reply.body == data, "{len} bytes");
                assert_eq!(reply.ttl, 64 - 1 - 1);
            }
        }
    }

    fn a_host_that_is_not_there_is_reported_and_never_answers() {
        let _world = World::new();
        allow_ping_sockets();
        let mut guest = guest();
        guest.send(&Icmp::echo(Ipv4Addr::new(10, 0, 1, 99), 1, 1, b"x"));
        let error = guest.icmp();
        assert_eq!((error.from, error.kind, error.code), (ROUTER, 3, 1));
    }

    fn the_gateway_answers_its_own_pings() {
        let mut guest = guest();
        for len in [0, 56, 4000] {
            guest.send_fragments(&Icmp::echo(GATEWAY, 9, 1, &vec![3; len]));
            let reply = guest.icmp();
            assert_eq!((reply.from, reply.kind, reply.body.len()), (GATEWAY, 0, len));
        }
    }

    fn what_is_closed_is_refused_by_name() {
        let mut guest = guest();
        for closed in ["169.254.169.254", "127.0.0.1"] {
            guest.send(&Udp::new(4000, closed.parse().unwrap(), 80, b"x"));
            assert_eq!((guest.icmp().code, guest.nat.counters().dropped(DropReason::Policy) > 0), (13, true));
            guest.send(&Icmp::echo(closed.parse().unwrap(), 1, 1, b"x"));
            assert_eq!(guest.icmp().code, 13);
        }
        guest.send(&Udp::new(4000, GATEWAY, 9999, b"x"));
        assert_eq!((guest.icmp().code, guest.nat.counters().dropped(DropReason::NoFlow)), (3, 1));
        for group in ["224.0.0.251", "192.168.122.255", "255.255.255.255"] {
            guest.send(&Udp::new(5353, group.parse().unwrap(), 5353, b"x"));
        }
        assert_eq!(guest.nat.counters().dropped(DropReason::Multicast), 3);
        assert!(guest.nothing(), "groups get no error");
    }

    fn a_published_port_hands_clients_to_the_guest_at_their_own_address() {
        let world = World::new();
        let publish = vec!["0.0.0.0:5000:53/udp".parse().unwrap()];
        let mut guest = Guest::new(Nat::new(NatConfig { publish, ..NatConfig::default() }).unwrap());
        guest.greet();
        let client = world.world.socket(6000);
        client.send_to(b"from afar", (Ipv4Addr::new(10, 0, 0, 1), 5000)).unwrap();
        let got = guest.udp();
        assert_eq!((got.from, got.to.port()), (SocketAddrV4::new(WORLD, 6000), 53));
        guest.send(&Udp::new(53, WORLD, 6000, b"to afar"));
        let mut buf = [0; 100];
        let (n, from) = client.recv_from(&mut buf).unwrap();
        assert_eq!((&buf[..n], from.port()), (&b"to afar"[..], 5000));
        let local = UdpSocket::bind("127.0.0.1:7000").unwrap();
        local.send_to(b"from the host", "127.0.0.1:5000").unwrap();
        let got = guest.udp();
        assert_eq!(got.from, SocketAddrV4::new(GATEWAY, 7000));
        guest.send(&Udp::new(53, GATEWAY, 7000, b"to the host"));
        let (n, from) = local.recv_from(&mut buf).unwrap();
        assert_eq!((&buf[..n], from.to_string().as_str()), (&b"to the host"[..], "127.0.0.1:5000"));
    }

    fn a_full_table_closes_the_oldest_flow_and_counts_it() {
        let world = World::new();
        let mut config = NatConfig::default();
        config.limits.udp_flows = 4;
        let (mut guest, server) = (Guest::new(Nat::new(config).unwrap()), world.world.socket(700));
        for port in 4000..4010 {
            guest.send(&Udp::new(port, WORLD, 700, b"x"));
            let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
            assert_eq!(from.port(), port, "a closed flow's port is free again");
        }
        assert_eq!(guest.nat.counters().dropped(DropReason::TableFull), 6);
    }

    fn the_hosts_loopback_is_open_at_the_gateway_when_asked_for() {
        let server = UdpSocket::bind("127.0.0.1:700").unwrap();
        let mut guest = Guest::new(Nat::new(NatConfig { host_access: true, ..NatConfig::default() }).unwrap());
        guest.send(&Udp::new(4000, GATEWAY, 700, b"x"));
        let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
        server.send_to(b"from the host", from).unwrap();
        let answer = guest.udp();
        assert_eq!((answer.from, answer.payload), (SocketAddrV4::new(GATEWAY, 700), b"from the host".to_vec()));
    }

    fn a_guest_without_buffers_loses_nothing_that_the_socket_holds() {
        let world = World::new();
        let (mut guest, server) = (guest(), world.world.socket(700));
        guest.send(&Udp::new(4000, WORLD, 700, b"x"));
        let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
        for n in 0..100u8 {
            server.send_to(&[n; 100], from).unwrap();
        }
        guest.stop_receiving();
        for n in 0..100u8 {
            assert_eq!(guest.udp().payload, [n; 100]);
        }
    }
}
