#![allow(unsafe_code, reason = "sendmsg and recvmsg with ancillary data, which std does not have")]
//! Datagram sockets of the real host: [`DatagramHost`] for [`SysHost`].
//!
//! Each datagram carries its own TTL and TOS as ancillary data (ip(7): `IP_TTL`, `IP_TOS`), so one socket serves all
//! packets of a flow without a `setsockopt` between them. `IP_RECVERR` keeps the world's ICMP errors apart from the data
//! and says who sent them and about what.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_void, iovec};
use vm_memory::{Bytes, VolatileSlice};

use super::socket::{DatagramHost, Incoming, MAX_PAYLOAD, Origin, Outgoing, PingKind, SocketError};
use crate::nat::host::{SockId, StreamHost};
use crate::nat::poller::Token;
use crate::nat::sys::SysHost;

/// Pieces of one datagram; one with more is gathered first.
const MAX_IOV: usize = 64;
/// Bytes of ancillary data: four small items, or an extended error with its sender.
const CONTROL: usize = 256;
/// Bytes of a returned datagram that are looked at.
const RETURNED: usize = 64;
/// Largest IPv4 packet, for raw sockets.
const MAX_PACKET: usize = 65_535;
/// `IP_PMTUDISC_*` (linux/in.h): never set DF; always.
const PMTUDISC_DONT: c_int = 0;
const PMTUDISC_DO: c_int = 2;

/// Room for ancillary data, aligned as its headers want it.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

