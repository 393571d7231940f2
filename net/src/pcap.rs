//! [`PcapPort`]: a port that writes down what crosses another one.
//!
//! It wraps any [`FramePort`] and changes nothing in what the NIC sees. The file is the classic pcap format
//! (microseconds, little-endian, link type Ethernet), which tcpdump, tshark and Wireshark read, also while it
//! grows: it is flushed at the end of each turn, and on drop.
//!
//! Frames are written as they cross: a super-segment is one record of up to 64 KiB, and a checksum that somebody else
//! is to complete looks wrong, as it does in a capture of any interface with offloads. A frame that the port refused
//! is written as well: it was sent. One that the port had no room for comes again and is written then. The record
//! holds the first `snaplen` bytes and the whole length.
//!
//! The bytes are copied out of lent memory, once per frame; that is the price of a capture. A file that can't be
//! written (a full disk) ends the capture with one warning and leaves the traffic alone; what was written stays
//! readable, up to a record that may be cut short.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use vm_memory::VolatileSlice;

use crate::port::{Counters, FramePort, Lent, MAX_FRAME, Offloads, Received, RxRing, Sent, TxFrame};
use crate::vnet::VnetHdr;

/// Takes every frame whole: above [`MAX_FRAME`], and the most that tcpdump accepts.
pub const SNAPLEN_ALL: u32 = 262_144;

const MAGIC_MICROSECONDS: u32 = 0xa1b2_c3d4;
const VERSION: (u16, u16) = (2, 4);
const LINKTYPE_ETHERNET: u32 = 1;
/// Two super-segments, or some hundred small frames, per system call.
const BUFFER: usize = 128 << 10;

/// A port whose frames are captured. See the module.
///
/// ```
/// use net::nat::{Nat, NatConfig};
/// use net::pcap::{PcapPort, SNAPLEN_ALL};
///
/// # let folder = tempfile::tempdir()?;
/// let nat = Nat::new(NatConfig::on_free_subnet()?)?;
/// let port = PcapPort::create(nat, &folder.path().join("vm1.pcap"), SNAPLEN_ALL)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PcapPort<P> {
    port: P,
    capture: Capture,
}

impl<P: FramePort> PcapPort<P> {
    /// Captures into a new file, replacing one of that name; `snaplen` is the most bytes per frame.
    ///
    /// # Errors
    /// When the file can't be made or its header not be written.
    pub fn create(port: P, path: &Path, snaplen: u32) -> io::Result<Self> {
        Self::new(port, Box::new(File::create(path)?), snaplen)
    }

    /// Captures into `sink`, which should not block for long: it is written on the I/O thread.
    ///
    /// # Errors
    /// When the header can't be written.
    pub fn new(port: P, sink: Box<dyn Write + Send>, snaplen: u32) -> io::Result<Self> {
        let mut sink = BufWriter::with_capacity(BUFFER, sink);
        sink.write_all(&MAGIC_MICROSECONDS.to_le_bytes())?;
        sink.write_all(&VERSION.0.to_le_bytes())?;
        sink.write_all(&VERSION.1.to_le_bytes())?;
        // Time zone and accuracy, always 0.
        sink.write_all(&[0; 8])?;
        sink.write_all(&snaplen.to_le_bytes())?;
        sink.write_all(&LINKTYPE_ETHERNET.to_le_bytes())?;
        sink.flush()?;
        Ok(Self { port, capture: Capture { sink: Some(sink), snaplen, buf: Vec::new() } })
    }

    /// The port behind the capture.
    pub fn inner(&self) -> &P {
        &self.port
    }
}

/// The file, until it fails.
struct Capture {
    sink: Option<BufWriter<Box<dyn Write + Send>>>,
    snaplen: u32,
    /// Reused for each frame.
    buf: Vec<u8>,
}

impl Capture {
    /// Writes the first `len` bytes of `parts` as one record.
    fn record(&mut self, parts: &[VolatileSlice<'_>], len: usize, now: SystemTime) {
        let Some(sink) = &mut self.sink else { return };
        let kept = len.min(usize::try_from(self.snaplen).unwrap_or(usize::MAX)).min(MAX_FRAME);
        self.buf.resize(kept, 0);
        let kept = TxFrame { hdr: VnetHdr::default(), parts }.copy_out(0, &mut self.buf);
        let written = write_record(sink, &self.buf[..kept], len, now);
        self.check(written);
    }

    fn flush(&mut self) {
        if let Some(sink) = &mut self.sink
            && !sink.buffer().is_empty()
        {
            let flushed = sink.flush();
            self.check(flushed);
        }
    }

    fn check(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            tracing::warn!(%error, "the capture file can't be written; capturing ends, traffic goes on");
            if let Some(sink) = self.sink.take() {
                // What is in the buffer would be tried again when the writer is dropped.
                let _ = sink.into_parts();
            }
        }
    }
}

fn write_record(sink: &mut impl Write, bytes: &[u8], len: usize, now: SystemTime) -> io::Result<()> {
    let at = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // The format's seconds are unsigned 32 bits, good until 2106; lengths are at most MAX_FRAME.
    let field = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    sink.write_all(&field(at.as_secs()))?;
    sink.write_all(&field(u64::from(at.subsec_micros())))?;
    sink.write_all(&field(bytes.len() as u64))?;
    sink.write_all(&field(len as u64))?;
    sink.write_all(bytes)
}

/// The guest's ring, watched.
struct Watched<'a> {
    ring: &'a mut dyn RxRing,
    capture: &'a mut Capture,
    loan: (usize, usize),
}

impl RxRing for Watched<'_> {
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_> {
        self.loan = (min, max);
        self.ring.lend(min, max)
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        // The same loan lends the same buffers, in which the frame now lies.
        if let Lent::Buffers(parts) = self.ring.lend(self.loan.0, self.loan.1) {
            self.capture.record(parts, len, SystemTime::now());
        }
        self.ring.commit(hdr, len);
    }
}

impl<P: FramePort> AsFd for PcapPort<P> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

impl<P: FramePort> FramePort for PcapPort<P> {
    fn offloads(&self) -> Offloads {
        self.port.offloads()
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        self.port.set_offloads(guest)
    }

    fn mtu(&self) -> u16 {
        self.port.mtu()
    }

    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let now = SystemTime::now();
        let sent = self.port.send(frame);
        if sent != Sent::Full {
            self.capture.record(frame.parts, frame.len(), now);
        }
        sent
    }

    fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
        let mut watched = Watched { ring, capture: &mut self.capture, loan: (0, 0) };
        let received = self.port.recv(&mut watched);
        self.capture.flush();
        received
    }

    fn link_up(&self) -> bool {
        self.port.link_up()
    }

    fn counters(&self) -> Counters {
        self.port.counters()
    }
}

impl<P> Drop for PcapPort<P> {
    fn drop(&mut self) {
        self.capture.flush();
    }
}
