//! [`Bus`]: which device answers at an address.
//!
//! A machine has two, one for I/O ports and one for MMIO. A bus is filled while the machine is built and then
//! shared unchanged by all vCPU threads, so a look-up is a binary search without a lock; only the device that
//! is found is locked, for the length of one register access.
//!
//! An access that no device claims, or that sticks out of the range of the device where it starts, reads all
//! ones and writes nothing, as on a PC. Such accesses are counted; the first one is logged.

use std::sync::{Arc, Mutex, PoisonError};

use crate::exit::ExitRequest;
use crate::once::Tally;

/// Registers of a device.
///
/// Called from vCPU threads, with `offset` counted from the start of the range at which the device was
/// inserted, and `offset + data.len()` within that range. Must not block on anything that the guest controls.
///
/// ```
/// use std::sync::{Arc, Mutex};
///
/// use devices::{Bus, BusDevice, ExitRequest};
///
/// /// The byte with which a firmware says how far it has come.
/// #[derive(Default)]
/// struct PostCode(u8);
///
/// impl BusDevice for PostCode {
///     fn read(&mut self, _offset: u64, data: &mut [u8]) {
///         data.fill(self.0);
///     }
///
///     fn write(&mut self, _offset: u64, data: &[u8]) -> Option<ExitRequest> {
///         self.0 = *data.first()?;
///         None
///     }
/// }
///
/// let code = Arc::new(Mutex::new(PostCode::default()));
/// let mut ports = Bus::new();
/// ports.insert(0x80, 1, code.clone())?;
/// assert_eq!(ports.write(0x80, &[0x55]), None);
/// assert_eq!(code.lock().map(|code| code.0).ok(), Some(0x55));
/// # Ok::<(), devices::BusError>(())
/// ```
pub trait BusDevice: Send {
    /// Fills `data` (1 to 8 bytes) with what the guest reads at `offset`, little-endian.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes the 1 to 8 bytes that the guest wrote at `offset`, little-endian. The answer is for the VMM:
    /// `Some` when this write asks the machine to end.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitRequest>;
}

/// Why a device could not be put on a bus.
///
/// ```
/// use std::sync::{Arc, Mutex};
///
/// use devices::exit::ExitDevice;
/// use devices::{Bus, BusError};
///
/// let device = Arc::new(Mutex::new(ExitDevice));
/// let mut bus = Bus::new();
/// bus.insert(0x3f8, 8, device.clone())?;
/// let refused = bus.insert(0x3ff, 2, device.clone());
/// assert_eq!(refused, Err(BusError::Overlap { base: 0x3ff, len: 2, other: 0x3f8 }));
/// assert_eq!(bus.insert(0x400, 0, device), Err(BusError::Range { base: 0x400, len: 0 }));
/// # Ok::<(), BusError>(())
/// ```
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// No byte, or past the end of the address space.
    #[error("a device of {len:#x} bytes at {base:#x} is no range of addresses; correct the machine's layout")]
    Range {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Two devices at one address.
    #[error(
        "a device of {len:#x} bytes at {base:#x} overlaps the one at {other:#x}; correct the machine's layout"
    )]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
        /// First address of the device that is already there.
        other: u64,
    },
}

