//! [`TapPort`]: a kernel TAP interface as a NIC's network.
//!
//! ```text
//!   guest ── send: one writev of header + lent pieces ──> /dev/net/tun ──> vnet0 ──> br0 ──> eth0
//!         <─ recv: one readv into header + lent buffers ─┘
//! ```
//!
//! With `IFF_VNET_HDR` the kernel and the guest speak the same `virtio_net_hdr`, so a 64 KiB super-segment or a
//! partial checksum crosses untouched, and what the guest did not agree to the kernel makes good itself
//! (`TUNSETOFFLOAD`). A descriptor that was handed over without that flag works too: then checksums are completed
//! and super-segments cut here ([`crate::segment`]).
//!
//! **Ownership.** A TAP that [`TapPort::open`] makes is not persistent: it ends with its descriptor, also when the
//! process is killed, and takes its bridge port with it. A persistent TAP that somebody prepared is attached to and
//! left behind. One that another process holds is refused.
//!
//! **No frame is lost to a small loan.** The length of the next frame is not known before the read, so the read has a
//! buffer of our own behind the lent pieces. A frame that is longer than the loan, or that the guest has not agreed
//! to (one that was queued before its driver was reset), is parked, helped, and delivered as the ring has room;
//! nothing more is read meanwhile, so that the rest waits in the TAP's own queue.
//!
//! **Refusals.** An interface that is down (`EIO`), a frame that the kernel finds malformed (`EINVAL`), a TAP that
//! somebody deleted (`EBADFD`): a counted drop and, for the first and last, a link that is down. Nothing panics, and
//! nothing ends the machine. `EAGAIN` from a write means that the TAP's send buffer limit is reached (there is none
//! unless somebody set `TUNSETSNDBUF`) and becomes [`Sent::Full`].
//!
//! **Limits.** [`FRAMES_PER_TURN`] frames or [`BYTES_PER_TURN`] bytes per `recv`. Memory: one frame of 64 KiB for
//! spilling, one more while a frame is parked.
//!
//! **After deletion.** A deleted TAP's descriptor reports `EPOLLERR` for ever; whoever polls it should
//! stop when [`FramePort::link_up`] says false after such an event.

mod open;
mod sys;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vm_memory::VolatileSlice;

pub use open::{TapError, TapName};

use crate::port::{
    Counters, DropReason, ETHERNET_LEN, FramePort, Lent, MAX_FRAME, Offloads, Received, RxRing, Sent, TxFrame,
};
use crate::segment::{self, Parked, Plan};
use crate::vnet::{GsoType, VNET_HDR_LEN, VnetFlags, VnetHdr};

/// Most frames that one `recv` passes on, so that a flood on the LAN does not starve the guest's other devices.
pub const FRAMES_PER_TURN: usize = 256;
/// Most bytes that one `recv` passes on before it takes a break.
pub const BYTES_PER_TURN: usize = 4 << 20;
/// An 802.1Q tag does not count towards the MTU.
const TAG_LEN: usize = 4;

/// A TAP interface, ready to use. See the module.
///
/// ```no_run
/// use net::tap::{TapName, TapPort};
///
/// let tap = TapPort::open(&TapName::default(), Some("br0"))?;
/// println!("{} is a port of br0", tap.name());
/// // Or one that a privileged launcher has opened:
/// # let fd: std::os::fd::OwnedFd = std::fs::File::open("/dev/net/tun").unwrap().into();
/// let tap = TapPort::from_fd(fd)?;
/// # Ok::<(), net::tap::TapError>(())
/// ```
#[derive(Debug)]
pub struct TapPort {
    fd: OwnedFd,
    name: String,
    mtu: u16,
    vnet_hdr: bool,
    offered: Offloads,
    granted: Offloads,
    up: bool,
    parked: Option<Parked>,
    /// Takes what a loan has no room for, and frames that are gathered; [`MAX_FRAME`] bytes.
    spill: Box<[u8]>,
    counters: Counters,
}

impl TapPort {
    /// Makes, or attaches to, the TAP `name`, brings it up and, if a bridge is given, makes it a port of that with
    /// the bridge's MTU.
    ///
    /// # Errors
    /// See [`TapError`]; nothing is left behind then.
    pub fn open(name: &TapName, bridge: Option<&str>) -> Result<Self, TapError> {
        open::open(name, bridge)
    }

