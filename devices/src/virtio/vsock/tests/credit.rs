//! Flow control both ways: to the byte, and without a stall.

use super::*;

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send_credit(key, 10, 0);
    client.write_all(b"0123456789abcdef").unwrap();
    let packets = lab.packets();
    let ops: Vec<_> = packets.iter().map(|(header, _)| Op::parse(header.op).unwrap()).collect();
    // It is asked for more, once.
    assert_eq!(ops, [Op::Rw, Op::CreditRequest]);
    assert_eq!(packets[0].1, b"0123456789");
    lab.send_credit(key, 10, 0);
    assert_eq!(lab.ops(), []);
    lab.send_credit(key, 10, 4);
    let packets = lab.packets();
    assert_eq!(packets[0].1, b"abcd");
    lab.send_credit(key, 100, 4);
    assert_eq!(lab.packet(Op::Rw).1, b"ef");
}

#[test]
fn room_that_shrinks_below_what_is_on_the_way_is_no_room() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    client.write_all(&[1; 100]).unwrap();
    assert_eq!(lab.packet(Op::Rw).1.len(), 100);
    lab.send_credit(key, 50, 0);
    client.write_all(&[2; 30]).unwrap();
    assert_eq!(lab.ops(), [Op::CreditRequest]);
    lab.send_credit(key, 50, 60);
    assert_eq!(lab.packets()[0].1, [2; 10]);
    lab.send_credit(key, 50, 110);
    assert_eq!(lab.packet(Op::Rw).1, [2; 20]);
}

#[test]
fn a_host_that_does_not_read_holds_the_guest_at_its_credit() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    // More than the socket takes: the rest is kept, and counts.
    let (mut sent, chunk) = (0usize, 16 << 10);
    loop {
        let before = lab.totals().from_guest;
        let (_, kept) = told(&mut lab, key);
        if sent as u32 - kept + chunk as u32 > BUF_ALLOC {
            break;
        }
        lab.send_data(key, &pattern(sent, chunk));
        sent += chunk;
        assert_eq!(lab.totals().from_guest, before + chunk as u64);
    }
    let (_, forwarded) = told(&mut lab, key);
    assert!(sent as u32 > BUF_ALLOC && forwarded > 0);
    let left = (BUF_ALLOC - (sent as u32 - forwarded)) as usize;
    lab.send_data(key, &pattern(sent, left));
    sent += left;
    assert_eq!(told(&mut lab, key).1, forwarded);
    // The host reads: the guest is told without asking, and nothing was lost.
    let mut got = Vec::new();
    let mut updates = 0;
    while got.len() < sent {
        let some = read(&mut client);
        assert!(!some.is_empty(), "stuck after {} of {sent}", got.len());
        got.extend(some);
        updates += lab.ops().iter().filter(|op| **op == Op::CreditUpdate).count();
    }
    assert!(got == pattern(0, sent));
    assert!(updates > 0);
    assert_eq!(told(&mut lab, key).1 as usize, sent);
}

/// What the device answers to a question about its buffer.
fn told(lab: &mut Lab, key: Key) -> (u32, u32) {
    lab.packets();
    lab.send(key, Op::CreditRequest);
    let (header, _) = lab.packet(Op::CreditUpdate);
    (header.buf_alloc, header.fwd_cnt)
}

#[test]
fn data_beyond_the_credit_ends_the_connection() {
    let mut lab = Lab::new();
    let (_client, key) = lab.connected(52);
    // Fill the socket and all the credit.
    let mut forwarded = 0;
    let mut sent = 0u32;
    while sent - forwarded < BUF_ALLOC {
        let len = (BUF_ALLOC - (sent - forwarded)).min(32 << 10);
        lab.send_data(key, &vec![0; len as usize]);
        sent += len;
        forwarded = told(&mut lab, key).1;
    }
    lab.send_data(key, &[0]);
    assert_eq!(lab.ops(), [Op::Rst]);
    assert_eq!((lab.refused(Refusal::OverCredit), lab.totals().open), (1, 0));
}

