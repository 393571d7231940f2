//! The e820 map: which guest physical addresses are RAM (ACPI 6.5 §15).
//!
//! Usable: conventional memory, 1 MiB to the hole or the end of RAM, and what is above 4 GiB. Reserved: the ACPI
//! tables and the reset vector. Everything unlisted is not RAM.

use crate::layout::{ACPI, HIGH_RAM, LOW_RAM_END, RESERVED_END};
use crate::memory::ranges;

/// What a range of addresses is, with the numbers of the e820 map.
///
/// ```
/// use vmm::boot::{E820Kind, e820_map};
///
/// let ram: u64 = e820_map(1 << 30).iter().filter(|entry| entry.kind == E820Kind::Ram).map(|entry| entry.size).sum();
/// // All but 385 KiB, the room for firmware below 1 MiB.
/// assert_eq!((1 << 30) - ram, 385 << 10);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range.
///
/// ```
/// use vmm::boot::{E820Entry, E820Kind, e820_map};
///
/// // What 4 GiB of RAM have beyond the hole for devices lies above 4 GiB.
/// let last = E820Entry { addr: 4 << 30, size: 1 << 30, kind: E820Kind::Ram };
/// assert_eq!(e820_map(4 << 30).last(), Some(&last));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// The map of a machine with `memory` bytes of RAM, sorted, without overlaps.
pub fn e820_map(memory: u64) -> Vec<E820Entry> {
    let ram = |addr, size| E820Entry { addr, size, kind: E820Kind::Ram };
    let mut map = vec![
        ram(0, LOW_RAM_END),
        E820Entry { addr: ACPI, size: RESERVED_END - ACPI, kind: E820Kind::Reserved },
    ];
    for (base, size) in ranges(memory) {
        let start = base.0.max(HIGH_RAM);
        map.push(ram(start, base.0 + size - start));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(memory: u64) -> Vec<String> {
        e820_map(memory).iter().map(|e| format!("{:#x}+{:#x} {:?}", e.addr, e.size, e.kind)).collect()
    }

    #[test]
    fn half_a_gibibyte_is_one_piece_above_one_mebibyte() {
        assert_eq!(
            lines(512 << 20),
            ["0x0+0x9fc00 Ram", "0xe0000+0x20000 Reserved", "0x100000+0x1ff00000 Ram"]
        );
    }

    #[test]
    fn memory_beyond_3_gib_goes_on_at_4_gib() {
        assert_eq!(
            lines(4 << 30),
            [
                "0x0+0x9fc00 Ram",
                "0xe0000+0x20000 Reserved",
                "0x100000+0xbff00000 Ram",
                "0x100000000+0x40000000 Ram"
            ]
        );
    }
}
