//! The gateway's services as this kernel and ordinary programs find them, in a namespace behind a TAP: names over UDP and
//! TCP, a DHCP client, groups, and what is closed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "nat_tcp/kernel.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod kernel;
#[path = "nat_linux/stub.rs"]
mod stub;
#[path = "nat_tcp/sys.rs"]
mod sys;

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use common::ip;
use hickory_proto::op::{Edns, Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use kernel::Network;
use net::nat::NatConfig;
use net::{DropReason, FramePort, Offloads};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);
const ALL: Offloads = Offloads::CSUM.union(Offloads::TSO4);
const MAC: &str = "52:54:00:00:00:0a";
const OTHER_MAC: &str = "52:54:00:00:00:0b";

/// The file that is this process's /etc/resolv.conf.
const RESOLV_CONF: &str = "PONTOON_TEST_RESOLV_CONF";

/// Runs `body` with a file of its own in place of /etc/resolv.conf: in a process with its own mounts.
fn with_resolv_conf(name: &str, text: &str, body: impl FnOnce(&Path)) {
    if let Some(file) = std::env::var_os(RESOLV_CONF) {
        let file = Path::new(&file);
        assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), fs::read_to_string(file).unwrap());
        return body(file);
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("resolv.conf");
    fs::write(&file, text).unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "--", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\""]);
    command.arg(&file).arg(std::env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]);
    assert!(
        command.env(RESOLV_CONF, &file).status().unwrap().success(),
        "{name} failed with its own resolver"
    );
}

fn question(name: &str, edns: Option<u16>) -> Vec<u8> {
    let mut question = Message::query();
    question.add_query(Query::query(Name::from_str(name).unwrap(), RecordType::A));
    if let Some(size) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        question.edns = Some(edns);
    }
    question.to_vec().unwrap()
}

/// Asks the gateway from the guest, in a datagram.
fn ask(network: &Network, name: &str, edns: Option<u16>) -> (Message, usize) {
    let question = question(name, edns);
    let answer = network.guest(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.connect((GATEWAY, 53)).unwrap();
        socket.send(&question).unwrap();
        let mut answer = vec![0; 65_536];
        let n = socket.recv(&mut answer).unwrap();
        answer.truncate(n);
        answer
    });
    (Message::from_vec(&answer).unwrap(), answer.len())
}

/// Asks the gateway from the guest, over one connection.
fn ask_over_tcp(network: &Network, names: &'static [&'static str]) -> Vec<Message> {
    network.guest(move || {
        let mut stream = TcpStream::connect((GATEWAY, 53)).unwrap();
        names.iter().map(|name| stub::exchange(&mut stream, &question(name, None))).collect()
    })
}

/// Sends questions for these many addresses over a new connection, all at once, and waits for as many answers: how many
/// addresses each has, in order.
fn counts_of(numbers: std::ops::Range<u32>) -> Vec<usize> {
    let mut stream = TcpStream::connect((GATEWAY, 53)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    numbers.clone().for_each(|n| stub::write(&mut stream, &question(&format!("{n}.example."), None)));
    let mut counts: Vec<usize> = numbers
        .map(|_| addresses(&Message::from_vec(&stub::read(&mut stream).unwrap()).unwrap()).len())
        .collect();
    counts.sort_unstable();
    counts
}

fn addresses(message: &Message) -> Vec<Ipv4Addr> {
    let address = |data: &RData| if let RData::A(a) = data { Some(a.0) } else { None };
    message.answers.iter().filter_map(|record| address(&record.data)).collect()
}

/// What a DHCP client says that it got.
#[derive(Debug, PartialEq, Eq)]
struct Got {
    ip: Ipv4Addr,
    /// Mask, router, DNS server, domain, search domains, MTU and seconds, as the client writes them.
    rest: String,
}

fn has_udhcpc() -> bool {
    let has = Command::new("busybox").args(["udhcpc", "--help"]).output();
    let has = has.is_ok_and(|out| String::from_utf8_lossy(&out.stderr).contains("Usage: udhcpc"));
    if !has {
        common::skip::skip("busybox with udhcpc is not installed");
    }
    has
}

/// Lets udhcpc get an address for the machine `mac`; `more` are further arguments.
fn udhcpc(network: &Network, mac: &'static str, more: &[&str]) -> Got {
    const SCRIPT: &str = "#!/bin/sh\n[ \"$1\" = bound ] && \
        echo \"$ip $subnet $router $dns $domain [$search] $mtu $lease\" > \"${0%/*}/got\"\nexit 0\n";
    let dir = tempfile::tempdir().unwrap();
    let (script, got) = (dir.path().join("script"), dir.path().join("got"));
    fs::write(&script, SCRIPT).unwrap();
    assert!(Command::new("chmod").arg("755").arg(&script).status().unwrap().success());
    let more: Vec<String> = more.iter().map(ToString::to_string).collect();
    let out = network.guest(move || {
        ip(&format!("link set tap0 address {mac}"));
        let mut command = Command::new("busybox");
        command.args([
            "udhcpc", "-i", "tap0", "-f", "-q", "-n", "-t", "5", "-T", "2", "-O", "search", "-O", "mtu",
        ]);
        command.arg("-s").arg(script).args(more).output().unwrap()
    });
    let text = fs::read_to_string(got).unwrap_or_default();
    let (ip, rest) = text.trim().split_once(' ').unwrap_or_else(|| panic!("{out:?}"));
    Got { ip: ip.parse().unwrap(), rest: rest.to_owned() }
}

/// Waits for something that another thread is about to do.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: not within 20 seconds");
    }
}

