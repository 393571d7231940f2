//! A guest for tests: receive buffers that are lent to a port, and a TCP that speaks one connection by hand.

use std::net::Ipv4Addr;

use net::checksum::{Sum, checksum};
use net::{FramePort, GsoType, Lent, Offloads, Received, RxRing, Sent, TxFrame, VnetFlags, VnetHdr};
use vm_memory::VolatileSlice;

use super::sys;

/// The guest's address and that of the LAN's host.
pub(crate) const GUEST: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(10, 9, 0, 5), [2, 0, 0, 0, 0, 5]);
pub(crate) const HOST: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(10, 9, 0, 2), [2, 0, 0, 0, 0, 2]);

/// Receive buffers of equal size, mergeable, of which `free` are posted.
pub(crate) struct Ring {
    buffers: Vec<VolatileSlice<'static>>,
    pub(crate) free: usize,
    pub(crate) frames: Vec<(VnetHdr, Vec<u8>)>,
    /// The guest merges buffers; otherwise a frame must fit one.
    pub(crate) mergeable: bool,
    /// The guest posts no buffer behind the first frame.
    pub(crate) one_frame: bool,
}

impl Ring {
    pub(crate) fn new(buffers: usize, size: usize) -> Self {
        // Leaked, as guest memory outlives every loan; a test process is short.
        let memory: &'static mut [u8] = vec![0; buffers * size].leak();
        let buffers: Vec<_> = memory.chunks_mut(size).map(VolatileSlice::from).collect();
        Self { free: buffers.len(), buffers, frames: Vec::new(), mergeable: true, one_frame: false }
    }

    fn lent(&self, min: usize, max: usize) -> usize {
        let size = self.buffers[0].len();
        let most = if self.mergeable { self.free } else { self.free.min(1) };
        most.min(max.max(min).div_ceil(size))
    }
}

impl RxRing for Ring {
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_> {
        let size = self.buffers[0].len();
        if !self.mergeable && size < min {
            return Lent::TooSmall;
        }
        let n = self.lent(min, max);
        if n * size < min { Lent::Empty } else { Lent::Buffers(&self.buffers[..n]) }
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        let mut bytes = vec![0; len];
        let n = TxFrame { hdr, parts: &self.buffers }.copy_out(0, &mut bytes);
        assert_eq!(n, len);
        self.free = if self.one_frame { 0 } else { self.free - len.div_ceil(self.buffers[0].len()) };
        self.frames.push((hdr, bytes));
    }
}

/// Sends one frame, in pieces of odd lengths.
pub(crate) fn send(port: &mut dyn FramePort, hdr: VnetHdr, bytes: &[u8]) -> Sent {
    let mut bytes = bytes.to_vec();
    let mut parts = Vec::new();
    let mut rest = bytes.as_mut_slice();
    for cut in [14, 7, 1001] {
        if rest.len() > cut {
            let (part, tail) = rest.split_at_mut(cut);
            parts.push(VolatileSlice::from(part));
            rest = tail;
        }
    }
    parts.push(VolatileSlice::from(rest));
    let wire = VnetHdr::parse(&hdr.to_bytes(), parts.iter().map(VolatileSlice::len).sum()).unwrap();
    port.send(&TxFrame { hdr: wire, parts: &parts })
}

/// Receives until a frame satisfies `wanted`, and returns it; what else a LAN says (IPv6 discovery) is passed over.
pub(crate) fn recv_until(
    port: &mut dyn FramePort,
    mut wanted: impl FnMut(&VnetHdr, &[u8]) -> bool,
) -> (VnetHdr, Vec<u8>) {
    let mut ring = Ring::new(64, 2048);
    ring.one_frame = true;
    loop {
        ring.free = 64;
        let how = port.recv(&mut ring);
        if let Some((hdr, frame)) = ring.frames.pop().filter(|(hdr, frame)| wanted(hdr, frame)) {
            return (hdr, frame);
        }
        if how == Received::Drained {
            assert!(sys::wait_readable(&port), "nothing came within ten seconds");
        }
    }
}

/// An IPv4 packet to the LAN's host, in an Ethernet frame.
pub(crate) fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [HOST.1, GUEST.1].concat();
    let mut header = vec![0x45, 0];
    header.extend_from_slice(&((payload.len() + 20) as u16).to_be_bytes());
    header.extend_from_slice(&[0, 1, 0x40, 0, 64, protocol, 0, 0]);
    header.extend_from_slice(&GUEST.0.octets());
    header.extend_from_slice(&HOST.0.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&[8, 0]);
    frame.extend_from_slice(&header);
    frame.extend_from_slice(payload);
    frame
}

/// A UDP datagram to the LAN's host with a complete checksum.
pub(crate) fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() + 8) as u16;
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes(), len.to_be_bytes(), [0, 0]].concat();
    bytes.extend_from_slice(payload);
    let mut sum = Sum::pseudo_v4(GUEST.0, HOST.0, 17, len);
    sum.add(&bytes);
    let sum = sum.finish_udp();
    bytes[6..8].copy_from_slice(&sum.to_be_bytes());
    ipv4(17, &bytes)
}

/// One TCP connection of the guest, spoken by hand: in order, and never a retransmission.
pub(crate) struct Tcp {
    ports: (u16, u16),
    seq: u32,
    /// The next byte that the peer sends.
    pub(crate) ack: u32,
}

pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const MSS: u16 = 1460;

