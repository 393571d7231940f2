//! [`FramePort`]: what a virtual NIC is plugged into.
//!
//! The NIC knows virtqueues and guest memory; the port knows where frames go: a TAP, the NAT, a switch. They
//! meet here and nowhere else, so neither learns the other's trade.
//!
//! ```text
//!   guest ──tx ring──> NIC ── send(&TxFrame) ──> port     frames lent as scatter lists over guest memory
//!   guest <─rx ring─── NIC <── recv(&mut RxRing) ── port  the NIC lends posted buffers, the port fills them
//! ```
//!
//! **Life cycle.** A port is made ready to use. The NIC reads [`FramePort::offloads`] and offers that much to
//! the guest; once the guest's driver has chosen, the NIC calls [`FramePort::set_offloads`] — again after each
//! device reset. From then on `send` and `recv` alternate, always on one thread, never re-entered.
//!
//! **The fd.** [`AsFd::as_fd`] is level-readable while `recv` may have something and no send made it so: an
//! event loop polls it for input. What a `send` causes on the spot (an ARP reply, a DHCP offer, a SYN-ACK) is
//! *not* announced by the fd; the caller drains `recv` after each batch of sends.
//!
//! **Back-pressure.** When `recv` answers [`Received::RingFull`] the caller stops polling the fd until the
//! guest has posted buffers, then calls `recv` without waiting for the fd. Otherwise a level-triggered loop
//! spins. Frames are never lost to a full ring by a port that can leave them where they are (a TAP's queue,
//! a socket).
//!
//! **Bytes are lent, not copied.** Payload goes from guest memory to a host socket by one `sendmsg`, and back by
//! one `recvmsg`. Guest memory may change while we look at it (the guest is running): whoever parses a header
//! copies it out once and decides on the copy.

use std::io;
use std::os::fd::AsFd;

use bitflags::bitflags;
use vm_memory::{Bytes, VolatileSlice};

use crate::vnet::VnetHdr;

/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
/// Most bytes of a frame without its `virtio_net_hdr`: Ethernet, one 802.1Q tag, and a 64 KiB IP packet.
pub const MAX_FRAME: usize = ETHERNET_LEN + 4 + 65_535;

bitflags! {
    /// Work on a frame that its receiver is able to take over from its sender.
    ///
    /// ```
    /// use net::switch::Switch;
    /// use net::{FramePort, Offloads};
    ///
    /// let mut port = Switch::new().plug(None)?;
    /// let guest = Offloads::CSUM | Offloads::TSO4;
    /// assert!(port.offloads().contains(guest), "a guest may accept part of what is offered");
    /// port.set_offloads(guest)?;
    /// assert!(!guest.contains(Offloads::TSO6), "IPv6 super-segments reach this guest in pieces");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u8 {
        /// Completes partial checksums (`NEEDS_CSUM`).
        const CSUM = 1;
        /// Takes TCP/IPv4 super-segments.
        const TSO4 = 2;
        /// Takes TCP/IPv6 super-segments.
        const TSO6 = 4;
        /// Takes ECN-marked super-segments.
        const ECN = 8;
        /// Takes UDP super-segments (`VIRTIO_NET_F_GUEST_USO4`/`USO6`, `HOST_USO`).
        const USO = 16;
    }
}

/// A frame on its way out of the guest.
///
/// ```
/// use net::{TxFrame, VnetHdr};
///
/// // A guest puts the header and the payload into buffers of their own.
/// let (mut header, mut payload) = ([0xff; 14], *b"payload");
/// let parts = [header.as_mut_slice().into(), payload.as_mut_slice().into()];
/// let frame = TxFrame { hdr: VnetHdr::default(), parts: &parts };
/// let mut bytes = [0; 4];
/// assert_eq!(frame.copy_out(17, &mut bytes), 4, "no more than there is room for");
/// assert_eq!((frame.len(), &bytes), (21, b"load"));
/// assert_eq!(frame.parts_from(14).count(), 1, "the payload alone");
/// ```
#[derive(Clone, Copy)]
pub struct TxFrame<'a> {
    /// The header, already checked against the frame's length by [`VnetHdr::parse`].
    pub hdr: VnetHdr,
    /// The Ethernet frame, in pieces; no piece is empty. The total is between 14 bytes and [`MAX_FRAME`].
    pub parts: &'a [VolatileSlice<'a>],
}

