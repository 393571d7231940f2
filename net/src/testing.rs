//! [`ScriptedPort`]: a port whose network is a test.
//!
//! The test holds the [`Script`]: it sees what was sent, delivers frames, makes the port full or broken, and
//! lets a send cause an answer on the spot, as an ARP request does. The port keeps the contract of
//! [`FramePort`](crate::FramePort) to the letter, and panics when the NIC breaks its side of it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, VolatileSlice};

use crate::{
    Counters, DropReason, ETHERNET_LEN, FramePort, Lent, MAX_FRAME, Offloads, Received, RxRing, Sent,
    TxFrame, VnetHdr,
};

/// A frame and its header.
pub type Frame = (VnetHdr, Vec<u8>);

struct State {
    sent: Vec<Frame>,
    to_guest: VecDeque<Frame>,
    /// One for each of the next sends; what it causes on the spot.
    replies: VecDeque<Frame>,
    full: bool,
    drop_sends: Option<DropReason>,
    refuse_offloads: bool,
    guest_offloads: Vec<Offloads>,
    budget: usize,
    lend_more: usize,
    link_up: bool,
    counters: Counters,
    /// The other end of the port's fd: a byte in it is input, room in it is output.
    far: UnixDatagram,
    /// The port's own, to be hung up.
    near: Option<UnixDatagram>,
}

/// The test's hand on a [`ScriptedPort`].
#[derive(Clone)]
pub struct Script(Arc<Mutex<State>>);

/// The port that the NIC gets.
pub struct ScriptedPort {
    near: UnixDatagram,
    offloads: Offloads,
    mtu: u16,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ScriptedPort {
    /// A port with these abilities and an MTU of 1500.
    ///
    /// # Errors
    /// When the host refuses a socket pair.
    pub fn new(offloads: Offloads) -> io::Result<(Self, Script)> {
        let (near, far) = UnixDatagram::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let state = Arc::new(Mutex::new(State {
            sent: Vec::new(),
            to_guest: VecDeque::new(),
            replies: VecDeque::new(),
            full: false,
            drop_sends: None,
            refuse_offloads: false,
            guest_offloads: Vec::new(),
            budget: usize::MAX,
            lend_more: 0,
            link_up: true,
            counters: Counters::default(),
            far,
            near: Some(near.try_clone()?),
        }));
        let script = Script(Arc::clone(&state));
        Ok((Self { near, offloads, mtu: 1500, state }, script))
    }
}

impl Script {
    /// From now on the port's fd reports a hang-up, for ever.
    ///
    /// # Panics
    /// When the host refuses.
    pub fn hang_up(&self) {
        let near = lock(&self.0).near.take().expect("it hangs up once");
        near.shutdown(std::net::Shutdown::Both).expect("it is connected");
    }

    /// Takes the frames that the NIC has sent.
    pub fn take_sent(&self) -> Vec<Frame> {
        std::mem::take(&mut lock(&self.0).sent)
    }

    /// A plain frame arrives from the network: the port becomes readable.
    pub fn deliver(&self, frame: &[u8]) {
        self.deliver_with(VnetHdr::default(), frame);
    }

    /// A frame with this header arrives from the network.
    pub fn deliver_with(&self, hdr: VnetHdr, frame: &[u8]) {
        let mut state = lock(&self.0);
        state.to_guest.push_back((hdr, frame.to_vec()));
        // When the socket's buffer is full the port is readable already.
        let _ = state.far.send(&[0]);
    }

    /// The next send that has no reply yet will cause this frame, which the fd does not announce.
    pub fn reply(&self, frame: &[u8]) {
        lock(&self.0).replies.push_back((VnetHdr::default(), frame.to_vec()));
    }

    /// Frames that the guest has not received yet.
    pub fn pending(&self) -> usize {
        lock(&self.0).to_guest.len()
    }

    /// Makes the port full, until [`Self::make_room`].
    pub fn fill(&self) {
        lock(&self.0).full = true;
    }

    /// The port can take frames again: it becomes writable.
    pub fn make_room(&self) {
        let mut state = lock(&self.0);
        state.full = false;
        while state.far.recv(&mut [0; 1]).is_ok() {}
    }

