//! The entry from the kernel, and the functions that the compiler expects of any environment.
#![allow(unsafe_code, reason = "there is no libc below this program: it is entered by the kernel itself")]

use core::arch::{asm, global_asm};
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;

// The kernel leaves the argument count at the stack's top (System V ABI, AMD64 §3.4.1). The stack is aligned for a call.
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {entry}",
    "ud2",
    entry = sym entry,
);

/// The program's arguments, as the kernel wrote them.
struct Arguments {
    next: *const *const c_char,
}

impl Iterator for Arguments {
    type Item = &'static CStr;

    fn next(&mut self) -> Option<&'static CStr> {
        // SAFETY: the array ends with a null, behind which this does not go; it and its strings live as long as the process.
        unsafe {
            let argument = *self.next;
            if argument.is_null() {
                return None;
            }
            self.next = self.next.add(1);
            Some(CStr::from_ptr(argument))
        }
    }
}

/// Entered from `_start` with the stack as the kernel left it.
extern "C" fn entry(stack: *const usize) -> ! {
    // SAFETY: the argument pointers follow the count.
    let next = unsafe { stack.add(1) }.cast();
    agent::serve::exit(super::super::run(Arguments { next }))
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    agent::serve::exit(5)
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    agent::serve::exit(5)
}

// SAFETY (of all below): the contracts are those of C; the string instructions read and write exactly `n` bytes.
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
    // SAFETY: see above; copies downwards and clears the direction flag again.
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
    for at in 0..n {
        // SAFETY: at < n; volatile, so that the loop isn't turned into a call of itself.
        let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, n) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const c_char) -> usize {
    let mut length = 0;
    // SAFETY: the string ends with a NUL, behind which this does not go.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
