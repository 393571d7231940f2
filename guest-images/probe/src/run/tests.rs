//! Orders against a peer: a smoltcp stack of its own at the other end of a wire, in virtual time, with a
//! script that may answer in its place. A 5-second timeout passes in microseconds.

use super::*;
use crate::nic::Facts;
use crate::observe::Observer;
use crate::orders;
use crate::run::dhcp_raw::{Route, datagram};
use crate::virtio::Refused;
use crate::virtio::abuse::{Abuse, Damage};
use crate::virtio::offload::HEADER;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp as tcp_socket, udp as udp_socket};
use smoltcp::wire::{DhcpPacket, EthernetAddress, HardwareAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;

const OUR_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const PEER_MAC: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const PEER: Ipv4Address = Ipv4Address::new(192, 168, 122, 1);
const OURS: Ipv4Address = Ipv4Address::new(192, 168, 122, 50);
/// How long a frame travels, in microseconds.
const DELAY: u64 = 10;

/// One end of the wire.
#[derive(Default)]
struct End {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

struct Rx(Vec<u8>);
impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);
impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for End {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.incoming.pop_front()?), Tx(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = 1514;
        caps
    }
}

/// Answers a frame in the peer's place; `None` leaves it to the peer.
type Script = Box<dyn FnMut(&[u8]) -> Option<Vec<Vec<u8>>>>;

/// The card under the orders, and everything behind the wire.
struct Wire {
    clock: u64,
    ours: End,
    observer: Observer,
    theirs: End,
    peer: Interface,
    sockets: SocketSet<'static>,
    script: Script,
    /// What the TCP echo server does to each byte: 0 leaves it as it is.
    echo_xor: u8,
}

impl Wire {
    fn new(script: Script) -> Self {
        let mut theirs = End::default();
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(PEER_MAC)));
        let mut peer = Interface::new(config, &mut theirs, Instant::from_micros(0));
        peer.update_ip_addrs(|list| list.push(IpCidr::new(PEER.into(), 24)).unwrap());
        let mut sockets = SocketSet::new(Vec::new());
        let mut echo = tcp::socket(65535);
        echo.listen(7).unwrap();
        sockets.add(echo);
        let buffer =
            || udp_socket::PacketBuffer::new(vec![udp_socket::PacketMetadata::EMPTY; 4], vec![0; 9000]);
        let mut datagrams = udp_socket::Socket::new(buffer(), buffer());
        datagrams.bind(7).unwrap();
        sockets.add(datagrams);
        Self {
            clock: 0,
            ours: End::default(),
            observer: Observer::default(),
            theirs,
            peer,
            sockets,
            script,
            echo_xor: 0,
        }
    }

    /// The peer's programs: echo servers.
    fn serve(&mut self) {
        for (_, socket) in self.sockets.iter_mut() {
            match socket {
                smoltcp::socket::Socket::Tcp(socket) => {
                    let mut bytes = Vec::new();
                    let xor = self.echo_xor;
                    let more = tcp::drain(socket, |part| bytes.extend(part.iter().map(|byte| byte ^ xor)));
                    let _ = socket.send_slice(&bytes);
                    if !more && socket.state() == tcp_socket::State::CloseWait {
                        socket.close();
                    }
                }
                smoltcp::socket::Socket::Udp(socket) => {
                    if let Ok((data, meta)) = socket.recv().map(|(data, meta)| (data.to_vec(), meta)) {
                        socket.send_slice(&data, meta.endpoint).unwrap();
                    }
                }
                _ => {}
            }
        }
    }

    /// Carries frames to the peer and back; whether any came back.
    fn carry(&mut self) -> bool {
        while let Some(frame) = self.ours.outgoing.pop_front() {
            match (self.script)(&frame) {
                Some(answers) => self.ours.incoming.extend(answers),
                None => self.theirs.incoming.push_back(frame),
            }
        }
        for _ in 0..3 {
            self.peer.poll(
                Instant::from_micros(self.clock.cast_signed()),
                &mut self.theirs,
                &mut self.sockets,
            );
            self.serve();
        }
        self.ours.incoming.extend(self.theirs.outgoing.drain(..));
        for frame in &self.ours.incoming {
            self.observer.frame(self.clock, frame);
        }
        !self.ours.incoming.is_empty()
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Rx, Tx<'_>)> {
        self.ours.receive(now)
    }

    fn transmit(&mut self, now: Instant) -> Option<Tx<'_>> {
        self.ours.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.ours.capabilities()
    }
}

