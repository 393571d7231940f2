//! Guests that break the rules, on purpose or not.

use super::*;
use crate::virtio::testing::{Buf, MEMORY_END};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn packets_of_no_connection_are_answered_by_rst() {
    let mut lab = Lab::new();
    let key = Key { host: 7, guest: 8 };
    for op in [Op::Response, Op::Shutdown, Op::Rw, Op::CreditUpdate, Op::CreditRequest] {
        lab.send(key, op);
        let (rst, _) = lab.packet(Op::Rst);
        assert_eq!((rst.src_port, rst.dst_port, rst.src_cid), (7, 8, HOST_CID));
    }
    // But not an RST: that would never end.
    lab.send(key, Op::Rst);
    assert_eq!((lab.ops(), lab.refused(Refusal::NoConnection)), (vec![], 5));
}

#[test]
fn packets_that_make_no_sense_are_refused_and_counted() {
    let mut lab = Lab::new();
    let key = Key { host: 7, guest: 8 };
    let good = lab.header(key, Op::Request);
    let cases = [
        (Header { src_cid: 4, ..good }, Refusal::WrongSource),
        (Header { dst_cid: 0, ..good }, Refusal::WrongDestination),
        (Header { dst_cid: GUEST_CID, ..good }, Refusal::WrongDestination),
        (Header { op: 0, ..good }, Refusal::BadOperation),
        (Header { op: 8, ..good }, Refusal::BadOperation),
        (Header { len: 1, ..good }, Refusal::BadLength),
        (Header { len: u32::MAX, ..good }, Refusal::BadLength),
    ];
    for (header, why) in cases {
        let before = lab.refused(why);
        lab.send_header(header, &[]);
        let (rst, _) = lab.packet(Op::Rst);
        assert_eq!((rst.src_cid, rst.src_port, rst.dst_port), (header.dst_cid, 7, 8));
        assert_eq!(lab.refused(why), before + 1);
    }
}

#[test]
fn an_unknown_type_is_answered_with_its_own_number() {
    let mut lab = Lab::starved(0);
    let header = Header { kind: 2, ..lab.header(Key { host: 7, guest: 8 }, Op::Request) };
    lab.send_header(header, &[]);
    lab.post_of(BUFFER);
    lab.guest.kick_and_run(RX);
    let rst = Header::parse(lab.guest.bytes(BUFFERS, HEADER_LEN).try_into().unwrap());
    assert_eq!((rst.kind, rst.op), (2, Op::Rst as u16));
    assert_eq!(lab.refused(Refusal::BadType), 1);
}

#[test]
fn a_packet_without_a_whole_header_is_returned_and_counted() {
    let mut lab = Lab::new();
    lab.guest.add(TX, &[out(OUTGOING, HEADER_LEN - 1)]);
    lab.guest.kick_and_run(TX);
    assert_eq!(lab.guest.used(TX).len(), 1);
    assert_eq!((lab.refused(Refusal::ShortPacket), lab.ops()), (1, vec![]));
    lab.guest.assert_healthy();
}

/// What the state does not allow ends the connection on both sides.
#[test]
fn packets_out_of_state_end_the_connection() {
    for op in [Op::Request, Op::Response] {
        let mut lab = Lab::new();
        let (mut client, key) = lab.connected(52);
        lab.send(key, op);
        assert_eq!(lab.ops(), [Op::Rst], "{op:?}");
        assert!(is_at_end(&mut client));
        assert_eq!((lab.refused(Refusal::OutOfState), lab.totals().open), (1, 0));
    }
    for op in [Op::Request, Op::Shutdown, Op::Rw, Op::CreditUpdate, Op::CreditRequest] {
        let mut lab = Lab::new();
        let (mut client, key) = lab.client(52);
        lab.send(key, op);
        assert_eq!(lab.ops(), [Op::Rst], "{op:?} before RESPONSE");
        assert!(is_at_end(&mut client));
    }
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send_shutdown(key, Shutdown::SEND);
    lab.send_data(key, b"more");
    assert_eq!(lab.ops(), [Op::Rst]);
    assert!(is_at_end(&mut client));
}

#[test]
fn an_answer_to_a_question_that_was_not_asked_yet_is_refused() {
    let mut lab = Lab::starved(0);
    let mut client = lab.stranger();
    client.write_all(b"CONNECT 52\n").unwrap();
    lab.guest.run();
    // The guest guesses the port.
    lab.send(Key { host: FIRST_HOST_PORT, guest: 52 }, Op::Response);
    assert!(is_at_end(&mut client));
    assert_eq!(lab.refused(Refusal::OutOfState), 1);
}