#[test]
fn every_packet_tells_what_was_forwarded() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send_data(key, &[0; 1000]);
    assert_eq!(lab.ops(), [], "small talk needs no update");
    client.write_all(b"x").unwrap();
    let (header, _) = lab.packet(Op::Rw);
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUF_ALLOC, 1000));
}

#[test]
fn a_guest_that_sends_its_half_of_the_buffer_is_told_in_time() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    let mut updates = 0;
    for _ in 0..64 {
        lab.send_data(key, &[7; 16 << 10]);
        read(&mut client);
        updates += lab.ops().len();
    }
    // 1 MiB, told each 128 KiB or a little more.
    assert!((6..=8).contains(&updates), "{updates}");
}

#[test]
fn without_receive_buffers_nothing_is_read_and_nothing_spins() {
    for features in [0, F_EVENT_IDX] {
        let mut lab = Lab::starved(features);
        lab.post(1);
        let mut client = lab.stranger();
        client.write_all(b"CONNECT 52\n").unwrap();
        lab.guest.run();
        lab.fetch(false);
        let key = Key { host: lab.inbox.pop().unwrap().0.src_port, guest: 52 };
        lab.send(key, Op::Response);
        read(&mut client);
        let stuffed = stuff(&mut client, 0, 1 << 20);
        assert!(stuffed < 1 << 20, "a socket has an end");
        // `run` fails if the I/O thread spins.
        lab.guest.run();
        assert_eq!(stuff(&mut client, stuffed, 1), 0, "somebody read");
        // One buffer, one packet.
        lab.post(1);
        lab.fetch(false);
        assert_eq!(lab.inbox.len(), 1);
        let mut got = lab.inbox.pop().unwrap().1;
        assert_eq!(got.len(), BUFFER - HEADER_LEN);
        lab.post(32);
        while got.len() < stuffed {
            lab.send_credit(key, ROOM, got.len() as u32);
            let packets = lab.packets();
            let data: Vec<u8> = packets.into_iter().flat_map(|(_, payload)| payload).collect();
            assert!(!data.is_empty(), "stuck after {} of {stuffed}", got.len());
            got.extend(data);
        }
        assert!(got == pattern(0, stuffed));
    }
}

#[test]
fn a_buffer_that_turns_out_not_to_be_needed_stays_the_guests_next() {
    let mut lab = Lab::starved(F_EVENT_IDX);
    lab.post(1);
    let mut client = lab.stranger();
    client.write_all(b"CONNECT 52\n").unwrap();
    lab.guest.run();
    lab.fetch(false);
    let key = Key { host: lab.inbox.pop().unwrap().0.src_port, guest: 52 };
    lab.send(key, Op::Response);
    read(&mut client);
    lab.post(2);
    // A whole buffer's worth: there may be more behind it, so the next buffer is tried, and nothing comes.
    client.write_all(&[1; BUFFER - HEADER_LEN]).unwrap();
    lab.guest.run();
    client.write_all(b"x").unwrap();
    lab.guest.run();
    lab.fetch(false);
    let lengths: Vec<_> = lab.inbox.iter().map(|(header, _)| header.len as usize).collect();
    assert_eq!(lengths, [BUFFER - HEADER_LEN, 1]);
}

#[test]
fn one_busy_connection_does_not_hold_up_another() {
    let mut lab = Lab::starved(F_EVENT_IDX);
    lab.post(8);
    let (mut busy, busy_key) = lab.connected(52);
    let (mut quiet, quiet_key) = lab.connected(53);
    lab.send_credit(busy_key, 1 << 20, 0);
    lab.guest.run();
    lab.fetch(false);
    lab.inbox.clear();
    stuff(&mut busy, 0, 1 << 17);
    lab.guest.run();
    quiet.write_all(b"me too").unwrap();
    lab.guest.run();
    lab.fetch(false);
    lab.inbox.clear();
    lab.post(2);
    lab.fetch(false);
    assert!(lab.inbox.iter().any(|(header, _)| header.src_port == quiet_key.host));
}
