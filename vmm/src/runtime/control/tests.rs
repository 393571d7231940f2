//! Dialogues with a server on a thread of its own; the machine behind it has no devices.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use net::nat::{Nat, NatConfig};
use proptest::prelude::*;

use super::super::{Scrollback, Tee};
use super::*;
use crate::machine::{ExitReason, Remote};

struct Machine {
    _dir: tempfile::TempDir,
    path: PathBuf,
    remote: Remote,
    stop_asked: StopAsked,
    output: Tee<std::io::Sink>,
    typed: std::fs::File,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Machine {
    fn new() -> Self {
        Self::with(true)
    }

    fn with(console: bool) -> Self {
        Self::on(console, None)
    }

    fn on(console: bool, nat: Option<net::nat::NatHandle>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let scrollback = Scrollback::new().unwrap();
        let (to_console, typed) = Console::new(scrollback.clone()).unwrap();
        let control = Control::bind(&path).unwrap();
        let control = if console { control.console(to_console) } else { control };
        let control = match nat {
            Some(nat) => control.nat(nat).unwrap(),
            None => control,
        };
        let remote = Remote::to_nothing();
        let stop_asked = control.stop_asked();
        let worker = control.serve(remote.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut events = EventManager::<Box<dyn MutEventSubscriber + Send>>::new().unwrap();
            events.add_subscriber(worker);
            while !until.load(Ordering::Relaxed) {
                events.run_with_timeout(20).unwrap();
            }
        });
        let typed = blocking(typed);
        let output = scrollback.tee(std::io::sink());
        Self { _dir: dir, path, remote, stop_asked, output, typed, stop, thread: Some(thread) }
    }

    fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    /// A connection without the client's manners.
    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn says(&mut self, text: &[u8]) {
        self.output.write_all(text).unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok(), "the server panicked");
    }
}

fn blocking(fd: OwnedFd) -> std::fs::File {
    rustix::io::ioctl_fionbio(&fd, false).unwrap();
    fd.into()
}

