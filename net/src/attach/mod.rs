//! Two ports back to back: a network for whatever is behind a TAP, without a virtual machine.
//!
//! ```text
//!   container, namespace ──> TAP ── recv ──> a buffer of ours ── send ──> NAT, switch, …
//!                                <── send ── a buffer of ours <── recv ──
//! ```
//!
//! [`run`] stands where a NIC would: what the guest's port receives, the network's port sends, and the other way
//! round. It serves containers and network namespaces with the network that machines get, and it measures that
//! network without a machine in front.
//!
//! **Offloads.** Each side is told what the other one can take, so that 64 KiB segments with partial checksums cross
//! where both know them. A TAP without `IFF_VNET_HDR` knows them as well: it cuts and completes what it gets
//! ([`crate::tap`]).
//!
//! **Back-pressure.** Each direction holds at most one frame: one that the receiving port answered with
//! [`Sent::Full`]. Nothing more is received for that direction until the port has taken it. Memory: one buffer of
//! [`MAX_FRAME`] bytes for each direction, through which frames are copied once; a machine's NIC does without that copy.
//!
//! **The end.** One of the caller's `stops` became readable (signals, a pidfd), or the guest's port reports an error
//! and its link is down: somebody deleted the TAP. An interface that is only down is waited for. A TAP's descriptor
//! keeps the namespace alive that it was opened in, so that the end of the last process there deletes nothing.

mod sys;
mod wait;

use std::io;
use std::os::fd::BorrowedFd;

use rustix::event::epoll::EventFlags;
use vm_memory::VolatileSlice;

pub use self::sys::inherited_fd;
use self::wait::Waiter;
use crate::{FramePort, Lent, MAX_FRAME, Received, RxRing, Sent, TxFrame, VnetHdr};

/// Why [`run`] returned.
///
/// ```
/// use std::io::Write;
/// use std::os::fd::AsFd;
/// use std::os::unix::net::UnixStream;
///
/// use net::attach::{self, Ended};
/// use net::switch::Switch;
///
/// let switch = Switch::new();
/// let (mut guest, mut network) = (switch.plug(None)?, switch.plug(None)?);
/// let (stop, mut button) = UnixStream::pair()?;
/// button.write_all(b"!")?;
/// let ended = attach::run(&mut guest, &mut network, &[stop.as_fd()])?;
/// assert_eq!(ended, Ended::Stopped(0), "the index of the descriptor that became readable");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// This one of the caller's descriptors became readable.
    Stopped(usize),
    /// The guest's port is gone for good.
    GuestGone,
}

/// Why the ports can't be connected any longer.
///
/// ```
/// use std::fs::File;
/// use std::os::fd::AsFd;
///
/// use net::attach::{self, AttachError};
/// use net::switch::Switch;
///
/// let switch = Switch::new();
/// let (mut guest, mut network) = (switch.plug(None)?, switch.plug(None)?);
/// // A regular file is always ready, so nobody can wait for it.
/// let file = File::open("/proc/self/exe")?;
/// let error = attach::run(&mut guest, &mut network, &[file.as_fd()]).unwrap_err();
/// assert!(matches!(error, AttachError::Wait(_)), "{error}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A side does not take what it offered.
    #[error("could not agree on offloads with the {side}'s port: {source}")]
    Offloads {
        /// "guest" or "network".
        side: &'static str,
        /// The port's answer.
        source: io::Error,
    },
    /// Waiting for the descriptors failed.
    #[error("could not wait for frames: {0}")]
    Wait(io::Error),
}

/// Passes frames between `guest` and `network` until one of `stops` is readable or the guest's port is gone.
///
/// What has arrived by then is passed on. The calling thread does all the work and sleeps while there is none.
///
/// # Errors
/// See [`AttachError`].
pub fn run(
    guest: &mut dyn FramePort,
    network: &mut dyn FramePort,
    stops: &[BorrowedFd<'_>],
) -> Result<Ended, AttachError> {
    agree(guest, network)?;
    let (mut above, mut below) = (vec![0; MAX_FRAME], vec![0; MAX_FRAME]);
    let mut up = Lane::new(&mut above);
    let mut down = Lane::new(&mut below);
    let mut waiter = Waiter::new([guest.as_fd(), network.as_fd()], stops).map_err(AttachError::Wait)?;
    loop {
        let wanted = [interest(&up, &down), interest(&down, &up)];
        let ready = waiter.wait([guest.as_fd(), network.as_fd()], wanted).map_err(AttachError::Wait)?;
        // In this order: the network may answer on the spot, without an event of its descriptor. A TAP never does.
        up.pass(guest, network);
        down.pass(network, guest);
        if let Some(which) = ready.stopped {
            return Ok(Ended::Stopped(which));
        }
        if ready.broken && !guest.link_up() {
            return Ok(Ended::GuestGone);
        }
    }
}

fn agree(guest: &mut dyn FramePort, network: &mut dyn FramePort) -> Result<(), AttachError> {
    let both = guest.offloads() & network.offloads();
    guest.set_offloads(both).map_err(|source| AttachError::Offloads { side: "guest", source })?;
    network.set_offloads(both).map_err(|source| AttachError::Offloads { side: "network", source })
}

/// What to wait for at a port that `from` receives from and `to` sends to.
fn interest(from: &Lane<'_>, to: &Lane<'_>) -> EventFlags {
    let mut wanted = EventFlags::empty();
    wanted.set(wait::INPUT, from.held.is_none());
    wanted.set(wait::OUTPUT, to.held.is_some());
    wanted
}

/// One direction: its buffer, and the frame in it that could not be sent yet.
struct Lane<'a> {
    buffer: [VolatileSlice<'a>; 1],
    held: Option<(VnetHdr, usize)>,
}

impl<'a> Lane<'a> {
    fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer: [VolatileSlice::from(buffer)], held: None }
    }

    /// Passes on what `from` has, the held frame first.
    fn pass(&mut self, from: &mut dyn FramePort, to: &mut dyn FramePort) {
        if let Some((hdr, len)) = self.held {
            self.send(to, hdr, len);
        }
        if self.held.is_none() {
            // Whether there is more is what the descriptor says.
            let (Received::Drained | Received::RingFull | Received::Again) =
                from.recv(&mut Forward { lane: self, to });
        }
    }

    fn send(&mut self, to: &mut dyn FramePort, hdr: VnetHdr, len: usize) {
        let Ok(frame) = self.buffer[0].subslice(0, len) else { return };
        let sent = to.send(&TxFrame { hdr, parts: &[frame] });
        self.held = (sent == Sent::Full).then_some((hdr, len));
    }
}

/// A ring whose frames are sent to another port at once.
struct Forward<'a, 'b> {
    lane: &'a mut Lane<'b>,
    to: &'a mut dyn FramePort,
}

impl RxRing for Forward<'_, '_> {
    fn lend(&mut self, _min: usize, _max: usize) -> Lent<'_> {
        if self.lane.held.is_some() { Lent::Empty } else { Lent::Buffers(&self.lane.buffer) }
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        self.lane.send(self.to, hdr, len);
    }
}

#[cfg(test)]
mod tests;
