//! Questions and answers; `hickory-proto` plays guests and servers, so bytes are checked by a second implementation.

use std::collections::BTreeMap;
use std::str::FromStr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use proptest::prelude::*;

use super::stream::{MAX_PENDING, Stream};
use super::transaction::MAX_ATTEMPTS;
use super::wire::PLAIN_SIZE;
use super::*;
use crate::MacAddr;
use crate::nat::config::NatConfig;
use crate::nat::host::SockId;

/// A question for `name`.
fn question(name: &str, kind: RecordType, edns: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(hickory_proto::op::Query::query(Name::from_str(name).unwrap(), kind));
    if let Some(size) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        edns.set_dnssec_ok(true);
        message.set_edns(edns);
    }
    message
}

fn bytes(message: &Message) -> Vec<u8> {
    message.to_vec().unwrap()
}

fn parse(message: &Message) -> Query {
    Query::parse(&bytes(message)).unwrap()
}

/// What a server answers: `count` addresses.
fn answered(question: &Message, id: u16, count: usize) -> Message {
    let mut answer = question.clone();
    answer.metadata.id = id;
    answer.metadata.message_type = MessageType::Response;
    let name = question.queries[0].name().clone();
    for n in 0..count {
        let addr = rdata::A(Ipv4Addr::from_bits(n as u32));
        answer.add_answer(Record::from_rdata(name.clone(), 60, RData::A(addr)));
    }
    answer
}

#[test]
fn a_question_is_read_whatever_its_case_and_size() {
    let query = parse(&question("WWW.Example.COM.", RecordType::AAAA, Some(4096)));
    assert_eq!((query.id, query.name.as_str(), query.kind, query.class), (0x1234, "www.example.com", 28, 1));
    assert_eq!(query.max_size(), 4096);
    assert_eq!(parse(&question("a.", RecordType::A, None)).max_size(), PLAIN_SIZE);
    assert_eq!(parse(&question("a.", RecordType::A, Some(100))).max_size(), PLAIN_SIZE);
    assert_eq!(parse(&question(".", RecordType::NS, None)).name, "");
}

#[test]
fn what_is_no_question_gets_an_error_or_silence() {
    let good = bytes(&question("a.example.", RecordType::A, None));
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Query::parse(&bytes)
    };
    let rcode = |outcome: Result<Query, BadQuery>| match outcome {
        Err(BadQuery::Answer(answer)) => Message::from_vec(&answer).unwrap().metadata.response_code,
        other => panic!("{other:?}"),
    };
    assert_eq!(Query::parse(&good[..11]), Err(BadQuery::Silence));
    assert_eq!(with(2, 0x80), Err(BadQuery::Silence), "an answer");
    assert_eq!(rcode(with(2, 0x10)), ResponseCode::NotImp, "STATUS");
    assert_eq!(rcode(with(5, 2)), ResponseCode::FormErr, "two questions");
    assert_eq!(rcode(with(12, 0xc0)), ResponseCode::FormErr, "compressed");
    assert_eq!(rcode(Query::parse(&good[..good.len() - 1])), ResponseCode::FormErr);
    assert_eq!(rcode(with(11, 1)), ResponseCode::FormErr, "a record is missing");
}

