//! The calls that the compiler can't check: fork, execve, signal dispositions, vsock addresses.
#![allow(
    unsafe_code,
    reason = "processes and vsock addresses, for which rustix has no safe calls; each argues below"
)]

use core::arch::asm;
use core::ffi::CStr;
use core::mem::MaybeUninit;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque, SocketAddrStorage};
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType, acceptfrom_with, bind, listen, socket_with,
};
use rustix::process::Pid;

/// Numbers of system calls (arch/x86/entry/syscalls/syscall_64.tbl of Linux).
const RT_SIGACTION: usize = 13;
const RT_SIGPROCMASK: usize = 14;
const FORK: usize = 57;
const EXECVE: usize = 59;
const EXIT_GROUP: usize = 231;

/// A system call with up to four arguments.
///
/// # Safety
/// The arguments must be what this call takes, and what pointers lead to must live through it.
unsafe fn call(number: usize, [a, b, c, d]: [usize; 4]) -> Result<usize, Errno> {
    let answer: isize;
    // SAFETY: the kernel changes rax, rcx and r11 only, and memory as the caller has promised.
    unsafe {
        asm!("syscall", inlateout("rax") number => answer, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match i32::try_from(answer) {
        Ok(errno @ -4095..=-1) => Err(Errno::from_raw_os_error(-errno)),
        _ => Ok(answer.cast_unsigned()),
    }
}

/// Writes to standard output, which is open since the agent's start.
pub(crate) fn say(text: &[u8]) {
    // SAFETY: descriptor 1 is never closed.
    let _ = rustix::io::write(unsafe { rustix::stdio::stdout() }, text);
}

/// Forks: the child's pid in the parent, `None` in the child.
pub(crate) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: this process has one thread and no libc whose state a fork could tear; the child goes on with a copy of all.
    let pid = unsafe { call(FORK, [0; 4]) }?;
    Ok(i32::try_from(pid).ok().and_then(Pid::from_raw))
}

/// Ends this process.
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: takes a number.
        let _ = unsafe { call(EXIT_GROUP, [status.into(), 0, 0, 0]) };
    }
}

/// execve(2). Each array's last pointer is null, and each one before the first null is to a string that ends with NUL.
pub(crate) fn execute(path: &CStr, arguments: &[*const u8], variables: &[*const u8]) -> Errno {
    let ends = |pointers: &[*const u8]| pointers.last().is_some_and(|last| last.is_null());
    if !ends(arguments) || !ends(variables) {
        return Errno::INVAL;
    }
    let pointers = [path.as_ptr() as usize, arguments.as_ptr() as usize, variables.as_ptr() as usize, 0];
    // SAFETY: both arrays end with a null within their bounds (just checked); the strings come from CStr and live on in
    // the caller's frames.
    unsafe { call(EXECVE, pointers) }.err().unwrap_or(Errno::INVAL)
}

/// `struct kernel_sigaction` of Linux: handler, flags, restorer, mask.
type SignalAction = [usize; 4];
/// `SIG_DFL` and `SIG_IGN`: both run nothing of ours.
const DEFAULT: SignalAction = [0; 4];
const IGNORE: SignalAction = [1, 0, 0, 0];

fn set_signal(signal: usize, action: &SignalAction) {
    // SAFETY: the action outlives the call, which writes none back; it installs no handler. The mask has 8 bytes.
    let _ = unsafe { call(RT_SIGACTION, [signal, action.as_ptr() as usize, 0, 8]) };
}

/// A write to a host that has gone is an error, not this process's end.
pub(crate) fn ignore_sigpipe() {
    set_signal(13, &IGNORE);
}

/// Every signal does what it does by default, and none is blocked: a program inherits what is ignored and blocked.
pub(crate) fn default_signals() {
    // SIGKILL and SIGSTOP are refused, which is as good.
    (1..=64).for_each(|signal| set_signal(signal, &DEFAULT));
    let none = 0_u64;
    // SAFETY: SIG_SETMASK (2) reads the 8 bytes of the mask, and writes no old one.
    let _ = unsafe { call(RT_SIGPROCMASK, [2, (&raw const none) as usize, 0, 8]) };
}

/// `struct sockaddr_vm` of linux/vm_sockets.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

const CID_ANY: u32 = u32::MAX;

// SAFETY: the closure gets a pointer to this value and its size, which is that of the kernel's struct.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f(core::ptr::from_ref(self).cast(), size_of::<Self>() as SocketAddrLen)
    }
}

/// A socket that listens on a vsock port, whoever the machine is.
pub(crate) fn listen_vsock(port: u32, backlog: i32) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let family = AddressFamily::VSOCK.as_raw();
    bind(&socket, &VsockAddress { family, reserved: 0, port, cid: CID_ANY, flags: 0, zero: [0; 3] })?;
    listen(&socket, backlog)?;
    Ok(socket)
}

/// Accepts a connection, which will not block: it, and the peer's CID if it came over vsock.
pub(crate) fn accept(listener: &OwnedFd) -> Result<(OwnedFd, Option<u32>), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (connection, peer) = acceptfrom_with(listener, flags)?;
    Ok((connection, peer.as_ref().and_then(cid)))
}

/// The CID of a vsock address; `None` for other families.
fn cid(address: &SocketAddrAny) -> Option<u32> {
    if address.address_family() != AddressFamily::VSOCK
        || (address.addr_len() as usize) < size_of::<VsockAddress>()
    {
        return None;
    }
    let mut storage = MaybeUninit::<SocketAddrStorage>::zeroed();
    // SAFETY: the storage has room for every address (its type's purpose), and is read as bytes of which all are
    // initialised: zeroed, then the address. VsockAddress has no invalid values.
    let address = unsafe {
        address.write_sockaddr(storage.as_mut_ptr());
        storage.as_ptr().cast::<VsockAddress>().read_unaligned()
    };
    Some(address.cid)
}
