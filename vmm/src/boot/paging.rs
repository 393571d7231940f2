//! The boot page tables: the low 4 GiB, identity-mapped by 2 MiB pages (Intel SDM vol. 3 §4.5).
//!
//! The protocol wants at least kernel, zero page and command line mapped; 4 GiB includes the device registers, so that
//! a bare-metal guest can use them at once. Pages are user-accessible: a guest may go to CPL3 without page tables of its
//! own.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::PAGE_TABLES;
use crate::memory::GuestMemory;

/// Bytes that the boot page tables map, from address 0.
pub const IDENTITY_MAPPED: u64 = 4 << 30;

const PRESENT_WRITABLE_USER: u64 = 0b111;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = 4096;
const ENTRIES: usize = 512;
const LARGE_PAGE_SHIFT: u32 = 21;
const DIRECTORIES: usize = 4;

/// Writes PML4, PDPT and four page directories at [`PAGE_TABLES`], which goes to CR3.
pub(super) fn write(memory: &GuestMemory) -> Result<(), BootError> {
    let pdpt = PAGE_TABLES + TABLE;
    let directory = pdpt + TABLE;
    let write = |at: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(at)).map_err(|source| BootError::Write {
            what: "a page table",
            at,
            source,
        })
    };
    write(PAGE_TABLES, &[pdpt | PRESENT_WRITABLE_USER])?;
    let directories: [u64; DIRECTORIES] =
        std::array::from_fn(|i| (directory + i as u64 * TABLE) | PRESENT_WRITABLE_USER);
    write(pdpt, &directories)?;
    let pages: Vec<u64> = (0..DIRECTORIES * ENTRIES)
        .map(|i| ((i as u64) << LARGE_PAGE_SHIFT) | PRESENT_WRITABLE_USER | LARGE)
        .collect();
    write(directory, &pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    /// Walks the tables like an MMU.
    fn translate(memory: &GuestMemory, address: u64) -> Option<u64> {
        let entry = |table: u64, shift: u32| {
            let at = (table & !0xfff) + ((address >> shift) & 0x1ff) * 8;
            let entry: u64 = memory.read_obj(GuestAddress(at)).unwrap();
            (entry & PRESENT_WRITABLE_USER == PRESENT_WRITABLE_USER).then_some(entry)
        };
        let directory = entry(entry(entry(PAGE_TABLES, 39)?, 30)?, 21)?;
        assert_eq!(directory & LARGE, LARGE);
        Some((directory & !0x1f_ffff) | (address & 0x1f_ffff))
    }

    #[test]
    fn every_address_below_4_gib_is_mapped_to_itself_and_no_other() {
        let memory = allocate(4 << 20).unwrap();
        write(&memory).unwrap();
        for address in [0, 0x7000, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xd000_0050, 0xfee0_00b0, 0xffff_ffff]
        {
            assert_eq!(translate(&memory, address), Some(address), "{address:#x}");
        }
        assert_eq!(translate(&memory, IDENTITY_MAPPED), None);
        assert_eq!(translate(&memory, 1 << 39), None);
    }
}
