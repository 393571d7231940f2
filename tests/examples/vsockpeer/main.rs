//! Both ends of the end-to-end test of vsock: one program in a guest with a stock kernel, one on the host.
//!
//! ```text
//! vsockpeer host PATH BYTES CONNECTIONS COMMAND…   starts COMMAND, which boots the guest with --vsock PATH; ends as it ends
//! vsockpeer guest                                  what the guest runs
//! ```
//!
//! The guest dials the host's port [`CONTROL`] when it is ready, and takes orders there, a line each; it answers `ok` or
//! what went wrong. A connection begins with a line of its own, [`Task`], and carries a pattern each way at the same time,
//! which the other end compares byte by byte. The last order ends the guest with status 0 if nothing went wrong.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program whose output is its result")]

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

mod sys;

/// Host port of the orders.
const CONTROL: u32 = 5000;
/// Host port for the guest's connections.
const DIALLED: u32 = 5001;
/// Host port that nobody serves.
const NOBODY: u32 = 5999;
/// Guest port.
const SERVED: u32 = 1234;
/// Guest port that nobody serves.
const CLOSED: u32 = 1235;

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match &args[..] {
        ["guest"] => guest(),
        ["host", path, bytes, connections, command @ ..] => {
            host(Path::new(path), bytes.parse()?, connections.parse()?, command)
        }
        _ => bail!("vsockpeer guest, or vsockpeer host PATH BYTES CONNECTIONS COMMAND…"),
    }
}

/// What a connection is to carry; both ends know it from its first line.
#[derive(Clone, Copy, Debug)]
struct Task {
    seed: u64,
    to_guest: u64,
    to_host: u64,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.seed, self.to_guest, self.to_host)
    }
}

impl FromStr for Task {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        let [seed, to_guest, to_host] = numbers[..] else { bail!("not a task: {text:?}") };
        Ok(Self { seed, to_guest, to_host })
    }
}

/// An endless stream that differs from seed to seed and never repeats (splitmix64).
struct Pattern {
    state: u64,
}

impl Pattern {
    fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x1234_5678_9abc_def1) }
    }

    /// The next bytes; `out` is a whole number of words but at the stream's end.
    fn fill(&mut self, out: &mut [u8]) {
        for word in out.chunks_mut(8) {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..word.len()]);
        }
    }
}

const CHUNK: usize = 64 << 10;

fn send(mut stream: &UnixStream, seed: u64, mut left: u64) -> Result<()> {
    let (mut pattern, mut chunk) = (Pattern::new(seed), vec![0; CHUNK]);
    while left > 0 {
        let len = left.min(CHUNK as u64) as usize;
        pattern.fill(&mut chunk[..len]);
        stream.write_all(&chunk[..len]).context("writing")?;
        left -= len as u64;
    }
    Ok(())
}

/// Reads until the end of the stream, which must be `total` bytes of the pattern.
fn receive(stream: &mut impl Read, seed: u64, total: u64) -> Result<()> {
    let (mut pattern, mut got, mut expected) = (Pattern::new(seed), vec![0; CHUNK], vec![0; CHUNK]);
    let mut done = 0u64;
    loop {
        let mut len = 0;
        while len < CHUNK {
            match stream.read(&mut got[len..]).with_context(|| format!("reading behind byte {done}"))? {
                0 => break,
                n => len += n,
            }
        }
        pattern.fill(&mut expected[..len]);
        ensure!(got[..len] == expected[..len], "wrong bytes behind byte {done}");
        done += len as u64;
        if len < CHUNK {
            break;
        }
    }
    ensure!(done == total, "{done} bytes came instead of {total}");
    Ok(())
}

/// Sends one stream and receives the other at the same time.
fn duplex(stream: &UnixStream, rest: &mut impl Read, sends: (u64, u64), receives: (u64, u64)) -> Result<()> {
    thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<()> {
            send(stream, sends.0, sends.1)?;
            Ok(stream.shutdown(Shutdown::Write)?)
        });
        let received = receive(rest, receives.0, receives.1);
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        received
    })
}

