//! Memory shared with the device and the device's registers.
//!
//! Physical addresses are virtual ones here (identity map), so an address is what the device gets.
#![allow(unsafe_code, reason = "device memory and registers are raw addresses")]

use alloc::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use core::arch::asm;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

/// Page-aligned, zeroed memory that a device reads and writes. Never freed: a device that was told the
/// address may keep it.
#[derive(Debug)]
pub struct Dma {
    base: *mut u8,
    len: usize,
}

impl Dma {
    /// `len` bytes, zeroed.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 4096)
            .expect("buffer sizes are constants far below isize::MAX");
        // SAFETY: the layout has a size above zero.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        Self { base, len }
    }

    /// The physical address of byte `offset`.
    #[must_use]
    pub fn address(&self, offset: usize) -> u64 {
        assert!(offset <= self.len, "offset {offset} in a buffer of {}", self.len);
        self.base as u64 + offset as u64
    }

    /// A part that the device doesn't own now.
    #[must_use]
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset <= self.len && len <= self.len - offset, "{offset}+{len} in a buffer of {}", self.len);
        // SAFETY: in bounds, and the memory lives for ever. The device writes only to buffers that are posted,
        // and the queue lends a buffer's bytes only while it isn't.
        unsafe { core::slice::from_raw_parts(self.base.add(offset), len) }
    }

    /// A part that the device doesn't own now, to be written.
    #[must_use]
    pub fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset <= self.len && len <= self.len - offset, "{offset}+{len} in a buffer of {}", self.len);
        // SAFETY: as for bytes; `&mut self` excludes other borrows.
        unsafe { core::slice::from_raw_parts_mut(self.base.add(offset), len) }
    }

    fn cell<T>(&self, offset: usize) -> &T {
        assert!(
            offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= self.len,
            "cell at {offset}"
        );
        // SAFETY: in bounds and aligned (the base is page-aligned); T is one of the atomics below, for which
        // every bit pattern is valid and shared mutation is allowed.
        unsafe { &*self.base.add(offset).cast::<T>() }
    }

    /// A 16-bit cell at an even offset.
    #[must_use]
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        self.cell(offset)
    }

    /// A 32-bit cell.
    #[must_use]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        self.cell(offset)
    }

    /// A 64-bit cell.
    #[must_use]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        self.cell(offset)
    }
}

/// A window of device registers.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    base: u64,
    len: u64,
}

impl Window {
    /// The registers at `base..base + len`. Accesses outside are refused; the caller answers for there
    /// being registers and not RAM.
    #[must_use]
    pub fn new(base: u64, len: u64) -> Self {
        Self { base, len }
    }

    /// The window's length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the window has no registers at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at(&self, offset: u64, width: u64) -> u64 {
        assert!(
            offset.saturating_add(width) <= self.len,
            "register {offset:#x} in a window of {:#x}",
            self.len
        );
        self.base + offset
    }

    /// Reads with a width of 1, 2, 4 or 8 bytes; unaligned offsets are allowed.
    #[must_use]
    pub fn read(&self, offset: u64, width: u8) -> u64 {
        let address = self.at(offset, u64::from(width));
        let value: u64;
        // SAFETY: a register inside the window. Plain moves, because hypervisors decode them.
        unsafe {
            match width {
                1 => asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) address, options(nostack)),
                2 => asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) address, options(nostack)),
                4 => asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address, options(nostack)),
                _ => asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) address, options(nostack)),
            }
        }
        value
    }

    /// Writes with a width of 1, 2, 4 or 8 bytes; unaligned offsets are allowed.
    pub fn write(&self, offset: u64, width: u8, value: u64) {
        let address = self.at(offset, u64::from(width));
        // SAFETY: as for read.
        unsafe {
            match width {
                1 => {
                    asm!("mov byte ptr [{0}], {1}", in(reg) address, in(reg_byte) value as u8, options(nostack))
                }
                2 => asm!("mov word ptr [{0}], {1:x}", in(reg) address, in(reg) value, options(nostack)),
                4 => asm!("mov dword ptr [{0}], {1:e}", in(reg) address, in(reg) value, options(nostack)),
                _ => asm!("mov qword ptr [{0}], {1}", in(reg) address, in(reg) value, options(nostack)),
            }
        }
    }

    /// Reads a 32-bit register.
    #[must_use]
    pub fn get(&self, offset: u64) -> u32 {
        self.read(offset, 4) as u32
    }

    /// Writes a 32-bit register.
    pub fn set(&self, offset: u64, value: u32) {
        self.write(offset, 4, u64::from(value));
    }
}