fn set(fd: RawFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the pointer and the length are those of `value`.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn socket(kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    let kind = kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `socket` takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, kind, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded just now, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(fd: RawFd, at: SocketAddrV4) -> io::Result<()> {
    let addr = to_sockaddr(at);
    let len = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: `addr` is a sockaddr_in and `len` its length.
    let result = unsafe { libc::bind(fd, (&raw const addr).cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn to_sockaddr(addr: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: addr.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
        sin_zero: [0; 8],
    }
}

fn from_sockaddr(addr: &libc::sockaddr_in) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(addr.sin_addr.s_addr.to_ne_bytes()), u16::from_be(addr.sin_port))
}

/// What both kinds of sockets are asked to tell with each datagram.
fn tell(fd: RawFd) -> io::Result<()> {
    for option in [libc::IP_RECVERR, libc::IP_RECVTTL, libc::IP_RECVTOS] {
        set(fd, libc::IPPROTO_IP, option, 1)?;
    }
    set(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, PMTUDISC_DONT)
}

/// One ancillary item, decoded.
enum Item {
    Ttl(c_int),
    Tos(u8),
    Local(Ipv4Addr),
    Error(libc::sock_extended_err, Option<Ipv4Addr>),
}

/// Reads a value out of an item's data, if the item has room for it.
fn item<T: Copy>(header: &libc::cmsghdr, at: usize) -> Option<T> {
    let have = header.cmsg_len.checked_sub(size_of::<libc::cmsghdr>())?;
    if have < at + size_of::<T>() {
        return None;
    }
    // SAFETY: the kernel wrote `cmsg_len` bytes from the header on, the data begins behind the aligned header, and
    // the check above leaves `size_of::<T>()` bytes at `at`; `T` is a plain kernel structure that any bytes make.
    Some(unsafe { libc::CMSG_DATA(header).add(at).cast::<T>().read_unaligned() })
}

fn items(header: &libc::msghdr) -> Vec<Item> {
    let mut items = Vec::with_capacity(4);
    // SAFETY: `header` is as `recvmsg` left it: its control buffer holds `msg_controllen` bytes of whole items.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: `CMSG_FIRSTHDR` and `CMSG_NXTHDR` give null or a header inside the control buffer.
    while let Some(cmsg) = unsafe { at.as_ref() } {
        let found = match (cmsg.cmsg_level, cmsg.cmsg_type) {
            (libc::IPPROTO_IP, libc::IP_TTL) => item(cmsg, 0).map(Item::Ttl),
            (libc::IPPROTO_IP, libc::IP_TOS) => item(cmsg, 0).map(Item::Tos),
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => item::<libc::in_pktinfo>(cmsg, 0)
                .map(|info| Item::Local(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()))),
            (libc::IPPROTO_IP, libc::IP_RECVERR) => item::<libc::sock_extended_err>(cmsg, 0).map(|error| {
                let offender = item::<libc::sockaddr_in>(cmsg, size_of::<libc::sock_extended_err>())
                    .filter(|addr| c_int::from(addr.sin_family) == libc::AF_INET)
                    .map(|addr| *from_sockaddr(&addr).ip());
                Item::Error(error, offender)
            }),
            _ => None,
        };
        items.extend(found);
        // SAFETY: as above; `cmsg` is an item of this very header.
        at = unsafe { libc::CMSG_NXTHDR(header, cmsg) };
    }
    items
}

/// Writes an ancillary item of a level and kind at `at` and gives the place behind it.
fn put_item<T>(control: &mut Control, at: usize, (level, kind): (c_int, c_int), value: T) -> usize {
    let (head, data) = (size_of::<libc::cmsghdr>(), size_of::<T>() as u32);
    // SAFETY: the two macros are arithmetic on their argument.
    let (len, space) = unsafe { (libc::CMSG_LEN(data) as usize, libc::CMSG_SPACE(data) as usize) };
    assert!(at + space <= CONTROL, "four small items fit");
    let header = libc::cmsghdr { cmsg_len: len, cmsg_level: level, cmsg_type: kind };
    // SAFETY: `at + space <= CONTROL` leaves room for the header and the aligned data behind it; the writes need no
    // alignment.
    unsafe {
        let place = control.0.as_mut_ptr().add(at);
        place.cast::<libc::cmsghdr>().write_unaligned(header);
        place.add(head.next_multiple_of(size_of::<usize>())).cast::<T>().write_unaligned(value);
    }
    at + space
}

fn empty_header() -> libc::msghdr {
    // SAFETY: an all-zero msghdr is a valid one: no name, no data, no control.
    unsafe { zeroed() }
}

impl SysHost {
    fn datagram_fd(&self, sock: SockId) -> io::Result<RawFd> {
        let closed = || io::Error::from_raw_os_error(libc::EBADF);
        self.fd(sock).map(|fd| fd.as_raw_fd()).ok_or_else(closed)
    }

    fn take_over(&mut self, fd: OwnedFd, token: Token) -> io::Result<SockId> {
        let sock = self.adopt(fd);
        if let Err(error) = self.watch(sock, token) {
            self.close(sock, crate::nat::host::Close::Graceful);
            return Err(error);
        }
        Ok(sock)
    }
}

impl DatagramHost for SysHost {
    fn udp_open(&mut self, at: SocketAddrV4, tell_local: bool, token: Token) -> io::Result<SockId> {
        let fd = socket(libc::SOCK_DGRAM, 0)?;
        tell(fd.as_raw_fd())?;
        if tell_local {
            set(fd.as_raw_fd(), libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
        }
        bind(fd.as_raw_fd(), at)?;
        self.take_over(fd, token)
    }

    fn ping_open(&mut self, id: u16, token: Token) -> io::Result<(SockId, PingKind)> {
        let (fd, kind) = match socket(libc::SOCK_DGRAM, libc::IPPROTO_ICMP) {
            Ok(fd) => {
                let wanted = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, id);
                if bind(fd.as_raw_fd(), wanted).is_err() {
                    bind(fd.as_raw_fd(), SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0))?;
                }
                (fd, PingKind::Datagram)
            }
            Err(refused) => {
                let fd = socket(libc::SOCK_RAW, libc::IPPROTO_ICMP).map_err(|_| refused)?;
                // linux/icmp.h: a set bit keeps that type out; 1 is ICMP_FILTER of SOL_RAW.
                set(fd.as_raw_fd(), libc::SOL_RAW, 1, !(1 << 0))?;
                (fd, PingKind::Raw)
            }
        };
        tell(fd.as_raw_fd())?;
        Ok((self.take_over(fd, token)?, kind))
    }

    fn set_dont_fragment(&mut self, sock: SockId, dont: bool) {
        if let Ok(fd) = self.datagram_fd(sock) {
            let value = if dont { PMTUDISC_DO } else { PMTUDISC_DONT };
            // It can't fail on a socket that took the option once; if it did, DF would be as before.
            let _ = set(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value);
        }
    }

    fn send_datagram(
        &mut self,
        sock: SockId,
        out: &Outgoing,
        parts: &mut dyn Iterator<Item = VolatileSlice<'_>>,
    ) -> io::Result<()> {
        let fd = self.datagram_fd(sock)?;
        let mut guards = Vec::with_capacity(4);
        let mut iov = Vec::with_capacity(4);
        let mut gathered = Vec::new();
        for part in parts {
            if iov.len() < MAX_IOV {
                let guard = part.ptr_guard();
                iov.push(iovec { iov_base: guard.as_ptr().cast_mut().cast::<c_void>(), iov_len: part.len() });
                guards.push(guard);
            } else {
                let at = gathered.len();
                gathered.resize(at + part.len(), 0);
                // The buffer is as long as the piece, so all of it is read.
                let _ = part.read(&mut gathered[at..], 0);
            }
        }
        if !gathered.is_empty() {
            iov.push(iovec { iov_base: gathered.as_mut_ptr().cast(), iov_len: gathered.len() });
        }
        let mut control = Control([0; CONTROL]);
        let mut used =
            put_item(&mut control, 0, (libc::IPPROTO_IP, libc::IP_TTL), c_int::from(out.ttl.max(1)));
        used = put_item(&mut control, used, (libc::IPPROTO_IP, libc::IP_TOS), c_int::from(out.tos));
        if let Some(from) = out.from {
            let spec = libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) };
            let any = libc::in_addr { s_addr: 0 };
            let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: spec, ipi_addr: any };
            used = put_item(&mut control, used, (libc::IPPROTO_IP, libc::IP_PKTINFO), info);
        }
        if out.segment > 0 {
            used = put_item(&mut control, used, (libc::SOL_UDP, libc::UDP_SEGMENT), out.segment);
        }
        let mut name = to_sockaddr(out.to);
        let mut header = empty_header();
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        header.msg_iov = iov.as_mut_ptr();
        header.msg_iovlen = iov.len();
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = used;
        // SAFETY: the header's name, pieces and control all live until the call returns; `guards` keep the guest's
        // memory mapped, and `sendmsg` only reads it.
        let sent = unsafe { libc::sendmsg(fd, &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn recv_datagram(
        &mut self,
        sock: SockId,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
        rest: &mut Vec<u8>,
    ) -> io::Result<Incoming> {
        let fd = self.datagram_fd(sock)?;
        let mut iov: Vec<iovec> = Vec::with_capacity(parts.len() + 1);
        let mut guards = Vec::with_capacity(parts.len());
        let (mut skip, mut left) = (skip, max);
        for part in parts {
            let here = skip.min(part.len());
            skip -= here;
            let take = (part.len() - here).min(left);
            // `here + take <= part.len()`, so the piece is within the slice.
            let Ok(piece) = part.subslice(here, take) else { continue };
            if take > 0 {
                left -= take;
                let guard = piece.ptr_guard_mut();
                iov.push(iovec { iov_base: guard.as_ptr().cast(), iov_len: take });
                guards.push(guard);
            }
        }
        let lent = max - left;
        rest.clear();
        rest.reserve(MAX_PACKET);
        iov.push(iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: MAX_PACKET });
        let mut name = to_sockaddr(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
        let mut control = Control([0; CONTROL]);
        let mut header = empty_header();
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        header.msg_iov = iov.as_mut_ptr();
        header.msg_iovlen = iov.len();
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL;
        // SAFETY: all that the header points to lives until the call returns; the pieces are lent for writing, and
        // `rest` has a capacity of MAX_PACKET bytes.
        let got = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_DONTWAIT) };
        let len = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        let behind = len.saturating_sub(lent).min(MAX_PACKET);
        // SAFETY: the kernel filled the pieces in order: what exceeds the lent ones, at most MAX_PACKET bytes, is
        // initialised in `rest`.
        unsafe { rest.set_len(behind) };
        let mut incoming = Incoming { from: from_sockaddr(&name), len, ttl: 64, tos: 0, to: None };
        for item in items(&header) {
            match item {
                Item::Ttl(ttl) => incoming.ttl = u8::try_from(ttl).unwrap_or(64),
                Item::Tos(tos) => incoming.tos = tos,
                Item::Local(addr) => incoming.to = Some(addr),
                Item::Error(..) => {}
            }
        }
        Ok(incoming)
    }

    fn take_error(&mut self, sock: SockId) -> Option<SocketError> {
        let fd = self.datagram_fd(sock).ok()?;
        let mut name = to_sockaddr(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
        let (mut control, mut payload) = (Control([0; CONTROL]), vec![0; RETURNED]);
        let mut iov = iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: RETURNED };
        let mut header = empty_header();
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL;
        // SAFETY: all that the header points to lives until the call returns, with the lengths that it says.
        let got = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
        payload.truncate(usize::try_from(got).ok()?.min(RETURNED));
        let (error, offender) = items(&header).into_iter().find_map(|item| match item {
            Item::Error(error, offender) => Some((error, offender)),
            Item::Ttl(_) | Item::Tos(_) | Item::Local(_) => None,
        })?;
        let origin = match error.ee_origin {
            libc::SO_EE_ORIGIN_ICMP => Origin::Icmp(error.ee_type, error.ee_code),
            _ => Origin::Local,
        };
        let errno = i32::try_from(error.ee_errno).unwrap_or(libc::EIO);
        Some(SocketError { errno, origin, mtu: error.ee_info, offender, to: from_sockaddr(&name), payload })
    }
}

// A datagram's payload always fits what `recv_datagram` receives into.
const _: () = assert!(MAX_PAYLOAD < MAX_PACKET);
