//! Software segmentation and checksum completion: what a receiver without offloads needs done for it.
//!
//! Enters: a frame in one piece with its `virtio_net_hdr`. Leaves: frames that anybody understands, each no larger
//! than its headers plus `gso_size`, with complete checksums and a default header. Used towards a TAP that was
//! handed over without `IFF_VNET_HDR`, and towards a guest that accepts less than the sender did (a switch port,
//! frames that a TAP had queued before the guest's driver was reset).
//!
//! Both headers come from a guest, so nothing in them is believed: [`Plan::new`] walks Ethernet, up to two 802.1Q
//! tags, IPv4 or IPv6 with extension headers, and TCP or UDP, and demands that `csum_start`, `csum_offset`,
//! `gso_type` and the IP length agree with what it finds. Refused as malformed: IP fragments, SYN or RST in a
//! super-segment, no payload, a piece that would not fit an IP packet, and more than [`MAX_PIECES`] pieces. The
//! hint `hdr_len` is not used. UDP *fragmentation* offload (`GsoType::Udp`) is offered nowhere and refused here.
//!
//! Each TCP piece gets its own sequence number, FIN and PSH go with the last piece and CWR with the first
//! (RFC 3168 §6.1.2), IPv4 identifications count up. UDP pieces are datagrams of their own. Checksums are computed
//! afresh and do not lean on the partial sum that the sender left.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use vm_memory::{Bytes, VolatileSlice};

use crate::checksum::{self, Sum};
use crate::port::{Counters, DropReason, ETHERNET_LEN, Lent, Offloads, RxRing};
use crate::vnet::{GsoType, VnetFlags, VnetHdr};

/// Most pieces that one frame is cut into: 64 KiB at the smallest MSS that Linux agrees to (48 bytes), and some.
pub(crate) const MAX_PIECES: usize = 2048;
/// Extension headers of an IPv6 packet that are looked through (hop-by-hop, destination, routing).
const MAX_EXTENSIONS: usize = 8;
/// 802.1Q tags that are looked through.
const MAX_TAGS: usize = 2;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Offsets in a TCP header, and its flags.
const TCP_SEQ: usize = 4;
const TCP_FLAGS: usize = 13;
const TCP_CSUM: usize = 16;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
/// Offsets in a UDP header.
const UDP_LEN: usize = 4;
const UDP_CSUM: usize = 6;

/// Why a frame can't be cut or completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    /// A header is not wholly in the frame, or not what its lengths say.
    #[error("the {0} header is cut short or inconsistent")]
    Header(&'static str),
    /// The headers of the frame are not those that `gso_type` names.
    #[error("gso_type {0:?} does not match the headers of the frame")]
    Type(GsoType),
    /// `csum_start` and `csum_offset` don't point at the transport checksum.
    #[error("the checksum is said to be at {start}+{offset}, which is not this frame's transport checksum")]
    Checksum {
        /// `csum_start`
        start: u16,
        /// `csum_offset`
        offset: u16,
    },
    /// A fragment, SYN or RST: there is no such super-segment.
    #[error("a fragment, SYN or RST can't be segmented")]
    NotData,
    /// The payload makes no pieces, or too many, or pieces that are too large.
    #[error("{payload} bytes of payload can't be cut into pieces of {gso_size}")]
    Pieces {
        /// Bytes behind the headers.
        payload: usize,
        /// `gso_size`
        gso_size: u16,
    },
}

/// Whether a receiver that accepts only `granted` must be helped with a frame that has this header.
pub(crate) fn needs_help(hdr: &VnetHdr, granted: Offloads) -> bool {
    let wanted = match hdr.gso_type {
        GsoType::None => Offloads::empty(),
        GsoType::Tcp4 => Offloads::TSO4,
        GsoType::Tcp6 => Offloads::TSO6,
        GsoType::UdpL4 => Offloads::USO,
        GsoType::Udp => return true,
    };
    let csum = if hdr.flags.contains(VnetFlags::NEEDS_CSUM) { Offloads::CSUM } else { Offloads::empty() };
    let ecn = if hdr.ecn { Offloads::ECN } else { Offloads::empty() };
    !granted.contains(wanted | csum | ecn)
}

