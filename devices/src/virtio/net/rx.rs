//! The receive queue: the guest's buffers, lent to the port for one turn.
//!
//! [`RxTurn`] is the [`RxRing`] of one `recv`. It *gathers* chains from the ring until they hold what the port asks
//! for, lends their memory behind the 12 bytes for the header, and on commit writes the header, returns the chains
//! that the frame needed and keeps the others gathered for the next frame. With `MRG_RXBUF` a frame may span
//! chains, and only the first has a header (§5.1.6.4); without it one chain holds one frame. A frame's chains become
//! visible to the driver together. At the end of the turn the chains that were not needed go back to the ring.
//!
//! Limits: a loan has at most [`MAX_PIECES`] pieces. A chain of fewer than 12 bytes, or any broken chain, breaks the
//! queue; the error surfaces at [`RxTurn::finish`].

use std::collections::VecDeque;

use net::{Lent, RxRing, VNET_HDR_LEN, VnetHdr};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::counters::Turn;
use crate::virtio::pieces::{Spare, take_front};
use crate::virtio::{Direction, QueueError, Ring};

/// Most pieces of one loan: what one `recvmsg` takes is 1024.
pub const MAX_PIECES: usize = 512;
/// Frames after which the driver gets to see what has come, while the turn goes on.
const PUBLISH_EVERY: u16 = 16;

/// A gathered chain.
struct Chain {
    head: u16,
    /// Bytes and pieces behind the header, if it is the first; all, if it is not.
    room: usize,
    pieces: usize,
}

/// The allocations of a turn, kept between turns.
#[derive(Default)]
pub(super) struct RxScratch {
    pieces: Spare,
    header: Spare,
    chains: VecDeque<Chain>,
}

/// How a turn of reception left the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RxLeft {
    /// The available index up to which buffers had been seen when they did not suffice, if they did not.
    pub(super) exhausted_at: Option<u16>,
}

/// The guest's buffers during one turn. See the module's documentation.
pub(super) struct RxTurn<'t, 'm> {
    mem: &'m GuestMemoryMmap,
    ring: &'t mut Ring,
    turn: &'t mut Turn,
    mergeable: bool,
    /// Memory of the gathered chains in order, from `start` on: `room` bytes, the first chain's header excluded.
    pieces: Vec<VolatileSlice<'m>>,
    start: usize,
    room: usize,
    /// The first chain's header.
    header: Vec<VolatileSlice<'m>>,
    chains: VecDeque<Chain>,
    /// The piece that the current loan cut short, to be restored.
    cut: Option<(usize, VolatileSlice<'m>)>,
    unpublished: u16,
    exhausted_at: Option<u16>,
    error: Option<QueueError>,
}

impl<'t, 'm> RxTurn<'t, 'm> {
    pub(super) fn new(
        mem: &'m GuestMemoryMmap,
        ring: &'t mut Ring,
        mergeable: bool,
        scratch: &mut RxScratch,
        turn: &'t mut Turn,
    ) -> Self {
        Self {
            mem,
            ring,
            turn,
            mergeable,
            pieces: scratch.pieces.take(),
            start: 0,
            room: 0,
            header: scratch.header.take(),
            chains: std::mem::take(&mut scratch.chains),
            cut: None,
            unpublished: 0,
            exhausted_at: None,
            error: None,
        }
    }

    /// Puts back what was not used, shows the driver what was, and says how the ring was left.
    pub(super) fn finish(mut self, scratch: &mut RxScratch) -> Result<RxLeft, QueueError> {
        // No more than a queue's size was gathered.
        self.ring.unpop(self.chains.len() as u16);
        self.chains.clear();
        scratch.pieces.put(self.pieces);
        scratch.header.put(self.header);
        scratch.chains = self.chains;
        match self.error {
            Some(error) => Err(error),
            None => self.ring.publish(self.mem).map(|()| RxLeft { exhausted_at: self.exhausted_at }),
        }
    }

    /// Gathers one more chain; false when the ring has none.
    fn gather(&mut self) -> Result<bool, QueueError> {
        let Some(chain) = self.ring.pop(self.mem)? else { return Ok(false) };
        let head = chain.head_index();
        let before = self.pieces.len();
        let bytes = Ring::collect(self.mem, chain, Direction::Writable, &mut self.pieces)?;
        if bytes < VNET_HDR_LEN {
            return Err(QueueError::TooSmall { head, bytes });
        }
        self.chains.push_back(Chain { head, room: bytes, pieces: self.pieces.len() - before });
        self.room += bytes;
        if self.chains.len() == 1 {
            self.reserve_header();
        }
        Ok(true)
    }