#[test]
fn a_malformed_packet_of_a_connection_ends_it() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send_header(Header { op: 99, ..lab.header(key, Op::Rw) }, &[]);
    assert_eq!(lab.ops(), [Op::Rst]);
    assert!(is_at_end(&mut client));
    // Somebody else's address does not.
    let (_client, key) = lab.connected(52);
    lab.send_header(Header { dst_cid: 9, ..lab.header(key, Op::Rst) }, &[]);
    lab.send_header(Header { src_cid: 9, ..lab.header(key, Op::Rw) }, &[]);
    lab.packets();
    assert_eq!(lab.totals().open, 1);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to_for_ever() {
    for features in [0, F_EVENT_IDX] {
        let mut lab = Lab::starved(features);
        let mut returned = 0;
        for n in 0..RESETS as u32 + 100 {
            lab.guest.fill(OUTGOING, &lab.header(Key { host: 7, guest: n }, Op::Rw).to_bytes());
            lab.guest.add(TX, &[out(OUTGOING, HEADER_LEN)]);
            lab.guest.kick_and_run(TX);
            returned += lab.guest.used(TX).len();
            if returned < n as usize {
                break;
            }
        }
        assert_eq!(returned, RESETS);
        // With buffers it goes on where it stopped.
        lab.post(64);
        let mut answers = 0;
        for _ in 0..20 {
            answers += lab.ops().len();
        }
        returned += lab.guest.used(TX).len();
        assert_eq!(answers, returned);
        assert!(returned > RESETS);
    }
}

#[test]
fn more_packets_than_the_budget_take_more_turns_and_are_all_taken() {
    for features in [0, F_EVENT_IDX] {
        let mut lab = Lab::starved(features);
        // Nobody answers these, so no other event brings the device back.
        lab.guest.fill(OUTGOING, &lab.header(Key { host: 7, guest: 8 }, Op::Rst).to_bytes());
        for _ in 0..TX_BUDGET + 3 {
            lab.guest.add(TX, &[out(OUTGOING, HEADER_LEN)]);
        }
        lab.guest.kick(TX);
        lab.guest.run_once();
        assert_eq!(lab.guest.used(TX).len(), TX_BUDGET);
        lab.guest.run();
        assert_eq!(lab.guest.used(TX).len(), 3);
    }
}

/// Headers that are nearly right.
fn header() -> impl Strategy<Value = Header> {
    let cid = |usual: u64| prop_oneof![20 => Just(usual), 1 => any::<u64>(), 1 => Just(2u64)];
    let port = || prop_oneof![4 => Just(7u32), 4 => FIRST_HOST_PORT..FIRST_HOST_PORT + 4, 1 => any::<u32>()];
    let number = || prop_oneof![2 => Just(0u32), 2 => 0u32..1000, 2 => Just(ROOM), 1 => any::<u32>()];
    let op = prop_oneof![20 => 1u16..8, 1 => any::<u16>()];
    let kind = prop_oneof![20 => Just(STREAM), 1 => any::<u16>()];
    let guest = prop_oneof![4 => Just(52u32), 1 => 0u32..4];
    ((cid(GUEST_CID), cid(HOST_CID), guest, port(), number()), (kind, op, 0u32..8, number(), number()))
        .prop_map(|((src_cid, dst_cid, src_port, dst_port, len), (kind, op, flags, buf_alloc, fwd_cnt))| {
            Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
        })
}

#[derive(Clone, Debug)]
enum Act {
    Send(Header),
    SendShort(usize),
    Post(usize),
    Connect,
    Say(usize, Vec<u8>),
    Read(usize),
    HangUp(usize),
    Shut(usize),
    Describe(usize, u16, Buf, u16),
    Offer(usize, u16),
    AvailIndex(usize, u16),
}

fn act() -> impl Strategy<Value = Act> {
    let who = 0usize..4;
    prop_oneof![
        20 => header().prop_map(Act::Send),
        1 => (0usize..50).prop_map(Act::SendShort),
        6 => (1usize..4).prop_map(Act::Post),
        5 => Just(Act::Connect),
        5 => (who.clone(), prop::collection::vec(any::<u8>(), 1..3000)).prop_map(|(n, b)| Act::Say(n, b)),
        3 => who.clone().prop_map(Act::Read),
        2 => who.clone().prop_map(Act::HangUp),
        2 => who.prop_map(Act::Shut),
    ]
}

