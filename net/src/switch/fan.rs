//! What the uplink fills when it is drained: the guest's own ring, or a buffer of ours behind which frames part ways.
//!
//! The uplink asks for room before anybody knows whom its frame is for. While there is one port, the frame is
//! for that port, and its guest's buffers are lent on: [`Direct`]. With more, a frame must not pass through the memory
//! of a guest that it is not for (a guest may read its posted buffers at any time), so a buffer of 64 KiB takes
//! each frame and [`Fan`] copies it into the queues of those it is for.
//!
//! **Back-pressure.** A port whose queue has no room for another super-segment makes the uplink wait, as long as somebody
//! polls that port: it will empty the queue and drain the uplink itself, so it is given the lead. A port that nobody polls
//! (its guest posts no buffers) makes nobody wait: what does not fit is dropped and counted there.

use std::time::Instant;

use vm_memory::VolatileSlice;

use super::table::{Side, To};
use super::{QUEUE_BYTES, QUEUE_FRAMES, State, addresses, gather};
use crate::port::{Counters, DropReason, ETHERNET_LEN, Lent, MAX_FRAME, RxRing};
use crate::vnet::VnetHdr;

/// The ring of the only guest; counts what it gets.
pub(super) struct Direct<'a> {
    pub(super) ring: &'a mut dyn RxRing,
    pub(super) counters: Counters,
}

impl RxRing for Direct<'_> {
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_> {
        self.ring.lend(min, max)
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        self.ring.commit(hdr, len);
        self.counters.rx_frames += 1;
        self.counters.rx_bytes += len as u64;
    }
}

/// A buffer of ours, and whom its frames are for.
pub(super) struct Fan<'a> {
    pub(super) state: &'a mut State,
    /// [`MAX_FRAME`] bytes that no guest sees.
    pub(super) room: &'a [VolatileSlice<'a>],
    pub(super) now: Instant,
    /// The port for which the uplink was made to wait.
    pub(super) waits_for: Option<usize>,
}

impl RxRing for Fan<'_> {
    fn lend(&mut self, min: usize, _max: usize) -> Lent<'_> {
        if min > MAX_FRAME {
            return Lent::TooSmall;
        }
        self.waits_for = self.state.ports.iter().position(|port| {
            port.as_ref().is_some_and(|port| {
                let full = port.bytes + MAX_FRAME > QUEUE_BYTES || port.queue.len() >= QUEUE_FRAMES;
                full && !port.stalled
            })
        });
        if self.waits_for.is_some() { Lent::Empty } else { Lent::Buffers(self.room) }
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        let frame = gather(self.room, len);
        let Some(header) = frame.first_chunk::<ETHERNET_LEN>() else { return };
        let (dst, src) = addresses(header);
        if !self.state.table.learn(src, Side::Uplink, self.now) {
            // A guest's frame that came back, or somebody out there who claims a guest's address.
            self.state.from_uplink.drop_frame(DropReason::BadSource, || format!("{src} from the uplink"));
            return;
        }
        match self.state.table.lookup(dst, Side::Uplink, self.now) {
            To::One(Side::Port(id)) => {
                if let Err(reason) = self.state.enqueue(id, hdr, frame) {
                    self.state.count(id, reason);
                }
            }
            To::All => self.state.flood(None, hdr, &frame),
            To::One(Side::Uplink) | To::Nobody => {}
        }
    }
}
