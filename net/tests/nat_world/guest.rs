//! A guest that speaks frames by hand.

use std::net::{Ipv4Addr, SocketAddrV4};

use net::checksum::{Sum, checksum};
use net::nat::Nat;
use net::{FramePort, GsoType, Offloads, Received, Sent, TxFrame, VnetFlags, VnetHdr};
use vm_memory::VolatileSlice;

use crate::common::guest::Ring;
use crate::common::sys;

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 7, 7, 7];

/// Something that goes into an IPv4 packet.
pub(crate) trait Packet {
    fn to(&self) -> Ipv4Addr;
    fn protocol(&self) -> u8;
    fn ttl(&self) -> u8;
    fn dont_fragment(&self) -> bool {
        false
    }
    /// The payload of the packet from `from`, checksum included.
    fn bytes(&self, from: Ipv4Addr) -> Vec<u8>;
}

/// A datagram.
pub(crate) struct Udp {
    pub(crate) from: u16,
    pub(crate) to: SocketAddrV4,
    pub(crate) payload: Vec<u8>,
    pub(crate) ttl: u8,
    pub(crate) dont_fragment: bool,
}

impl Udp {
    pub(crate) fn new(from: u16, to: Ipv4Addr, port: u16, payload: &[u8]) -> Self {
        let to = SocketAddrV4::new(to, port);
        Self { from, to, payload: payload.to_vec(), ttl: 64, dont_fragment: false }
    }
}

impl Packet for Udp {
    fn to(&self) -> Ipv4Addr {
        *self.to.ip()
    }
    fn protocol(&self) -> u8 {
        17
    }
    fn ttl(&self) -> u8 {
        self.ttl
    }
    fn dont_fragment(&self) -> bool {
        self.dont_fragment
    }
    fn bytes(&self, from: Ipv4Addr) -> Vec<u8> {
        let len = (self.payload.len() + 8) as u16;
        let mut bytes = [self.from, self.to.port(), len, 0].map(u16::to_be_bytes).concat();
        bytes.extend_from_slice(&self.payload);
        let mut sum = Sum::pseudo_v4(from, *self.to.ip(), 17, len);
        sum.add(&bytes);
        bytes[6..8].copy_from_slice(&sum.finish_udp().to_be_bytes());
        bytes
    }
}

/// A ping.
pub(crate) struct Icmp {
    pub(crate) to: Ipv4Addr,
    pub(crate) message: Vec<u8>,
    pub(crate) ttl: u8,
}

impl Icmp {
    pub(crate) fn echo(to: Ipv4Addr, id: u16, seq: u16, data: &[u8]) -> Self {
        let mut message = vec![8, 0, 0, 0];
        message.extend([id, seq].map(u16::to_be_bytes).concat());
        message.extend_from_slice(data);
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        Self { to, message, ttl: 64 }
    }
}

impl Packet for Icmp {
    fn to(&self) -> Ipv4Addr {
        self.to
    }
    fn protocol(&self) -> u8 {
        1
    }
    fn ttl(&self) -> u8 {
        self.ttl
    }
    fn bytes(&self, _: Ipv4Addr) -> Vec<u8> {
        self.message.clone()
    }
}

/// A datagram that the guest got, its checksums checked.
#[derive(Debug)]
pub(crate) struct UdpGot {
    pub(crate) from: SocketAddrV4,
    pub(crate) to: SocketAddrV4,
    pub(crate) ttl: u8,
    pub(crate) payload: Vec<u8>,
}

/// An ICMP message that the guest got, its checksum checked.
#[derive(Debug)]
pub(crate) struct IcmpGot {
    pub(crate) from: Ipv4Addr,
    pub(crate) ttl: u8,
    pub(crate) kind: u8,
    pub(crate) code: u8,
    /// The second word of the header.
    pub(crate) rest: u32,
    pub(crate) body: Vec<u8>,
}

pub(crate) struct Guest {
    pub(crate) nat: Nat,
    pub(crate) addr: Ipv4Addr,
    ring: Ring,
    packets: u16,
}

impl Guest {
    /// The machine 192.168.122.2 on this network; it completes checksums.
    pub(crate) fn new(mut nat: Nat) -> Self {
        nat.set_offloads(Offloads::CSUM).unwrap();
        Self { nat, addr: Ipv4Addr::new(192, 168, 122, 2), ring: Ring::new(256, 2048), packets: 0 }
    }

    fn ipv4(&mut self, packet: &dyn Packet, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = [&self.nat.config().gateway_mac.octets()[..], &MAC, &[8, 0]].concat();
        let mut header = vec![0x45, 0];
        header.extend([(payload.len() + 20) as u16, self.packets, fragment].map(u16::to_be_bytes).concat());
        header.extend([packet.ttl(), packet.protocol(), 0, 0]);
        header.extend(self.addr.octets());
        header.extend(packet.to().octets());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(header);
        frame.extend_from_slice(payload);
        frame
    }

    fn put(&mut self, frame: Vec<u8>) {
        self.put_as(VnetHdr::default(), frame);
    }

    fn put_as(&mut self, hdr: VnetHdr, mut frame: Vec<u8>) {
        let (head, rest) = frame.split_at_mut(20);
        let parts: Vec<_> =
            [head, rest].into_iter().filter(|p| !p.is_empty()).map(VolatileSlice::from).collect();
        assert!(!matches!(self.nat.send(&TxFrame { hdr, parts: &parts }), Sent::Full));
    }