/// The header as a receiver that accepts `granted` may see it, for a frame that needs no help: without
/// `DATA_VALID` when checksum offload was not agreed (virtio 1.3 §5.1.6.4.1).
pub(crate) fn visible_hdr(hdr: VnetHdr, granted: Offloads) -> VnetHdr {
    if granted.contains(Offloads::CSUM) { VnetHdr { num_buffers: 0, ..hdr } } else { VnetHdr::default() }
}

/// Completes the partial checksum of a frame that is not a super-segment, in place.
///
/// # Errors
/// When the checksum's place is outside the frame.
pub(crate) fn complete_checksum(hdr: &VnetHdr, frame: &mut [u8]) -> Result<(), Malformed> {
    if !hdr.flags.contains(VnetFlags::NEEDS_CSUM) {
        return Ok(());
    }
    let outside = Malformed::Checksum { start: hdr.csum_start, offset: hdr.csum_offset };
    let covered = frame.get_mut(usize::from(hdr.csum_start)..).ok_or(outside)?;
    let mut sum = Sum::new();
    sum.add(covered);
    let at = usize::from(hdr.csum_offset);
    let field = covered.get_mut(at..at + 2).ok_or(outside)?;
    // 0xffff and 0 verify alike, and UDP must not send 0.
    field.copy_from_slice(&sum.finish_udp().to_be_bytes());
    Ok(())
}

/// How a super-segment is cut. Holds offsets only: the frame stays with the caller and must not change.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Where the IP header starts.
    network: usize,
    /// IPv4 or IPv6.
    v6: bool,
    /// Where the TCP or UDP header starts.
    transport: usize,
    /// `TCP` or `UDP`.
    protocol: u8,
    /// Bytes of all headers.
    headers: usize,
    /// Bytes behind them; at least 1.
    payload: usize,
    /// Payload bytes of each piece but the last; at least 1.
    size: usize,
}

