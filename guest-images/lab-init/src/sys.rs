//! The system calls that have no safe wrapper.
#![allow(unsafe_code, reason = "NIC and KVM ioctls, and the child's set-up between fork and exec")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Lets `command` start as the leader of a session of its own, which owns the terminal on its standard
/// input if `terminal`.
pub(crate) fn in_own_session(command: &mut Command, terminal: bool) {
    let set_up = move || {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec; it makes two system calls through wrappers that
    // neither allocate nor lock, and captures one bool.
    unsafe { command.pre_exec(set_up) };
}

/// Gives `interface` its address and brings it up.
pub(crate) fn set_address(interface: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    let socket = control_socket()?;
    let mut request = request_for(interface)?;
    request.ifr_ifru.ifru_addr = socket_address(address);
    request_ioctl(&socket, libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_netmask = socket_address(mask);
    request_ioctl(&socket, libc::SIOCSIFNETMASK, &request)?;
    set_up(interface)
}

/// Brings `interface` up.
pub(crate) fn set_up(interface: &str) -> io::Result<()> {
    let mut request = request_for(interface)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    request_ioctl(&control_socket()?, libc::SIOCSIFFLAGS, &request)
}

/// Adds a default route through `gateway`.
pub(crate) fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let socket = control_socket()?;
    // SAFETY: an all-zero rtentry is a valid value: integers, addresses of family 0 and a null name.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads one rtentry, and `route` is one that outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `KVM_CREATE_VM`, `KVM_CREATE_VCPU`, `KVM_CREATE_IRQCHIP`: `_IO(0xAE, n)` of <linux/kvm.h>.
const KVM_CREATE_VM: libc::Ioctl = 0xAE01;
const KVM_CREATE_VCPU: libc::Ioctl = 0xAE41;
const KVM_CREATE_IRQCHIP: libc::Ioctl = 0xAE60;

/// Makes a virtual machine with interrupt controllers and one vCPU, which never runs. It lives as long as both descriptors.
pub(crate) fn idle_machine(kvm: &File) -> io::Result<[OwnedFd; 2]> {
    let vm = new_descriptor(kvm, KVM_CREATE_VM)?;
    // SAFETY: this request has no argument.
    if unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_IRQCHIP, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let vcpu = new_descriptor(&vm, KVM_CREATE_VCPU)?;
    Ok([vm, vcpu])
}

/// One of KVM's requests that answer with a descriptor; their argument, a type or a number, is 0 here.
fn new_descriptor(of: &impl AsRawFd, request: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: both requests take an integer, no pointer.
    let fd = unsafe { libc::ioctl(of.as_raw_fd(), request, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A request about `interface` with nothing else set.
fn request_for(interface: &str) -> io::Result<libc::ifreq> {
    let name = CString::new(interface)?;
    // SAFETY: an all-zero ifreq is a valid value: an empty name and a union of plain data.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let bytes = name.to_bytes();
    if bytes.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{interface} is too long a name")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn request_ioctl(socket: &OwnedFd, number: libc::Ioctl, request: &libc::ifreq) -> io::Result<()> {
    // SAFETY: the three SIOCSIF* requests that this file makes read one ifreq and write nothing.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw const *request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: an all-zero sockaddr is a valid value.
    let mut generic: libc::sockaddr = unsafe { mem::zeroed() };
    generic.sa_family = libc::AF_INET as libc::sa_family_t;
    // sockaddr_in: two bytes of port, then the address in network order.
    for (to, from) in generic.sa_data.iter_mut().skip(2).zip(address.octets()) {
        *to = from.cast_signed();
    }
    generic
}