    /// Sets the header of the first chain apart.
    fn reserve_header(&mut self) {
        let Some(first) = self.chains.front_mut() else { return };
        self.header.clear();
        let before = self.start;
        take_front(&mut self.pieces, &mut self.start, VNET_HDR_LEN, |piece| self.header.push(piece));
        first.room -= VNET_HDR_LEN;
        first.pieces -= self.start - before;
        self.room -= VNET_HDR_LEN;
    }

    /// Gathers until there is room for `max` bytes, or no more can be had.
    fn gather_up_to(&mut self, max: usize) -> Result<(), QueueError> {
        while self.room < max
            && (self.mergeable || self.chains.is_empty())
            && self.pieces.len() - self.start < MAX_PIECES
        {
            if !self.gather()? {
                self.exhausted_at = Some(self.ring.position());
                return Ok(());
            }
        }
        self.exhausted_at = None;
        Ok(())
    }

    /// Undoes what the last loan cut short.
    fn restore(&mut self) {
        if let Some((at, piece)) = self.cut.take() {
            self.pieces[at] = piece;
        }
    }

    /// Where the pieces of a loan of at most `max` bytes end; the last one is cut to fit.
    fn cut_to(&mut self, max: usize) -> usize {
        let mut end = self.pieces.len();
        let mut excess = self.room.saturating_sub(max);
        while let Some(last) = self.pieces[..end].last().copied().filter(|_| excess > 0) {
            if let Some(keep) = last.len().checked_sub(excess).filter(|keep| *keep > 0) {
                self.cut = Some((end - 1, last));
                // `keep < len`, so the piece has a front of that length.
                self.pieces[end - 1] = last.subslice(0, keep).unwrap_or(last);
                return end;
            }
            excess -= last.len();
            end -= 1;
        }
        end
    }

    /// Returns the chains that `len` bytes fill, and says how many they are.
    fn return_chains(&mut self, mut len: usize) -> Result<u16, QueueError> {
        let mut count = 0;
        while let Some(chain) = self.chains.pop_front() {
            let written = len.min(chain.room) + if count == 0 { VNET_HDR_LEN } else { 0 };
            self.ring.add_used(self.mem, chain.head, written as u32)?;
            len = len.saturating_sub(chain.room);
            self.room -= chain.room;
            self.start += chain.pieces;
            count += 1;
            if len == 0 {
                break;
            }
        }
        Ok(count)
    }

    fn commit_frame(&mut self, hdr: VnetHdr, len: usize) -> Result<(), QueueError> {
        let num_buffers = self.return_chains(len)?;
        let (bytes, mut at) = (VnetHdr { num_buffers, ..hdr }.to_bytes(), 0);
        for piece in &self.header {
            let here = piece.len().min(VNET_HDR_LEN - at);
            piece.copy_from(&bytes[at..at + here]);
            at += here;
        }
        if self.chains.is_empty() {
            self.pieces.clear();
            self.start = 0;
        } else {
            if self.start >= MAX_PIECES {
                self.pieces.drain(..self.start);
                self.start = 0;
            }
            self.reserve_header();
        }
        self.unpublished += 1;
        if self.unpublished == PUBLISH_EVERY {
            self.unpublished = 0;
            self.ring.publish(self.mem)?;
        }
        Ok(())
    }
}

impl RxRing for RxTurn<'_, '_> {
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_> {
        self.restore();
        if self.error.is_some() {
            return Lent::Empty;
        }
        let (min, max) = (min.max(1), max.max(min).max(1));
        if let Err(error) = self.gather_up_to(max) {
            self.error = Some(error);
            return Lent::Empty;
        }
        if self.room >= min {
            let end = self.cut_to(max);
            return Lent::Buffers(&self.pieces[self.start..end]);
        }
        // More chains would not help a driver without MRG_RXBUF, nor one that has posted all that it can.
        let full = self.exhausted_at.is_none() || self.chains.len() >= usize::from(self.ring.size());
        if full && !self.chains.is_empty() {
            self.exhausted_at = None;
            self.turn.rx_too_small += 1;
            return Lent::TooSmall;
        }
        Lent::Empty
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        self.restore();
        if self.error.is_some() || self.chains.is_empty() {
            return;
        }
        debug_assert!(len <= self.room, "a port committed more than it was lent");
        match self.commit_frame(hdr, len) {
            Ok(()) => self.turn.received(len),
            Err(error) => self.error = Some(error),
        }
    }
}