/// The next `len` bytes.
fn read(stream: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn ask(stream: &mut UnixStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    while !answer.ends_with('\n') {
        answer.push(char::from(read(stream, 1)[0]));
    }
    answer
}

fn refused<T: std::fmt::Debug>(result: Result<T, ControlError>) -> String {
    match result {
        Err(ControlError::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_end_that_is_asked_for_is_remembered() {
    for ask in [Client::stopping, Client::power_button] {
        let machine = Machine::new();
        machine.client().status().unwrap();
        assert!(!machine.stop_asked.is_set());
        ask(&mut machine.client()).unwrap();
        assert!(machine.stop_asked.is_set() && machine.remote.exit_reason().is_none());
    }
}

#[test]
fn a_machine_tells_its_status_and_ends_when_told() {
    let machine = Machine::new();
    let mut client = machine.client();
    assert_eq!(client.status().unwrap().consoles, 0);
    assert_eq!(machine.remote.exit_reason(), None);
    client.power_button().unwrap();
    assert_eq!(machine.remote.exit_reason(), None, "that is the guest's to decide");
    client.kill().unwrap();
    assert_eq!(machine.remote.exit_reason(), Some(ExitReason::Stopped));
    client.status().unwrap();
}

#[test]
fn what_is_no_request_is_refused_and_the_next_one_answered() {
    let machine = Machine::new();
    let mut stream = machine.raw();
    for bad in
        ["hello\n", "{}\n", "{\"do\":\"dance\"}\n", "\n", "[[[[\n", "{\"do\":\"connect\",\"port\":70000}\n"]
    {
        let answer = ask(&mut stream, bad);
        assert!(answer.starts_with(r#"{"error":"#) && answer.contains(r#""ok":false"#), "{answer}");
    }
    assert!(ask(&mut stream, "{\"do\":\"status\"}\n").contains(r#""ok":true"#));
    // Two at once are two answers.
    let first = ask(&mut stream, "{\"do\":\"status\"}\n{\"do\":\"status\"}\n");
    assert_eq!(ask(&mut stream, "").split("uptime").next(), first.split("uptime").next());
}

#[test]
fn a_request_without_end_is_refused_and_its_client_sent_away() {
    let machine = Machine::new();
    let mut stream = machine.raw();
    let answer = ask(&mut stream, &"x".repeat(LINE_MAX));
    assert!(answer.contains("4096"), "{answer}");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    machine.client().status().unwrap();
}

#[test]
fn readers_get_what_was_said_and_what_is_said() {
    let mut machine = Machine::new();
    machine.says(b"early ");
    let (mut first, _) = machine.client().console(false).unwrap();
    assert_eq!(read(&mut first, 6), b"early ");
    machine.says(b"middle ");
    let (mut second, _) = machine.client().console(false).unwrap();
    machine.says(b"late");
    assert_eq!(read(&mut first, 11), b"middle late");
    assert_eq!(read(&mut second, 17), b"early middle late");
    assert_eq!(machine.client().status().unwrap().consoles, 2);
}

#[test]
fn one_types_and_the_next_may_when_that_one_has_left() {
    let mut machine = Machine::new();
    let (mut first, writer) = machine.client().console(true).unwrap();
    assert!(writer);
    let (mut second, writer) = machine.client().console(true).unwrap();
    assert!(!writer);
    second.write_all(b"nobody hears this").unwrap();
    first.write_all(b"ls\n").unwrap();
    assert_eq!(read(&mut machine.typed, 3), b"ls\n");
    drop(first);
    let mut third = loop {
        let (stream, writer) = machine.client().console(true).unwrap();
        if writer {
            break stream;
        }
    };
    third.write_all(b"x").unwrap();
    assert_eq!(read(&mut machine.typed, 1), b"x");
    // Who types no more goes on reading.
    third.shutdown(std::net::Shutdown::Write).unwrap();
    machine.says(b"bye");
    assert_eq!((read(&mut third, 3), read(&mut second, 3)), (b"bye".to_vec(), b"bye".to_vec()));
}

#[test]
fn what_is_typed_faster_than_the_guest_takes_it_arrives_whole() {
    let mut machine = Machine::new();
    let (mut stream, _) = machine.client().console(true).unwrap();
    let text: Vec<u8> = (0..400_000u32).map(|n| (n % 251) as u8).collect();
    let copy = text.clone();
    let typist = std::thread::spawn(move || {
        stream.write_all(&copy).unwrap();
        stream
    });
    // Meanwhile others are served, and nobody's request costs the typist its turn.
    for piece in text.chunks(4000) {
        assert!(read(&mut machine.typed, piece.len()) == piece);
        machine.client().status().unwrap();
    }
    typist.join().unwrap();
}

#[test]
fn a_reader_that_does_not_read_is_cut_off_and_others_are_not() {
    let mut machine = Machine::new();
    let (mut lazy, _) = machine.client().console(false).unwrap();
    let (mut eager, _) = machine.client().console(false).unwrap();
    let mut said = 0;
    for _ in 0..128 {
        machine.says(&[b'x'; 16 << 10]);
        said += 16 << 10;
        read(&mut eager, 16 << 10);
    }
    let mut got = Vec::new();
    lazy.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    lazy.read_to_end(&mut got).unwrap();
    assert!(got.len() < said, "{} bytes", got.len());
    assert_eq!(machine.client().status().unwrap().consoles, 1);
}

#[test]
fn when_all_places_are_taken_the_one_that_asked_nothing_for_longest_gives_way() {
    let machine = Machine::new();
    let mut old = machine.raw();
    let mut active = machine.raw();
    let rest: Vec<_> = (2..CLIENTS_MAX).map(|_| machine.raw()).collect();
    ask(&mut active, "{\"do\":\"status\"}\n");
    machine.client().status().unwrap();
    assert_eq!(old.read(&mut [0]).unwrap(), 0, "the oldest was sent away");
    ask(&mut active, "{\"do\":\"status\"}\n");
    drop(rest);
}

#[test]
fn consoles_do_not_give_way() {
    let machine = Machine::new();
    let consoles: Vec<_> = (0..CLIENTS_MAX).map(|_| machine.client().console(false).unwrap()).collect();
    let mut late = machine.raw();
    let mut said = String::new();
    late.read_to_string(&mut said).unwrap();
    assert!(said.contains("as many attached consoles as it can serve"), "{said}");
    drop(consoles);
    // Their places are free again, as soon as the server has seen that they are gone.
    while machine.client().status().is_err() {}
}

#[test]
fn a_machine_on_a_terminal_lets_nobody_attach_and_goes_on_answering() {
    let machine = Machine::with(false);
    assert!(refused(machine.client().console(true)).contains("terminal"));
    machine.client().status().unwrap();
}

#[test]
fn a_connection_into_the_guest_is_the_networks_and_its_refusal_an_answer() {
    let mut nat = Nat::new(NatConfig::default()).unwrap();
    let machine = Machine::on(false, Some(nat.handle().unwrap()));
    let why = refused(machine.client().open(Some(Ipv4Addr::new(10, 0, 0, 1)), 22));
    assert!(why.contains("10.0.0.1"), "{why}");
    let mut impatient = machine.raw();
    let answer = ask(&mut impatient, "{\"do\":\"connect\",\"port\":22}\nSSH-2.0\r\n");
    assert!(answer.contains("wait for the answer"), "{answer}");
    let mut stream = machine.client().open(None, 22).unwrap();
    stream.write_all(b"waits for a guest").unwrap();
    machine.client().status().unwrap();
    drop(nat);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "the network has ended, and the connection with it");
    assert!(refused(machine.client().open(None, 22)).contains("ended"));
}

#[test]
fn connections_are_told_later_and_their_question_never_stays_open() {
    let mut nat = Nat::new(NatConfig::default()).unwrap();
    let machine = Machine::on(false, Some(nat.handle().unwrap()));
    let mut asking = machine.raw();
    // Nobody serves this network, so the answer is its end; what was asked behind is answered behind.
    asking.write_all(b"{\"do\":\"flows\"}\n{\"do\":\"status\"}\n").unwrap();
    assert!(machine.client().status().unwrap().leases.is_empty());
    drop(nat);
    assert!(ask(&mut asking, "").contains("\"flows\":[]"));
    assert!(ask(&mut asking, "").contains("\"status\""));
    assert_eq!(machine.client().flows().unwrap(), []);
}

#[test]
fn a_machine_without_a_nat_lets_nobody_in() {
    let machine = Machine::new();
    assert!(refused(machine.client().open(None, 22)).contains("--net nat"));
    assert!(refused(machine.client().flows()).contains("--net nat"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn no_bytes_end_the_server(
        pieces in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                Just(b"{\"do\":\"status\"}\n".to_vec()),
                Just(b"{\"do\":\"console\",\"write\":true}\n".to_vec()),
                Just(vec![b'\n'; 3000]),
            ],
            0..12,
        )
    ) {
        let machine = Machine::new();
        for piece in &pieces {
            let mut stream = machine.raw();
            let _ = stream.write_all(piece);
        }
        let mut all = machine.raw();
        let _ = all.write_all(&pieces.concat());
        machine.client().status().unwrap();
    }
}
