//! The transmit queue: frames from the guest to the port.
//!
//! A chain is 12 bytes of `virtio_net_hdr` and an Ethernet frame, in any split, all readable (§5.1.6.2). The header is
//! copied once and checked against the frame's length and the negotiated features; the frame itself is lent to
//! the port as pieces of guest memory.
//!
//! A turn sends at most [`TX_BUDGET`] frames, then lets others have the thread. While it runs the driver need not
//! kick; before it ends it asks for kicks again and looks once more, so none is lost. A frame that the port has no
//! room for stays in the ring; the caller polls the port for output and takes a new turn.
//!
//! Refused, counted and returned to the guest: a frame shorter than an Ethernet header or longer than
//! [`MAX_FRAME`], and a header that means nothing or uses what was not negotiated. A broken chain breaks the queue.

use net::{ETHERNET_LEN, FramePort, GsoType, MAX_FRAME, Sent, TxFrame, VNET_HDR_LEN, VnetFlags, VnetHdr};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::config::{F_CSUM, F_HOST_ECN, F_HOST_TSO4, F_HOST_TSO6, F_HOST_USO};
use super::counters::Turn;
use crate::virtio::pieces::take_front;
use crate::virtio::{Direction, QueueError, Ring};

/// Most frames of one turn.
pub const TX_BUDGET: usize = 64;

/// How a turn of transmission ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TxEnd {
    /// The ring is empty and a kick will come.
    Idle,
    /// The budget is used up; take another turn soon.
    More,
    /// The port is full; the frame waits at the head of the ring.
    PortFull,
}

/// Sends what the driver has made available.
pub(super) fn transmit<'m>(
    mem: &'m GuestMemoryMmap,
    ring: &mut Ring,
    features: u64,
    port: &mut dyn FramePort,
    pieces: &mut Vec<VolatileSlice<'m>>,
    turn: &mut Turn,
) -> Result<TxEnd, QueueError> {
    let mut budget = TX_BUDGET;
    ring.disarm(mem)?;
    let end = loop {
        match send_available(mem, ring, features, port, pieces, turn, &mut budget)? {
            TxEnd::Idle if ring.arm(mem, ring.position())? => ring.disarm(mem)?,
            end => break end,
        }
    };
    ring.publish(mem)?;
    Ok(end)
}

/// Sends until the ring is empty, the port full or the budget used up. What became of each frame is staged in
/// the used ring, not published.
fn send_available<'m>(
    mem: &'m GuestMemoryMmap,
    ring: &mut Ring,
    features: u64,
    port: &mut dyn FramePort,
    pieces: &mut Vec<VolatileSlice<'m>>,
    turn: &mut Turn,
    budget: &mut usize,
) -> Result<TxEnd, QueueError> {
    while *budget > 0 {
        let Some(chain) = ring.pop(mem)? else { return Ok(TxEnd::Idle) };
        *budget -= 1;
        let head = chain.head_index();
        pieces.clear();
        let total = Ring::collect(mem, chain, Direction::Readable, pieces)?;
        if let Some((hdr, start)) = check(pieces, total, features, turn) {
            let frame = TxFrame { hdr, parts: &pieces[start..] };
            match port.send(&frame) {
                Sent::Full => {
                    ring.unpop(1);
                    return Ok(TxEnd::PortFull);
                }
                Sent::Taken => turn.sent(total - VNET_HDR_LEN),
                Sent::Dropped(_) => turn.tx_dropped += 1,
            }
        }
        ring.add_used(mem, head, 0)?;
    }
    Ok(TxEnd::More)
}

/// The header, and where in `pieces` the frame starts; `None` for a frame that is refused, and counted.
fn check(
    pieces: &mut [VolatileSlice<'_>],
    total: usize,
    features: u64,
    turn: &mut Turn,
) -> Option<(VnetHdr, usize)> {
    if !(VNET_HDR_LEN + ETHERNET_LEN..=VNET_HDR_LEN + MAX_FRAME).contains(&total) {
        turn.tx_bad_length += 1;
        return None;
    }
    let (mut bytes, mut filled, mut start) = ([0; VNET_HDR_LEN], 0, 0);
    take_front(pieces, &mut start, VNET_HDR_LEN, |piece| {
        filled += piece.copy_to(&mut bytes[filled..]);
    });
    match VnetHdr::parse(&bytes, total - VNET_HDR_LEN) {
        Ok(hdr) if uses(&hdr) & !features == 0 => Some((hdr, start)),
        _ => {
            turn.tx_bad_header += 1;
            None
        }
    }
}

/// The features that a driver must have accepted to send this header (§5.1.6.2.1).
fn uses(hdr: &VnetHdr) -> u64 {
    let csum = if hdr.flags.contains(VnetFlags::NEEDS_CSUM) { F_CSUM } else { 0 };
    let ecn = if hdr.ecn { F_HOST_ECN } else { 0 };
    let gso = match hdr.gso_type {
        GsoType::None => 0,
        GsoType::Tcp4 => F_HOST_TSO4,
        GsoType::Tcp6 => F_HOST_TSO6,
        GsoType::UdpL4 => F_HOST_USO,
        // Fragmentation offload of UDP (HOST_UFO) is never offered: no bit of any accepted set.
        GsoType::Udp => 1 << 63,
    };
    csum | ecn | gso
}
