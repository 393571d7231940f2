//! Small frames on their way to the guests: ARP and DHCP answers, ICMP, TCP resets.
//!
//! Bounded, because whoever floods us with requests would fill it: what does not fit is dropped and counted by
//! the caller. Bulk data never passes here; it goes from its socket into the guest's buffers.

use std::collections::VecDeque;

use vm_memory::Bytes;

use crate::{Counters, DropReason, Lent, Received, RxRing, VnetHdr};

/// Frames that wait at most; each is at most an MTU long.
pub(crate) const OUTBOX_FRAMES: usize = 256;

/// The queue. A frame is a complete Ethernet frame with complete checksums.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    frames: VecDeque<Vec<u8>>,
}

impl Outbox {
    /// Queues a frame.
    ///
    /// # Errors
    /// [`DropReason::QueueFull`], which the caller counts.
    pub(crate) fn push(&mut self, frame: Vec<u8>) -> Result<(), DropReason> {
        if self.frames.len() == OUTBOX_FRAMES {
            return Err(DropReason::QueueFull);
        }
        self.frames.push_back(frame);
        Ok(())
    }

    /// Passes the frames to the guest. Answers `Drained` or `RingFull`.
    pub(crate) fn emit(&mut self, counters: &mut Counters, ring: &mut dyn RxRing) -> Received {
        while let Some(frame) = self.frames.front() {
            match ring.lend(frame.len(), frame.len()) {
                Lent::Buffers(parts) => {
                    copy_into(parts, frame);
                    ring.commit(VnetHdr::default(), frame.len());
                    counters.rx_frames += 1;
                    counters.rx_bytes += frame.len() as u64;
                }
                Lent::Empty => return Received::RingFull,
                Lent::TooSmall => {
                    counters.drop_frame(DropReason::RxBufferTooSmall, || format!("{} bytes", frame.len()));
                }
            }
            self.frames.pop_front();
        }
        Received::Drained
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }
}

/// Writes `bytes` into the beginning of lent buffers, which have room for them.
pub(crate) fn copy_into(parts: &[vm_memory::VolatileSlice<'_>], bytes: &[u8]) {
    let mut rest = bytes;
    for part in parts {
        if rest.is_empty() {
            break;
        }
        // A write of at most the slice's length at offset 0 always succeeds.
        let written = part.write(&rest[..rest.len().min(part.len())], 0).unwrap_or(0);
        rest = &rest[written..];
    }
}
