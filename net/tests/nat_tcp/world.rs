//! The world: servers at an address of the test's own namespace that is not loopback, and data to exchange with them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use net::Offloads;

use crate::common::ip;

/// Where the servers are.
pub(crate) const WORLD: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// What a Linux guest agrees to.
pub(crate) const ALL: Offloads = Offloads::CSUM.union(Offloads::TSO4);

/// A server in the world, whose every connection is served by `job` on a thread.
pub(crate) fn server(job: impl Fn(TcpStream) + Send + Clone + 'static) -> SocketAddrV4 {
    let listener = TcpListener::bind((WORLD, 0)).unwrap();
    let addr = SocketAddrV4::new(WORLD, listener.local_addr().unwrap().port());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let job = job.clone();
            thread::spawn(move || job(stream));
        }
    });
    addr
}

/// Gives the namespace the world's address.
pub(crate) fn world() {
    ip(&format!("address add {WORLD}/32 dev lo"));
}

/// Bytes that repeat at no power of two.
pub(crate) fn pattern(len: usize, salt: u32) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(salt) >> 13) as u8).collect()
}

/// Sends `data` while it receives, closes its half, and returns all that came.
pub(crate) fn exchange(stream: TcpStream, data: Vec<u8>) -> Vec<u8> {
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    let mut stream = stream;
    stream.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    got
}

/// Sends all of `data`, and says once on `full` how much was sent when nothing more fits between here and the reader.
pub(crate) fn send_and_tell(mut stream: TcpStream, data: &[u8], full: &mpsc::Sender<usize>) {
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let (mut sent, mut told) = (0, false);
    while sent < data.len() {
        match stream.write(&data[sent..]) {
            Ok(n) => sent += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock && told => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                full.send(sent).unwrap();
                told = true;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// All that comes until the other end closes.
pub(crate) fn read_all(mut stream: TcpStream) -> Vec<u8> {
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    got
}

/// Sends back every byte that comes.
pub(crate) fn echo(mut stream: TcpStream) {
    let mut byte = [0];
    while stream.read(&mut byte).is_ok_and(|n| n == 1) && stream.write_all(&byte).is_ok() {}
}

/// Descriptors that this process has open.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