fn line(reader: &mut impl BufRead) -> Result<String> {
    let mut text = String::new();
    reader.read_line(&mut text)?;
    Ok(text.trim_end().to_owned())
}

// The guest.

/// A vsock stream as std reads and writes it.
fn stream(fd: OwnedFd) -> UnixStream {
    fd.into()
}

fn guest() -> Result<ExitCode> {
    let listener = sys::listen(SERVED).context("listening; is the driver loaded?")?;
    let faults = Arc::new(Mutex::new(Vec::new()));
    {
        let faults = Arc::clone(&faults);
        thread::spawn(move || {
            while let Ok(fd) = sys::accept(listener.as_raw_fd()) {
                let faults = Arc::clone(&faults);
                thread::spawn(move || {
                    if let Err(error) = serve(&stream(fd)) {
                        faults.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{error:#}"));
                    }
                });
            }
        });
    }
    let control = stream(sys::connect(CONTROL).context("dialling the host")?);
    let mut orders = BufReader::new(control.try_clone()?);
    loop {
        let order = line(&mut orders)?;
        let answer = match obey(&order) {
            Ok(true) => break,
            Ok(false) => "ok".to_owned(),
            Err(error) => format!("{order}: {error:#}"),
        };
        writeln!(&control, "{answer}")?;
    }
    let faults = faults.lock().unwrap_or_else(PoisonError::into_inner);
    for fault in faults.iter() {
        println!("guest: {fault}");
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn serve(stream: &UnixStream) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let Task { seed, to_guest, to_host } = line(&mut reader)?.parse()?;
    duplex(stream, &mut reader, (seed + 1, to_host), (seed, to_guest))
}

/// Does what the host orders; whether that is the end.
fn obey(order: &str) -> Result<bool> {
    let (verb, rest) = order.split_once(' ').unwrap_or((order, ""));
    match verb {
        "dial" => dial(&rest.parse()?)?,
        "burst" => burst(&rest.parse()?)?,
        "pages" => pages(&rest.parse()?)?,
        "refused" => match sys::connect(rest.parse()?) {
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {}
            other => bail!("expected ECONNRESET, got {other:?}"),
        },
        "quit" => return Ok(true),
        _ => bail!("no such order"),
    }
    Ok(false)
}

/// A connection to the host that carries both streams.
fn dial(task: &Task) -> Result<()> {
    let stream = stream(sys::connect(DIALLED)?);
    writeln!(&stream, "{task}")?;
    duplex(&stream, &mut &stream, (task.seed + 1, task.to_host), (task.seed, task.to_guest))
}

/// Everything at once, and closed without waiting for anybody to read it.
fn burst(task: &Task) -> Result<()> {
    let stream = stream(sys::connect(DIALLED)?);
    writeln!(&stream, "{task}")?;
    send(&stream, task.seed + 1, task.to_host)
}

/// As a burst, with packets whose payload is in many pieces, where the kernel has such.
fn pages(task: &Task) -> Result<()> {
    let stream = stream(sys::connect(DIALLED)?);
    writeln!(&stream, "{task}")?;
    if !sys::allow_zero_copy(stream.as_raw_fd()) {
        return send(&stream, task.seed + 1, task.to_host);
    }
    println!("guest: its kernel leaves payload where it is");
    let mut bytes = vec![0; task.to_host as usize];
    Pattern::new(task.seed + 1).fill(&mut bytes);
    let mut left: &'static [u8] = bytes.leak();
    while !left.is_empty() {
        let sent = sys::send_zero_copy(stream.as_raw_fd(), &left[..left.len().min(CHUNK)])?;
        left = &left[sent..];
    }
    Ok(())
}

// The host.

/// What the host has of the guest.
struct Guest<'a> {
    path: &'a Path,
    control: UnixStream,
    answers: BufReader<UnixStream>,
    dialled: UnixListener,
}

fn listen(path: &Path, port: u32) -> Result<UnixListener> {
    let path = format!("{}_{port}", path.display());
    UnixListener::bind(&path).with_context(|| format!("listening on {path}"))
}

fn host(path: &Path, bytes: u64, connections: u64, command: &[&str]) -> Result<ExitCode> {
    let (program, args) = command.split_first().context("COMMAND is missing")?;
    let (control, dialled) = (listen(path, CONTROL)?, listen(path, DIALLED)?);
    let mut child =
        Command::new(program).args(args).spawn().with_context(|| format!("starting {program}"))?;
    // Whoever runs this bounds its time.
    let (control, _) = control.accept()?;
    let answers = BufReader::new(control.try_clone()?);
    let mut guest = Guest { path, control, answers, dialled };
    guest.try_all(bytes, connections)?;
    writeln!(&guest.control, "quit")?;
    let status = child.wait()?;
    ensure!(status.success(), "the guest found something wrong: {status}");
    ensure!(!path.exists(), "the machine left {}", path.display());
    println!("all streams arrived whole");
    Ok(ExitCode::SUCCESS)
}

impl Guest<'_> {
    fn try_all(&mut self, bytes: u64, connections: u64) -> Result<()> {
        let whole = |seed| Task { seed, to_guest: bytes, to_host: bytes };
        println!("host to guest, {bytes} bytes both ways");
        self.ask(SERVED, &whole(1))?;
        println!("guest to host, {bytes} bytes both ways");
        self.order(&format!("dial {}", whole(100)), |guest| guest.answer(false))?;
        println!("{connections} connections at once");
        let part = bytes / connections;
        thread::scope(|scope| -> Result<()> {
            let this = &*self;
            let task = |n| Task { seed: 1000 + 2 * n, to_guest: part, to_host: part + n };
            let all: Vec<_> =
                (0..connections).map(|n| scope.spawn(move || this.ask(SERVED, &task(n)))).collect();
            for one in all {
                one.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            }
            Ok(())
        })?;
        println!("a guest that closes at once");
        let task = Task { seed: 200, to_guest: 0, to_host: bytes };
        self.order(&format!("burst {task}"), |guest| guest.answer(true))?;
        println!("pages in many pieces");
        let task = Task { seed: 300, to_guest: 0, to_host: 512 << 10 };
        self.order(&format!("pages {task}"), |guest| guest.answer(true))?;
        println!("ports that nobody serves");
        self.order(&format!("refused {NOBODY}"), |_| Ok(()))?;
        let refused = self.ask(CLOSED, &whole(1)).err().context("a closed port of the guest answered")?;
        ensure!(refused.to_string().contains("refused"), "{refused:#}");
        println!("{connections} short connections, one after the other");
        for n in 0..connections {
            self.ask(SERVED, &Task { seed: n, to_guest: n, to_host: 1 })?;
        }
        Ok(())
    }

    /// A connection to the guest's port, as a client of the socket makes it.
    fn ask(&self, port: u32, task: &Task) -> Result<()> {
        let stream = UnixStream::connect(self.path)?;
        writeln!(&stream, "CONNECT {port}")?;
        let mut reader = BufReader::new(&stream);
        let answer = line(&mut reader)?;
        ensure!(answer.starts_with("OK "), "refused: {answer:?}");
        writeln!(&stream, "{task}")?;
        duplex(&stream, &mut reader, (task.seed, task.to_guest), (task.seed + 1, task.to_host))
    }

    /// Serves a connection of the guest; a burst's sender is gone before anything is read.
    fn answer(&self, one_way: bool) -> Result<()> {
        let (stream, _) = self.dialled.accept()?;
        let mut reader = BufReader::new(&stream);
        let Task { seed, to_guest, to_host } = line(&mut reader)?.parse()?;
        if one_way {
            return receive(&mut reader, seed + 1, to_host);
        }
        duplex(&stream, &mut reader, (seed, to_guest), (seed + 1, to_host))
    }

    /// Gives an order, does the host's share, and hears how it went.
    fn order(&mut self, order: &str, share: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        writeln!(&self.control, "{order}")?;
        share(self).with_context(|| format!("the host's share of '{order}'"))?;
        let answer = line(&mut self.answers)?;
        ensure!(answer == "ok", "the guest says: {answer}");
        Ok(())
    }
}