impl Nic for Wire {
    fn now(&self) -> Instant {
        Instant::from_micros(self.clock.cast_signed())
    }

    fn flush(&mut self) {}

    fn wait(&mut self, until: Instant) {
        self.clock += DELAY;
        if !self.carry() {
            self.clock = self.clock.max(until.total_micros().cast_unsigned());
        }
    }

    fn facts(&self) -> Facts {
        Facts { mac: OUR_MAC, mtu: 1500, ..Facts::default() }
    }

    fn observer(&mut self) -> &mut Observer {
        &mut self.observer
    }

    fn send_raw(&mut self, _: [u8; HEADER], frame: &[u8]) -> bool {
        self.ours.outgoing.push_back(frame.to_vec());
        true
    }

    fn cpu(&self) -> Option<&dyn crate::cpu::Cpu> {
        None
    }

    fn abuse(&mut self, _: Abuse) -> Option<Result<Damage, Refused>> {
        None
    }
}

/// Runs orders behind a static address; returns the last line and whether all were ok.
fn play(text: &str, script: Script) -> (String, bool) {
    let mut stack = Stack::new(Wire::new(script), 7);
    let all = format!("static=192.168.122.50/24,gw=192.168.122.1;{text}");
    let results: Vec<_> = orders::parse(&all).unwrap().iter().map(|order| run(&mut stack, order)).collect();
    (results.last().unwrap().0.line(), results.iter().all(|(_, ok)| *ok))
}

fn alone(text: &str) -> (String, bool) {
    play(text, Box::new(|_| None))
}

/// An ICMP error from the gateway about a frame of ours.
fn icmp_error(kind: u8, code: u8, frame: &[u8]) -> Vec<u8> {
    let route = Route {
        mac: EthernetAddress(PEER_MAC),
        to_mac: EthernetAddress(OUR_MAC),
        from: (PEER, 0),
        to: (OURS, 0),
    };
    let cause = &frame[14..(14 + 28).min(frame.len())];
    let mut answer = datagram(route, cause);
    answer[23] = 1;
    answer[34..42].copy_from_slice(&[kind, code, 0, 0, 0, 0, 0, 0]);
    answer
}

/// Whether a frame is IPv4 of this protocol.
fn is(frame: &[u8], protocol: u8) -> bool {
    frame[12..14] == [8, 0] && frame[23] == protocol
}