impl<'a> TxFrame<'a> {
    /// Bytes of the Ethernet frame.
    pub fn len(&self) -> usize {
        self.parts.iter().map(VolatileSlice::len).sum()
    }

    /// Whether there is no byte in it; never so for a frame that a NIC sends.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the frame's bytes from `offset` on into `buf` and says how many there were.
    pub fn copy_out(&self, offset: usize, buf: &mut [u8]) -> usize {
        let mut copied = 0;
        for part in self.parts_from(offset) {
            if copied == buf.len() {
                break;
            }
            let want = part.len().min(buf.len() - copied);
            // A read of `want <= part.len()` bytes at offset 0 always has them all.
            copied += part.read(&mut buf[copied..copied + want], 0).unwrap_or(0);
        }
        copied
    }

    /// The pieces of the frame from byte `offset` on: the payload behind parsed headers.
    pub fn parts_from(&self, offset: usize) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        let mut skip = offset;
        self.parts.iter().filter_map(move |part| {
            let here = skip.min(part.len());
            skip -= here;
            // `here <= part.len()`, so the offset is within the slice.
            part.offset(here).ok().filter(|rest| !rest.is_empty())
        })
    }
}

/// What became of a frame that was given to [`FramePort::send`].
///
/// ```
/// use net::switch::Switch;
/// use net::{DropReason, FramePort, Sent, TxFrame, VnetHdr};
///
/// let mut port = Switch::new().plug(None)?;
/// let mut bytes = [[0xff; 6], [2; 6], [0; 6]].concat(); // to everybody
/// let mut send = |len: usize| {
///     let parts = [(&mut bytes[..len]).into()];
///     port.send(&TxFrame { hdr: VnetHdr::default(), parts: &parts })
/// };
/// assert_eq!(send(18), Sent::Taken);
/// assert_eq!(send(13), Sent::Dropped(DropReason::Malformed), "an Ethernet header has 14 bytes");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sent {
    /// The port has it; the guest's buffers may be returned.
    Taken,
    /// The port refused it and counted the reason; the guest's buffers may be returned.
    Dropped(DropReason),
    /// The port can take no frame now. The caller keeps the frame, polls the fd for *output* as well, and
    /// offers the same frame again when it becomes writable.
    Full,
}

/// How [`FramePort::recv`] ended.
///
/// ```
/// use net::switch::Switch;
/// use net::{FramePort, Lent, Received, RxRing, TxFrame, VnetHdr};
///
/// /// A guest that has posted no buffer.
/// struct Dry;
/// # impl RxRing for Dry {
/// #     fn lend(&mut self, _: usize, _: usize) -> Lent<'_> { Lent::Empty }
/// #     fn commit(&mut self, _: VnetHdr, _: usize) {}
/// # }
/// let switch = Switch::new();
/// let (mut a, mut b) = (switch.plug(None)?, switch.plug(None)?);
/// assert_eq!(b.recv(&mut Dry), Received::Drained, "nothing has come yet");
/// let mut broadcast = [[0xff; 6], [2; 6], [0; 6]].concat();
/// let _ = a.send(&TxFrame { hdr: VnetHdr::default(), parts: &[broadcast.as_mut_slice().into()] });
/// assert_eq!(b.recv(&mut Dry), Received::RingFull, "the frame waits until the guest posts a buffer");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Received {
    /// Nothing more to receive now; the fd tells when there is.
    Drained,
    /// The guest has no buffer for the next frame: stop polling, call again after a refill.
    RingFull,
    /// The turn's budget is used up and there may be more: serve the other events, then call again. The fd
    /// is readable in this state, so an event loop comes back by itself.
    Again,
}

