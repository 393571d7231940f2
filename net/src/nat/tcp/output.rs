//! A flow passes to the guest what is due: data out of the socket, its own SYN and FIN, ACKs.
//!
//! Data go from the socket into the guest's buffers in one call, up to 64 KiB a frame when the guest takes
//! super-segments; the headers are written in front of them afterwards, when their length is known.

use std::io;

use vm_memory::VolatileSlice;

use super::flow::{End, Flow, Marks, SHIFT};
use super::options::{Offer, STAMP_LEN};
use super::segment::{CSUM_OFFSET, CSUM_START, Flags, HEADERS, Header, TCP_MAX, before};
use super::state::{Event, State};
use crate::nat::cx::Cx;
use crate::nat::host::Close;
use crate::nat::ipv4::{DONT_FRAGMENT, FRAME_HEAD, Ipv4Out, TTL, protocol};
use crate::nat::outbox::copy_into;
use crate::{DropReason, GsoType, Lent, MAX_FRAME, MacAddr, Offloads, RxRing, VnetFlags, VnetHdr};

/// Data frames of one flow before others get their turn.
const BURST: usize = 4;
/// Longest super-segment, headers included: no VLAN tag is in it.
const MAX_SUPER: usize = MAX_FRAME - 4;
/// More pieces than one call to the host takes: a short read then says nothing.
const MANY_PIECES: usize = 100;

/// How an attempt to emit went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing is left to do now.
    Done,
    /// There is more, but it is others' turn.
    More,
    /// The guest has no buffer.
    RingFull,
}

/// What became of one frame.
enum Put {
    Sent,
    Nothing,
    RingFull,
}

impl Flow {
    /// Emits what is due.
    pub(super) fn emit(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing) -> Step {
        self.discard(cx);
        let Some(mac) = cx.neighbours.mac_of(*self.key.guest.ip()) else {
            // Nobody has the guest's address: it is asked for, and the timers go on or give up.
            cx.neighbours.want(*self.key.guest.ip());
            self.marks -= Marks::SYN | Marks::PROBE;
            self.acks = 0;
            return Step::Done;
        };
        if self.marks.contains(Marks::SYN) && !self.put_syn(cx, ring, mac) {
            return Step::RingFull;
        }
        for sent in 0.. {
            if sent == BURST || *cx.budget == 0 {
                return Step::More;
            }
            match self.put_next(cx, ring, mac) {
                Put::Sent => {}
                Put::Nothing => break,
                Put::RingFull => return Step::RingFull,
            }
        }
        if self.marks.contains(Marks::PROBE) {
            // One before what it expects: the guest answers with where it is and its window (RFC 9293 §3.8.6.1).
            if !self.put_control(cx, ring, mac, self.snd_una.wrapping_sub(1), Flags::empty()) {
                return Step::RingFull;
            }
            self.marks -= Marks::PROBE;
        }
        while self.acks > 0 {
            if !self.put_control(cx, ring, mac, self.snd_max, Flags::empty()) {
                return Step::RingFull;
            }
            self.acks = self.acks.saturating_sub(1);
        }
        self.wind_up();
        Step::Done
    }

    /// All is said that could be: is it over?
    fn wind_up(&mut self) {
        if self.state == State::TimeWait {
            self.finish(End::Quiet(Close::Graceful));
        } else if self.marks.contains(Marks::DEAD) && (self.marks.contains(Marks::TOLD) || !self.has_data()) {
            // A guest that waits reads to the end first; one that still sends must hear that it is in vain.
            self.finish(End::Reset(Close::Reset));
        }
    }

    /// Takes out of the socket what the guest has acknowledged.
    pub(super) fn discard(&mut self, cx: &mut Cx<'_>) {
        if self.undiscarded > 0 {
            cx.host.discard(self.sock, self.undiscarded);
            self.undiscarded = 0;
        }
    }

    fn put_syn(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing, mac: MacAddr) -> bool {
        let answers = self.state == State::SynReceived;
        let window = self.window(cx);
        let mut header = self.header(self.snd_una, Flags::SYN, window, cx.now);
        // All is offered in our SYN, and in our SYN-ACK only in answer (RFC 7323 §2.2, §3.2, RFC 2018 §2).
        let scaled = !answers || self.marks.contains(Marks::SCALED);
        let sack = !answers || self.marks.contains(Marks::SACK);
        let mss = cx.config.mtu.saturating_sub(40);
        header.offer = Some(Offer { mss, shift: scaled.then_some(SHIFT), sack });
        if !answers {
            header.stamp = Some(self.stamps.offer(cx.now));
            header.flags -= Flags::ACK;
            header.ack = 0;
        }
        if !put(cx, ring, mac, &header) {
            return false;
        }
        self.stamps.acknowledged(self.rcv_nxt);
        self.marks -= Marks::SYN | Marks::SILENT;
        self.snd_nxt = self.snd_una.wrapping_add(1);
        if self.snd_max == self.snd_nxt {
            self.rto.resent();
        } else {
            self.rto.sent(self.snd_nxt, cx.now);
        }
        self.snd_max = self.snd_nxt;
        true
    }