struct Guests(BTreeMap<&'static str, Ipv4Addr>);

impl Names for Guests {
    fn address(&self, label: &str) -> Option<Ipv4Addr> {
        self.0.get(label).copied()
    }
    fn label(&self, address: Ipv4Addr) -> Option<String> {
        self.0.iter().find(|(_, a)| **a == address).map(|(label, _)| (*label).to_owned())
    }
}

fn own(name: &str, kind: RecordType) -> Option<Message> {
    let guests = Guests(BTreeMap::from([("vm1", Ipv4Addr::new(192, 168, 122, 7))]));
    let config = NatConfig::default();
    let query = parse(&question(name, kind, Some(1232)));
    let answer = names::answer(&query, config.subnet, &config.domain, &guests)?;
    let answer = Message::from_vec(&answer).expect("hickory reads our answers");
    assert_eq!((answer.metadata.id, answer.metadata.message_type), (0x1234, MessageType::Response));
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert_eq!(answer.queries[0].name(), &Name::from_str(name).unwrap());
    assert!(answer.edns.is_some());
    Some(answer)
}

#[test]
fn guests_and_the_gateway_have_names_both_ways() {
    let address = |name: &str| {
        let answer = own(name, RecordType::A).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        match &answer.answers[0].data {
            RData::A(addr) => addr.0.to_string(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(address("vm1."), "192.168.122.7");
    assert_eq!(address("VM1.internal."), "192.168.122.7");
    for gateway in ["gateway.", "gateway.internal.", "host.pontoon.internal."] {
        assert_eq!(address(gateway), "192.168.122.1");
    }
    assert_eq!(address("localhost."), "127.0.0.1");
    for (n, name) in [(7, "vm1.internal."), (1, "gateway.internal.")] {
        let answer = own(&format!("{n}.122.168.192.in-addr.arpa."), RecordType::PTR).unwrap();
        assert_eq!(answer.answers[0].data, RData::PTR(rdata::PTR(Name::from_str(name).unwrap())));
    }
}

#[test]
fn our_names_have_no_other_data_and_strangers_of_one_label_do_not_exist() {
    for kind in [RecordType::AAAA, RecordType::MX, RecordType::TXT] {
        let answer = own("vm1.internal.", kind).unwrap();
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
    }
    for (name, kind) in [
        ("vm2.", RecordType::A),
        ("vm2.", RecordType::AAAA),
        ("8.122.168.192.in-addr.arpa.", RecordType::PTR),
    ] {
        assert_eq!(own(name, kind).unwrap().metadata.response_code, ResponseCode::NXDomain, "{name}");
    }
    for (name, kind) in [
        ("vm2.internal.", RecordType::A),
        ("metadata.google.internal.", RecordType::A),
        ("example.com.", RecordType::A),
        ("com.", RecordType::NS),
        (".", RecordType::NS),
        ("7.123.168.192.in-addr.arpa.", RecordType::PTR),
        ("122.168.192.in-addr.arpa.", RecordType::SOA),
        ("07.122.168.192.in-addr.arpa.", RecordType::PTR),
    ] {
        assert!(own(name, kind).is_none(), "{name} is for the world");
    }
    let mut chaos = question("vm1.", RecordType::TXT, None);
    chaos.queries[0].query_class = DNSClass::CH;
    let guests = Guests(BTreeMap::new());
    assert!(names::answer(&parse(&chaos), NatConfig::default().subnet, "internal", &guests).is_none());
}

const GUEST: Client = Client::Udp(SocketAddrV4::new(Ipv4Addr::new(192, 168, 122, 7), 4000), MacAddr([2; 6]));

fn servers(n: u8) -> Vec<SocketAddrV4> {
    (1..=n).map(|n| SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, n), 53)).collect()
}

fn transaction(question: &Message, n: u8, first: Option<u8>) -> Transaction {
    let first = first.map(|n| SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, n), 53));
    Transaction::new(GUEST, parse(question), &bytes(question), 0xabcd, &servers(n), first)
}

#[test]
fn servers_are_asked_in_turn_the_last_good_one_first() {
    let asked = |n, first| {
        let mut ask = transaction(&question("a.example.", RecordType::A, None), n, first);
        let mut asked = Vec::new();
        while let Some(server) = ask.server() {
            asked.push(server.ip().octets()[3]);
            ask.next();
        }
        let answer = Message::from_vec(&ask.give_up()).unwrap();
        assert_eq!((answer.metadata.id, answer.metadata.response_code), (0x1234, ResponseCode::ServFail));
        asked
    };
    assert_eq!(asked(1, None), [1, 1]);
    assert_eq!(asked(3, Some(2)), [2, 3, 1, 2, 3, 1]);
    assert_eq!(asked(8, None).len(), MAX_ATTEMPTS);
    assert_eq!(asked(2, Some(9)), [1, 2, 1, 2]);
}

#[test]
fn only_the_answer_to_the_question_counts() {
    let asked = question("a.example.", RecordType::A, None);
    let mut ask = transaction(&asked, 1, None);
    assert_eq!(ask.message[..2], [0xab, 0xcd]);
    assert_eq!(ask.message[2..], bytes(&asked)[2..]);
    let foreign = [
        bytes(&answered(&asked, 0xabce, 1)),
        bytes(&answered(&question("b.example.", RecordType::A, None), 0xabcd, 1)),
        bytes(&answered(&question("a.example.", RecordType::AAAA, None), 0xabcd, 0)),
        ask.message.clone(),
        vec![0xab, 0xcd],
    ];
    for answer in foreign {
        assert_eq!(ask.judge(&answer), Verdict::Foreign);
    }
    let Verdict::Final(answer) = ask.judge(&bytes(&answered(&asked, 0xabcd, 1))) else { panic!("it counts") };
    assert_eq!(answer, bytes(&answered(&asked, 0x1234, 1)), "nothing but the identifier is changed");
}

