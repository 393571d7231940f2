//! One turn of the transmit or of the receive queue.
//!
//! **Transmit.** A chain is 44 bytes of header and the payload, in any split, all readable. A turn takes at most
//! [`TX_BUDGET`] packets, and none while the table is full of RSTs that wait for a receive buffer.
//!
//! **Receive.** A chain is room for a header and at least one byte, all writable; a smaller one breaks the queue. A
//! turn gives at most [`RX_BUDGET`] packets. Kicks are asked for only when the guest has no buffer for a packet
//! that waits.

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::counters::{Refusal, VsockCounters};
use super::host::Listener;
use super::packet::{HEADER_LEN, Header};
use super::table::Table;
use crate::virtio::pieces::{Spare, take_front};
use crate::virtio::{Direction, QueueError, Ring};

/// Most packets from the guest in a turn.
pub const TX_BUDGET: usize = 64;
/// Most packets to the guest in a turn.
pub const RX_BUDGET: usize = 64;
/// Packets after which the guest gets to see what has come, while the turn goes on.
const PUBLISH_EVERY: usize = 16;

/// Allocations that outlive a turn.
#[derive(Default)]
pub(super) struct Scratch {
    pieces: Spare,
    header: Spare,
}

/// How a turn of transmission ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TxEnd {
    /// The ring is empty and a kick will come.
    Idle,
    /// The budget is used up; take another turn soon.
    More,
    /// RSTs must go to the guest first.
    Halted,
}

/// How a turn of reception ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RxEnd {
    /// Nothing waits for the guest.
    Idle,
    /// The budget is used up; take another turn soon.
    More,
    /// The guest has no buffer, and a kick will come with the next.
    Starved,
}

/// Takes the packets that the guest has made available.
pub(super) fn transmit(
    mem: &GuestMemoryMmap,
    ring: &mut Ring,
    table: &mut Table,
    listener: &Listener,
    counters: &VsockCounters,
    scratch: &mut Scratch,
) -> Result<TxEnd, QueueError> {
    let mut pieces = scratch.pieces.take();
    let mut budget = TX_BUDGET;
    ring.disarm(mem)?;
    let end = loop {
        if table.is_full_of_resets() {
            break TxEnd::Halted;
        }
        if budget == 0 {
            break TxEnd::More;
        }
        let Some(chain) = ring.pop(mem)? else {
            if ring.arm(mem, ring.position())? {
                ring.disarm(mem)?;
                continue;
            }
            break TxEnd::Idle;
        };
        budget -= 1;
        let head = chain.head_index();
        pieces.clear();
        let total = Ring::collect(mem, chain, Direction::Readable, &mut pieces)?;
        take_packet(&mut pieces, total, table, listener, counters);
        ring.add_used(mem, head, 0)?;
    };
    scratch.pieces.put(pieces);
    ring.publish(mem)?;
    Ok(end)
}

fn take_packet(
    pieces: &mut [VolatileSlice<'_>],
    total: usize,
    table: &mut Table,
    listener: &Listener,
    counters: &VsockCounters,
) {
    let Some(payload) = total.checked_sub(HEADER_LEN) else {
        return counters.refuse(Refusal::ShortPacket);
    };
    let (mut bytes, mut filled, mut start) = ([0; HEADER_LEN], 0, 0);
    take_front(pieces, &mut start, HEADER_LEN, |piece| filled += piece.copy_to(&mut bytes[filled..]));
    let header = Header::parse(bytes);
    let whole = header.len as usize <= payload;
    table.guest_packet(&header, whole.then_some((pieces, start)), listener, counters);
}

/// Gives the guest what waits for it.
pub(super) fn receive(
    mem: &GuestMemoryMmap,
    ring: &mut Ring,
    table: &mut Table,
    counters: &VsockCounters,
    scratch: &mut Scratch,
) -> Result<RxEnd, QueueError> {
    let (mut pieces, mut front) = (scratch.pieces.take(), scratch.header.take());
    let mut done = 0;
    ring.disarm(mem)?;
    let end = loop {
        if !table.has_work() {
            break RxEnd::Idle;
        }
        if done == RX_BUDGET {
            break RxEnd::More;
        }
        let Some(chain) = ring.pop(mem)? else {
            if ring.arm(mem, ring.position())? {
                ring.disarm(mem)?;
                continue;
            }
            break RxEnd::Starved;
        };
        let head = chain.head_index();
        pieces.clear();
        front.clear();
        let bytes = Ring::collect(mem, chain, Direction::Writable, &mut pieces)?;
        if bytes <= HEADER_LEN {
            return Err(QueueError::TooSmall { head, bytes });
        }
        let mut start = 0;
        take_front(&mut pieces, &mut start, HEADER_LEN, |piece| front.push(piece));
        let Some(header) = table.next_packet(&pieces[start..], bytes - HEADER_LEN) else {
            ring.unpop(1);
            break RxEnd::Idle;
        };
        counters.sent(header.len);
        let (text, mut at) = (header.to_bytes(), 0);
        for piece in &front {
            piece.copy_from(&text[at..at + piece.len()]);
            at += piece.len();
        }
        ring.add_used(mem, head, HEADER_LEN as u32 + header.len)?;
        done += 1;
        if done % PUBLISH_EVERY == 0 {
            ring.publish(mem)?;
        }
    };
    scratch.pieces.put(pieces);
    scratch.header.put(front);
    ring.publish(mem)?;
    Ok(end)
}
