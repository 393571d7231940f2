//! [`net::pcap::PcapPort`]: what it writes, and that it changes nothing.

#![cfg(test)]

mod common;

use std::io::{self, Write};
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::guest::{Mirror, Ring, Tcp, pattern, send, udp};
use net::pcap::{PcapPort, SNAPLEN_ALL};
use net::{FramePort, Received, Sent, VnetHdr};
use proptest::prelude::*;

/// A file of which the test keeps hold; it takes `room` bytes.
#[derive(Clone)]
struct Sink {
    bytes: Arc<Mutex<Vec<u8>>>,
    room: usize,
}

impl Sink {
    fn new(room: usize) -> Self {
        Self { bytes: Arc::default(), room }
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut bytes = self.bytes.lock().unwrap();
        if bytes.len() + buf.len() > self.room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The records of a capture: bytes kept, and the frame's length.
fn records(file: &[u8]) -> Vec<(Vec<u8>, usize)> {
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(20)), (0xa1b2_c3d4, 0x0004_0002, 1));
    let (mut at, mut records) = (24, Vec::new());
    while at < file.len() {
        let (kept, len) = (word(at + 8) as usize, word(at + 12) as usize);
        assert!(word(at + 4) < 1_000_000 && kept <= word(16) as usize);
        records.push((file[at + 16..at + 16 + kept].to_vec(), len));
        at += 16 + kept;
    }
    assert_eq!(at, file.len());
    records
}

#[test]
fn both_directions_are_written_in_the_order_of_their_crossing() {
    let sink = Sink::new(usize::MAX);
    let mut port = PcapPort::new(Mirror::new(), Box::new(sink.clone()), SNAPLEN_ALL).unwrap();
    let (a, b) = (udp(1, 2, b"first"), udp(3, 4, &pattern(1200)));
    assert_eq!(send(&mut port, VnetHdr::default(), &a), Sent::Taken);
    assert_eq!(send(&mut port, VnetHdr::default(), &b), Sent::Taken);
    let mut ring = Ring::new(8, 600);
    assert_eq!(port.recv(&mut ring), Received::Drained);
    // The turn is over, so the file is complete, though the port lives.
    let seen: Vec<_> = records(&sink.bytes()).into_iter().map(|(bytes, _)| bytes).collect();
    assert_eq!(seen, [a.clone(), b.clone(), a.clone(), b.clone()]);
    assert_eq!(ring.frames.iter().map(|(_, f)| f.clone()).collect::<Vec<_>>(), [a, b]);
}

#[test]
fn a_super_segment_is_one_record() {
    let sink = Sink::new(usize::MAX);
    let mut port = PcapPort::new(Mirror::new(), Box::new(sink.clone()), SNAPLEN_ALL).unwrap();
    let tcp = Tcp::connectionless();
    let frame = tcp.segment(0x10, &pattern(60_000));
    assert_eq!(send(&mut port, tcp.partial(1460), &frame), Sent::Taken);
    drop(port);
    let records = records(&sink.bytes());
    assert_eq!(records.len(), 1);
    assert!(records[0] == (frame.clone(), frame.len()));
}

#[test]
fn a_frame_that_did_not_fit_is_written_once() {
    let sink = Sink::new(usize::MAX);
    let mut mirror = Mirror::new();
    mirror.room = 0;
    let mut port = PcapPort::new(mirror, Box::new(sink.clone()), SNAPLEN_ALL).unwrap();
    assert_eq!(send(&mut port, VnetHdr::default(), &udp(1, 2, b"x")), Sent::Full);
    drop(port);
    assert_eq!(records(&sink.bytes()), []);
}

#[test]
fn a_full_disk_ends_the_capture_and_not_the_traffic() {
    let sink = Sink::new(24);
    let mut port = PcapPort::new(Mirror::new(), Box::new(sink.clone()), SNAPLEN_ALL).unwrap();
    let mut ring = Ring::new(64, 2048);
    for _ in 0..4 {
        assert_eq!(send(&mut port, VnetHdr::default(), &udp(1, 2, b"x")), Sent::Taken);
        assert_eq!(port.recv(&mut ring), Received::Drained);
    }
    assert_eq!(ring.frames.len(), 4);
    drop(port);
    assert_eq!(records(&sink.bytes()), []);
}

#[test]
fn tcpdump_reads_the_file() {
    if Command::new("tcpdump").arg("--version").output().is_err() {
        common::skip::skip("tcpdump is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.pcap");
    let mut port = PcapPort::create(Mirror::new(), &path, SNAPLEN_ALL).unwrap();
    let _ = send(&mut port, VnetHdr::default(), &udp(1234, 4321, b"ahoy"));
    let _ = port.recv(&mut Ring::new(8, 2048));
    let out = Command::new("tcpdump").arg("-nr").arg(&path).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(text.matches("10.9.0.5.1234 > 10.9.0.2.4321: UDP, length 4").count(), 2, "{text}");
}

proptest! {
    #[test]
    fn any_frames_are_read_back_up_to_the_snaplen(
        frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 14..300), 0..6),
        snaplen in 0u32..400,
    ) {
        let sink = Sink::new(usize::MAX);
        let mut port = PcapPort::new(Mirror::new(), Box::new(sink.clone()), snaplen).unwrap();
        for frame in &frames {
            let _ = send(&mut port, VnetHdr::default(), frame);
        }
        drop(port);
        let kept = |f: &Vec<u8>| (f[..f.len().min(snaplen as usize)].to_vec(), f.len());
        prop_assert_eq!(records(&sink.bytes()), frames.iter().map(kept).collect::<Vec<_>>());
    }
}
