//! How connections end: each way by itself, both, in order or not.

use super::*;
use std::net::Shutdown as Half;

#[test]
fn the_hosts_end_of_stream_becomes_shutdown_and_the_other_way_goes_on() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    client.write_all(b"last words").unwrap();
    client.shutdown(Half::Write).unwrap();
    let packets = lab.packets();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!(packets[1].0.op, Op::Shutdown as u16);
    assert_eq!(packets[1].0.flags, Shutdown::SEND.bits());
    lab.send_data(key, b"I hear you");
    assert_eq!(read(&mut client), b"I hear you");
    // The guest ends its way, too: both are told, and it answers.
    lab.send_shutdown(key, Shutdown::SEND);
    assert!(is_at_end(&mut client));
    let (header, _) = lab.packet(Op::Shutdown);
    assert_eq!(header.flags, Shutdown::all().bits());
    lab.send(key, Op::Rst);
    assert_eq!((lab.ops(), lab.totals().open), (vec![], 0));
}

#[test]
fn the_guests_end_of_stream_reaches_the_host_behind_its_data() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    // Fill the socket, so that some is kept.
    let mut sent = 0;
    for _ in 0..26 {
        lab.send_data(key, &pattern(sent, 16 << 10));
        sent += 16 << 10;
    }
    lab.send_shutdown(key, Shutdown::SEND);
    let mut got = Vec::new();
    while got.len() < sent {
        got.extend(read(&mut client));
        lab.guest.run();
    }
    assert!(got == pattern(0, sent));
    assert!(is_at_end(&mut client));
    lab.packets();
    client.write_all(b"still here").unwrap();
    assert_eq!(lab.packet(Op::Rw).1, b"still here");
}

#[test]
fn a_host_that_closes_is_told_and_the_guests_word_frees_the_connection() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    client.write_all(b"bye").unwrap();
    drop(client);
    let packets = lab.packets();
    let data: Vec<_> = packets.iter().flat_map(|(_, payload)| payload.clone()).collect();
    assert_eq!(data, b"bye");
    assert_eq!(packets.last().unwrap().0.flags, Shutdown::all().bits());
    // What the guest had sent meanwhile is no crime, and goes nowhere.
    lab.send_data(key, b"wait");
    lab.send_credit(key, ROOM, 3);
    assert_eq!((lab.ops(), lab.totals().open), (vec![], 1));
    lab.send(key, Op::Rst);
    assert_eq!((lab.ops(), lab.totals().open), (vec![], 0));
}

#[test]
fn a_host_that_closes_with_data_on_the_way_loses_none_of_it() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send_credit(key, 5, 0);
    client.write_all(b"0123456789").unwrap();
    drop(client);
    let packets = lab.packets();
    let data: Vec<_> = packets.iter().flat_map(|(_, payload)| payload.clone()).collect();
    assert_eq!(data, b"01234");
    // The guest may know that nobody listens, but not yet that nobody speaks.
    assert!(packets.iter().all(|(header, _)| header.flags & Shutdown::SEND.bits() == 0));
    lab.send_credit(key, 5, 5);
    let packets = lab.packets();
    let data: Vec<_> = packets.iter().flat_map(|(_, payload)| payload.clone()).collect();
    assert_eq!(data, b"56789");
    lab.send_credit(key, 5, 10);
    assert_eq!(lab.packet(Op::Shutdown).0.flags, Shutdown::all().bits());
}

#[test]
fn a_guest_that_closes_gets_its_answer_and_the_host_its_data() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send_data(key, b"all of it");
    lab.send_shutdown(key, Shutdown::all());
    assert_eq!(lab.ops(), [Op::Rst]);
    assert_eq!(read(&mut client), b"all of it");
    assert!(is_at_end(&mut client));
    assert_eq!(lab.totals().open, 0);
}

/// Sends so much that the client's socket is full and some is kept; how much was sent.
fn fill_host(lab: &mut Lab, key: Key) -> usize {
    let mut sent = 0;
    for _ in 0..26 {
        lab.send_data(key, &pattern(sent, 16 << 10));
        sent += 16 << 10;
    }
    lab.packets();
    sent
}

#[test]
fn a_slow_host_gets_all_that_a_guest_sent_before_it_closed() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    let sent = fill_host(&mut lab, key);
    lab.send_shutdown(key, Shutdown::all());
    // The guest is done with it at once, and may use the ports again.
    assert_eq!((lab.ops(), lab.totals().open), (vec![Op::Rst], 1));
    lab.send_data(key, b"again?");
    assert_eq!(lab.ops(), [Op::Rst]);
    let mut got = Vec::new();
    while got.len() < sent {
        got.extend(read(&mut client));
        lab.guest.run();
    }
    assert!(got == pattern(0, sent));
    assert!(is_at_end(&mut client));
    assert_eq!(lab.totals().open, 0);
}