fn wild() -> impl Strategy<Value = Act> {
    let queue = 0usize..3;
    let addr = prop_oneof![4 => (0u64..64).prop_map(|n| BUFFERS + n * 0x100), 1 => Just(MEMORY_END - 20), 1 => any::<u64>()];
    let len = prop_oneof![4 => 0u32..5000, 2 => 40u32..60, 1 => any::<u32>()];
    let flags = prop_oneof![4 => 0u16..4, 1 => any::<u16>()];
    let desc = (addr, len, flags).prop_map(|(addr, len, flags)| Buf { addr, len, flags });
    prop_oneof![
        3 => act(),
        2 => (queue.clone(), 0u16..16, desc, 0u16..16).prop_map(|(q, at, buf, next)| Act::Describe(q, at, buf, next)),
        2 => (queue.clone(), 0u16..16).prop_map(|(q, head)| Act::Offer(q, head)),
        1 => (queue, any::<u16>()).prop_map(|(q, idx)| Act::AvailIndex(q, idx)),
    ]
}

fn perform(lab: &mut Lab, clients: &mut Vec<UnixStream>, act: Act) {
    match act {
        Act::Send(header) => {
            lab.guest.fill(OUTGOING, &header.to_bytes());
            lab.guest.add(TX, &[out(OUTGOING, HEADER_LEN + header.len.min(2000) as usize)]);
            lab.guest.put(0x50, TX as u32);
        }
        Act::SendShort(len) => {
            lab.guest.add(TX, &[out(OUTGOING, len)]);
            lab.guest.put(0x50, TX as u32);
        }
        Act::Post(count) => {
            for n in 0..count as u64 {
                lab.guest.add(RX, &[into(BUFFERS + n * 0x1000, 60 + 900 * n as usize)]);
            }
            lab.guest.put(0x50, RX as u32);
        }
        Act::Connect => {
            let mut client = lab.stranger();
            client.write_all(b"CONNECT 52\n").unwrap();
            clients.push(client);
        }
        Act::Say(n, bytes) => {
            if let Some(client) = clients.get_mut(n) {
                let _ = client.write(&bytes);
            }
        }
        Act::Read(n) => {
            if let Some(client) = clients.get_mut(n) {
                let _ = client.read(&mut [0; 5000]);
            }
        }
        Act::HangUp(n) => {
            if n < clients.len() {
                clients.swap_remove(n);
            }
        }
        Act::Shut(n) => {
            if let Some(client) = clients.get_mut(n) {
                let _ = client.shutdown(std::net::Shutdown::Write);
            }
        }
        Act::Describe(queue, at, buf, next) => {
            lab.guest.queues[queue].write_desc(&lab.guest.mem, at, buf, next);
        }
        Act::Offer(queue, head) => {
            lab.guest.offer(queue, head);
            lab.guest.put(0x50, queue as u32);
        }
        Act::AvailIndex(queue, idx) => {
            let addr = GuestAddress(lab.guest.queues[queue].avail + 2);
            lab.guest.mem.write_obj(idx, addr).unwrap();
            lab.guest.put(0x50, queue as u32);
        }
    }
    // Fails if it spins.
    lab.guest.run();
    assert!(lab.totals().open <= MAX_CONNECTIONS as u64);
}

/// The device works as if nothing had happened.
fn assert_cured(lab: &mut Lab) {
    lab.guest.start(F_EVENT_IDX);
    lab.posted.clear();
    lab.inbox.clear();
    lab.next_buffer = 0;
    lab.post(16);
    lab.packets();
    let (mut client, key) = lab.connected(99);
    lab.send_data(key, b"well");
    assert_eq!(read(&mut client), b"well");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_dialogue_is_survived(
        event_idx in any::<bool>(),
        acts in prop::collection::vec(act(), 0..100),
    ) {
        let mut lab = Lab::starved(if event_idx { F_EVENT_IDX } else { 0 });
        let _server = lab.server(7);
        let mut clients = Vec::new();
        for act in acts {
            perform(&mut lab, &mut clients, act);
        }
        drop(clients);
        lab.guest.run();
        assert_cured(&mut lab);
    }

    #[test]
    fn any_rings_are_survived(acts in prop::collection::vec(wild(), 0..80)) {
        let mut lab = Lab::starved(0);
        let _server = lab.server(7);
        let mut clients = Vec::new();
        for act in acts {
            perform(&mut lab, &mut clients, act);
        }
        drop(clients);
        lab.guest.run();
        assert_cured(&mut lab);
    }
}