    fn put_control(
        &mut self,
        cx: &mut Cx<'_>,
        ring: &mut dyn RxRing,
        mac: MacAddr,
        seq: u32,
        flags: Flags,
    ) -> bool {
        let window = self.window(cx);
        let header = self.header(seq, flags, window, cx.now);
        let sent = put(cx, ring, mac, &header);
        if sent {
            self.stamps.acknowledged(self.rcv_nxt);
        }
        sent
    }

    /// The next data that are missing, new data, or the FIN behind the last.
    fn put_next(&mut self, cx: &mut Cx<'_>, ring: &mut dyn RxRing, mac: MacAddr) -> Put {
        if self.state.world_may_send()
            && let Some((seq, len)) = self.hole()
        {
            return self.put_data(cx, ring, mac, seq, len as usize);
        }
        let gap = self.skip_sacked();
        if !self.has_data() {
            return Put::Nothing;
        }
        if self.fin == Some(self.snd_nxt) {
            if !self.put_control(cx, ring, mac, self.snd_nxt, Flags::FIN) {
                return Put::RingFull;
            }
            self.advance(cx, 1);
            self.state = self.state.on(Event::FinSent);
            return Put::Sent;
        }
        let room = self.room();
        // Silly windows are waited out (RFC 9293 §3.8.6.2.1) while an ACK is to come, unless the end is near.
        let silly = room < u32::from(self.mss) && self.pipe() > 0;
        if room == 0 || silly && !self.marks.contains(Marks::READ_CLOSED) {
            return Put::Nothing;
        }
        self.put_data(cx, ring, mac, self.snd_nxt, room.min(gap) as usize)
    }

    /// At most `room` bytes from `seq` on: `snd_nxt`, or the start of a hole.
    fn put_data(
        &mut self,
        cx: &mut Cx<'_>,
        ring: &mut dyn RxRing,
        mac: MacAddr,
        seq: u32,
        room: usize,
    ) -> Put {
        let (mss, headers) = (usize::from(self.mss), self.headers());
        let largest = if cx.guest.contains(Offloads::TSO4) { (MAX_SUPER - headers) / mss * mss } else { mss };
        let want = room.min(largest.max(mss));
        let parts = match ring.lend(headers + want.min(mss), headers + want) {
            Lent::Buffers(parts) => parts,
            Lent::Empty => return Put::RingFull,
            Lent::TooSmall => {
                cx.drop(DropReason::RxBufferTooSmall, || format!("a TCP segment of {mss} bytes"));
                self.finish(End::Reset(Close::Reset));
                return Put::Nothing;
            }
        };
        let lent: usize = parts.iter().map(VolatileSlice::len).sum();
        let want = want.min(lent.saturating_sub(headers));
        let base = self.snd_una.wrapping_sub(self.undiscarded);
        let got = match cx.host.peek(self.sock, seq.wrapping_sub(base), parts, headers, want) {
            Ok(got) if got > 0 => got,
            outcome => return self.no_data(seq, outcome),
        };
        let drained = got < want && parts.len() < MANY_PIECES && seq == self.snd_nxt;
        if drained && !self.marks.intersects(Marks::READ_CLOSED | Marks::DEAD) {
            self.marks -= Marks::READABLE;
        }
        let flags = if drained { Flags::PSH } else { Flags::empty() };
        let window = self.window(cx);
        let header = self.header(seq, flags, window, cx.now);
        let hdr = finish_data(&header, cx, mac, parts, got, self.mss);
        ring.commit(hdr, headers + got);
        cx.emitted(headers + got);
        self.stamps.acknowledged(self.rcv_nxt);
        let len = u32::try_from(got).unwrap_or(0);
        if seq == self.snd_nxt {
            self.advance(cx, len);
        } else {
            self.filled(seq.wrapping_add(len), len);
        }
        if self.acks == 1 {
            self.acks = 0;
        }
        Put::Sent
    }

