//! The driver's side of a split virtqueue (virtio 1.3 §2.7).
//!
//! Enters: buffer numbers with an address, a length and a direction. Leaves: buffer numbers that the device
//! has returned with a used length. Buffer `i` is always described by descriptor `i`, so there is no
//! descriptor allocation and a returned id names its buffer; an id that isn't outstanding is refused and
//! counted, since the device under test may be wrong.
//!
//! Limits: sizes are powers of two up to 1024. One descriptor per buffer, no indirect tables: the abuse
//! orders write those by hand.
//!
//! Notifications follow VIRTIO_F_EVENT_IDX (§2.7.7.1, §2.7.10) when negotiated, else the flags.

use super::sys::Dma;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

/// Descriptor flag: the device writes.
pub const DESC_WRITE: u16 = 2;
/// The largest queue that is set up.
pub const MAX_SIZE: u16 = 1024;

const DESC_BYTES: usize = 16;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A split virtqueue.
#[derive(Debug)]
pub struct Queue {
    ring: Dma,
    size: u16,
    event_idx: bool,
    avail: u16,
    used: u16,
    notified: u16,
    outstanding: Vec<bool>,
    refused: u64,
}

impl Queue {
    /// A queue of `size` (a power of two, at most [`MAX_SIZE`]).
    #[must_use]
    pub fn new(size: u16, event_idx: bool) -> Self {
        assert!(size.is_power_of_two() && size <= MAX_SIZE, "queue size {size}");
        let ring = Dma::new(Self::used_offset(size) + 6 + 8 * usize::from(size));
        Self {
            ring,
            size,
            event_idx,
            avail: 0,
            used: 0,
            notified: 0,
            outstanding: vec![false; usize::from(size)],
            refused: 0,
        }
    }

    fn avail_offset(size: u16) -> usize {
        DESC_BYTES * usize::from(size)
    }

    fn used_offset(size: u16) -> usize {
        (Self::avail_offset(size) + 6 + 2 * usize::from(size)).next_multiple_of(4096)
    }

    /// The number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Physical addresses of the descriptor table, the available and the used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [
            self.ring.address(0),
            self.ring.address(Self::avail_offset(self.size)),
            self.ring.address(Self::used_offset(self.size)),
        ]
    }

    /// The ring memory, for those who write nonsense into it.
    pub fn memory(&mut self) -> &mut Dma {
        &mut self.ring
    }

    /// Forgets every buffer, for a device that was reset; the memory stays where it is.
    pub fn clear(&mut self) {
        let len = Self::used_offset(self.size) + 6 + 8 * usize::from(self.size);
        self.ring.bytes_mut(0, len).fill(0);
        self.outstanding.fill(false);
        (self.avail, self.used, self.notified) = (0, 0, 0);
    }

    /// Writes a descriptor as it is told, right or wrong.
    pub fn write_descriptor(&self, id: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = usize::from(id % self.size) * DESC_BYTES;
        self.ring.u64(at).store(address, Ordering::Relaxed);
        let tail = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.ring.u64(at + 8).store(tail, Ordering::Relaxed);
    }

    /// Hands buffer `id` to the device.
    pub fn post(&mut self, id: u16, address: u64, len: u32, device_writes: bool) {
        let was = core::mem::replace(&mut self.outstanding[usize::from(id)], true);
        assert!(!was, "buffer {id} is with the device already");
        self.write_descriptor(id, address, len, if device_writes { DESC_WRITE } else { 0 }, 0);
        let entry = Self::avail_offset(self.size) + 4 + 2 * usize::from(self.avail % self.size);
        self.ring.u16(entry).store(id, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
        self.ring.u16(Self::avail_offset(self.size) + 2).store(self.avail, Ordering::Release);
    }

    /// Takes back the next buffer: its number and the bytes that the device says it wrote.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        let used = Self::used_offset(self.size);
        while self.ring.u16(used + 2).load(Ordering::Acquire) != self.used {
            let entry = used + 4 + 8 * usize::from(self.used % self.size);
            let id = self.ring.u32(entry).load(Ordering::Relaxed);
            let len = self.ring.u32(entry + 4).load(Ordering::Relaxed);
            self.used = self.used.wrapping_add(1);
            match usize::try_from(id).ok().and_then(|index| self.outstanding.get_mut(index)) {
                Some(out) if *out => {
                    *out = false;
                    return Some((id as u16, len));
                }
                _ => self.refused += 1,
            }
        }
        None
    }

    /// Used ids that named no buffer of the device's: each is a defect of the device.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Whether the device wants a doorbell for what was posted since the last call; assume it is rung.
    pub fn wants_notification(&mut self) -> bool {
        let old = core::mem::replace(&mut self.notified, self.avail);
        if old == self.avail {
            return false;
        }
        // The index must be visible before the device's wish is read (§2.7.13.3.1).
        fence(Ordering::SeqCst);
        let used = Self::used_offset(self.size);
        if self.event_idx {
            let event = self.ring.u16(used + 4 + 8 * usize::from(self.size)).load(Ordering::Relaxed);
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old)
        } else {
            self.ring.u16(used).load(Ordering::Relaxed) & USED_NO_NOTIFY == 0
        }
    }

    /// Asks for an interrupt at the next used buffer, or for none. Returns whether something is used already
    /// (then the interrupt may have passed: don't sleep).
    pub fn set_interrupts(&mut self, on: bool) -> bool {
        let avail = Self::avail_offset(self.size);
        if self.event_idx {
            // An event index half a ring space away never comes before the next call.
            let event = if on { self.used } else { self.used.wrapping_sub(0x8000) };
            self.ring.u16(avail + 4 + 2 * usize::from(self.size)).store(event, Ordering::Relaxed);
        } else {
            self.ring.u16(avail).store(if on { 0 } else { AVAIL_NO_INTERRUPT }, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.ring.u16(Self::used_offset(self.size) + 2).load(Ordering::Acquire) != self.used
    }
}

#[cfg(test)]
mod tests;
