//! What else a guest does on a day: it asks for the gateway, for leases and for names, and answers behind a published
//! UDP port. And the world's DNS servers, which are not always of help.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};

use dhcproto::v4::{DhcpOption, Message, MessageType};
use dhcproto::{Decodable, Encodable};

use super::{GUESTS, Rng, frame, frame_from, guest_addr, mac};
use crate::MacAddr;
use crate::nat::NatConfig;
use crate::nat::ipv4::protocol;

/// The guest that answers what comes to the published UDP port, and where.
pub(super) const ECHO: (usize, u16) = (1, 5300);
/// Machines that want leases.
const MACHINES: u8 = 6;
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);

/// What somebody does once.
#[derive(Clone, Copy, Debug)]
pub(super) enum Errand {
    Datagram,
    Ping,
    Arp,
    Question,
    /// Questions over one TCP connection.
    Stream,
    Lease,
    /// A client of the published UDP port sends something.
    Client,
}

/// The host's DNS servers.
pub(super) fn servers() -> Vec<SocketAddrV4> {
    [53, 54].map(|n| SocketAddrV4::new(Ipv4Addr::new(10, 250, 0, n), 53)).to_vec()
}

/// What a server sends back for a question, and from where: nothing, a failure, somebody's guess, the answer.
pub(super) fn server(rng: &mut Rng, at: SocketAddrV4, question: &[u8]) -> Vec<(SocketAddrV4, Vec<u8>)> {
    let mut answer = question.to_vec();
    answer[2] |= 0x80;
    match rng.below(10) {
        0 | 1 => Vec::new(),
        2 => {
            answer[3] |= 2;
            vec![(at, answer)]
        }
        3 => {
            let mut guess = answer.clone();
            guess[0] ^= 1;
            let elsewhere = SocketAddrV4::new(*at.ip(), 5353);
            vec![(at, guess), (elsewhere, answer.clone()), (at, answer)]
        }
        _ => vec![(at, answer)],
    }
}

/// A machine and what it has.
#[derive(Debug, Default)]
struct Machine {
    lease: Option<Ipv4Addr>,
    /// It waits for an answer.
    asks: bool,
}

/// What was asked, and what was answered.
#[derive(Debug, Default)]
pub(super) struct Services {
    arps: (u64, u64),
    /// By the guest, its port and the identifier: the address that it must be, if it is known, and the answers.
    questions: BTreeMap<(SocketAddrV4, u16), (Option<Ipv4Addr>, u32)>,
    machines: BTreeMap<MacAddr, Machine>,
    /// What clients sent to the published port.
    pub(super) sent: BTreeSet<u16>,
    count: u16,
}

/// A question for the address of a guest, or of somebody in the world.
fn question(id: u16, n: usize, ours: bool) -> Vec<u8> {
    let (name, domain) = if ours { (format!("g{n}"), "internal") } else { (format!("w{n}"), "example") };
    let mut question = [id, 0x100, 1, 0, 0, 0].map(u16::to_be_bytes).concat();
    for label in [name.as_str(), domain, ""] {
        question.push(label.len() as u8);
        question.extend(label.as_bytes());
    }
    question.extend([0, 1, 0, 1]);
    question
}

/// What is said on a connection: questions with the identifiers from 1 on.
#[derive(Debug, Default)]
pub(super) struct Script {
    pub(super) out: Vec<u8>,
    pub(super) received: Vec<u8>,
    questions: u16,
}

impl Script {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let questions = 1 + rng.below(30) as u16;
        let ask = |id| framed(&question(id, usize::from(id), rng.chance(30)));
        let out = (1..=questions).flat_map(ask).collect();
        Self { out, received: Vec::new(), questions }
    }

    /// Each question has one answer; none has any if the gateway could not serve the connection.
    pub(super) fn finish(&self, may_fail: bool) {
        let mut left = self.received.clone();
        let mut ids = Vec::new();
        while let Some(answer) = take(&mut left) {
            assert!(answer[2] & 0x80 != 0, "{answer:?}");
            ids.push(u16::from_be_bytes([answer[0], answer[1]]));
        }
        ids.sort_unstable();
        let all: Vec<u16> = (1..=self.questions).collect();
        assert!(left.is_empty() && (ids == all || may_fail && ids.is_empty()), "{ids:?} of {all:?}");
    }
}