/// What [`RxRing::lend`] had to offer.
///
/// ```
/// use net::{Counters, DropReason, Lent, Received, RxRing, VnetHdr};
///
/// /// What a port does with a frame of 60 bytes; `None`: on to the next one.
/// fn pass_on(frame: &[u8; 60], ring: &mut dyn RxRing, counters: &mut Counters) -> Option<Received> {
///     match ring.lend(60, 60) {
///         Lent::Empty => return Some(Received::RingFull), // and keep the frame
///         Lent::TooSmall => counters.drop_frame(DropReason::RxBufferTooSmall, || "60 bytes".into()),
///         Lent::Buffers(parts) => {
///             parts[0].copy_from(frame); // a real port fills all the pieces
///             ring.commit(VnetHdr::default(), 60);
///         }
///     }
///     None
/// }
/// # struct Small;
/// # impl RxRing for Small {
/// #     fn lend(&mut self, _: usize, _: usize) -> Lent<'_> { Lent::TooSmall }
/// #     fn commit(&mut self, _: VnetHdr, _: usize) {}
/// # }
/// let mut counters = Counters::default();
/// assert_eq!(pass_on(&[0; 60], &mut Small, &mut counters), None, "waiting would not help");
/// assert_eq!(counters.dropped(DropReason::RxBufferTooSmall), 1);
/// ```
pub enum Lent<'a> {
    /// Room for the frame, in pieces, none of them empty.
    Buffers(&'a [VolatileSlice<'a>]),
    /// The guest has posted too few buffers for now.
    Empty,
    /// The guest's next buffer can never hold this much (no `MRG_RXBUF`, small buffer): drop the frame.
    TooSmall,
}

/// The guest's posted receive buffers, lent by the NIC for the duration of one [`FramePort::recv`].
///
/// The buffers exclude the `virtio_net_hdr`, which the NIC writes itself on `commit`.
///
/// ```
/// use net::switch::Switch;
/// use net::{FramePort, Lent, Received, RxRing, TxFrame, VnetHdr};
/// use vm_memory::VolatileSlice;
///
/// /// A guest that posts one buffer of a fixed size.
/// struct OneBuffer<'a> {
///     buffer: [VolatileSlice<'a>; 1],
///     used: Option<usize>,
/// }
///
/// impl RxRing for OneBuffer<'_> {
///     fn lend(&mut self, min: usize, _max: usize) -> Lent<'_> {
///         match self.used {
///             _ if self.buffer[0].len() < min => Lent::TooSmall,
///             None => Lent::Buffers(&self.buffer),
///             Some(_) => Lent::Empty,
///         }
///     }
///
///     fn commit(&mut self, _hdr: VnetHdr, len: usize) {
///         self.used = Some(len);
///     }
/// }
///
/// # let switch = Switch::new();
/// # let (mut a, mut b) = (switch.plug(None)?, switch.plug(None)?);
/// # let mut broadcast = [[0xff; 6], [2; 6], [0; 6]].concat();
/// # let _ = a.send(&TxFrame { hdr: VnetHdr::default(), parts: &[broadcast.as_mut_slice().into()] });
/// let mut memory = [0; 2048];
/// let mut ring = OneBuffer { buffer: [memory.as_mut_slice().into()], used: None };
/// assert_eq!(b.recv(&mut ring), Received::Drained);
/// assert_eq!(ring.used, Some(18), "the frame that the other port sent, without a virtio_net_hdr");
/// assert!(matches!(ring.lend(18, 18), Lent::Empty));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait RxRing {
    /// Lends room for a frame: at least `min` bytes and, if the guest has posted them, up to `max`.
    ///
    /// Lending again without a `commit` lends the same buffers: nothing is lost by not using them.
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_>;

    /// Passes the first `len` bytes of the last loan to the guest as one frame.
    ///
    /// `len` is at most what was lent; `hdr.num_buffers` is filled in by the NIC. The guest is interrupted at
    /// the end of the turn, not here.
    fn commit(&mut self, hdr: VnetHdr, len: usize);
}