    /// The socket gave nothing from `seq` on.
    fn no_data(&mut self, seq: u32, outcome: io::Result<usize>) -> Put {
        match outcome {
            // The error was told before: whether there was an orderly end is not to be had any more.
            Ok(_) if self.marks.contains(Marks::TOLD) => {
                self.marks -= Marks::READABLE;
                Put::Nothing
            }
            // The end comes before an error: the world's RST followed its FIN, and answered an ACK of the host that the
            // world no longer knew. The guest gets the FIN, and a RST if it sends anything more.
            Ok(_) if seq == self.snd_nxt => {
                self.fin = Some(seq);
                self.marks -= Marks::READABLE | Marks::DEAD;
                // `put_next` sends the FIN when it is called again.
                Put::Sent
            }
            // An acknowledgement makes room.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && self.in_flight() > 0 => Put::Nothing,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && seq == self.snd_nxt => {
                self.marks -= Marks::READABLE;
                Put::Nothing
            }
            // What was sent once is gone: so is the connection.
            outcome => {
                tracing::debug!(guest = %self.key.guest, world = %self.key.world, ?outcome, "TCP: receive");
                self.marks -= Marks::READABLE;
                self.marks |= Marks::DEAD | Marks::TOLD;
                Put::Nothing
            }
        }
    }

    /// `len` sequence numbers were sent.
    fn advance(&mut self, cx: &Cx<'_>, len: u32) {
        let again = self.snd_max.wrapping_sub(self.snd_nxt).min(len);
        self.snd_nxt = self.snd_nxt.wrapping_add(len);
        if before(self.snd_max, self.snd_nxt) {
            self.snd_max = self.snd_nxt;
        }
        if again == 0 {
            self.rto.sent(self.snd_nxt, cx.now);
        } else {
            self.sent_again(again);
        }
    }
}

fn ipv4(header: &Header) -> Ipv4Out {
    Ipv4Out {
        src: *header.world.ip(),
        dst: *header.guest.ip(),
        protocol: protocol::TCP,
        ttl: TTL,
        tos: 0,
        id: 0,
        fragment: DONT_FRAGMENT,
    }
}

/// Writes the headers in front of `got` bytes of data, and says what is left to the guest.
fn finish_data(
    header: &Header,
    cx: &Cx<'_>,
    mac: MacAddr,
    parts: &[VolatileSlice<'_>],
    got: usize,
    mss: u16,
) -> VnetHdr {
    let mut tcp = [0; TCP_MAX];
    let len = header.write(&mut tcp);
    let headers = FRAME_HEAD + len;
    let mut head = [0; HEADERS + STAMP_LEN];
    head[..FRAME_HEAD].copy_from_slice(&ipv4(header).head(mac, cx.config.gateway_mac, len + got));
    head[FRAME_HEAD..headers].copy_from_slice(&tcp[..len]);
    let mut sum = header.pseudo(len + got);
    let mut hdr = VnetHdr::default();
    let checksum = if cx.guest.contains(Offloads::CSUM) {
        hdr.flags = VnetFlags::NEEDS_CSUM;
        hdr.csum_start = CSUM_START;
        hdr.csum_offset = CSUM_OFFSET;
        sum.fold()
    } else {
        sum.add(&head[FRAME_HEAD..headers]);
        sum.add_parts(slices(parts, headers, got));
        sum.finish()
    };
    head[FRAME_HEAD + 16..FRAME_HEAD + 18].copy_from_slice(&checksum.to_be_bytes());
    if got > usize::from(mss) {
        hdr.gso_type = GsoType::Tcp4;
        hdr.gso_size = mss;
        hdr.hdr_len = headers as u16;
    }
    copy_into(parts, &head[..headers]);
    hdr
}

/// `len` bytes of `parts` behind their first `skip`.
fn slices<'a>(
    parts: &'a [VolatileSlice<'a>],
    skip: usize,
    len: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    let (mut skip, mut left) = (skip, len);
    parts.iter().filter_map(move |part| {
        let here = skip.min(part.len());
        skip -= here;
        let take = (part.len() - here).min(left);
        left -= take;
        part.subslice(here, take).ok()
    })
}

/// Puts a segment without data into the ring. Says whether there was room.
fn put(cx: &mut Cx<'_>, ring: &mut dyn RxRing, mac: MacAddr, header: &Header) -> bool {
    let (segment, len) = header.control();
    let frame = FRAME_HEAD + len;
    match ring.lend(frame, frame) {
        Lent::Buffers(parts) => {
            let mut bytes = [0; FRAME_HEAD + TCP_MAX];
            bytes[..FRAME_HEAD].copy_from_slice(&ipv4(header).head(mac, cx.config.gateway_mac, len));
            bytes[FRAME_HEAD..frame].copy_from_slice(&segment[..len]);
            copy_into(parts, &bytes[..frame]);
            ring.commit(VnetHdr::default(), frame);
            cx.emitted(frame);
        }
        Lent::Empty => return false,
        Lent::TooSmall => cx.drop(DropReason::RxBufferTooSmall, || "a TCP header".to_owned()),
    }
    true
}

/// A RST frame, or the ACK of a challenge: for those that have no flow.
pub(super) fn frame(mac: MacAddr, cx: &Cx<'_>, header: &Header) -> Vec<u8> {
    let (segment, len) = header.control();
    ipv4(header).frame(mac, cx.config.gateway_mac, &segment[..len])
}