/// A message with its length in front (RFC 1035 §4.2.2).
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

/// Takes a whole message out.
pub(super) fn take(bytes: &mut Vec<u8>) -> Option<Vec<u8>> {
    let end = 2 + usize::from(u16::from_be_bytes(*bytes.first_chunk()?));
    let message = bytes.get(2..end)?.to_vec();
    bytes.drain(..end);
    Some(message)
}

/// A UDP packet; [`frame`] completes it.
pub(super) fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let len = 8 + data.len() as u16;
    [&[from, to, len, 0].map(u16::to_be_bytes).concat(), data].concat()
}

fn arp(operation: u8, (mac, addr): (MacAddr, Ipv4Addr), about: Ipv4Addr) -> Vec<u8> {
    let [own, everybody] = [mac.octets(), [0xff; 6]];
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    let nobody = [0; 6];
    [&everybody[..], &own, &[8, 6], &head, &own, &addr.octets(), &nobody, &about.octets()].concat()
}

impl Services {
    /// The frame of an errand of this guest.
    pub(super) fn errand(&mut self, errand: Errand, guest: Ipv4Addr, rng: &mut Rng) -> Vec<u8> {
        match errand {
            Errand::Arp => {
                self.arps.0 += 1;
                arp(1, (mac(guest), guest), GATEWAY)
            }
            Errand::Question => self.question(guest, rng),
            Errand::Lease => self.lease(rng),
            Errand::Datagram | Errand::Ping | Errand::Client | Errand::Stream => Vec::new(),
        }
    }

    /// What a client of the published port sends, and from where.
    pub(super) fn client(&mut self, rng: &mut Rng) -> (SocketAddrV4, Vec<u8>) {
        self.count += 1;
        self.sent.insert(self.count);
        let from = Ipv4Addr::new(10, 201, 0, rng.below(5) as u8);
        let mut data = self.count.to_be_bytes().to_vec();
        data.resize(2 + rng.below(1000) as usize, 7);
        (SocketAddrV4::new(from, 4000), data)
    }

    fn question(&mut self, guest: Ipv4Addr, rng: &mut Rng) -> Vec<u8> {
        self.count += 1;
        let n = rng.below(GUESTS as u64) as usize;
        let ours = rng.chance(30);
        let from = SocketAddrV4::new(guest, 6000 + rng.below(4) as u16);
        self.questions.insert((from, self.count), (ours.then(|| guest_addr(n)), 0));
        let question = question(self.count, n, ours);
        frame((guest, GATEWAY), protocol::UDP, udp(from.port(), 53, &question), true)
    }

    /// A machine wants a lease, or to keep the one that it has, or to be rid of it.
    fn lease(&mut self, rng: &mut Rng) -> Vec<u8> {
        let address = MacAddr([0x52, 0x54, 0, 0, 1, rng.below(u64::from(MACHINES)) as u8]);
        let machine = self.machines.entry(address).or_default();
        machine.asks = true;
        match machine.lease {
            None => dhcp(address, MessageType::Discover, None, vec![]),
            Some(lease) if rng.chance(50) => dhcp(address, MessageType::Request, Some(lease), vec![]),
            Some(lease) => {
                *machine = Machine::default();
                let server = DhcpOption::ServerIdentifier(GATEWAY);
                dhcp(address, MessageType::Release, Some(lease), vec![server])
            }
        }
    }