/// Why a frame was not forwarded. Every refusal of this crate ends in one of these and is counted.
///
/// ```
/// use net::switch::Switch;
/// use net::{DropReason, FramePort, Sent, TxFrame, VnetHdr};
///
/// let mut port = Switch::new().plug(None)?;
/// let mut from_a_group = [0xff; 60];
/// let frame = TxFrame { hdr: VnetHdr::default(), parts: &[from_a_group.as_mut_slice().into()] };
/// assert_eq!(port.send(&frame), Sent::Dropped(DropReason::BadSource));
/// assert_eq!(port.counters().dropped(DropReason::BadSource), 1, "no refusal is silent");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum DropReason {
    /// Shorter than its headers say, or not a header at all.
    Malformed,
    /// An Ethernet type or IP protocol that this network does not carry.
    UnknownProtocol,
    /// A wrong IP or transport checksum.
    BadChecksum,
    /// The source address is not the sender's own (not its lease, or a martian).
    BadSource,
    /// Sent to an Ethernet address that is not on this network.
    NotForUs,
    /// The egress policy closes this destination (link-local, metadata, the host's loopback).
    Policy,
    /// Multicast or broadcast that a virbr0 network does not forward.
    Multicast,
    /// TTL ran out here; the guest got a time-exceeded.
    TtlExceeded,
    /// Larger than the MTU allows and not to be fragmented; the guest got a frag-needed.
    TooBig,
    /// The host knows no way there; the guest got an unreachable.
    Unreachable,
    /// A flow table is at its limit.
    TableFull,
    /// Fragments that never became a packet: overlap, time-out, or too many at once.
    Fragment,
    /// Belongs to no flow (a late segment, an unexpected reply).
    NoFlow,
    /// Outside the window or otherwise not acceptable to the TCP state.
    Tcp,
    /// A host socket refused the data for a reason that is not the guest's to know.
    HostSocket,
    /// The receiver's queue is full and cannot exert back-pressure (UDP, ICMP, a flooded port).
    QueueFull,
    /// The guest's receive buffers are too small for the frame.
    RxBufferTooSmall,
    /// A `virtio_net_hdr` that means nothing.
    BadVnetHdr,
    /// The TAP refused the frame (interface down, wrong size).
    TapError,
    /// A rate limit on answers that we generate (ICMP errors, DHCP floods).
    RateLimited,
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = Self::RateLimited as usize + 1;

    /// Every reason, in counter order.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Malformed,
        Self::UnknownProtocol,
        Self::BadChecksum,
        Self::BadSource,
        Self::NotForUs,
        Self::Policy,
        Self::Multicast,
        Self::TtlExceeded,
        Self::TooBig,
        Self::Unreachable,
        Self::TableFull,
        Self::Fragment,
        Self::NoFlow,
        Self::Tcp,
        Self::HostSocket,
        Self::QueueFull,
        Self::RxBufferTooSmall,
        Self::BadVnetHdr,
        Self::TapError,
        Self::RateLimited,
    ];
}

/// Frames, bytes and refusals of a port since it was made.
///
/// ```
/// use net::{Counters, DropReason};
///
/// let mut counters = Counters::default();
/// for seq in [7, 8] {
///     // The text is made, and logged, for the first one only.
///     counters.drop_frame(DropReason::Tcp, || format!("segment {seq}"));
/// }
/// assert_eq!(counters.drops().collect::<Vec<_>>(), [(DropReason::Tcp, 2)]);
/// assert_eq!(counters.tx_frames, 0, "a refused frame was not taken");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that the guest sent and the port took.
    pub tx_frames: u64,
    /// Their bytes, without `virtio_net_hdr`.
    pub tx_bytes: u64,
    /// Frames passed to the guest.
    pub rx_frames: u64,
    /// Their bytes, without `virtio_net_hdr`.
    pub rx_bytes: u64,
    drops: [u64; DropReason::COUNT],
}

impl Counters {
    /// Counts a refusal. The first of each kind is logged, with `detail` saying which frame it was.
    pub fn drop_frame(&mut self, reason: DropReason, detail: impl FnOnce() -> String) {
        let count = &mut self.drops[reason as usize];
        if *count == 0 {
            tracing::info!(?reason, detail = detail(), "frame dropped; further ones are only counted");
        }
        *count = count.saturating_add(1);
    }

    /// How many frames were refused for `reason`.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// The reasons that occurred, with their counts.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.into_iter().map(|r| (r, self.dropped(r))).filter(|(_, n)| *n > 0)
    }
}

