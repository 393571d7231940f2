//! Both ends of the measurements of `scripts/bench/net` that iperf3 does not make: latency, connection rate, paced
//! datagrams, and connections that are only held.
//!
//! ```text
//! netload serve PORT                            TCP and UDP on PORT: answers, counts and sends datagrams
//! netload rr HOST PORT SECONDS                  one byte there and back, over one TCP connection
//! netload udprr HOST PORT SECONDS               the same by UDP
//! netload crr HOST PORT SECONDS CLIENTS         connect, one byte there and back, close
//! netload udp HOST PORT BYTES RATE SECONDS      datagrams to the server, RATE per second
//! netload udpr HOST PORT BYTES RATE SECONDS     datagrams from the server
//! netload hold HOST PORT COUNT                  opens connections and holds them until its input ends
//! ```
//!
//! Each client prints one line of `key=value`: times in microseconds, rates per second, losses as a fraction.
#![allow(clippy::print_stdout, reason = "a program whose output is its result")]

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::net::sockopt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// First byte of a datagram: what the server is to do with it.
const ECHO: u8 = b'P';
const COUNT: u8 = b'D';
const BLAST: u8 = b'B';
/// First byte of the last datagram of a blast: how many were sent follows.
const END: u8 = b'E';
/// First byte of a TCP stream: a ping-pong, one byte and the end, or the datagrams counted until now.
const PING: u8 = b'p';
const ONCE: u8 = b'o';
const ASK: u8 = b'?';
/// Room for bursts, so that what is lost was lost on the way.
const SOCKET_BUFFER: usize = 8 << 20;
/// Datagrams are sent in bursts this far apart.
const TICK: Duration = Duration::from_micros(100);

fn main() -> Result<()> {
    let files = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files, maximum: files });
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let ["serve", port] = args[..] {
        return serve(port.parse()?);
    }
    let [what, host, port, numbers @ ..] = &args[..] else {
        bail!("netload WHAT HOST PORT …; the head of netload.rs has the list")
    };
    let to: SocketAddr = format!("{host}:{port}").parse().context("HOST is an address")?;
    let numbers = numbers.iter().map(|text| text.parse()).collect::<Result<Vec<u32>, _>>()?;
    match (*what, &numbers[..]) {
        ("rr", [seconds]) => tcp_rr(to, *seconds),
        ("udprr", [seconds]) => udp_rr(to, *seconds),
        ("crr", [seconds, clients]) => connections(to, *seconds, *clients),
        ("udp", [bytes, rate, seconds]) => udp_up(to, *bytes as usize, *rate, *seconds),
        ("udpr", [bytes, rate, seconds]) => udp_down(to, *bytes, *rate, *seconds),
        ("hold", [count]) => hold(to, *count),
        _ => bail!("{what} with {} numbers: the head of netload.rs has the list", numbers.len()),
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(stream)
}

fn datagrams(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    widen(&socket);
    Ok(socket)
}

/// Larger buffers where the process may have them.
fn widen(socket: &UdpSocket) {
    let _ = sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER);
    let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER);
}

/// Prints the median and the 99th percentile, and the rate.
fn report(mut times: Vec<Duration>, seconds: f64) -> Result<()> {
    times.sort_unstable();
    let Some(last) = times.len().checked_sub(1) else { bail!("no round trip ended") };
    let micros = |at: usize| times[at.min(last)].as_secs_f64() * 1e6;
    println!(
        "p50={:.1} p99={:.1} rate={:.0}",
        micros(times.len() / 2),
        micros(times.len() * 99 / 100),
        times.len() as f64 / seconds
    );
    Ok(())
}

/// Repeats `once` for some seconds, and times it.
fn repeat(seconds: u32, mut once: impl FnMut() -> io::Result<()>) -> Result<()> {
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds.into());
    let mut times = Vec::new();
    let mut now = start;
    while now < end {
        once()?;
        let then = Instant::now();
        times.push(then - now);
        now = then;
    }
    report(times, start.elapsed().as_secs_f64())
}

fn tcp_rr(to: SocketAddr, seconds: u32) -> Result<()> {
    let mut stream = connect(to)?;
    repeat(seconds, || {
        stream.write_all(&[PING])?;
        stream.read_exact(&mut [0])
    })
}

fn udp_rr(to: SocketAddr, seconds: u32) -> Result<()> {
    let socket = datagrams(to)?;
    repeat(seconds, || {
        socket.send(&[ECHO])?;
        socket.recv(&mut [0]).map(drop)
    })
}