    /// The port drops what it is sent for this reason, or `None`: takes it.
    pub fn drop_sends(&self, reason: Option<DropReason>) {
        lock(&self.0).drop_sends = reason;
    }

    /// The backend refuses any choice of offloads.
    pub fn refuse_offloads(&self) {
        lock(&self.0).refuse_offloads = true;
    }

    /// The choices of offloads so far, the latest last.
    pub fn guest_offloads(&self) -> Vec<Offloads> {
        lock(&self.0).guest_offloads.clone()
    }

    /// At most this many frames per `recv`.
    pub fn set_budget(&self, frames: usize) {
        lock(&self.0).budget = frames;
    }

    /// The port asks for this many bytes more than a frame has, as one that can't know its length does.
    pub fn lend_more(&self, bytes: usize) {
        lock(&self.0).lend_more = bytes;
    }

    /// Takes the cable out, or puts it back in.
    pub fn set_link(&self, up: bool) {
        lock(&self.0).link_up = up;
    }
}

impl AsFd for ScriptedPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.near.as_fd()
    }
}

impl FramePort for ScriptedPort {
    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        assert!(self.offloads.contains(guest), "the NIC chose {guest:?} of {:?}", self.offloads);
        let mut state = lock(&self.state);
        if state.refuse_offloads {
            return Err(io::Error::other("refused by the test's script"));
        }
        state.guest_offloads.push(guest);
        Ok(())
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let len = frame.len();
        assert!((ETHERNET_LEN..=MAX_FRAME).contains(&len), "the NIC sent a frame of {len} bytes");
        assert!(frame.parts.iter().all(|part| !part.is_empty()), "the NIC sent an empty piece");
        let mut state = lock(&self.state);
        assert!(!state.guest_offloads.is_empty(), "the NIC sent before it chose offloads");
        if state.full {
            // What does not fit makes the fd unwritable, as a socket's would be.
            while self.near.send(&[0]).is_ok() {}
            return Sent::Full;
        }
        if let Some(reason) = state.drop_sends {
            state.counters.drop_frame(reason, String::new);
            return Sent::Dropped(reason);
        }
        let mut bytes = vec![0; len];
        assert_eq!(frame.copy_out(0, &mut bytes), len);
        state.counters.tx_frames += 1;
        state.counters.tx_bytes += len as u64;
        state.sent.push((frame.hdr, bytes));
        if let Some(reply) = state.replies.pop_front() {
            state.to_guest.push_back(reply);
        }
        Sent::Taken
    }

    fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
        let mut state = lock(&self.state);
        for _ in 0..state.budget {
            let Some((hdr, frame)) = state.to_guest.front() else {
                while self.near.recv(&mut [0; 1]).is_ok() {}
                return Received::Drained;
            };
            match ring.lend(frame.len(), frame.len() + state.lend_more) {
                Lent::Empty => return Received::RingFull,
                Lent::TooSmall => {
                    state.to_guest.pop_front();
                    state.counters.drop_frame(DropReason::RxBufferTooSmall, String::new);
                }
                Lent::Buffers(room) => {
                    copy_in(room, frame);
                    let len = frame.len();
                    ring.commit(*hdr, len);
                    state.to_guest.pop_front();
                    state.counters.rx_frames += 1;
                    state.counters.rx_bytes += len as u64;
                }
            }
        }
        Received::Again
    }

    fn link_up(&self) -> bool {
        lock(&self.state).link_up
    }

    fn counters(&self) -> Counters {
        lock(&self.state).counters.clone()
    }
}

/// Copies `frame` to the start of `room`, which must be large enough and without empty pieces.
fn copy_in(room: &[VolatileSlice<'_>], mut frame: &[u8]) {
    for piece in room {
        assert!(!piece.is_empty(), "the NIC lent an empty piece");
        let written = piece.write(&frame[..frame.len().min(piece.len())], 0).unwrap_or(0);
        frame = &frame[written..];
        if frame.is_empty() {
            return;
        }
    }
    assert!(frame.is_empty(), "the NIC lent {} bytes too few", frame.len());
}