#[test]
fn a_failure_is_passed_on_when_nobody_knows_better() {
    let asked = question("a.example.", RecordType::A, None);
    let mut ask = transaction(&asked, 2, None);
    let mut refused = answered(&asked, 0xabcd, 0);
    refused.metadata.response_code = ResponseCode::Refused;
    assert_eq!(ask.judge(&bytes(&refused)), Verdict::Failure);
    let answer = Message::from_vec(&ask.give_up()).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (0x1234, ResponseCode::Refused));
    // Some leave the question out.
    assert_eq!(ask.judge(&[0xab, 0xcd, 0x80, 2, 0, 0, 0, 0, 0, 0, 0, 0]), Verdict::Failure);
    assert_eq!(ask.judge(&[0xab, 0xcd, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Verdict::Foreign);
}

#[test]
fn an_answer_too_large_for_the_guest_is_truncated_and_one_over_tcp_is_not() {
    for (edns, fits) in [(None, false), (Some(1232), true)] {
        let asked = question("a.example.", RecordType::A, edns);
        let mut ask = transaction(&asked, 1, None);
        let whole = bytes(&answered(&asked, 0xabcd, 60));
        assert!(whole.len() > 512 && whole.len() < 1232);
        let Verdict::Final(answer) = ask.judge(&whole) else { panic!() };
        let message = Message::from_vec(&answer).unwrap();
        assert_eq!((message.metadata.truncation, message.answers.len()), (!fits, if fits { 60 } else { 0 }));
        assert_eq!((message.queries.len(), message.edns.is_some()), (1, edns.is_some()));
    }
    let asked = question("a.example.", RecordType::A, None);
    let token = Token { owner: Owner::Dns, slot: 0, generation: 0 };
    let mut ask =
        Transaction::new(Client::Stream(token), parse(&asked), &bytes(&asked), 0xabcd, &servers(1), None);
    let whole = answered(&asked, 0xabcd, 2000);
    let Verdict::Final(answer) = ask.judge(&bytes(&whole)) else { panic!() };
    assert_eq!(Message::from_vec(&answer).unwrap().answers.len(), 2000);
}

#[test]
fn a_stream_is_cut_into_questions_wherever_it_breaks() {
    let mut stream = Stream::new(SockId(3), Instant::now());
    let sent = [stream::frame(b"first"), stream::frame(b""), stream::frame(b"third")].concat();
    let mut got = Vec::new();
    for byte in sent {
        stream.push(&[byte]);
        got.extend(stream.question());
    }
    assert_eq!(got, [b"first".to_vec(), vec![], b"third".to_vec()]);
    stream.answer(b"answer");
    assert_eq!(stream.out(), b"\0\x06answer");
    stream.sent(3);
    assert_eq!(stream.out(), b"nswer");
    stream.ended = true;
    assert!(!stream.is_done());
    stream.sent(5);
    assert!(stream.is_done());
    stream.answer(&vec![0; 300_000]);
    assert_eq!(stream.out().len(), 65_537);
}

#[test]
fn a_stream_whose_guest_has_closed_is_done_when_all_its_questions_are_answered() {
    let mut stream = Stream::new(SockId(3), Instant::now());
    stream.push(&[stream::frame(b"first"), stream::frame(b"second"), vec![0, 9]].concat());
    (stream.ended, stream.pending) = (true, MAX_PENDING);
    assert!(!stream.wants_turn(), "too many are under way");
    stream.pending = 0;
    for _ in 0..2 {
        assert!(stream.wants_turn() && !stream.is_done());
        stream.question().unwrap();
    }
    assert!(stream.is_done() && !stream.wants_turn(), "what is left is no question");
}

#[test]
fn identifiers_do_not_repeat_a_pattern() {
    let mut dns = Dns::new(Vec::new());
    let ids: std::collections::BTreeSet<u16> = (0..1000).map(|_| dns.random_id()).collect();
    assert!(ids.len() > 900, "{}", ids.len());
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_answered(bytes in proptest::collection::vec(any::<u8>(), 0..300), plain in any::<bool>()) {
        let mut bytes = bytes;
        if plain && bytes.len() > 12 {
            // Close enough to a question to get past the header.
            bytes[2] &= 1;
            let records = bytes[11] & 1;
            bytes[4..12].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, records]);
        }
        match Query::parse(&bytes) {
            Ok(query) => {
                let answer = query.answer(Rcode::NxDomain, true, &[]);
                let read = Message::from_vec(&answer).unwrap();
                prop_assert_eq!(read.metadata.response_code, ResponseCode::NXDomain);
                prop_assert!(query.is_answered_by(&answer, query.id));
                let guests = Guests(BTreeMap::new());
                let _ = names::answer(&query, NatConfig::default().subnet, "internal", &guests);
                let mut ask = Transaction::new(GUEST, query, &bytes, 1, &servers(1), None);
                ask.judge(&bytes);
            }
            Err(BadQuery::Answer(answer)) => {
                prop_assert_eq!(Message::from_vec(&answer).unwrap().metadata.op_code, OpCode::from_u8(bytes[2] >> 3 & 0xf));
            }
            Err(BadQuery::Silence) => {}
        }
    }

    #[test]
    fn any_answer_of_a_server_is_judged(flags in any::<[u8; 2]>(), rest in proptest::collection::vec(any::<u8>(), 0..600)) {
        let asked = question("a.example.", RecordType::A, Some(512));
        let mut ask = transaction(&asked, 1, None);
        let answer = [&[0xab, 0xcd], &flags[..], &[0, 1, 0, 0, 0, 0, 0, 0], &bytes(&asked)[12..27], &rest].concat();
        if let Verdict::Final(fit) = ask.judge(&answer) {
            prop_assert!(fit.len() <= PLAIN_SIZE);
            prop_assert_eq!(&fit[..2], &[0x12, 0x34]);
        }
    }

    #[test]
    fn any_question_of_hickory_is_read_back(labels in proptest::collection::vec("[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", 1..6), kind in 1u16..300) {
        let name = labels.join(".");
        let message = question(&format!("{name}."), RecordType::from(kind), Some(1400));
        let query = parse(&message);
        prop_assert_eq!((query.name, query.kind), (name, kind));
    }
}
