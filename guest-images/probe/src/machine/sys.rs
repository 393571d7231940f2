//! The bare machine: entry, port I/O, time, sleep, the heap and the exit.
//!
//! Everything here runs at CPL3 with a TSS that opens every port and page tables that map the low
//! 4 GiB for user code; `boot.s` is the CPL0 part. One CPU, no threads. An interrupt only counts
//! itself in `probe_interrupts`, so nothing below needs a lock.
#![allow(
    unsafe_code,
    reason = "port I/O, linker symbols, the allocator and C memory functions have no safe form"
)]

use core::alloc::{GlobalAlloc, Layout};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

global_asm!(include_str!("boot.s"), options(att_syntax));

unsafe extern "C" {
    static probe_interrupts: AtomicU64;
    static probe_tsc_khz: AtomicU32;
    static probe_cpuid1_ecx: AtomicU32;
    static probe_image_end: u8;
}

const COM1: u16 = 0x3f8;
const EXIT_PORT: u16 = 0xf4;

/// boot_params (Linux boot protocol): offsets of the fields that are read here.
const E820_COUNT: u64 = 0x1e8;
const CMD_LINE_POINTER: u64 = 0x228;
const E820_TABLE: u64 = 0x2d0;
const E820_ENTRY_SIZE: u64 = 20;
const E820_RAM: u32 = 1;
/// The longest command line that is read, in bytes.
const CMD_LINE_MAX: u64 = 64 * 1024;
/// The heap takes at most this much of the RAM behind the image, in bytes.
const HEAP_MAX: u64 = 96 << 20;

/// Writes one byte to an I/O port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: a port write touches no memory of ours; DMA-capable devices are driven through MMIO only.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads an I/O port with the given width of 1, 2 or 4 bytes.
pub(crate) fn input(port: u16, width: u8) -> u32 {
    let value: u32;
    // SAFETY: as for out8; eax receives the result whatever the width.
    unsafe {
        match width {
            1 => asm!("in al, dx", in("dx") port, inout("eax") 0 => value, options(nomem, nostack)),
            2 => asm!("in ax, dx", in("dx") port, inout("eax") 0 => value, options(nomem, nostack)),
            _ => asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)),
        }
    }
    value
}

/// Writes an I/O port with the given width of 1, 2 or 4 bytes.
pub(crate) fn output(port: u16, width: u8, value: u32) {
    // SAFETY: as for out8.
    unsafe {
        match width {
            1 => asm!("out dx, al", in("dx") port, in("eax") value, options(nomem, nostack)),
            2 => asm!("out dx, ax", in("dx") port, in("eax") value, options(nomem, nostack)),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)),
        }
    }
}

/// Sends bytes to COM1.
pub(crate) fn serial(bytes: &[u8]) {
    // SAFETY: service 2 of boot.s reads exactly the `bytes` that rsi and rcx describe and changes only those
    // two registers and the flags.
    unsafe {
        asm!("int3", in("eax") 2, in("dx") COM1, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _)
    };
}

/// Makes COM1 usable whatever was written to it before: 8n1, no DLAB, no loopback, no interrupts.
pub(crate) fn serial_reset() {
    out8(COM1 + 3, 0x03);
    out8(COM1 + 1, 0x00);
    out8(COM1 + 4, 0x03);
}

/// Ends the VM with this exit status.
pub(crate) fn exit(status: u8) -> ! {
    out8(EXIT_PORT, status);
    loop {
        sleep_ticks(interrupts(), None);
    }
}

/// The time-stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: rdtsc reads a counter; CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Interrupts taken so far.
pub(crate) fn interrupts() -> u64 {
    // SAFETY: defined in boot.s, 8-byte aligned, written only by `incq`.
    unsafe { probe_interrupts.load(Ordering::Acquire) }
}

