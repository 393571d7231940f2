//! The kick signal and the parts of `struct kvm_run` that kvm-ioctls does not show.
#![allow(unsafe_code, reason = "a signal handler writes to kvm_run; unions of kvm_run are read")]

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null in all other threads. Constant-initialised and without
    /// a destructor, so that a signal handler may read it at any time.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// The signal that interrupts a vCPU thread: the first real-time signal, which nothing else in Rust's std uses.
pub(crate) fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the handler of the kick signal, once per process.
pub(crate) fn install_kick_handler() -> std::io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed =
        INSTALLED.get_or_init(|| register_signal_handler(kick_signal(), on_kick).map_err(|e| e.errno()));
    installed.map_err(std::io::Error::from_raw_os_error)
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable` of this very thread set the pointer to a byte of a live kvm_run mapping and clears it
        // before that mapping can go; the handler runs on this thread, so not in between.
        unsafe { &*flag }.store(1, Ordering::Release);
    }
}

/// While it lives, the kick signal makes `KVM_RUN` of its vCPU return, on the thread that made it.
pub(super) struct Kickable {
    fd: VcpuFd,
    /// Not `Send`: the thread-local of this thread points into `fd`.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Kickable {
    pub(super) fn new(mut fd: VcpuFd) -> Self {
        let flag = ptr::from_mut(&mut fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        IMMEDIATE_EXIT.set(flag.cast_const());
        Self { fd, _thread: std::marker::PhantomData }
    }

    pub(super) fn fd(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        // Before the fields: the mapping is unmapped with `fd`.
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

/// An I/O port access that is to be completed: `count` items of `size` bytes each at one port (more than one for
/// `rep ins` and `rep outs`).
pub(super) struct IoAccess<'a> {
    pub(super) port: u16,
    /// 1, 2 or 4.
    pub(super) size: usize,
    pub(super) data: &'a mut [u8],
}

/// The access of the I/O exit with which `KVM_RUN` has just returned. `None` when what KVM says lies outside of the
/// page that it may use for data, which no KVM does.
pub(super) fn io_access(fd: &mut VcpuFd) -> Option<IoAccess<'_>> {
    const DATA_PAGE: u64 = 4096;
    const DATA_END: u64 = DATA_PAGE + 4096;
    let run = fd.get_kvm_run();
    // SAFETY: the caller has seen KVM_EXIT_IO, for which KVM fills this member; any bits are valid integers.
    let io = unsafe { run.__bindgen_anon_1.io };
    let len = u64::from(io.size).checked_mul(u64::from(io.count))?;
    let end = io.data_offset.checked_add(len)?;
    if !matches!(io.size, 1 | 2 | 4) || io.data_offset < DATA_PAGE || end > DATA_END {
        return None;
    }
    let (offset, len) = (usize::try_from(io.data_offset).ok()?, usize::try_from(len).ok()?);
    let base = ptr::from_mut(run).cast::<u8>();
    // SAFETY: the mapping of kvm_run has at least two pages (KVM_GET_VCPU_MMAP_SIZE: run, PIO data), the range was
    // checked to lie in the second, which is no part of `struct kvm_run`, and nobody else looks at it until the next
    // KVM_RUN, which needs `fd` back.
    let data = unsafe { std::slice::from_raw_parts_mut(base.add(offset), len) };
    Some(IoAccess { port: io.port, size: usize::from(io.size), data })
}

/// The suberror of an internal error, with the instruction bytes if it is a failed emulation and KVM tells them.
pub(super) fn internal_error(fd: &mut VcpuFd) -> (u32, Option<Vec<u8>>) {
    const EMULATION: u32 = 1;
    const INSTRUCTION_BYTES: u64 = 1;
    let run = fd.get_kvm_run();
    // SAFETY: the caller has seen KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member; any bits are valid integers.
    let (suberror, ndata) =
        unsafe { (run.__bindgen_anon_1.internal.suberror, run.__bindgen_anon_1.internal.ndata) };
    if suberror != EMULATION || ndata < 3 {
        return (suberror, None);
    }
    // SAFETY: as above; this is another view of the same member, for failed emulations.
    let (flags, insn) = unsafe {
        let failure = run.__bindgen_anon_1.emulation_failure;
        (failure.flags, failure.__bindgen_anon_1.__bindgen_anon_1)
    };
    let len = usize::from(insn.insn_size).min(insn.insn_bytes.len());
    (suberror, (flags & INSTRUCTION_BYTES != 0).then(|| insn.insn_bytes[..len].to_vec()))
}
