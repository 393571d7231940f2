//! Dialogues between a guest's driver and programs on the host.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;

use super::connection::Key;
use super::packet::{HEADER_LEN, Header, Op, STREAM, Shutdown};
use super::*;
use crate::virtio::F_EVENT_IDX;
use crate::virtio::testing::{DATA, Driver, into, out};

mod close;
mod connect;
mod credit;
mod hostile;
mod life;
mod soak;
mod streams;

/// Bytes of a receive buffer, header included: as Linux has it.
const BUFFER: usize = 4096;
/// Receive buffers, then a place for packets to be sent.
const BUFFERS: u64 = DATA;
const OUTGOING: u64 = DATA + (8 << 20);
/// Credit that the guest gives unless a test says otherwise.
const ROOM: u32 = 64 << 10;

/// A guest with its vsock device, and the folder with the host's sockets.
struct Lab {
    guest: Driver,
    monitor: VsockMonitor,
    dir: TempDir,
    /// Receive buffers in the ring: where they are.
    posted: HashMap<u16, (u64, usize)>,
    next_buffer: u64,
    next_outgoing: u64,
    /// Packets that were received and not looked at.
    inbox: Vec<(Header, Vec<u8>)>,
}

impl Lab {
    /// A running driver without receive buffers.
    fn starved(features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (vsock, worker) = Vsock::new(GUEST_CID, &dir.path().join("v")).unwrap();
        let monitor = vsock.monitor();
        let mut guest = Driver::new(vsock, worker);
        guest.start(features);
        let posted = HashMap::new();
        Self { guest, monitor, dir, posted, next_buffer: 0, next_outgoing: 0, inbox: Vec::new() }
    }

    /// A running driver with receive buffers.
    fn new() -> Self {
        let mut lab = Self::starved(F_EVENT_IDX);
        lab.post(64);
        lab
    }

    /// Makes so many receive buffers available.
    fn post(&mut self, count: usize) {
        for _ in 0..count {
            self.post_of(BUFFER);
        }
        self.guest.kick_and_run(RX);
    }

    /// Makes one receive buffer of `len` bytes available, without telling the device.
    fn post_of(&mut self, len: usize) {
        let addr = BUFFERS + self.next_buffer % 512 * BUFFER as u64;
        self.next_buffer += 1;
        let head = self.guest.add(RX, &[into(addr, len)]);
        self.posted.insert(head, (addr, len));
    }

    /// Fetches what the device has given, and makes as many buffers available again if `repost`.
    fn fetch(&mut self, repost: bool) {
        loop {
            let used = self.guest.used(RX);
            if used.is_empty() {
                return;
            }
            let count = used.len();
            for (head, len) in used {
                let (addr, room) = self.posted.remove(&head).unwrap();
                assert!(len as usize <= room);
                let header = Header::parse(self.guest.bytes(addr, HEADER_LEN).try_into().unwrap());
                let payload = self.guest.bytes(addr + HEADER_LEN as u64, header.len as usize);
                assert_eq!(len as usize, HEADER_LEN + payload.len());
                assert_eq!((header.dst_cid, header.kind), (GUEST_CID, STREAM));
                self.inbox.push((header, payload));
            }
            if repost {
                self.post(count);
            }
        }
    }