/// TSC frequency as leaf 0x4000_0010 told it, in kHz; 0 when the leaf is absent.
pub(crate) fn cpuid_tsc_khz() -> u32 {
    // SAFETY: defined in boot.s, written before probe_main only.
    unsafe { probe_tsc_khz.load(Ordering::Relaxed) }
}

/// CPUID.1:ECX as read at CPL0.
pub(crate) fn cpuid1_ecx() -> u32 {
    // SAFETY: defined in boot.s, written before probe_main only.
    unsafe { probe_cpuid1_ecx.load(Ordering::Relaxed) }
}

/// Sleeps until an interrupt after the `seen`-th; `deadline` (TSC) arms the timer, `None` leaves it as it is.
pub(crate) fn sleep_ticks(seen: u64, deadline: Option<u64>) {
    let (function, at) = deadline.map_or((1u32, 0), |at| (0, at.max(1)));
    // SAFETY: the int3 gate of boot.s changes only eax, ecx and the flags, and returns behind the int3.
    unsafe {
        asm!("int3", inout("eax") function => _, in("rdi") seen, in("esi") at as u32, in("edx") (at >> 32) as u32,
            out("ecx") _)
    };
}

/// Raises #UD.
pub(crate) fn invalid_instruction() {
    // SAFETY: the exception's handler doesn't return here.
    unsafe { asm!("ud2", options(nomem, nostack, noreturn)) }
}

/// Makes the CPU shut down.
pub(crate) fn triple_fault() {
    // SAFETY: service 3 of boot.s doesn't return.
    unsafe { asm!("int3", in("eax") 3, options(nomem, nostack, noreturn)) }
}

/// Reads `T` from physical memory that boot_params pointed out.
fn physical<T: Copy>(address: u64) -> T {
    // SAFETY: called for boot_params and the command line only, which the boot protocol puts into RAM
    // below 4 GiB, mapped one to one by boot.s.
    unsafe { core::ptr::read_unaligned(address as *const T) }
}

/// Copies the kernel command line out of boot_params; needs the heap.
pub(crate) fn command_line(boot_params: u64) -> alloc::vec::Vec<u8> {
    let start = u64::from(physical::<u32>(boot_params + CMD_LINE_POINTER));
    if start == 0 {
        return alloc::vec::Vec::new();
    }
    (start..start + CMD_LINE_MAX).map(physical::<u8>).take_while(|byte| *byte != 0).collect()
}

/// Gives the heap the RAM between the image and the end of its e820 region.
pub(crate) fn heap_init(boot_params: u64) {
    let start = (&raw const probe_image_end) as u64;
    let count = u64::from(physical::<u8>(boot_params + E820_COUNT));
    let region_end = (0..count)
        .map(|index| boot_params + E820_TABLE + index * E820_ENTRY_SIZE)
        .map(|entry| (physical::<u64>(entry), physical::<u64>(entry + 8), physical::<u32>(entry + 16)))
        .find(|(base, size, kind)| *kind == E820_RAM && (*base..base.saturating_add(*size)).contains(&start))
        .map_or(start, |(base, size, _)| base.saturating_add(size));
    let heap = HEAP.0.get();
    // SAFETY: called once from probe_main, before the first allocation.
    unsafe {
        (*heap).next = start as usize;
        (*heap).end = region_end.min(start + HEAP_MAX) as usize;
    }
}

/// A bump allocator with one free list per power of two. A freed block serves its own size class again and
/// nothing coalesces. Page-aligned blocks are device memory: exact in size and never given back.
///
/// Fresh blocks are taken to be zero, as a VM's RAM is: a VM that resets ends, so nobody has written there.
struct Heap {
    next: usize,
    end: usize,
    free: [*mut u8; 64],
}

struct Global(UnsafeCell<Heap>);

// SAFETY: one CPU, one thread, and interrupt handlers never allocate.
unsafe impl Sync for Global {}

#[global_allocator]
static HEAP: Global = Global(UnsafeCell::new(Heap { next: 0, end: 0, free: [core::ptr::null_mut(); 64] }));

