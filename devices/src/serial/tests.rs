use super::*;
use crate::irq::testing::CountingLine;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use event_manager::{EventManager, SubscriberOps};

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const MCR: u64 = 4;
const LSR: u64 = 5;
const LSR_DATA_READY: u8 = 1;
const IER_RX: u8 = 1;
const LOOPBACK: u8 = 0x10;

/// Collects; blocks in `write` until the other side says go.
struct Gate {
    go: Receiver<()>,
    taken: Arc<Mutex<Vec<u8>>>,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A closed channel means: from now on, everything may pass.
        let _ = self.go.recv();
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn blocking(sink: Box<dyn Write + Send>) -> Serial {
    Serial::new(CountingLine::new(), Sink::Blocking(sink)).unwrap().0
}

fn gated() -> (Serial, Sender<()>, Arc<Mutex<Vec<u8>>>) {
    let (tx, go) = channel();
    let taken = Arc::<Mutex<Vec<u8>>>::default();
    let sink = Box::new(Gate { go, taken: Arc::clone(&taken) });
    (blocking(sink), tx, taken)
}

fn get(serial: &mut Serial, offset: u64) -> u8 {
    let mut byte = [0];
    serial.read(offset, &mut byte);
    byte[0]
}

fn put(serial: &mut Serial, offset: u64, value: u8) {
    assert_eq!(serial.write(offset, &[value]), None);
}

#[test]
fn what_the_guest_sends_reaches_the_sink_in_order() {
    let (mut serial, go, taken) = gated();
    drop(go);
    let text: Vec<u8> = (0..5000).map(|n| n as u8).collect();
    for byte in &text {
        put(&mut serial, DATA, *byte);
    }
    drop(serial); // waits for the sink
    assert_eq!(*taken.lock().unwrap(), text);
}

#[test]
fn a_stalled_sink_loses_the_newest_bytes_and_never_the_vcpu() {
    let (mut serial, go, taken) = gated();
    // At most one buffer is with the sink and one waits for it.
    let sent = 2 * OUTPUT_BUFFER + 3000;
    for _ in 0..sent {
        put(&mut serial, DATA, b'x');
    }
    assert!(serial.output_lost() >= 3000);
    assert!(!serial.flush(Duration::ZERO));
    drop(go);
    assert!(serial.flush(Duration::from_secs(60)));
    put(&mut serial, DATA, b'y');
    assert!(serial.flush(Duration::from_secs(60)));
    let taken = taken.lock().unwrap();
    assert_eq!(taken.len() as u64 + serial.output_lost(), sent as u64 + 1);
    assert_eq!(taken.last(), Some(&b'y'), "it moves again");
}

#[test]
fn a_failed_sink_is_left_alone_and_everything_is_counted() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut serial = blocking(Box::new(Broken));
    put(&mut serial, DATA, b'a');
    assert!(serial.flush(Duration::from_secs(60)));
    put(&mut serial, DATA, b'b');
    assert_eq!(serial.output_lost(), 1, "the byte in the failed write is the sink's");
}