in_namespace! {
    fn an_answer_too_long_for_a_datagram_is_truncated_and_comes_whole_over_tcp() {
        if !common::has_tun() {
            return;
        }
        let dns = vec![stub::start(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0), Ipv4Addr::new(198, 51, 100, 1))];
        let network = Network::new(NatConfig { dns, ..NatConfig::default() }, ALL);
        let (answer, len) = ask(&network, "100.example.", None);
        assert!(answer.metadata.truncation && len <= 512 && addresses(&answer).len() < 100);
        let answers = ask_over_tcp(&network, &["100.example.", "1.example.", "2000.example."]);
        for (answer, count) in answers.iter().zip([100, 1, 2000]) {
            assert_eq!((answer.metadata.truncation, addresses(answer).len()), (false, count));
        }
    }

    fn questions_over_tcp_share_a_connection_to_the_server_and_are_answered_in_any_order() {
        if !common::has_tun() {
            return;
        }
        // It answers nothing before it has heard sixteen questions, and the last one first.
        let (server, connections) = stub::listen(|stream| {
            let questions: Vec<_> = (0..16).map_while(|_| stub::read(stream)).collect();
            for question in questions.iter().rev() {
                stub::write(stream, &stub::answer(question, Ipv4Addr::LOCALHOST, true));
            }
            stub::read(stream);
        });
        let network = Network::new(NatConfig { dns: vec![server], ..NatConfig::default() }, ALL);
        let counts = network.guest(|| {
            let first = std::thread::spawn(|| counts_of(1..9));
            (counts_of(9..17), first.join().unwrap())
        });
        assert_eq!(counts, ((9..17).collect(), (1..9).collect()));
        assert_eq!(connections.try_iter().count(), 1);
    }

    fn a_server_that_closes_or_falls_silent_after_one_answer_is_asked_again() {
        if !common::has_tun() {
            return;
        }
        let closes: fn(&mut TcpStream) = |stream| stub::answer_one(stream);
        let falls_silent: fn(&mut TcpStream) = |stream| {
            stub::answer_one(stream);
            while stub::read(stream).is_some() {}
        };
        for manner in [closes, falls_silent] {
            let (server, connections) = stub::listen(manner);
            let network = Network::new(NatConfig { dns: vec![server], ..NatConfig::default() }, ALL);
            assert_eq!(network.guest(|| counts_of(1..6)), [1, 2, 3, 4, 5]);
            let answers = ask_over_tcp(&network, &["7.example.", "8.example."]);
            assert_eq!(answers.iter().map(|answer| addresses(answer).len()).collect::<Vec<_>>(), [7, 8]);
            assert!(connections.try_iter().count() >= 5);
        }
    }

    fn edns_passes_both_ways_and_a_long_answer_comes_in_one_datagram() {
        if !common::has_tun() {
            return;
        }
        let dns = vec![stub::start(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0), Ipv4Addr::new(198, 51, 100, 1))];
        let network = Network::new(NatConfig { dns, ..NatConfig::default() }, ALL);
        for (count, size) in [("70.example.", 1232), ("190.example.", 4096)] {
            let (answer, len) = ask(&network, count, Some(size));
            assert!(!answer.metadata.truncation && len > 1000, "{count} {len}");
            assert_eq!(format!("{}.example.", addresses(&answer).len()), count);
            assert_eq!(answer.edns.unwrap().max_payload(), stub::EDNS);
        }
        let (answer, len) = ask(&network, "190.example.", Some(1232));
        assert!(answer.metadata.truncation && len <= 1232, "{len}");
    }

    fn a_resolver_that_changes_is_followed_while_the_network_runs() {
        if !common::has_tun() {
            return;
        }
        const NAME: &str = "a_resolver_that_changes_is_followed_while_the_network_runs";
        with_resolv_conf(NAME, "nameserver 127.0.0.53\n", |file| {
            let (first, second) = (Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(198, 51, 100, 2));
            stub::start("127.0.0.53:53".parse().unwrap(), first);
            stub::start("127.0.0.2:53".parse().unwrap(), second);
            let network = Network::new(NatConfig::default(), ALL);
            let now = || addresses(&ask(&network, "1.example.", None).0);
            assert_eq!(now(), [first], "a stub on 127.0.0.53 is a resolver like any other");
            fs::write(file, "nameserver 127.0.0.2\n").unwrap();
            until("the new resolver answers", || now() == [second]);
            assert_eq!(addresses(&ask_over_tcp(&network, &["1.example."])[0]), [second]);
        });
    }

    fn a_dhcp_client_gets_address_router_resolver_and_the_hosts_search_domains() {
        if !common::has_tun() || !has_udhcpc() {
            return;
        }
        const NAME: &str = "a_dhcp_client_gets_address_router_resolver_and_the_hosts_search_domains";
        let text = "nameserver 127.0.0.53\nsearch corp.example lab.example\n";
        with_resolv_conf(NAME, text, |_| {
            let network = Network::new(NatConfig { mtu: 1400, ..NatConfig::default() }, ALL);
            let got = udhcpc(&network, MAC, &[]);
            let rest = "255.255.255.0 192.168.122.1 192.168.122.1 internal [internal corp.example lab.example] 1400 3600";
            assert_eq!(got.rest, rest);
            let leases = network.nat(|nat| nat.leases());
            let leases: Vec<_> = leases.iter().map(|lease| (lease.address, lease.mac.to_string())).collect();
            assert_eq!(leases, [(got.ip, MAC.to_owned())]);
        });
    }

    fn two_machines_never_share_a_lease_and_each_keeps_its_own() {
        if !common::has_tun() || !has_udhcpc() {
            return;
        }
        let network = Network::new(NatConfig::default(), ALL);
        let first = udhcpc(&network, MAC, &[]).ip;
        let wanted = first.to_string();
        let second = udhcpc(&network, OTHER_MAC, &["-r", &wanted]).ip;
        assert_ne!(first, second, "though it asked for it");
        assert_eq!(udhcpc(&network, MAC, &[]).ip, first);
        assert_eq!(udhcpc(&network, OTHER_MAC, &[]).ip, second);
        // The first machine is gone for a while; then the whole network is.
        let mac = MAC.parse().unwrap();
        network.nat(move |nat| nat.unplug(mac));
        assert_eq!(udhcpc(&network, MAC, &[]).ip, first);
        drop(network);
        let network = Network::new(NatConfig::default(), ALL);
        assert_eq!(udhcpc(&network, MAC, &[]).ip, first);
    }

    fn groups_are_refused_by_name_and_dhcp_by_broadcast_works_all_the_same() {
        if !common::has_tun() {
            return;
        }
        let network = Network::new(NatConfig::default(), ALL);
        let refused = || network.nat(|nat| nat.counters().dropped(DropReason::Multicast));
        let before = refused();
        network.guest(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_broadcast(true).unwrap();
            for group in ["224.0.0.251:5353", "192.168.122.255:9", "255.255.255.255:9"] {
                socket.send_to(b"anybody?", group).unwrap();
            }
        });
        until("three refused", || refused() == before + 3);
        if has_udhcpc() {
            udhcpc(&network, MAC, &[]);
        }
    }

    fn a_metadata_service_of_the_host_is_closed_to_guests() {
        if !common::has_tun() {
            return;
        }
        ip("address add 169.254.169.254/32 dev lo");
        let listener = TcpListener::bind("169.254.169.254:80").unwrap();
        let socket = UdpSocket::bind("169.254.169.254:80").unwrap();
        TcpStream::connect("169.254.169.254:80").expect("the host itself reaches it");
        listener.accept().unwrap();
        let network = Network::new(NatConfig::default(), ALL);
        let error = network.guest(|| TcpStream::connect("169.254.169.254:80").unwrap_err().kind());
        assert_eq!(error, ErrorKind::ConnectionRefused);
        let error = network.guest(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("169.254.169.254:80").unwrap();
            socket.send(b"x").unwrap();
            socket.recv(&mut [0]).unwrap_err().kind()
        });
        assert_eq!(error, ErrorKind::HostUnreachable, "Linux's word for administratively prohibited");
        listener.set_nonblocking(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(socket.recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}