    /// Takes a datagram that arrived at a guest; what is sent for it.
    pub(super) fn datagram(&mut self, from: SocketAddrV4, to: SocketAddrV4, data: &[u8]) -> Option<Vec<u8>> {
        let (guest, port) = ECHO;
        if to == SocketAddrV4::new(guest_addr(guest), port) {
            let echo = udp(port, from.port(), data);
            return Some(frame((*to.ip(), *from.ip()), protocol::UDP, echo, true));
        }
        match from.port() {
            53 => self.answer(to, data),
            67 => return self.offer(&Message::from_bytes(data).expect("dhcproto reads it")),
            _ => {}
        }
        None
    }

    fn answer(&mut self, to: SocketAddrV4, answer: &[u8]) {
        let id = u16::from_be_bytes([answer[0], answer[1]]);
        let (address, count) = self.questions.get_mut(&(to, id)).expect("somebody asked that");
        *count += 1;
        let rcode = answer[3] & 15;
        assert!(answer[2] & 0x80 != 0 && (rcode == 0 || rcode == 2), "{answer:?}");
        if let Some(address) = address {
            assert!(rcode == 0 && answer.ends_with(&address.octets()), "{address}: {answer:?}");
        }
    }

    fn offer(&mut self, message: &Message) -> Option<Vec<u8>> {
        let address = MacAddr(message.chaddr().try_into().expect("an Ethernet address"));
        let offered = message.yiaddr();
        if message.opts().msg_type() == Some(MessageType::Offer) {
            let asked = vec![DhcpOption::ServerIdentifier(GATEWAY), DhcpOption::RequestedIpAddress(offered)];
            return Some(dhcp(address, MessageType::Request, None, asked));
        }
        assert_eq!(message.opts().msg_type(), Some(MessageType::Ack));
        let taken = self.machines.iter().find(|(mac, m)| **mac != address && m.lease == Some(offered));
        assert!(taken.is_none(), "{offered} is {taken:?}'s");
        assert!((0..GUESTS).all(|n| guest_addr(n) != offered), "{offered} is reserved");
        let machine = self.machines.get_mut(&address).expect("it asked");
        *machine = Machine { lease: Some(offered), asks: false };
        None
    }

    /// Takes an ARP packet; what is sent for it.
    pub(super) fn arp(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let addr = |at: usize| Ipv4Addr::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3]);
        let asked = addr(38);
        if frame[21] == 1 {
            let here = (0..GUESTS).any(|n| guest_addr(n) == asked);
            return here.then(|| arp(2, (mac(asked), asked), GATEWAY));
        }
        assert_eq!(addr(28), GATEWAY);
        assert_eq!(frame[22..28], NatConfig::default().gateway_mac.octets());
        self.arps.1 += 1;
        None
    }

    /// What holds in the end, when nothing was lost on the wire.
    pub(super) fn finish(&self) {
        assert_eq!(self.arps.0, self.arps.1, "ARP");
        let unanswered: Vec<_> = self.questions.iter().filter(|(_, (_, answers))| *answers != 1).collect();
        assert!(unanswered.is_empty(), "questions without one answer: {unanswered:?}");
        let waiting: Vec<_> = self.machines.iter().filter(|(_, machine)| machine.asks).collect();
        assert!(waiting.is_empty(), "machines without a lease: {waiting:?}");
    }
}

fn dhcp(address: MacAddr, kind: MessageType, lease: Option<Ipv4Addr>, options: Vec<DhcpOption>) -> Vec<u8> {
    let nobody = Ipv4Addr::UNSPECIFIED;
    let own = lease.unwrap_or(nobody);
    let mut message = Message::new_with_id(7, own, nobody, nobody, nobody, &address.octets());
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option);
    }
    let data = message.to_vec().expect("it is small");
    let to = if lease.is_some() { GATEWAY } else { Ipv4Addr::BROADCAST };
    frame_from(address, (own, to), protocol::UDP, udp(68, 67, &data), true)
}