impl Plan {
    /// Checks that `frame` is the super-segment that `hdr` says and works out how to cut it.
    ///
    /// # Errors
    /// See [`Malformed`]; the frame is then to be dropped.
    pub(crate) fn new(hdr: &VnetHdr, frame: &[u8]) -> Result<Self, Malformed> {
        let (ethertype, network) = ethernet(frame)?;
        let (v6, protocol) = match hdr.gso_type {
            GsoType::Tcp4 => (false, TCP),
            GsoType::Tcp6 => (true, TCP),
            GsoType::UdpL4 => (ethertype == ETHERTYPE_IPV6, UDP),
            GsoType::None | GsoType::Udp => return Err(Malformed::Type(hdr.gso_type)),
        };
        if ethertype != if v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 } {
            return Err(Malformed::Type(hdr.gso_type));
        }
        let (found, transport) = if v6 { ipv6(frame, network)? } else { ipv4(frame, network)? };
        if found != protocol {
            return Err(Malformed::Type(hdr.gso_type));
        }
        let (len, csum) = match protocol {
            TCP => (tcp(frame, transport)?, TCP_CSUM),
            _ => (8, UDP_CSUM),
        };
        if usize::from(hdr.csum_start) != transport || usize::from(hdr.csum_offset) != csum {
            return Err(Malformed::Checksum { start: hdr.csum_start, offset: hdr.csum_offset });
        }
        let headers = transport + len;
        let payload = frame.len().checked_sub(headers).ok_or(Malformed::Header("transport"))?;
        let size = usize::from(hdr.gso_size);
        let plan = Self { network, v6, transport, protocol, headers, payload, size };
        let too_large = headers - network + size.min(payload) > 65_535;
        if payload == 0 || size == 0 || plan.count() > MAX_PIECES || too_large {
            return Err(Malformed::Pieces { payload, gso_size: hdr.gso_size });
        }
        Ok(plan)
    }

    /// How many frames come of it; at least one and at most [`MAX_PIECES`].
    pub(crate) fn count(&self) -> usize {
        self.payload.div_ceil(self.size.max(1))
    }

    /// Writes piece `index` of `frame`, a whole Ethernet frame with complete checksums, into `out`.
    ///
    /// `index` is below [`Self::count`], and `frame` the one that the plan was made for.
    pub(crate) fn piece(&self, frame: &[u8], index: usize, out: &mut Vec<u8>) {
        let payload = self.payload_range(index);
        let last = payload.end == self.headers + self.payload;
        out.clear();
        out.extend_from_slice(&frame[..self.headers]);
        out.extend_from_slice(&frame[payload.clone()]);
        let done = payload.start - self.headers;
        self.finish_network(index, out);
        if self.protocol == TCP {
            self.finish_tcp(index == 0, last, done, out);
        } else {
            let len = u16_len(out.len() - self.transport);
            put(out, self.transport + UDP_LEN, len);
        }
        self.finish_checksum(out);
    }

    fn payload_range(&self, index: usize) -> Range<usize> {
        let start = self.headers + index * self.size;
        start..(start + self.size).min(self.headers + self.payload)
    }

    fn finish_network(&self, index: usize, out: &mut [u8]) {
        if self.v6 {
            let len = u16_len(out.len() - self.network - 40);
            put(out, self.network + 4, len);
            return;
        }
        put(out, self.network + 2, u16_len(out.len() - self.network));
        let id = get(out, self.network + 4).wrapping_add(u16_len(index));
        put(out, self.network + 4, id);
        put(out, self.network + 10, 0);
        let header = self.network..self.network + usize::from(out[self.network] & 0xf) * 4;
        let sum = checksum::checksum(&out[header]);
        put(out, self.network + 10, sum);
    }

    fn finish_tcp(&self, first: bool, last: bool, done: usize, out: &mut [u8]) {
        let seq = self.transport + TCP_SEQ..self.transport + TCP_SEQ + 4;
        let number = out[seq.clone()].iter().fold(0u32, |n, b| (n << 8) | u32::from(*b));
        // `done` is below 64 KiB.
        let number = number.wrapping_add(u32::try_from(done).unwrap_or(0));
        out[seq].copy_from_slice(&number.to_be_bytes());
        let flags = &mut out[self.transport + TCP_FLAGS];
        if !last {
            *flags &= !(FIN | PSH);
        }
        if !first {
            *flags &= !CWR;
        }
    }

    fn finish_checksum(&self, out: &mut [u8]) {
        let field = self.transport + if self.protocol == TCP { TCP_CSUM } else { UDP_CSUM };
        put(out, field, 0);
        let len = u16_len(out.len() - self.transport);
        let ip = &out[self.network..];
        let mut sum = if self.v6 {
            let [src, dst] = [8, 24].map(|at| Ipv6Addr::from(array::<16>(ip, at)));
            Sum::pseudo_v6(src, dst, self.protocol, u32::from(len))
        } else {
            let [src, dst] = [12, 16].map(|at| Ipv4Addr::from(array::<4>(ip, at)));
            Sum::pseudo_v4(src, dst, self.protocol, len)
        };
        sum.add(&out[self.transport..]);
        let value = if self.protocol == TCP { sum.finish() } else { sum.finish_udp() };
        put(out, field, value);
    }
}

/// The Ethernet type behind any tags, and where its payload starts.
fn ethernet(frame: &[u8]) -> Result<(u16, usize), Malformed> {
    let mut at = ETHERNET_LEN;
    for _ in 0..=MAX_TAGS {
        let kind = read(frame, at - 2).ok_or(Malformed::Header("Ethernet"))?;
        if !matches!(kind, 0x8100 | 0x88a8) {
            return Ok((kind, at));
        }
        at += 4;
    }
    Err(Malformed::Header("802.1Q"))
}

/// The protocol of an IPv4 packet that ends with the frame, and where its payload starts.
fn ipv4(frame: &[u8], at: usize) -> Result<(u8, usize), Malformed> {
    const BAD: Malformed = Malformed::Header("IPv4");
    let header = frame.get(at..at + 20).ok_or(BAD)?;
    let len = usize::from(header[0] & 0xf) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] >> 4 != 4 || len < 20 || len > total || total != frame.len() - at {
        return Err(BAD);
    }
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(Malformed::NotData);
    }
    Ok((header[9], at + len))
}

/// The upper protocol of an IPv6 packet that ends with the frame, and where it starts (RFC 8200 §4).
fn ipv6(frame: &[u8], at: usize) -> Result<(u8, usize), Malformed> {
    const BAD: Malformed = Malformed::Header("IPv6");
    let header = frame.get(at..at + 40).ok_or(BAD)?;
    let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 || len != frame.len() - at - 40 {
        return Err(BAD);
    }
    let (mut next, mut here) = (header[6], at + 40);
    for _ in 0..=MAX_EXTENSIONS {
        match next {
            TCP | UDP => return Ok((next, here)),
            44 => return Err(Malformed::NotData),
            0 | 43 | 60 => {
                let ext = frame.get(here..here + 8).ok_or(BAD)?;
                // The pseudo-header of a packet that is still being routed has an address that isn't in the header.
                if next == 43 && ext[3] != 0 {
                    return Err(BAD);
                }
                next = ext[0];
                here += (usize::from(ext[1]) + 1) * 8;
            }
            _ => return Err(BAD),
        }
    }
    Err(BAD)
}