    /// Takes over a TAP that is open: from a privileged parent, or a sandbox's launcher.
    ///
    /// The descriptor becomes non-blocking. Whether it carries `virtio_net_hdr` is found out by itself.
    ///
    /// # Errors
    /// When the descriptor is no TAP, or its header's length can't be set.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        open::adopt(fd)
    }

    /// The interface's name, such as `vnet0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes one frame that needs nothing done to it, or that the kernel will help.
    fn write(&mut self, hdr: VnetHdr, parts: &[VolatileSlice<'_>]) -> Sent {
        let head = hdr.to_bytes();
        let head: &[u8] = if self.vnet_hdr { &head } else { &[] };
        let written = sys::write_frame(self.fd.as_fd(), head, parts);
        self.outcome(written.err(), &hdr)
    }

    /// What a write's result means for the frame and the link.
    fn outcome(&mut self, error: Option<io::Error>, hdr: &VnetHdr) -> Sent {
        let Some(error) = error else {
            self.up = true;
            return Sent::Taken;
        };
        let reason = match error.raw_os_error() {
            Some(libc::EAGAIN) => return Sent::Full,
            Some(libc::EINVAL) if *hdr != VnetHdr::default() => DropReason::BadVnetHdr,
            Some(libc::EINVAL) => DropReason::Malformed,
            Some(libc::EIO | libc::EBADFD) => {
                self.up = false;
                DropReason::TapError
            }
            _ => DropReason::TapError,
        };
        self.counters.drop_frame(reason, || format!("{}: {error}", self.name));
        Sent::Dropped(reason)
    }

    fn refuse(&mut self, reason: DropReason, detail: impl FnOnce() -> String) -> Sent {
        self.counters.drop_frame(reason, detail);
        Sent::Dropped(reason)
    }

    /// Sends a frame in more pieces than one call takes.
    fn send_gathered(&mut self, frame: &TxFrame<'_>, hdr: VnetHdr) -> Sent {
        let mut bytes = self.gather(frame);
        self.write(hdr, &[VolatileSlice::from(bytes.as_mut_slice())])
    }

    /// Sends a frame that needs the help which only a `virtio_net_hdr` could have asked of the kernel.
    fn send_helped(&mut self, frame: &TxFrame<'_>) -> Sent {
        let mut bytes = self.gather(frame);
        if frame.hdr.gso_type == GsoType::None {
            if let Err(error) = segment::complete_checksum(&frame.hdr, &mut bytes) {
                return self.refuse(DropReason::BadVnetHdr, || error.to_string());
            }
            return self.write(VnetHdr::default(), &[VolatileSlice::from(bytes.as_mut_slice())]);
        }
        let plan = match Plan::new(&frame.hdr, &bytes) {
            Ok(plan) => plan,
            Err(error) => return self.refuse(DropReason::BadVnetHdr, || error.to_string()),
        };
        let mut piece = Vec::new();
        for index in 0..plan.count() {
            plan.piece(&bytes, index, &mut piece);
            match self.write(VnetHdr::default(), &[VolatileSlice::from(piece.as_mut_slice())]) {
                Sent::Taken => {}
                // Offering the whole frame again would repeat the pieces that are through.
                Sent::Full if index > 0 => {
                    return self
                        .refuse(DropReason::QueueFull, || format!("piece {index} of {}", plan.count()));
                }
                other => return other,
            }
        }
        Sent::Taken
    }

    fn gather(&self, frame: &TxFrame<'_>) -> Vec<u8> {
        let mut bytes = vec![0; frame.len()];
        let n = frame.copy_out(0, &mut bytes);
        bytes.truncate(n);
        bytes
    }

    /// The smallest and the largest room to ask of the guest for a frame that has not been read.
    fn loan(&self) -> (usize, usize) {
        let plain = ETHERNET_LEN + usize::from(self.mtu);
        let large = Offloads::TSO4 | Offloads::TSO6 | Offloads::USO;
        (plain, if self.granted.intersects(large) { MAX_FRAME } else { plain + TAG_LEN })
    }

    /// Reads one frame and passes it on, or parks it.
    fn recv_one(&mut self, ring: &mut dyn RxRing) -> One {
        let (min, max) = self.loan();
        let none: &[VolatileSlice<'_>] = &[];
        let parts = match ring.lend(min, max) {
            Lent::Empty => return One::RingFull,
            // The frame decides, once its length is known.
            Lent::TooSmall => none,
            Lent::Buffers(parts) => &parts[..parts.len().min(sys::MAX_PARTS)],
        };
        let lent: usize = parts.iter().map(VolatileSlice::len).sum();
        let mut head = [0; VNET_HDR_LEN];
        let head_len = if self.vnet_hdr { VNET_HDR_LEN } else { 0 };
        let spill = &mut self.spill[lent.min(MAX_FRAME)..];
        let read = match sys::read_frame(self.fd.as_fd(), &mut head[..head_len], parts, spill) {
            Ok(n) => n,
            Err(error) => return self.read_failed(&error),
        };
        let len = read.saturating_sub(head_len);
        let hdr = match VnetHdr::parse(&head, len) {
            _ if len < ETHERNET_LEN => return self.refused(DropReason::Malformed, || format!("{len} bytes")),
            Err(error) => return self.refused(DropReason::BadVnetHdr, || error.to_string()),
            Ok(hdr) => hdr,
        };
        if len <= lent && !segment::needs_help(&hdr, self.granted) {
            ring.commit(segment::visible_hdr(hdr, self.granted), len);
            self.counters.rx_frames += 1;
            self.counters.rx_bytes += len as u64;
            return One::Passed(len);
        }
        let mut frame = vec![0; len];
        let in_ring = TxFrame { hdr, parts }.copy_out(0, &mut frame);
        frame[in_ring..].copy_from_slice(&self.spill[in_ring..len]);
        match Parked::new(hdr, frame, self.granted) {
            Ok(parked) => self.parked = Some(parked),
            Err(error) => return self.refused(DropReason::BadVnetHdr, || error.to_string()),
        }
        One::Passed(len)
    }

    fn refused(&mut self, reason: DropReason, detail: impl FnOnce() -> String) -> One {
        self.counters.drop_frame(reason, detail);
        One::Passed(0)
    }

    fn read_failed(&mut self, error: &io::Error) -> One {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => {}
            Some(libc::EINTR) => return One::Passed(0),
            // A TAP that is gone answers so for ever: it is said once.
            _ if self.up => {
                self.up = false;
                tracing::warn!(tap = self.name, %error, "the TAP can't be read any more; its link is down");
            }
            _ => {}
        }
        One::Drained
    }
}