impl Tcp {
    /// No connection: for its headers alone.
    pub(crate) fn connectionless() -> Self {
        Self { ports: (40_000, 80), seq: 1000, ack: 0 }
    }

    /// Connects to `port` of the LAN's host.
    pub(crate) fn connect(port: &mut dyn FramePort, to: u16) -> Self {
        let mut tcp = Self { ports: (40_000, to), ..Self::connectionless() };
        let syn = tcp.segment(SYN, &[]);
        assert_eq!(send(port, tcp.partial(0), &syn), Sent::Taken);
        tcp.seq += 1;
        let (_, answer) = recv_until(port, |_, frame| tcp.is_mine(frame));
        assert_eq!(answer[34 + 13], SYN | ACK);
        tcp.ack = u32::from_be_bytes(answer[38..42].try_into().unwrap()).wrapping_add(1);
        let ack = tcp.segment(ACK, &[]);
        assert_eq!(send(port, tcp.partial(0), &ack), Sent::Taken);
        tcp
    }

    /// The header that leaves the checksum to the port, and the cutting as well when `mss` is not 0.
    pub(crate) fn partial(&self, mss: u16) -> VnetHdr {
        VnetHdr {
            flags: VnetFlags::NEEDS_CSUM,
            gso_type: if mss == 0 { GsoType::None } else { GsoType::Tcp4 },
            gso_size: mss,
            hdr_len: if mss == 0 { 0 } else { 54 },
            csum_start: 34,
            csum_offset: 16,
            ..VnetHdr::default()
        }
    }

    /// A segment with the pseudo-header's sum in the checksum field, as a kernel leaves it to its NIC.
    pub(crate) fn segment(&self, flags: u8, payload: &[u8]) -> Vec<u8> {
        let options: &[u8] = if flags & SYN != 0 { &[2, 4, 5, 180] } else { &[] };
        let mut bytes = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes()].concat();
        bytes.extend_from_slice(&self.seq.to_be_bytes());
        bytes.extend_from_slice(&self.ack.to_be_bytes());
        let len = 20 + options.len();
        bytes.extend_from_slice(&[((len / 4) as u8) << 4, flags, 0xff, 0xff]);
        let sum = Sum::pseudo_v4(GUEST.0, HOST.0, 6, (len + payload.len()) as u16).fold();
        bytes.extend_from_slice(&sum.to_be_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(options);
        bytes.extend_from_slice(payload);
        ipv4(6, &bytes)
    }

    pub(crate) fn is_mine(&self, frame: &[u8]) -> bool {
        let to_me = [self.ports.1.to_be_bytes(), self.ports.0.to_be_bytes()].concat();
        frame.len() >= 54 && frame[12..14] == [8, 0] && frame[23] == 6 && frame[34..38] == to_me
    }
}

/// Whether IP and transport checksums of an IPv4 frame are complete and right.
pub(crate) fn checksums_hold(frame: &[u8]) -> bool {
    let len = usize::from(u16::from_be_bytes([frame[16], frame[17]])) - 20;
    let address = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).unwrap());
    let mut sum = Sum::pseudo_v4(address(26), address(30), frame[23], len as u16);
    sum.add(&frame[34..34 + len]);
    checksum(&frame[14..34]) == 0 && sum.fold() == 0xffff
}

/// What a Linux guest agrees to.
pub(crate) const LINUX: Offloads =
    Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6).union(Offloads::ECN);

/// Payload whose every part is recognisable.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 256) as u8).collect()
}

/// A network that sends every frame back, up to `room` of them at a time.
pub(crate) struct Mirror {
    fd: std::fs::File,
    frames: std::collections::VecDeque<(VnetHdr, Vec<u8>)>,
    pub(crate) room: usize,
    counters: net::Counters,
}

impl Mirror {
    pub(crate) fn new() -> Self {
        let fd = std::fs::File::open("/dev/null").unwrap();
        Self { fd, frames: std::collections::VecDeque::new(), room: 8, counters: net::Counters::default() }
    }

    /// Lets a frame come in as if from outside.
    pub(crate) fn push(&mut self, hdr: VnetHdr, frame: &[u8]) {
        self.frames.push_back((hdr, frame.to_vec()));
    }
}

impl std::os::fd::AsFd for Mirror {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl FramePort for Mirror {
    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&mut self, _: Offloads) -> std::io::Result<()> {
        Ok(())
    }

    fn mtu(&self) -> u16 {
        1500
    }

    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        if self.frames.len() == self.room {
            return Sent::Full;
        }
        let mut bytes = vec![0; frame.len()];
        frame.copy_out(0, &mut bytes);
        self.frames.push_back((frame.hdr, bytes));
        self.counters.tx_frames += 1;
        Sent::Taken
    }

    fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
        while let Some((hdr, frame)) = self.frames.pop_front() {
            let parts = match ring.lend(frame.len(), frame.len()) {
                Lent::Buffers(parts) => parts,
                Lent::TooSmall => continue,
                Lent::Empty => {
                    self.frames.push_front((hdr, frame));
                    return Received::RingFull;
                }
            };
            let mut rest = frame.as_slice();
            for part in parts {
                let n = part.len().min(rest.len());
                part.copy_from(&rest[..n]);
                rest = &rest[n..];
            }
            ring.commit(hdr, frame.len());
        }
        Received::Drained
    }

    fn counters(&self) -> net::Counters {
        self.counters.clone()
    }
}
