//! A small world for guests that are to prove something: echo and DNS servers on this host's loopback.
//!
//! `pontoon check` and the tests use it. A guest reaches them at the gateway's address (`--host-access` does that for any guest), so the check
//! needs no internet, and what it measures is this host and Pontoon alone. Every server ends with [`World`]:
//! its sockets are shut down and its threads joined. Each serves at most [`MAX_CONNECTIONS`] connections, and
//! a connection that says nothing for [`IDLE`] is closed.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The name that the world's DNS server knows.
pub const WORLD_NAME: &str = "world.test";

const MAX_CONNECTIONS: usize = 64;
const IDLE: Duration = Duration::from_secs(20);

/// The servers, until it is dropped.
///
/// ```
/// use std::io::{Read, Write};
/// use std::net::{Ipv4Addr, Shutdown, TcpStream};
///
/// use vmm::world::World;
///
/// let world = World::start(Ipv4Addr::new(192, 168, 122, 1))?;
/// let mut stream = TcpStream::connect(world.tcp_echo)?;
/// stream.write_all(b"hello")?;
/// stream.shutdown(Shutdown::Write)?;
/// let mut back = String::new();
/// stream.read_to_string(&mut back)?;
/// assert_eq!(back, "hello");
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct World {
    /// Echoes TCP streams.
    pub tcp_echo: SocketAddr,
    /// Echoes UDP datagrams.
    pub udp_echo: SocketAddr,
    /// Answers [`WORLD_NAME`] with the address given to [`World::start`].
    pub dns: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl World {
    /// Starts the servers on free ports of 127.0.0.1; the DNS server answers with `address`.
    ///
    /// # Errors
    /// When this process may not have sockets or threads.
    pub fn start(address: Ipv4Addr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let dns = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tcp_echo, udp_echo, dns_addr) = (listener.local_addr()?, udp.local_addr()?, dns.local_addr()?);
        let threads = vec![
            serve(&stop, "world-tcp", move |stop| echo_streams(&listener, stop))?,
            serve(&stop, "world-udp", move |stop| {
                answer_datagrams(&udp, stop, |request| Some(request.to_vec()))
            })?,
            serve(&stop, "world-dns", move |stop| {
                answer_datagrams(&dns, stop, |query| answer_dns(query, address))
            })?,
        ];
        Ok(Self { tcp_echo, udp_echo, dns: dns_addr, stop, threads })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Each server is woken from its wait by something to read.
        let _ = TcpStream::connect(self.tcp_echo);
        if let Ok(socket) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)) {
            let _ = socket.send_to(&[], self.udp_echo);
            let _ = socket.send_to(&[], self.dns);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(
    stop: &Arc<AtomicBool>,
    name: &str,
    work: impl FnOnce(&AtomicBool) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let stop = Arc::clone(stop);
    std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&stop))
}

fn echo_streams(listener: &TcpListener, stop: &AtomicBool) {
    for stream in listener.incoming().take(MAX_CONNECTIONS) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(stream) = stream {
            // A client that vanishes is the client's affair.
            let _ = echo(&stream);
        }
    }
}

fn echo(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

fn answer_datagrams(socket: &UdpSocket, stop: &AtomicBool, answer: impl Fn(&[u8]) -> Option<Vec<u8>>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if let Some(reply) = answer(&buffer[..length]) {
            let _ = socket.send_to(&reply, peer);
        }
    }
}

/// Answers one question (RFC 1035 §4.1): A of [`WORLD_NAME`] with `address`, anything else with NXDOMAIN.
fn answer_dns(query: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    let mut name = Vec::new();
    for label in WORLD_NAME.split('.') {
        name.push(u8::try_from(label.len()).ok()?);
        name.extend_from_slice(label.as_bytes());
    }
    name.push(0);
    let rest = query.get(HEADER..)?;
    let end = rest.iter().position(|b| *b == 0)? + 1;
    let question = rest.get(..end + 4)?;
    let ours = question[..end].eq_ignore_ascii_case(&name) && question[end..] == [0, 1, 0, 1];
    let mut reply = query[..2].to_vec();
    // QR, RD, RA; the low four bits are the response code.
    reply.extend_from_slice(&[0x81, if ours { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(ours), 0, 0, 0, 0]);
    reply.extend_from_slice(question);
    if ours {
        // A pointer to the question's name, type A, class IN, 60 s, four bytes of address.
        reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        reply.extend_from_slice(&address.octets());
    }
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_world_echoes_answers_and_ends() {
        let world = World::start(Ipv4Addr::new(192, 0, 2, 7)).expect("loopback has free ports");
        let mut stream = TcpStream::connect(world.tcp_echo).expect("the server listens");
        stream.write_all(b"hello").expect("the connection is open");
        let mut back = [0; 5];
        stream.read_exact(&mut back).expect("the server echoes");
        assert_eq!(&back, b"hello");
        drop(stream);
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has free ports");
        socket.set_read_timeout(Some(IDLE)).expect("a time-out is not zero");
        let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05World\x04test\x00\x00\x01\x00\x01";
        socket.send_to(query, world.dns).expect("the server listens");
        let mut reply = [0; 512];
        let (length, _) = socket.recv_from(&mut reply).expect("the server answers");
        assert_eq!(&reply[..2], b"\x12\x34");
        assert_eq!(&reply[length - 4..length], [192, 0, 2, 7]);
        drop(world);
    }

    #[test]
    fn other_names_do_not_exist_and_garbage_is_not_answered() {
        let other = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01x\x00\x00\x01\x00\x01";
        assert_eq!(answer_dns(other, Ipv4Addr::LOCALHOST).expect("it is a question")[3] & 15, 3);
        assert_eq!(answer_dns(&other[..14], Ipv4Addr::LOCALHOST), None);
        assert_eq!(answer_dns(&[], Ipv4Addr::LOCALHOST), None);
    }
}
