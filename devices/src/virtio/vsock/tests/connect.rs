//! How connections begin, from both sides.

use super::*;
use crate::virtio::testing::out;

#[test]
fn a_client_of_the_host_reaches_the_guests_port() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.client(52);
    assert!(key.host >= FIRST_HOST_PORT);
    assert_eq!(read(&mut client), b"");
    lab.send(key, Op::Response);
    assert_eq!(read(&mut client), format!("OK {}\n", key.host).as_bytes());
    client.write_all(b"hello").unwrap();
    let (header, payload) = lab.packet(Op::Rw);
    assert_eq!((header.src_port, header.dst_port, payload), (key.host, 52, b"hello".to_vec()));
    lab.send_data(key, b"hello yourself");
    assert_eq!(read(&mut client), b"hello yourself");
    let totals = lab.totals();
    assert_eq!((totals.opened, totals.open, totals.to_guest, totals.from_guest), (1, 1, 5, 14));
}

#[test]
fn a_client_may_write_its_line_in_pieces_and_data_behind_it() {
    let mut lab = Lab::new();
    let mut client = lab.stranger();
    for piece in ["CON", "NECT 1", "0"] {
        client.write_all(piece.as_bytes()).unwrap();
        assert_eq!(lab.ops(), []);
    }
    client.write_all(b"24\nearly").unwrap();
    let (request, _) = lab.packet(Op::Request);
    assert_eq!(request.dst_port, 1024);
    let key = Key { host: request.src_port, guest: 1024 };
    lab.send(key, Op::Response);
    assert_eq!(lab.packet(Op::Rw).1, b"early");
    assert!(!read(&mut client).is_empty());
}

#[test]
fn a_port_without_listener_in_the_guest_closes_the_client() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.client(52);
    lab.send(key, Op::Rst);
    assert!(is_at_end(&mut client));
    assert_eq!(lab.ops(), []);
    assert_eq!((lab.refused(Refusal::GuestRefused), lab.totals().open), (1, 0));
}

#[test]
fn a_bad_line_closes_the_client_and_the_guest_hears_nothing() {
    let mut lab = Lab::new();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT\n", "CONNECT 99999999999\n", "\n"] {
        let mut client = lab.stranger();
        client.write_all(line.as_bytes()).unwrap();
        assert_eq!(lab.ops(), []);
        assert!(is_at_end(&mut client), "{line:?}");
    }
    assert_eq!((lab.refused(Refusal::BadLine), lab.totals().open), (4, 0));
}

#[test]
fn a_client_that_gives_up_before_the_answer_is_reset_in_the_guest() {
    let mut lab = Lab::new();
    let (client, key) = lab.client(52);
    drop(client);
    let (rst, _) = lab.packet(Op::Rst);
    assert_eq!((rst.src_port, rst.dst_port), (key.host, 52));
    // The answer that was on its way meets nothing.
    lab.send(key, Op::Response);
    assert_eq!(lab.ops(), [Op::Rst]);
    assert_eq!(lab.totals().open, 0);
}

#[test]
fn a_client_that_is_gone_when_the_guest_accepts_is_reset_in_the_guest() {
    let mut lab = Lab::new();
    let (client, key) = lab.client(52);
    drop(client);
    // Both come in one round of the I/O thread.
    lab.send(key, Op::Response);
    assert_eq!(*lab.ops().last().unwrap(), Op::Rst);
    assert_eq!(lab.totals().open, 0);
}

#[test]
fn a_client_that_gives_up_while_the_guest_has_no_buffer_leaves_no_trace() {
    let mut lab = Lab::starved(F_EVENT_IDX);
    for _ in 0..3 * MAX_CONNECTIONS {
        let mut client = lab.stranger();
        client.write_all(b"CONNECT 52\n").unwrap();
        lab.guest.run();
    }
    lab.guest.run();
    assert_eq!(lab.totals().open, 0);
    lab.post(4);
    assert_eq!(lab.ops(), []);
}

#[test]
fn the_guest_reaches_a_server_of_the_host() {
    let mut lab = Lab::new();
    let key = Key { host: 8080, guest: 1_000_000 };
    let mut server = lab.accepted(key);
    server.write_all(b"welcome").unwrap();
    assert_eq!(lab.packet(Op::Rw).1, b"welcome");
    lab.send_data(key, b"thanks");
    assert_eq!(read(&mut server), b"thanks");
    assert_eq!(lab.totals().opened, 1);
}

#[test]
fn a_port_that_nobody_serves_is_refused() {
    let mut lab = Lab::new();
    let key = Key { host: 8080, guest: 5 };
    lab.send(key, Op::Request);
    let (rst, _) = lab.packet(Op::Rst);
    assert_eq!((rst.src_cid, rst.src_port, rst.dst_port), (HOST_CID, 8080, 5));
    // A dead server's file is no server.
    drop(lab.server(8081));
    lab.send(Key { host: 8081, guest: 5 }, Op::Request);
    assert_eq!(lab.ops(), [Op::Rst]);
    assert_eq!((lab.refused(Refusal::NobodyListens), lab.totals().open), (2, 0));
}

