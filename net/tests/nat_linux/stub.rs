//! A DNS server of the world: it answers `N.example.` with N addresses, over UDP and TCP.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread;

use hickory_proto::op::{Edns, Message, MessageType};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};

/// Bytes that it says it takes.
pub(crate) const EDNS: u16 = 1400;

/// Serves at `at`, with copies of `address`; says where, when the port was 0.
pub(crate) fn start(at: SocketAddrV4, address: Ipv4Addr) -> SocketAddrV4 {
    let listener = TcpListener::bind(at).unwrap();
    let SocketAddr::V4(at) = listener.local_addr().unwrap() else { panic!("an IPv4 address was bound") };
    let socket = UdpSocket::bind(at).unwrap();
    thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok((n, from)) = socket.recv_from(&mut buf) {
            socket.send_to(&answer(&buf[..n], address, false), from).unwrap();
        }
    });
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            while let Some(question) = read(&mut stream) {
                write(&mut stream, &answer(&question, address, true));
            }
        }
    });
    at
}

/// Serves every connection on a thread of its own as `serve` does, on a free port of the loopback; the second is told of
/// each connection.
pub(crate) fn listen(serve: fn(&mut TcpStream)) -> (SocketAddrV4, mpsc::Receiver<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let SocketAddr::V4(at) = listener.local_addr().unwrap() else { panic!("an IPv4 address was bound") };
    let (came, connections) = mpsc::channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // The test may have all that it wants to know.
            let _ = came.send(());
            thread::spawn(move || serve(&mut stream));
        }
    });
    (at, connections)
}

/// One question and its answer over a connection (RFC 1035 §4.2.2).
pub(crate) fn exchange(stream: &mut TcpStream, question: &[u8]) -> Message {
    write(stream, question);
    Message::from_vec(&read(stream).unwrap()).unwrap()
}

pub(crate) fn read(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len).ok()?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut message).ok()?;
    Some(message)
}

pub(crate) fn write(stream: &mut TcpStream, message: &[u8]) {
    let len = u16::try_from(message.len()).unwrap();
    stream.write_all(&[&len.to_be_bytes(), message].concat()).unwrap();
}

/// Answers the first question of a connection.
pub(crate) fn answer_one(stream: &mut TcpStream) {
    if let Some(question) = read(stream) {
        write(stream, &answer(&question, Ipv4Addr::LOCALHOST, true));
    }
}

/// The answer to a question, cut to what fits in a datagram unless it goes `over_tcp`.
pub(crate) fn answer(question: &[u8], address: Ipv4Addr, over_tcp: bool) -> Vec<u8> {
    let mut message = Message::from_vec(question).unwrap();
    message.metadata.message_type = MessageType::Response;
    let most = message.edns.as_ref().map_or(512, Edns::max_payload);
    if let Some(edns) = &mut message.edns {
        edns.set_max_payload(EDNS);
    }
    let name = message.queries[0].name().clone();
    let count: u32 = String::from_utf8_lossy(name.iter().next().unwrap()).parse().unwrap();
    for n in 0..count {
        message.add_answer(Record::from_rdata(name.clone(), n, RData::A(A(address))));
    }
    let bytes = message.to_vec().unwrap();
    if over_tcp || bytes.len() <= usize::from(most) {
        return bytes;
    }
    message.answers.clear();
    message.metadata.truncation = true;
    message.to_vec().unwrap()
}