    /// The packets for the guest since the last look.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.guest.run();
        self.fetch(true);
        std::mem::take(&mut self.inbox)
    }

    /// The operations of the packets for the guest since the last look.
    fn ops(&mut self) -> Vec<Op> {
        self.packets().iter().map(|(header, _)| Op::parse(header.op).unwrap()).collect()
    }

    /// The only packet for the guest since the last look, which has this operation.
    fn packet(&mut self, op: Op) -> (Header, Vec<u8>) {
        let mut all = self.packets();
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(Op::parse(all[0].0.op), Some(op), "{all:?}");
        all.pop().unwrap()
    }

    /// A packet of the guest in the connection `key`, with the usual credit.
    fn header(&self, key: Key, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: key.guest,
            dst_port: key.host,
            kind: STREAM,
            op: op as u16,
            buf_alloc: ROOM,
            ..Header::default()
        }
    }

    /// Makes a packet available, in one buffer, and lets the device work.
    fn send_header(&mut self, header: Header, payload: &[u8]) {
        let addr = OUTGOING + self.next_outgoing % 4 * (1 << 19);
        self.next_outgoing += 1;
        self.guest.fill(addr, &header.to_bytes());
        self.guest.fill(addr + HEADER_LEN as u64, payload);
        self.guest.add(TX, &[out(addr, HEADER_LEN + payload.len())]);
        self.guest.kick_and_run(TX);
        let used = self.guest.used(TX);
        assert!(used.iter().all(|(_, len)| *len == 0));
    }

    fn send(&mut self, key: Key, op: Op) {
        self.send_header(self.header(key, op), &[]);
    }

    fn send_data(&mut self, key: Key, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..self.header(key, Op::Rw) };
        self.send_header(header, payload);
    }

    fn send_shutdown(&mut self, key: Key, flags: Shutdown) {
        self.send_header(Header { flags: flags.bits(), ..self.header(key, Op::Shutdown) }, &[]);
    }

    /// The guest tells what it has room for and has forwarded.
    fn send_credit(&mut self, key: Key, buf_alloc: u32, fwd_cnt: u32) {
        self.send_header(Header { buf_alloc, fwd_cnt, ..self.header(key, Op::CreditUpdate) }, &[]);
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("v")
    }

    /// A program on the host that has connected and said nothing.
    fn stranger(&mut self) -> UnixStream {
        let client = UnixStream::connect(self.path()).unwrap();
        client.set_nonblocking(true).unwrap();
        self.guest.run();
        client
    }

    /// A client that asks for the guest's port; what the guest then gets.
    fn client(&mut self, port: u32) -> (UnixStream, Key) {
        let mut client = self.stranger();
        writeln!(client, "CONNECT {port}").unwrap();
        let (request, _) = self.packet(Op::Request);
        assert_eq!((request.src_cid, request.dst_port, request.buf_alloc), (HOST_CID, port, BUF_ALLOC));
        (client, Key { host: request.src_port, guest: port })
    }

    /// A client whose connection the guest has accepted.
    fn connected(&mut self, port: u32) -> (UnixStream, Key) {
        let (mut client, key) = self.client(port);
        self.send(key, Op::Response);
        assert_eq!(read(&mut client), format!("OK {}\n", key.host).as_bytes());
        (client, key)
    }

    /// A server on the host's port, to be connected to by the guest.
    fn server(&self, port: u32) -> UnixListener {
        let listener = UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// A connection that the guest has made to a server on the host.
    fn accepted(&mut self, key: Key) -> UnixStream {
        let server = self.server(key.host);
        self.send(key, Op::Request);
        let (header, _) = self.packet(Op::Response);
        assert_eq!((header.src_port, header.dst_port, header.buf_alloc), (key.host, key.guest, BUF_ALLOC));
        let (stream, _) = server.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    fn totals(&self) -> VsockTotals {
        self.monitor.totals()
    }

    fn refused(&self, why: Refusal) -> u64 {
        self.totals().refused(why)
    }
}

/// What a stream holds now.
fn read(stream: &mut UnixStream) -> Vec<u8> {
    let (mut all, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return all,
            Ok(len) => all.extend(&chunk[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The peer has closed its end, or shut down its sending.
fn is_at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

/// Bytes that tell where in a stream they are.
fn pattern(start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8).collect()
}

/// Writes until the stream takes no more; how much it took.
fn stuff(stream: &mut UnixStream, start: usize, max: usize) -> usize {
    let mut done = 0;
    while done < max {
        match stream.write(&pattern(start + done, (max - done).min(1 << 16))) {
            Ok(len) => done += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    done
}
