#![allow(unsafe_code, reason = "std has no AF_VSOCK")]
//! The guest's sockets.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_void, sockaddr_vm};

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn own(result: c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the call that made `fd` succeeded just now, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: `socket` takes no pointers.
    own(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })
}

fn address(cid: u32, port: u32) -> sockaddr_vm {
    // SAFETY: a sockaddr_vm of zeros is valid.
    let mut address: sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const LEN: u32 = size_of::<sockaddr_vm>() as u32;

/// Connects to a port of the host.
pub(crate) fn connect(port: u32) -> io::Result<OwnedFd> {
    let (fd, address) = (socket()?, address(libc::VMADDR_CID_HOST, port));
    // SAFETY: the pointer and the length are those of `address`, which outlives the call.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), LEN) })?;
    Ok(fd)
}

/// Listens on a port of the guest.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let (fd, address) = (socket()?, address(libc::VMADDR_CID_ANY, port));
    // SAFETY: the pointer and the length are those of `address`, which outlives the call.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), LEN) })?;
    // SAFETY: `listen` takes no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), 128) })?;
    Ok(fd)
}

/// Waits for the next connection.
pub(crate) fn accept(listener: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no address is asked for.
    own(unsafe { libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) })
}

/// Lets `send` leave the bytes where they are, where the kernel can (Linux 6.7); whether it can.
pub(crate) fn allow_zero_copy(fd: RawFd) -> bool {
    let on: c_int = 1;
    let len = size_of::<c_int>() as u32;
    // SAFETY: the pointer and the length are those of `on`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY, (&raw const on).cast::<c_void>(), len)
    };
    result == 0
}

/// Sends pages that the kernel does not copy, so that a packet's payload is in many pieces. The bytes must stay as they
/// are until the connection has ended.
pub(crate) fn send_zero_copy(fd: RawFd, bytes: &'static [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of `bytes`, which live for ever and don't change.
    let sent = unsafe {
        libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_ZEROCOPY | libc::MSG_NOSIGNAL)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