struct Slot {
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Address ranges and their devices. See the module's documentation.
///
/// ```
/// use std::sync::{Arc, Mutex};
///
/// use devices::exit::{EXIT_PORT, ExitDevice};
/// use devices::{Bus, ExitRequest};
///
/// let mut ports = Bus::new();
/// ports.insert(EXIT_PORT.into(), 1, Arc::new(Mutex::new(ExitDevice)))?;
/// assert_eq!(ports.write(0xf4, &[7]), Some(ExitRequest::Status(7)));
/// // Two bytes stick out of a range of one: nobody is there.
/// assert_eq!(ports.write(0xf4, &[7, 0]), None);
/// let mut word = [0; 2];
/// ports.read(0xf5, &mut word);
/// assert_eq!((word, ports.unclaimed()), ([0xff, 0xff], 2));
/// # Ok::<(), devices::BusError>(())
/// ```
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`, disjoint.
    slots: Vec<Slot>,
    unclaimed: Tally,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer at the `len` addresses from `base` on.
    ///
    /// # Errors
    /// When the range is empty, wraps around, or overlaps another device's.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let Some(last) = len.checked_sub(1).and_then(|n| base.checked_add(n)) else {
            return Err(BusError::Range { base, len });
        };
        let at = self.slots.partition_point(|slot| slot.base <= base);
        let before = at.checked_sub(1).map(|i| &self.slots[i]).filter(|s| base - s.base < s.len);
        let after = self.slots.get(at).filter(|s| s.base <= last);
        if let Some(other) = before.or(after) {
            return Err(BusError::Overlap { base, len, other: other.base });
        }
        self.slots.insert(at, Slot { base, len, device });
        Ok(())
    }

    /// The device at `addr` and the offset in its range, when it holds all `len` bytes.
    fn find(&self, addr: u64, len: usize) -> Option<(&Slot, u64)> {
        let at = self.slots.partition_point(|slot| slot.base <= addr);
        let slot = &self.slots[at.checked_sub(1)?];
        let offset = addr - slot.base;
        let room = slot.len.checked_sub(offset)?;
        (len > 0 && len as u64 <= room).then_some((slot, offset))
    }

    /// Reads at `addr`; all ones when no device answers.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((slot, offset)) => {
                slot.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => {
                self.count_unclaimed("read", addr, data.len());
                data.fill(0xff);
            }
        }
    }

    /// Writes at `addr`; nothing happens when no device answers. `Some` when the machine is to end.
    #[must_use = "the device may have asked the machine to end"]
    pub fn write(&self, addr: u64, data: &[u8]) -> Option<ExitRequest> {
        let Some((slot, offset)) = self.find(addr, data.len()) else {
            self.count_unclaimed("write", addr, data.len());
            return None;
        };
        slot.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }

    /// How many accesses no device claimed.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.get()
    }

    fn count_unclaimed(&self, what: &str, addr: u64, len: usize) {
        if self.unclaimed.first() {
            tracing::debug!(
                what,
                addr,
                len,
                "no device at this address; further such accesses are only counted"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads its offset, remembers the last write.
    #[derive(Default)]
    struct Probe(Option<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitRequest> {
            self.0 = Some((offset, data.to_vec()));
            Some(ExitRequest::Reset)
        }
    }

    fn probe() -> Arc<Mutex<Probe>> {
        Arc::default()
    }

    #[test]
    fn an_access_goes_to_the_device_with_its_offset() {
        let mut bus = Bus::new();
        let (low, high) = (probe(), probe());
        bus.insert(0x100, 0x10, high.clone()).unwrap();
        bus.insert(0x60, 8, low).unwrap();
        let mut byte = [0];
        bus.read(0x67, &mut byte);
        assert_eq!(byte, [7]);
        assert_eq!(bus.write(0x10f, &[9]), Some(ExitRequest::Reset));
        assert_eq!(high.lock().unwrap().0, Some((0xf, vec![9])));
        assert_eq!(bus.unclaimed(), 0);
    }

    #[test]
    fn nobody_reads_all_ones_and_swallows_writes() {
        let mut bus = Bus::new();
        bus.insert(0x60, 8, probe()).unwrap();
        for addr in [0, 0x5f, 0x65, 0x68, u64::MAX] {
            let mut data = [0; 4];
            bus.read(addr, &mut data);
            assert_eq!(data, [0xff; 4], "{addr:#x}");
            assert_eq!(bus.write(addr, &data), None);
        }
        assert_eq!(bus.unclaimed(), 10);
    }

    #[test]
    fn overlapping_and_empty_ranges_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x60, 8, probe()).unwrap();
        for (base, len) in [(0x60, 8), (0x5f, 2), (0x67, 1), (0, 0x1000), (0x62, 2)] {
            let refused = bus.insert(base, len, probe());
            assert_eq!(refused, Err(BusError::Overlap { base, len, other: 0x60 }));
        }
        assert_eq!(bus.insert(0x70, 0, probe()), Err(BusError::Range { base: 0x70, len: 0 }));
        assert_eq!(bus.insert(u64::MAX, 2, probe()), Err(BusError::Range { base: u64::MAX, len: 2 }));
        bus.insert(u64::MAX, 1, probe()).unwrap();
        bus.insert(0x68, 1, probe()).unwrap();
    }

    proptest! {
        #[test]
        fn look_up_agrees_with_a_linear_search(
            ranges in prop::collection::vec((0u64..200, 1u64..20), 0..12),
            addr in 0u64..240,
            len in 1usize..9,
        ) {
            let mut bus = Bus::new();
            let mut there = Vec::new();
            for (base, size) in ranges {
                let free = there.iter().all(|(b, s)| base + size <= *b || b + s <= base);
                prop_assert_eq!(bus.insert(base, size, probe()).is_ok(), free);
                if free {
                    there.push((base, size));
                }
            }
            let want = there.iter().find(|(b, s)| *b <= addr && addr + len as u64 <= b + s);
            let got = bus.find(addr, len).map(|(slot, offset)| (slot.base, offset));
            prop_assert_eq!(got, want.map(|(b, _)| (*b, addr - b)));
        }
    }
}