#[test]
fn a_guest_that_loses_patience_after_its_shutdown_loses_no_data() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    let sent = fill_host(&mut lab, key);
    lab.send_shutdown(key, Shutdown::SEND);
    lab.send(key, Op::Rst);
    assert_eq!(lab.ops(), []);
    let mut got = Vec::new();
    while got.len() < sent {
        got.extend(read(&mut client));
        lab.guest.run();
    }
    assert!(got == pattern(0, sent));
    assert!(is_at_end(&mut client));
}

#[test]
fn a_host_that_dies_while_a_closed_guests_data_waits_frees_the_connection() {
    let mut lab = Lab::new();
    let (client, key) = lab.connected(52);
    fill_host(&mut lab, key);
    lab.send_shutdown(key, Shutdown::all());
    assert_eq!((lab.ops(), lab.totals().open), (vec![Op::Rst], 1));
    drop(client);
    assert_eq!((lab.ops(), lab.totals().open), (vec![], 0));
}

#[test]
fn a_reset_by_the_guest_closes_the_client() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send(key, Op::Rst);
    assert!(is_at_end(&mut client));
    assert_eq!((lab.ops(), lab.totals().open), (vec![], 0));
}

#[test]
fn a_guest_that_reads_no_more_stops_the_hosts_writing() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    lab.send_shutdown(key, Shutdown::RCV);
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    lab.send_data(key, b"one way");
    assert_eq!(read(&mut client), b"one way");
    assert_eq!(lab.ops(), []);
    drop(client);
    assert_eq!(lab.packet(Op::Shutdown).0.flags, Shutdown::all().bits());
}

#[test]
fn a_host_that_reads_no_more_is_told_to_the_guest_and_may_go_on_writing() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    client.shutdown(Half::Read).unwrap();
    lab.send_data(key, b"nobody reads this");
    assert_eq!(lab.packet(Op::Shutdown).0.flags, Shutdown::RCV.bits());
    client.write_all(b"but").unwrap();
    let (header, payload) = lab.packet(Op::Rw);
    // What was thrown away is not on the guest's account.
    assert_eq!((payload, header.fwd_cnt), (b"but".to_vec(), 17));
    drop(client);
    assert_eq!(lab.packet(Op::Shutdown).0.flags, Shutdown::all().bits());
}

#[test]
fn a_host_that_dies_with_unread_data_ends_both_ways() {
    let mut lab = Lab::new();
    let (client, key) = lab.connected(52);
    fill_host(&mut lab, key);
    drop(client);
    let packets = lab.packets();
    assert_eq!(packets.last().unwrap().0.flags, Shutdown::all().bits());
    lab.send(key, Op::Rst);
    assert_eq!((lab.ops(), lab.totals().open), (vec![], 0));
}

#[test]
fn what_a_dead_host_did_not_take_is_off_the_guests_account() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    let sent = fill_host(&mut lab, key);
    // The guest has no room for the host's last words, so the connection lives on.
    lab.send_credit(key, 0, 0);
    client.write_all(b"last words").unwrap();
    drop(client);
    let packets = lab.packets();
    let (told, _) = packets.iter().find(|(header, _)| header.op == Op::Shutdown as u16).unwrap();
    assert_eq!((told.flags, told.fwd_cnt as usize), (Shutdown::RCV.bits(), sent));
    lab.send_credit(key, ROOM, 0);
    assert!(lab.packets().iter().any(|(_, payload)| payload == b"last words"));
}

#[test]
fn ports_may_be_used_again_when_the_host_has_gone() {
    let mut lab = Lab::new();
    let key = Key { host: 9, guest: 77 };
    let server = lab.accepted(key);
    drop(server);
    assert_eq!(lab.ops(), [Op::Shutdown]);
    // The guest's RST was never sent: it has a new connection with the old ports.
    std::fs::remove_file(lab.dir.path().join("v_9")).unwrap();
    let mut server = lab.accepted(key);
    lab.send_data(key, b"anew");
    assert_eq!(read(&mut server), b"anew");
    assert_eq!(lab.totals().open, 1);
}

#[test]
fn a_thousand_short_connections_leave_nothing() {
    let mut lab = Lab::new();
    let server = lab.server(9);
    for n in 0..1000 {
        let key = Key { host: 9, guest: 1000 + n };
        lab.send(key, Op::Request);
        let (mut stream, _) = server.accept().unwrap();
        lab.send_data(key, b"short");
        lab.send_shutdown(key, Shutdown::all());
        let mut got = String::new();
        stream.read_to_string(&mut got).unwrap();
        assert_eq!(got, "short");
        assert_eq!(lab.ops(), [Op::Response, Op::Rst]);
    }
    assert_eq!((lab.totals().opened, lab.totals().open), (1000, 0));
}