#[test]
fn a_nonblocking_sink_that_is_full_is_tried_again() {
    struct Shy(u32, Arc<Mutex<Vec<u8>>>);
    impl Write for Shy {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += 1;
            if self.0 % 2 == 1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.1.lock().unwrap().push(bytes[0]);
            Ok(1)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let taken = Arc::default();
    let mut serial = blocking(Box::new(Shy(0, Arc::clone(&taken))));
    for byte in *b"abc" {
        put(&mut serial, DATA, byte);
    }
    drop(serial);
    assert_eq!(*taken.lock().unwrap(), b"abc");
}

#[test]
fn input_beyond_the_fifo_waits_until_the_guest_has_read() {
    let line = CountingLine::new();
    let mut serial = Serial::new(line.clone(), Sink::Nowhere).unwrap().0;
    put(&mut serial, IER, IER_RX);
    line.take();
    let text: Vec<u8> = (0..100).collect();
    let taken = serial.input(&text);
    assert_eq!((taken, serial.input_room()), (64, 0));
    assert_eq!(line.take(), 1);
    assert_eq!(get(&mut serial, IIR) & 0xf, 4, "received data available");
    assert_eq!(serial.input(&text[taken..]), 0);
    assert!(serial.room().read().is_err(), "nothing read yet, so no room");
    for want in 0..64 {
        assert_eq!(get(&mut serial, LSR) & LSR_DATA_READY, LSR_DATA_READY);
        assert_eq!(get(&mut serial, DATA), want);
    }
    assert!(serial.room().read().is_ok());
    assert_eq!(serial.input(&text[taken..]), 36);
    assert_eq!(get(&mut serial, DATA), 64);
}

#[test]
fn leaving_loopback_announces_room() {
    let mut serial = Serial::new(CountingLine::new(), Sink::Nowhere).unwrap().0;
    put(&mut serial, MCR, LOOPBACK);
    let _ = serial.room().read();
    assert_eq!(serial.input(b"x"), 0, "nothing enters in loopback");
    put(&mut serial, MCR, 0);
    assert!(serial.room().read().is_ok());
    assert_eq!(serial.input(b"x"), 1);
}

#[test]
fn held_input_waits_for_the_receive_interrupt_and_not_for_a_divisor() {
    let (mut serial, _go, _taken) = gated();
    serial.hold_input(Hold::Interrupt);
    assert_eq!((serial.input(b"hello"), serial.input_room()), (0, 0));
    // With the divisor latch open, register 1 is half of a divisor.
    put(&mut serial, 3, 0x80);
    put(&mut serial, 1, 1);
    assert_eq!(serial.input(b"hello"), 0);
    put(&mut serial, 3, 0x03);
    assert!(serial.room().read().is_err(), "nothing has changed yet");
    put(&mut serial, 1, 1);
    assert!(serial.room().read().is_ok(), "whoever waits is told");
    assert_eq!(serial.input(b"hello"), 5);
    assert_eq!(get(&mut serial, 0), b'h');
}

#[test]
fn input_held_for_out1_waits_for_it() {
    let (mut serial, _go, _taken) = gated();
    serial.hold_input(Hold::Out1);
    put(&mut serial, 1, 1);
    put(&mut serial, 4, 0x0b);
    assert_eq!(serial.input(b"hello"), 0);
    put(&mut serial, 4, 0x0f);
    assert!(serial.room().read().is_ok(), "whoever waits is told");
    assert_eq!(serial.input(b"hello"), 5);
}

/// A UART whose output goes to `fd`, in an event loop with its worker.
fn polled(fd: OwnedFd) -> (Serial, EventManager<SinkWorker>) {
    let sink = Polled::of(fd).expect("it can be polled");
    let (serial, worker) = Serial::new(CountingLine::new(), Sink::Polled(sink)).unwrap();
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(worker.unwrap());
    (serial, events)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n ^ (n >> 8)) as u8).collect()
}

#[test]
fn a_full_pipe_is_waited_for_and_loses_nothing() {
    let (mut reader, writer) = io::pipe().unwrap();
    let (mut serial, mut events) = polled(writer.try_clone().unwrap().into());
    let text = pattern(OUTPUT_BUFFER);
    for _ in 0..2 {
        text.iter().for_each(|byte| put(&mut serial, DATA, *byte));
        while events.run_with_timeout(0).unwrap() > 0 {}
    }
    assert_eq!(serial.output_lost(), 0, "one buffer is in the pipe, one with the worker");
    assert!(!serial.flush(Duration::ZERO), "the pipe is full");
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "the user's own descriptor is as it was");
    drop(writer);
    let mut got = vec![0; 2 * text.len()];
    let (first, second) = got.split_at_mut(text.len());
    reader.read_exact(first).unwrap();
    while !serial.flush(Duration::ZERO) {
        events.run().unwrap();
    }
    reader.read_exact(second).unwrap();
    assert!(*first == text && *second == text);
}

#[test]
fn a_socket_takes_output_and_dropping_the_worker_writes_the_rest() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let (mut serial, events) = polled(theirs.into());
    b"last words".iter().for_each(|byte| put(&mut serial, DATA, *byte));
    drop(events);
    drop(serial);
    let mut got = String::new();
    ours.read_to_string(&mut got).unwrap();
    assert_eq!(got, "last words");
}

#[test]
fn a_reader_that_has_gone_costs_the_output_and_nothing_else() {
    let (reader, writer) = io::pipe().unwrap();
    let (mut serial, mut events) = polled(writer.into());
    drop(reader);
    put(&mut serial, DATA, b'a');
    events.run().unwrap();
    put(&mut serial, DATA, b'b');
    assert!(serial.flush(Duration::ZERO), "nothing is waited for");
    assert_eq!(serial.output_lost(), 2);
}

#[test]
fn what_may_block_or_cannot_be_polled_gets_a_thread() {
    let regular = File::open("/proc/self/exe").unwrap();
    assert!(matches!(Sink::of(regular.into()), Sink::Blocking(_)));
    let zero = File::open("/dev/zero").unwrap();
    assert!(matches!(Sink::of(zero.into()), Sink::Blocking(_)));
    let null = File::options().write(true).open("/dev/null").unwrap();
    assert!(matches!(Sink::of(null.into()), Sink::Polled(_)));
}