const PAGE: usize = 4096;

fn size_class(layout: Layout) -> usize {
    layout.size().max(layout.align()).max(16).next_power_of_two()
}

impl Heap {
    fn fresh(&mut self, size: usize, align: usize) -> *mut u8 {
        let start = self.next.next_multiple_of(align);
        if start.saturating_add(size) > self.end {
            return core::ptr::null_mut();
        }
        self.next = start + size;
        start as *mut u8
    }
}

// SAFETY: blocks are disjoint: a fresh one lies behind all earlier ones, a recycled one was freed by its
// only owner. A class is a power of two of at least size and align and its fresh blocks are aligned to it
// (up to a page, beyond which only the page branch goes), so any block of a class serves any layout of it.
unsafe impl GlobalAlloc for Global {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: single-threaded, and no other reference to the heap is alive.
        let heap = unsafe { &mut *self.0.get() };
        if layout.align() >= PAGE {
            return heap.fresh(layout.size(), layout.align());
        }
        let class = size_class(layout);
        let slot = class.trailing_zeros() as usize;
        let recycled = heap.free[slot];
        if recycled.is_null() {
            return heap.fresh(class, class.min(PAGE));
        }
        // SAFETY: a free block of at least 16 bytes holds the next pointer in its first word.
        heap.free[slot] = unsafe { *(recycled as *const *mut u8) };
        recycled
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in alloc.
        let fresh_from = unsafe { (*self.0.get()).next };
        // SAFETY: same contract.
        let block = unsafe { self.alloc(layout) };
        if !block.is_null() && (block as usize) < fresh_from {
            // SAFETY: the block is ours and `size` bytes long.
            unsafe { core::ptr::write_bytes(block, 0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if layout.align() >= PAGE {
            return;
        }
        // SAFETY: as in alloc.
        let heap = unsafe { &mut *self.0.get() };
        let slot = size_class(layout).trailing_zeros() as usize;
        // SAFETY: the block is ours again and has room for a pointer.
        unsafe { *(block as *mut *mut u8) = heap.free[slot] };
        heap.free[slot] = block;
    }
}

/// Entered from boot.s at CPL3.
#[unsafe(no_mangle)]
extern "C" fn probe_main(boot_params: u64) -> ! {
    heap_init(boot_params);
    super::start(&command_line(boot_params))
}

/// Entered from boot.s at CPL3 after the first exception, interrupts off.
#[unsafe(no_mangle)]
extern "C" fn probe_exception(vector: u64, error: u64, rip: u64, rsp: u64, address: u64) -> ! {
    super::exception(vector, error, rip, rsp, address)
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(4)
}

// SAFETY (all five): the contracts are those of C; the string instructions read and write exactly `n` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: see above; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") n => _,
            options(nostack, preserves_flags))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: the destination starts before the source or behind its end, so copying upwards is right.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: see above; copies downwards and restores the direction flag.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(n).sub(1) => _, inout("rsi") from.add(n).sub(1) => _,
            inout("rcx") n => _, options(nostack))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, n: usize) -> *mut u8 {
    // SAFETY: see above.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") n => _,
            options(nostack, preserves_flags))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let mut at = 0;
    while at + 8 <= n {
        // SAFETY: at + 8 <= n.
        let (x, y) =
            unsafe { (a.add(at).cast::<u64>().read_unaligned(), b.add(at).cast::<u64>().read_unaligned()) };
        if x != y {
            break;
        }
        at += 8;
    }
    while at < n {
        // SAFETY: at < n; volatile, so that the loop isn't turned into a call of memcmp.
        let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        at += 1;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: same contract.
    unsafe { memcmp(a, b, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut n = 0;
    // SAFETY: the caller's string ends with a zero; volatile, so that the loop isn't turned into strlen.
    while unsafe { text.add(n).read_volatile() } != 0 {
        n += 1;
    }
    n
}
