//! What the orders need of a network card: a smoltcp device that can be waited for, watched and abused.

use crate::cpu::Cpu;
use crate::observe::Observer;
use crate::virtio::abuse::{Abuse, Damage};
use crate::virtio::{Refused, offload::HEADER};
use smoltcp::phy::Device;
use smoltcp::time::Instant;

/// What is known of a card, and its counters since it was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its address.
    pub mac: [u8; 6],
    /// Negotiated feature bits.
    pub features: u64,
    /// IP MTU in bytes.
    pub mtu: u16,
    /// Whether the link is up.
    pub link_up: bool,
    /// Sizes of the receive and the transmit queue.
    pub queue_sizes: [u16; 2],
    /// Frames sent.
    pub sent: u64,
    /// Frames received.
    pub received: u64,
    /// Received frames with a GSO type: longer than the MTU allows on a wire.
    pub received_long: u64,
    /// Frames whose TCP or UDP checksum was wrong; they were dropped.
    pub bad_checksums: u64,
    /// Frames with NEEDS_CSUM whose partial checksum or its place was wrong; they were accepted.
    pub bad_partial: u64,
    /// Used buffers that were too short for a header, or missing from a merged frame.
    pub short_frames: u64,
    /// Used ids that named no outstanding buffer.
    pub refused_ids: u64,
    /// Whether the device asks for a reset.
    pub needs_reset: bool,
}

/// A network card.
pub trait Nic: Device {
    /// Time since an arbitrary start, with microseconds.
    fn now(&self) -> Instant;
    /// Makes the device look at everything that was queued.
    fn flush(&mut self);
    /// Flushes, then sleeps until a frame may have come or `until` has passed. May return early.
    fn wait(&mut self, until: Instant);
    /// The card's facts and counters.
    fn facts(&self) -> Facts;
    /// Who watches the received frames.
    fn observer(&mut self) -> &mut Observer;
    /// Queues any bytes with any header; false if there was no room.
    fn send_raw(&mut self, header: [u8; HEADER], frame: &[u8]) -> bool;
    /// The processor behind the card, if there is one.
    fn cpu(&self) -> Option<&dyn Cpu>;
    /// Misuses the device, then brings it up again. `None`: this card has nothing to misuse.
    fn abuse(&mut self, abuse: Abuse) -> Option<Result<Damage, Refused>>;
}