fn connections(to: SocketAddr, seconds: u32, clients: u32) -> Result<()> {
    let once = move || -> io::Result<Duration> {
        let start = Instant::now();
        let mut stream = connect(to)?;
        stream.write_all(&[ONCE])?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        if answer == [ONCE] { Ok(start.elapsed()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    };
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds.into());
    let client = move || {
        let mut times = Vec::new();
        while Instant::now() < end {
            times.push(once()?);
        }
        io::Result::Ok(times)
    };
    let clients: Vec<_> = (0..clients).map(|_| thread::spawn(client)).collect();
    let mut times = Vec::new();
    for client in clients {
        times.extend(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
    }
    report(times, start.elapsed().as_secs_f64())
}

/// How many datagrams the server has counted since the last question.
fn counted(to: SocketAddr) -> Result<u64> {
    let mut stream = connect(to)?;
    stream.write_all(&[ASK])?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.trim().parse()?)
}

/// Sends `rate` datagrams a second, and says how many.
fn paced(rate: u32, seconds: u32, mut send: impl FnMut() -> io::Result<usize>) -> u64 {
    let start = Instant::now();
    let (mut sent, mut due) = (0, 0);
    while start.elapsed() < Duration::from_secs(seconds.into()) {
        while sent < due {
            // A full queue is a loss like any other: it was to be sent.
            let _ = send();
            sent += 1;
        }
        due = (start.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        if sent >= due {
            thread::sleep(TICK);
        }
    }
    sent
}

fn losses(sent: u64, received: u64, seconds: u32) {
    let lost = 1.0 - received as f64 / sent.max(1) as f64;
    println!("rate={:.0} loss={:.5}", received as f64 / f64::from(seconds), lost.max(0.0));
}

fn udp_up(to: SocketAddr, bytes: usize, rate: u32, seconds: u32) -> Result<()> {
    counted(to)?;
    let socket = datagrams(to)?;
    let mut datagram = vec![0; bytes.max(1)];
    datagram[0] = COUNT;
    let sent = paced(rate, seconds, || socket.send(&datagram));
    thread::sleep(Duration::from_millis(300));
    losses(sent, counted(to)?, seconds);
    Ok(())
}

fn udp_down(to: SocketAddr, bytes: u32, rate: u32, seconds: u32) -> Result<()> {
    let socket = datagrams(to)?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    socket.send(format!("{}{bytes} {rate} {seconds}", char::from(BLAST)).as_bytes())?;
    let mut buffer = [0; 2048];
    let mut received = 0;
    loop {
        let len = socket.recv(&mut buffer).context("the end of the datagrams was lost")?;
        if buffer[0] == END {
            losses(String::from_utf8_lossy(&buffer[1..len]).parse()?, received, seconds);
            return Ok(());
        }
        received += 1;
    }
}

fn hold(to: SocketAddr, count: u32) -> Result<()> {
    let start = Instant::now();
    let streams = (0..count).map(|_| connect(to)).collect::<io::Result<Vec<_>>>()?;
    println!("held={} seconds={:.2}", streams.len(), start.elapsed().as_secs_f64());
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn serve(port: u16) -> Result<()> {
    let counter = Arc::new(AtomicU64::new(0));
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    widen(&socket);
    let counts = Arc::clone(&counter);
    thread::spawn(move || serve_datagrams(&socket, &counts));
    serve_streams(&TcpListener::bind(("0.0.0.0", port))?, &counter)
}

fn serve_datagrams(socket: &UdpSocket, counter: &AtomicU64) -> io::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        let (len, from) = socket.recv_from(&mut buffer)?;
        match buffer.first() {
            Some(&COUNT) => drop(counter.fetch_add(1, Ordering::Relaxed)),
            Some(&ECHO) => drop(socket.send_to(&buffer[..len], from)),
            Some(&BLAST) => {
                let order = String::from_utf8_lossy(&buffer[1..len]).into_owned();
                let socket = socket.try_clone()?;
                thread::spawn(move || blast(&socket, from, &order));
            }
            _ => {}
        }
    }
}

/// Sends what a client ordered: bytes, rate, seconds.
fn blast(socket: &UdpSocket, to: SocketAddr, order: &str) {
    let numbers: Vec<u32> = order.split(' ').filter_map(|number| number.parse().ok()).collect();
    let [bytes, rate, seconds] = numbers[..] else { return };
    let datagram = vec![COUNT; bytes.clamp(1, 2048) as usize];
    let sent = paced(rate, seconds, || socket.send_to(&datagram, to));
    thread::sleep(Duration::from_millis(300));
    for _ in 0..5 {
        let _ = socket.send_to(format!("{}{sent}", char::from(END)).as_bytes(), to);
        thread::sleep(Duration::from_millis(20));
    }
}

/// One thread for all streams, however many are held.
fn serve_streams(listener: &TcpListener, counter: &AtomicU64) -> Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let interest = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
    epoll::add(&epoll, listener, epoll::EventData::new_u64(0), interest)?;
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut next = 1;
    let mut events = Vec::with_capacity(256);
    loop {
        events.clear();
        epoll::wait(&epoll, spare_capacity(&mut events), None)?;
        for event in &events {
            let id = event.data.u64();
            if id == 0 {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                    epoll::add(&epoll, &stream, epoll::EventData::new_u64(next), interest)?;
                    streams.insert(next, stream);
                    next += 1;
                }
            } else if let Some(stream) = streams.get_mut(&id)
                && !answer(stream, counter)
            {
                streams.remove(&id);
            }
        }
    }
}

/// Answers what a stream has sent. Says whether it goes on.
fn answer(stream: &mut TcpStream, counter: &AtomicU64) -> bool {
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(1) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
        _ => return false,
    }
    match byte[0] {
        PING => stream.write_all(&byte).is_ok(),
        ONCE => {
            let _ = stream.write_all(&byte);
            false
        }
        ASK => {
            let _ = stream.write_all(counter.swap(0, Ordering::Relaxed).to_string().as_bytes());
            false
        }
        _ => false,
    }
}