#[test]
fn ping_reports_the_reply_and_its_ttl() {
    let (line, ok) = alone("ping=gw,count=3,size=1000");
    assert!(ok, "{line}");
    assert!(line.contains(r#""sent":3,"received":3,"ttl":64,"#), "{line}");
}

#[test]
fn a_ping_too_big_for_one_frame_comes_back_whole() {
    assert!(alone("ping=gw,size=4000").1);
}

#[test]
fn a_host_that_does_not_answer_is_a_timeout() {
    let (line, ok) = alone("ping=192.168.122.9,timeout=500");
    assert!(!ok);
    assert!(line.ends_with(r#""ok":false,"reason":"timeout"}"#), "{line}");
}

#[test]
fn what_was_expected_to_fail_is_ok_when_it_fails_like_that() {
    assert!(alone("ping=192.168.122.9,timeout=500,expect=timeout").1);
    assert!(alone("ping=192.168.122.9,timeout=500,expect=fail").1);
    assert!(!alone("ping=192.168.122.9,timeout=500,expect=refused").1);
    assert!(!alone("ping=gw,expect=fail").1);
}

#[test]
fn a_field_that_reads_otherwise_fails_the_order() {
    assert!(alone("ping=gw,want.received=1,want.address=192.168.122.1").1);
    let (line, ok) = alone("ping=gw,want.received=2");
    assert!(!ok);
    assert!(line.ends_with(r#""reason":"unwanted","field":"received"}"#), "{line}");
}

#[test]
fn a_closed_port_refuses_by_rst_and_by_icmp() {
    assert!(alone("tcp-connect=gw:81,expect=refused").1);
    assert!(alone("udp-echo=gw:81,expect=refused,want.icmp_code=3").1);
}

#[test]
fn a_connection_that_an_icmp_error_answers_is_unreachable_at_once() {
    let script: Script = Box::new(|frame| is(frame, 6).then(|| vec![icmp_error(3, 13, frame)]));
    let (line, ok) = play("tcp-connect=198.51.100.7:80,expect=unreachable,want.icmp_code=13", script);
    assert!(ok, "{line}");
}

#[test]
fn a_silent_server_is_a_timeout() {
    let script: Script = Box::new(|frame| is(frame, 6).then(Vec::new));
    assert!(play("tcp-connect=gw:80,expect=timeout", script).1);
}

#[test]
fn an_expired_ttl_is_time_exceeded_and_a_hop() {
    let expire = || -> Script {
        Box::new(|frame| (frame[12..14] == [8, 0] && frame[22] == 1).then(|| vec![icmp_error(11, 0, frame)]))
    };
    assert!(play("ping=198.51.100.7,ttl=1,expect=time-exceeded,want.icmp_from=192.168.122.1", expire()).1);
    let (line, ok) = play("traceroute=gw,want.count=2", expire());
    assert!(ok, "{line}");
    let (line, ok) = play("traceroute=gw,method=udp,want.count=2", expire());
    assert!(ok, "{line}");
}

#[test]
fn echoes_survive_half_close_and_come_back_the_same() {
    let (line, ok) = alone("tcp-echo=gw:7,bytes=300000,want.bytes=300000");
    assert!(ok, "{line}");
    assert!(alone("tcp-echo=gw:7,bytes=10,end=rst").1);
    assert!(alone("tcp-rr=gw:7,count=20,want.count=20").1);
    assert!(alone("udp-echo=gw:7,bytes=5000,count=3,want.received=3").1);
}

#[test]
fn a_byte_changed_on_the_way_back_is_a_mismatch() {
    // The peer's checksum is wrong then, so the script echoes by itself: addresses and ports swapped.
    let script: Script = Box::new(|frame| {
        is(frame, 17).then(|| {
            let route = Route {
                mac: EthernetAddress(PEER_MAC),
                to_mac: EthernetAddress(OUR_MAC),
                from: (PEER, 7),
                to: (OURS, u16::from_be_bytes([frame[34], frame[35]])),
            };
            let mut payload = frame[42..].to_vec();
            payload[3] ^= 1;
            vec![datagram(route, &payload)]
        })
    });
    assert!(play("udp-echo=gw:7,expect=mismatch", script).1);
}

#[test]
fn a_stream_that_comes_back_changed_is_a_mismatch() {
    let mut wire = Wire::new(Box::new(|_| None));
    wire.echo_xor = 4;
    let mut stack = Stack::new(wire, 7);
    for text in ["static=192.168.122.50/24", "tcp-echo=192.168.122.1:7,expect=mismatch"] {
        let (report, ok) = run(&mut stack, &orders::parse(text).unwrap()[0]);
        assert!(ok, "{}", report.line());
    }
}

#[test]
fn an_order_without_an_address_fails_as_such() {
    let mut stack = Stack::new(Wire::new(Box::new(|_| None)), 7);
    for text in [
        "ping=198.51.100.7,expect=no-address",
        "ping=gw,expect=no-address",
        "resolve=a.test,expect=no-server",
    ] {
        let (report, ok) = run(&mut stack, &orders::parse(text).unwrap()[0]);
        assert!(ok, "{}", report.line());
    }
}

#[test]
fn arp_finds_the_neighbour() {
    let (line, ok) = alone("arp=gw,want.mac=52:54:00:09:09:09");
    assert!(ok, "{line}");
}

/// A server that gives out one address: DISCOVER to OFFER, REQUEST to ACK, or to NAK for another address.
fn dhcp_server() -> Script {
    Box::new(|frame| {
        if !is(frame, 17) || frame[36..38] != [0, 67] {
            return None;
        }
        let request = &frame[42..];
        let packet = DhcpPacket::new_checked(request).unwrap();
        let option =
            |kind| packet.options().find(|option| option.kind == kind).map(|option| option.data.to_vec());
        let wrong = option(50).is_some_and(|asked| asked != OURS.octets());
        let kind = match (option(53).unwrap()[0], wrong) {
            (1, _) => 2,
            (_, true) => 6,
            _ => 5,
        };
        let mut reply = request[..240].to_vec();
        reply[0] = 2;
        if kind != 6 {
            reply[16..20].copy_from_slice(&OURS.octets());
        }
        reply.extend_from_slice(&[
            53, 1, kind, 54, 4, 192, 168, 122, 1, 51, 4, 0, 0, 0x0e, 0x10, 26, 2, 5, 0xdc,
        ]);
        reply.extend_from_slice(&[1, 4, 255, 255, 255, 0, 3, 4, 192, 168, 122, 1, 6, 4, 192, 168, 122, 1]);
        reply.extend_from_slice(&[15, 4, b't', b'e', b's', b't', 119, 6, 4, b't', b'e', b's', b't', 0, 255]);
        let route = Route {
            mac: EthernetAddress(PEER_MAC),
            to_mac: EthernetAddress(OUR_MAC),
            from: (PEER, 67),
            to: (Ipv4Address::BROADCAST, 68),
        };
        Some(vec![datagram(route, &reply)])
    })
}

#[test]
fn a_lease_is_reported_with_its_options_and_used() {
    let mut stack = Stack::new(Wire::new(dhcp_server()), 7);
    let orders = orders::parse("dhcp,want.search=test,want.mtu=1500;ping=gw;dhcp").unwrap();
    let lines: Vec<_> = orders.iter().map(|order| run(&mut stack, order)).collect();
    assert!(lines.iter().all(|(_, ok)| *ok), "{}", lines[0].0.line());
    let want = r#""address":"192.168.122.50","prefix":24,"gateway":"192.168.122.1","dns":["192.168.122.1"]"#;
    assert!(lines[0].0.line().contains(want));
}

#[test]
fn a_raw_request_for_another_address_is_answered_by_nak() {
    assert!(play("dhcp-raw=discover,want.reply=offer,want.yours=192.168.122.50", dhcp_server()).1);
    assert!(play("dhcp-raw=request,address=10.0.0.9,expect=nak", dhcp_server()).1);
}

#[test]
fn no_dhcp_server_is_a_timeout() {
    let mut stack = Stack::new(Wire::new(Box::new(|_| None)), 7);
    let (report, _) = run(&mut stack, &orders::parse("dhcp,timeout=2000").unwrap()[0]);
    assert!(report.line().ends_with(r#""ok":false,"reason":"timeout"}"#));
}

#[test]
fn malformed_frames_and_dhcp_garbage_are_sent_in_full_and_reproducibly() {
    let (line, ok) = alone("bad=frames,count=300,seed=4,want.sent=300");
    assert!(ok, "{line}");
    assert!(alone("bad=dhcp-garbage,count=300,want.sent=300").1);
    assert!(alone("bad=rings,expect=unsupported").1);
    assert!(alone("end=0,expect=unsupported").1);
}