#[test]
fn many_connections_have_ports_of_their_own_and_do_not_mix() {
    let mut lab = Lab::new();
    let mut all: Vec<_> = (0..20).map(|_| lab.connected(52)).collect();
    for (n, (client, key)) in all.iter_mut().enumerate() {
        write!(client, "to {n}").unwrap();
        lab.send_data(*key, format!("from {n}").as_bytes());
    }
    let packets = lab.packets();
    for (n, (client, key)) in all.iter_mut().enumerate() {
        assert_eq!(read(client), format!("from {n}").as_bytes());
        let mine: Vec<_> = packets.iter().filter(|(header, _)| header.src_port == key.host).collect();
        assert_eq!(mine.len(), 1);
        assert_eq!(mine[0].1, format!("to {n}").as_bytes());
    }
}

#[test]
fn the_table_is_bounded_and_says_so_to_both_sides() {
    let mut lab = Lab::new();
    let _server = lab.server(7);
    let strangers: Vec<_> = (0..MAX_CONNECTIONS).map(|_| lab.stranger()).collect();
    let mut late = lab.stranger();
    assert!(is_at_end(&mut late));
    lab.send(Key { host: 7, guest: 1 }, Op::Request);
    assert_eq!(lab.ops(), [Op::Rst]);
    assert_eq!((lab.refused(Refusal::TableFull), lab.totals().open), (2, MAX_CONNECTIONS as u64));
    drop(strangers);
    lab.guest.run();
    assert_eq!(lab.totals().open, 0);
    lab.connected(52);
}

#[test]
fn a_guest_with_many_connections_does_not_lock_the_host_out() {
    let mut lab = Lab::new();
    let server = lab.server(7);
    let mut streams = Vec::new();
    for guest in 0.. {
        lab.send(Key { host: 7, guest }, Op::Request);
        if lab.ops() == [Op::Rst] {
            break;
        }
        streams.push(server.accept().unwrap());
    }
    assert_eq!(streams.len(), MAX_CONNECTIONS - KEPT_FOR_HOST);
    // What is refused for want of room is not even tried.
    assert_eq!(server.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let clients: Vec<_> = (0..KEPT_FOR_HOST).map(|_| lab.connected(52)).collect();
    let mut late = lab.stranger();
    assert!(is_at_end(&mut late));
    drop(clients);
}

#[test]
fn connections_that_only_wait_for_the_guests_last_word_make_room() {
    let mut lab = Lab::new();
    let all: Vec<_> = (0..MAX_CONNECTIONS).map(|_| lab.connected(52)).collect();
    drop(all);
    assert!(lab.ops().iter().all(|op| *op == Op::Shutdown));
    assert_eq!(lab.totals().open, MAX_CONNECTIONS as u64);
    lab.connected(52);
    assert_eq!(lab.refused(Refusal::TableFull), 0);
}

#[test]
fn header_and_payload_may_be_split_anyhow() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    let packet = [&Header { len: 10, ..lab.header(key, Op::Rw) }.to_bytes()[..], b"0123456789"].concat();
    for cuts in [[1, 43, 44, 45], [20, 21, 44, 54], [44, 48, 50, 54], [10, 46, 47, 53]] {
        let (mut bufs, mut at) = (Vec::new(), 0);
        for (n, end) in cuts.into_iter().chain([packet.len()]).enumerate() {
            let addr = OUTGOING + n as u64 * 0x1000;
            lab.guest.fill(addr, &packet[at..end]);
            bufs.push(out(addr, end - at));
            at = end;
        }
        lab.guest.add(TX, &bufs);
        lab.guest.kick_and_run(TX);
        assert_eq!(read(&mut client), b"0123456789");
    }
    // And so may a receive buffer.
    let mut lab = Lab::starved(0);
    let mut client = lab.stranger();
    client.write_all(b"CONNECT 1\n").unwrap();
    lab.guest.add(RX, &[into(BUFFERS, 10), into(BUFFERS + 0x100, 40), into(BUFFERS + 0x200, 100)]);
    lab.guest.kick_and_run(RX);
    assert_eq!(lab.guest.used(RX)[0].1 as usize, HEADER_LEN);
    let header = [lab.guest.bytes(BUFFERS, 10), lab.guest.bytes(BUFFERS + 0x100, 34)].concat();
    let header = Header::parse(header.try_into().unwrap());
    assert_eq!((header.op, header.dst_port), (Op::Request as u16, 1));
    lab.send(Key { host: header.src_port, guest: 1 }, Op::Response);
    client.write_all(b"0123456789").unwrap();
    lab.guest.add(
        RX,
        &[into(BUFFERS, 10), into(BUFFERS + 0x100, 36), into(BUFFERS + 0x200, 3), into(BUFFERS + 0x300, 50)],
    );
    lab.guest.kick_and_run(RX);
    assert_eq!(lab.guest.used(RX)[0].1 as usize, HEADER_LEN + 10);
    assert_eq!(lab.guest.bytes(BUFFERS + 0x100 + 34, 2), b"01");
    assert_eq!(lab.guest.bytes(BUFFERS + 0x200, 3), b"234");
    assert_eq!(lab.guest.bytes(BUFFERS + 0x300, 5), b"56789");
}