/// How an attempt to read one frame ended.
enum One {
    /// A frame of so many bytes went to the guest, was parked or refused.
    Passed(usize),
    /// There is none.
    Drained,
    /// There is no room for one.
    RingFull,
}

impl AsFd for TapPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl FramePort for TapPort {
    fn offloads(&self) -> Offloads {
        self.offered
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        if !self.offered.contains(guest) {
            let text = format!("{} offers {:?}, not {guest:?}", self.name, self.offered);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if self.vnet_hdr {
            sys::set_offload(self.fd.as_fd(), open::tun_features(guest))?;
        }
        self.granted = guest;
        // What was parked was prepared for the driver that is gone.
        self.parked = None;
        Ok(())
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        if frame.hdr.gso_type == GsoType::Udp {
            return self.refuse(DropReason::BadVnetHdr, || "UDP fragmentation offload".to_owned());
        }
        // The kernel has no use for the rest, and a guest's word that a checksum is valid is not passed on.
        let flags = frame.hdr.flags & VnetFlags::NEEDS_CSUM;
        let hdr = VnetHdr { flags, num_buffers: 0, ..frame.hdr };
        let sent = if !self.vnet_hdr && segment::needs_help(&hdr, Offloads::empty()) {
            self.send_helped(frame)
        } else if frame.parts.len() > sys::MAX_PARTS {
            self.send_gathered(frame, hdr)
        } else {
            self.write(hdr, frame.parts)
        };
        if sent == Sent::Taken {
            self.counters.tx_frames += 1;
            self.counters.tx_bytes += frame.len() as u64;
        }
        sent
    }

    fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
        let (mut frames, mut bytes) = (0, 0);
        loop {
            if let Some(mut parked) = self.parked.take()
                && !parked.deliver(ring, &mut self.counters)
            {
                self.parked = Some(parked);
                return Received::RingFull;
            }
            if frames >= FRAMES_PER_TURN || bytes >= BYTES_PER_TURN {
                return Received::Again;
            }
            match self.recv_one(ring) {
                One::Passed(len) => {
                    frames += 1;
                    bytes += len;
                }
                One::Drained => return Received::Drained,
                One::RingFull => return Received::RingFull,
            }
        }
    }

    fn link_up(&self) -> bool {
        self.up
    }

    fn counters(&self) -> Counters {
        self.counters.clone()
    }
}