    /// Sends a packet as one frame, and gives the frame.
    pub(crate) fn send(&mut self, packet: &dyn Packet) -> Vec<u8> {
        self.packets += 1;
        let fragment = if packet.dont_fragment() { 0x4000 } else { 0 };
        let bytes = packet.bytes(self.addr);
        let frame = self.ipv4(packet, fragment, &bytes);
        self.put(frame.clone());
        frame
    }

    /// Sends datagrams of `size` bytes, the last one perhaps shorter, as one super-segment (virtio 1.3 §5.1.6.2).
    pub(crate) fn send_row(&mut self, packet: &Udp, size: u16) {
        self.packets += 1;
        let bytes = packet.bytes(self.addr);
        let frame = self.ipv4(packet, 0, &bytes);
        let hdr = VnetHdr {
            flags: VnetFlags::NEEDS_CSUM,
            gso_type: GsoType::UdpL4,
            hdr_len: 42,
            gso_size: size,
            csum_start: 34,
            csum_offset: 6,
            ..VnetHdr::default()
        };
        self.put_as(hdr, frame);
    }

    /// Sends a packet in fragments, the last one first.
    pub(crate) fn send_fragments(&mut self, packet: &dyn Packet) {
        self.packets += 1;
        let bytes = packet.bytes(self.addr);
        let pieces: Vec<_> = bytes.chunks(1480).collect();
        for (n, piece) in pieces.iter().enumerate().rev() {
            let more = if n + 1 < pieces.len() { 0x2000 } else { 0 };
            let frame = self.ipv4(packet, more | (n * 185) as u16, piece);
            self.put(frame);
        }
    }

    /// Makes itself known: it asks the gateway for its Ethernet address.
    pub(crate) fn greet(&mut self) {
        let mut frame =
            [&[0xff; 6][..], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC, &self.addr.octets()].concat();
        frame.extend([0; 6]);
        frame.extend([192, 168, 122, 1]);
        self.put(frame);
        let (_, answer) = self.frame(|frame| frame[12..14] == [8, 6]);
        assert_eq!(answer[6..12], self.nat.config().gateway_mac.octets());
    }

    /// Takes all buffers out of the ring for one turn.
    pub(crate) fn stop_receiving(&mut self) {
        self.ring.free = 0;
        assert!(sys::wait_readable(&self.nat), "nothing to receive within ten seconds");
        assert_eq!(self.nat.recv(&mut self.ring), Received::RingFull);
        self.ring.free = 256;
    }

    /// Whether there is nothing to receive now.
    pub(crate) fn nothing(&mut self) -> bool {
        self.ring.free = 256;
        self.nat.recv(&mut self.ring) == Received::Drained && self.ring.frames.is_empty()
    }

    fn frame(&mut self, wanted: impl Fn(&[u8]) -> bool) -> (VnetHdr, Vec<u8>) {
        loop {
            if let Some(at) = self.ring.frames.iter().position(|(_, frame)| wanted(frame)) {
                return self.ring.frames.remove(at);
            }
            self.ring.free = 256;
            let had = self.ring.frames.len();
            let how = self.nat.recv(&mut self.ring);
            if how == Received::Drained && self.ring.frames.len() == had {
                assert!(sys::wait_readable(&self.nat), "nothing came within ten seconds");
            }
        }
    }

    /// The next packet of a protocol, put together from its fragments; its checksum completed.
    fn packet(&mut self, protocol: u8) -> (Vec<u8>, Vec<u8>) {
        let is = |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == protocol;
        let (mut header, mut payload) = (Vec::new(), Vec::new());
        loop {
            let (hdr, frame) = self.frame(is);
            assert_eq!(frame[..6], MAC);
            assert_eq!(checksum(&frame[14..34]), 0);
            assert!(frame.len() <= 1514);
            assert_eq!(usize::from(u16::from_be_bytes([frame[16], frame[17]])), frame.len() - 14);
            let field = u16::from_be_bytes([frame[20], frame[21]]);
            assert_eq!(usize::from(field & 0x1fff) * 8, payload.len(), "fragments come in order");
            if header.is_empty() {
                header = frame[14..34].to_vec();
            }
            payload.extend_from_slice(&frame[34..]);
            if hdr.flags.contains(VnetFlags::NEEDS_CSUM) {
                let (start, at) =
                    (usize::from(hdr.csum_start), usize::from(hdr.csum_start + hdr.csum_offset) - 34);
                let mut sum = Sum::new();
                sum.add(&frame[start..]);
                payload[at..at + 2].copy_from_slice(&sum.finish_udp().to_be_bytes());
            }
            if field & 0x2000 == 0 {
                return (header, payload);
            }
        }
    }

    /// The next datagram.
    pub(crate) fn udp(&mut self) -> UdpGot {
        let (header, bytes) = self.packet(17);
        let addr = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
        let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        assert_eq!(usize::from(word(4)), bytes.len());
        let mut sum = Sum::pseudo_v4(addr(12), addr(16), 17, word(4));
        sum.add(&bytes);
        assert_eq!(sum.fold(), 0xffff);
        UdpGot {
            from: SocketAddrV4::new(addr(12), word(0)),
            to: SocketAddrV4::new(addr(16), word(2)),
            ttl: header[8],
            payload: bytes[8..].to_vec(),
        }
    }

    /// The next ICMP message.
    pub(crate) fn icmp(&mut self) -> IcmpGot {
        let (header, bytes) = self.packet(1);
        assert_eq!(checksum(&bytes), 0);
        IcmpGot {
            from: Ipv4Addr::new(header[12], header[13], header[14], header[15]),
            ttl: header[8],
            kind: bytes[0],
            code: bytes[1],
            rest: u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            body: bytes[8..].to_vec(),
        }
    }
}