/// Bytes of the TCP header at `at`.
fn tcp(frame: &[u8], at: usize) -> Result<usize, Malformed> {
    const BAD: Malformed = Malformed::Header("TCP");
    let header = frame.get(at..at + 20).ok_or(BAD)?;
    let len = usize::from(header[12] >> 4) * 4;
    if len < 20 || at + len > frame.len() {
        return Err(BAD);
    }
    if header[TCP_FLAGS] & (SYN | RST) != 0 {
        return Err(Malformed::NotData);
    }
    Ok(len)
}

fn read(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..at + 2)?.first_chunk()?))
}

/// The field at `at`, which the plan has found to be inside.
fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// A length that [`Plan::new`] has found to fit an IP packet.
fn u16_len(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// A frame that waits for room in the guest's ring, with whatever the guest needs done to it.
///
/// It owns its bytes. Pieces are made one at a time as the ring has room, so a super-segment for a small ring costs
/// no more memory than one frame and one piece.
#[derive(Debug, Default)]
pub(crate) struct Parked {
    hdr: VnetHdr,
    frame: Vec<u8>,
    /// `None`: the frame goes as it is.
    plan: Option<Plan>,
    next: usize,
    piece: Vec<u8>,
}

impl Parked {
    /// Parks `frame` for a receiver that accepts `granted`.
    ///
    /// # Errors
    /// When the frame needs help and is malformed.
    pub(crate) fn new(hdr: VnetHdr, mut frame: Vec<u8>, granted: Offloads) -> Result<Self, Malformed> {
        if !needs_help(&hdr, granted) {
            return Ok(Self { hdr: visible_hdr(hdr, granted), frame, ..Self::default() });
        }
        if hdr.gso_type == GsoType::None {
            complete_checksum(&hdr, &mut frame)?;
            return Ok(Self { frame, ..Self::default() });
        }
        let plan = Plan::new(&hdr, &frame)?;
        Ok(Self { frame, plan: Some(plan), ..Self::default() })
    }

    /// Bytes that it holds.
    pub(crate) fn len(&self) -> usize {
        self.frame.len()
    }

    /// Passes to the ring what it has room for. Returns whether all of it is through; what the guest's buffers
    /// can never hold is counted and counts as through.
    pub(crate) fn deliver(&mut self, ring: &mut dyn RxRing, counters: &mut Counters) -> bool {
        let Some(plan) = &self.plan else {
            return offer(ring, self.hdr, &self.frame, counters);
        };
        while self.next < plan.count() {
            plan.piece(&self.frame, self.next, &mut self.piece);
            if !offer(ring, VnetHdr::default(), &self.piece, counters) {
                return false;
            }
            self.next += 1;
        }
        true
    }
}

/// Copies one frame into the ring; false when the ring has no room for it now.
fn offer(ring: &mut dyn RxRing, hdr: VnetHdr, frame: &[u8], counters: &mut Counters) -> bool {
    match ring.lend(frame.len(), frame.len()) {
        Lent::Empty => return false,
        Lent::TooSmall => {
            counters.drop_frame(DropReason::RxBufferTooSmall, || format!("{} bytes", frame.len()));
            return true;
        }
        Lent::Buffers(parts) => copy_in(parts, frame),
    }
    ring.commit(hdr, frame.len());
    counters.rx_frames += 1;
    counters.rx_bytes += frame.len() as u64;
    true
}

/// Copies `bytes` to the start of lent memory that has at least as much room.
pub(crate) fn copy_in(parts: &[VolatileSlice<'_>], bytes: &[u8]) {
    let mut rest = bytes;
    for part in parts {
        let n = part.len().min(rest.len());
        // `n` bytes at offset 0 of a piece of at least `n` bytes are always written.
        let _ = part.write(&rest[..n], 0);
        rest = &rest[n..];
    }
}

#[cfg(test)]
mod tests;