/// A place where a NIC's frames go to and come from. See the module's contract.
///
/// ```
/// use std::io::{self, ErrorKind};
/// use std::os::fd::{AsFd, BorrowedFd};
/// use std::os::unix::net::UnixDatagram;
///
/// use net::{Counters, DropReason, FramePort, Lent, Offloads, Received, RxRing, Sent, TxFrame, VnetHdr};
///
/// /// A wire: each frame is a datagram. Without offloads, frames have at most the MTU and complete checksums.
/// struct Wire {
///     socket: UnixDatagram,
///     counters: Counters,
/// }
///
/// const FRAME: usize = 1514;
///
/// impl AsFd for Wire {
///     fn as_fd(&self) -> BorrowedFd<'_> {
///         self.socket.as_fd()
///     }
/// }
///
/// impl FramePort for Wire {
///     fn offloads(&self) -> Offloads {
///         Offloads::empty()
///     }
///
///     fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
///         Ok(())
///     }
///
///     fn mtu(&self) -> u16 {
///         1500
///     }
///
///     fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
///         let mut bytes = [0; FRAME];
///         let len = frame.copy_out(0, &mut bytes);
///         match self.socket.send(&bytes[..len]) {
///             Ok(_) => Sent::Taken,
///             Err(e) if e.kind() == ErrorKind::WouldBlock => Sent::Full,
///             Err(e) => {
///                 self.counters.drop_frame(DropReason::HostSocket, || e.to_string());
///                 Sent::Dropped(DropReason::HostSocket)
///             }
///         }
///     }
///
///     fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
///         let mut bytes = [0; FRAME];
///         // The frame stays in the socket until the guest has room for it.
///         for _ in 0..64 {
///             let Lent::Buffers(room) = ring.lend(FRAME, FRAME) else { return Received::RingFull };
///             let Ok(len) = self.socket.recv(&mut bytes) else { return Received::Drained };
///             let mut rest = &bytes[..len];
///             for part in room {
///                 let (now, later) = rest.split_at(rest.len().min(part.len()));
///                 part.copy_from(now);
///                 rest = later;
///             }
///             ring.commit(VnetHdr::default(), len);
///         }
///         Received::Again
///     }
///
///     fn counters(&self) -> Counters {
///         self.counters.clone()
///     }
/// }
///
/// let (ours, theirs) = UnixDatagram::pair()?;
/// ours.set_nonblocking(true)?;
/// let port: Box<dyn FramePort> = Box::new(Wire { socket: ours, counters: Counters::default() });
/// # Ok::<(), io::Error>(())
/// ```
pub trait FramePort: AsFd + Send {
    /// What the port can take over from the guest in `send`, and may itself ask of the guest in `recv`.
    fn offloads(&self) -> Offloads;

    /// Tells the port what this guest accepts in `recv`: a subset of [`Self::offloads`]. Until the first call
    /// the port must assume nothing: complete checksums and frames of at most the MTU.
    ///
    /// # Errors
    /// When the backend refuses (a TAP without the feature); the caller then fails the device.
    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()>;

    /// Largest IP packet, in bytes, that crosses the port without segmentation offload.
    fn mtu(&self) -> u16;

    /// Gives a frame to the port. Never blocks.
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent;

    /// Passes what has arrived to the guest, frame by frame, until nothing is left, the ring is full or the
    /// turn's budget is used up. Never blocks.
    fn recv(&mut self, ring: &mut dyn RxRing) -> Received;

    /// Whether the link is up: reported to the guest as `VIRTIO_NET_S_LINK_UP`.
    fn link_up(&self) -> bool {
        true
    }

    /// The port's counters.
    fn counters(&self) -> Counters;
}

/// A boxed port is a port: what wraps one need not care whether it knows which.
impl<P: FramePort + ?Sized> FramePort for Box<P> {
    fn offloads(&self) -> Offloads {
        (**self).offloads()
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        (**self).set_offloads(guest)
    }

    fn mtu(&self) -> u16 {
        (**self).mtu()
    }

    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        (**self).send(frame)
    }

    fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
        (**self).recv(ring)
    }

    fn link_up(&self) -> bool {
        (**self).link_up()
    }

    fn counters(&self) -> Counters {
        (**self).counters()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_from_skips_whole_pieces_and_splits_one() {
        let (mut a, mut b, mut c) = ([1u8, 2, 3], [4u8], [5u8, 6]);
        let parts = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
            VolatileSlice::from(&mut c[..]),
        ];
        let frame = TxFrame { hdr: VnetHdr::default(), parts: &parts };
        assert_eq!(frame.len(), 6);
        let mut buf = [0; 8];
        assert_eq!(frame.copy_out(2, &mut buf), 4);
        assert_eq!(buf, [3, 4, 5, 6, 0, 0, 0, 0]);
        assert_eq!(frame.parts_from(3).map(|p| p.len()).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(frame.parts_from(6).count(), 0);
        assert_eq!(frame.copy_out(4, &mut buf[..1]), 1);
        assert_eq!(buf[0], 5);
    }

    #[test]
    fn every_drop_reason_has_its_own_counter() {
        let mut counters = Counters::default();
        for (at, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at);
            counters.drop_frame(reason, String::new);
        }
        assert!(counters.drops().all(|(_, n)| n == 1));
        assert_eq!(counters.drops().count(), DropReason::COUNT);
    }
}
