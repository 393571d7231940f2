//! The gateway's services as a guest finds them: a lease, and names.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that can't go on says where")]

mod common;
#[path = "nat_world/guest.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod guest;

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::str::FromStr;
use std::thread;

use dhcproto::v4::{self, DhcpOption, MessageType};
use dhcproto::{Decodable, Encodable};
use guest::{Guest, MAC, Udp};
use hickory_proto::op::{Message, MessageType as DnsType, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use net::nat::{Nat, NatConfig};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);

fn dhcp(guest: &mut Guest, kind: MessageType, options: Vec<DhcpOption>) -> v4::Message {
    let zero = Ipv4Addr::UNSPECIFIED;
    let mut message = v4::Message::new_with_id(7, zero, zero, zero, zero, &MAC);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option);
    }
    guest.send(&Udp::new(68, Ipv4Addr::BROADCAST, 67, &message.to_vec().unwrap()));
    let answer = guest.udp();
    assert_eq!((answer.from, answer.to.port()), (SocketAddrV4::new(GATEWAY, 67), 68));
    v4::Message::from_bytes(&answer.payload).unwrap()
}

/// Gets a lease under the name `vm1`.
fn join(guest: &mut Guest) {
    guest.addr = Ipv4Addr::UNSPECIFIED;
    let offered = dhcp(guest, MessageType::Discover, vec![]).yiaddr();
    let mut options = vec![DhcpOption::ServerIdentifier(GATEWAY), DhcpOption::RequestedIpAddress(offered)];
    options.push(DhcpOption::Hostname("vm1".into()));
    let ack = dhcp(guest, MessageType::Request, options);
    assert_eq!((ack.opts().msg_type(), ack.yiaddr()), (Some(MessageType::Ack), offered));
    guest.addr = offered;
}

fn ask(guest: &mut Guest, name: &str, kind: RecordType) -> Message {
    let mut question = Message::query();
    question.add_query(Query::query(Name::from_str(name).unwrap(), kind));
    guest.send(&Udp::new(5000, GATEWAY, 53, &question.to_vec().unwrap()));
    let answer = guest.udp();
    assert_eq!((answer.from, answer.to.port()), (SocketAddrV4::new(GATEWAY, 53), 5000));
    let answer = Message::from_vec(&answer.payload).unwrap();
    assert_eq!(answer.metadata.id, question.metadata.id);
    answer
}

/// A server on the host's loopback that knows one address, and the port that it is on.
fn server() -> SocketAddrV4 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buf = [0; 1500];
        while let Ok((n, from)) = socket.recv_from(&mut buf) {
            let mut message = Message::from_vec(&buf[..n]).unwrap();
            message.metadata.message_type = DnsType::Response;
            let name = message.queries[0].name().clone();
            message.add_answer(Record::from_rdata(name, 60, RData::A(A::new(198, 51, 100, 7))));
            // First somebody else's guess, then the answer.
            let mut forged = message.to_vec().unwrap();
            forged[0] ^= 0xff;
            socket.send_to(&forged, from).unwrap();
            socket.send_to(&message.to_vec().unwrap(), from).unwrap();
        }
    });
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

in_namespace! {
    fn a_guest_that_got_a_lease_is_found_by_its_name() {
        let mut guest = Guest::new(Nat::new(NatConfig::default()).unwrap());
        join(&mut guest);
        let answer = ask(&mut guest, "vm1.internal.", RecordType::A);
        assert_eq!(answer.answers[0].data, RData::A(A(guest.addr)));
        let answer = ask(&mut guest, "vm2.", RecordType::A);
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }

    fn a_handle_tells_of_the_lease_while_the_network_is_in_use() {
        let mut nat = Nat::new(NatConfig::default()).unwrap();
        let handle = nat.handle().unwrap();
        let mut guest = Guest::new(nat);
        assert_eq!(handle.leases(), []);
        join(&mut guest);
        let leases = handle.leases();
        assert_eq!(leases.len(), 1);
        assert_eq!((leases[0].address, leases[0].mac.0), (guest.addr, MAC));
        assert_eq!(leases[0].name.as_deref(), Some("vm1"));
    }

    fn the_world_is_asked_through_the_hosts_loopback_and_a_dead_server_is_passed_over() {
        let dead = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1);
        let mut guest = Guest::new(Nat::new(NatConfig { dns: vec![dead, server()], ..NatConfig::default() }).unwrap());
        join(&mut guest);
        for _ in 0..3 {
            let answer = ask(&mut guest, "example.com.", RecordType::A);
            assert_eq!(answer.answers[0].data, RData::A(A::new(198, 51, 100, 7)));
        }
        let answer = ask(&mut guest, "example.com.", RecordType::AAAA);
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0), "no IPv6 here");
    }

    fn without_any_server_the_guest_is_told() {
        let dns = vec![SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1)];
        let mut guest = Guest::new(Nat::new(NatConfig { dns, ..NatConfig::default() }).unwrap());
        join(&mut guest);
        let answer = ask(&mut guest, "example.com.", RecordType::A);
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
}
