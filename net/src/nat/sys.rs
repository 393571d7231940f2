#![allow(unsafe_code, reason = "socket, epoll and timerfd calls that std does not have")]
//! The real host: sockets, one epoll, one timerfd.
//!
//! [`SysHost`] owns every descriptor of the NAT; a [`SockId`] is the number of one. All are non-blocking, closed on
//! exec, and registered edge-triggered in the inner epoll, whose own descriptor is the NAT's [`AsFd`].
//!
//! **Data stays in the kernel until the guest has it.** `peek` reads with `MSG_PEEK` at `SO_PEEK_OFF`, which moves
//! with each read, and which `discard` (`MSG_TRUNC` without a buffer) moves back. TCP has it since Linux 6.9; on an
//! older kernel the bytes in front of the offset are peeked into a scratch buffer once more, which costs a copy of what is
//! in flight and changes nothing else. Whether TCP has it is tried once, at the start.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use libc::{c_int, c_void, iovec};
use vm_memory::VolatileSlice;

use super::host::{Close, Machine, SendSpace, SockId, StreamHost};
use super::poller::{Events, Owner, Token};

/// Pieces of one read or write; what does not fit is left for the next.
const MAX_IOV: usize = 128;
/// Events of one `epoll_wait`.
const MAX_EVENTS: usize = 128;
/// Bytes that a peek without `SO_PEEK_OFF` throws away in one piece.
const SCRATCH: usize = 64 << 10;
/// Pieces of [`SCRATCH`] in one such peek: more than that is never in flight on an old kernel.
const MAX_SCRATCH: usize = 64;
/// Assumed send buffer where the kernel does not tell.
const UNIX_SPACE: u32 = 32 << 10;
/// Connections that wait for `accept` (the kernel caps it at `net.core.somaxconn`).
const BACKLOG: c_int = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Unix,
    Other,
}

#[derive(Debug)]
struct Open {
    fd: OwnedFd,
    kind: Kind,
    /// Where the kernel's `SO_PEEK_OFF` stands.
    peek_at: u32,
}

/// Descriptors, and how to call the kernel for them.
#[derive(Debug)]
pub(crate) struct SysHost {
    epoll: OwnedFd,
    timer: OwnedFd,
    bell: Option<OwnedFd>,
    /// Indexed by descriptor number.
    open: Vec<Option<Open>>,
    /// Whether the kernel has `SO_PEEK_OFF` for streams; until the first stream, whether it may have.
    peek_off: bool,
    scratch: Vec<u8>,
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_len(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn own(result: c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the call that made `fd` succeeded just now, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option<T>(fd: RawFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    // SAFETY: the pointer and the length are those of `value`, which outlives the call.
    let result =
        unsafe { libc::setsockopt(fd, level, name, std::ptr::from_ref(value).cast(), size_of::<T>() as u32) };
    check(result).map(drop)
}

fn stream_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `socket` takes no pointers.
    own(unsafe { libc::socket(libc::AF_INET, kind, 0) })
}

fn to_sockaddr(addr: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: addr.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
        sin_zero: [0; 8],
    }
}

fn from_sockaddr(addr: &libc::sockaddr_in) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(addr.sin_addr.s_addr.to_ne_bytes()), u16::from_be(addr.sin_port))
}

/// Lets the process have as many descriptors as its hard limit allows: each flow is one.
pub(crate) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the kernel to fill in.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 && limit.rlim_cur < limit.rlim_max
    {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: `limit` is a valid rlimit. A refusal leaves the old limit, and a full table is handled.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

impl AsFd for SysHost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl SysHost {
    /// Makes the epoll and the timer.
    ///
    /// # Errors
    /// When the process may have no more descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: `epoll_create1` takes no pointers.
        let epoll = own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
        // SAFETY: `timerfd_create` takes no pointers.
        let timer = own(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
        let host = Self { epoll, timer, bell: None, open: Vec::new(), peek_off: true, scratch: Vec::new() };
        host.register(host.timer.as_raw_fd(), Token { owner: Owner::Timer, slot: 0, generation: 0 })?;
        Ok(host)
    }

    /// Behaves as on a kernel before 6.9.
    #[cfg(test)]
    pub(crate) fn without_peek_off(&mut self) {
        self.peek_off = false;
    }

    /// Whether an event comes within `millis`.
    #[cfg(test)]
    fn is_readable(&self, millis: c_int) -> bool {
        let mut poll = libc::pollfd { fd: self.epoll.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, millis) == 1 }
    }

    /// Takes over a descriptor that a module made itself.
    pub(crate) fn adopt(&mut self, fd: OwnedFd) -> SockId {
        self.insert(fd, Kind::Other)
    }

    /// A descriptor, for a module's own calls.
    pub(crate) fn fd(&self, sock: SockId) -> Option<BorrowedFd<'_>> {
        self.entry(sock).map(|open| open.fd.as_fd())
    }

    fn register(&self, fd: RawFd, token: Token) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token)
    }

    fn control(&self, operation: c_int, fd: RawFd, token: Token) -> io::Result<()> {
        let interest = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
        let mut event = libc::epoll_event { events: interest as u32, u64: token.to_bits() };
        // SAFETY: `event` is valid for the call.
        check(unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &raw mut event) }).map(drop)
    }

    fn insert(&mut self, fd: OwnedFd, kind: Kind) -> SockId {
        // A descriptor is never negative.
        let number = fd.as_raw_fd().unsigned_abs();
        let at = number as usize;
        if at >= self.open.len() {
            self.open.resize_with(at + 1, || None);
        }
        self.open[at] = Some(Open { fd, kind, peek_at: 0 });
        SockId(number)
    }

    fn entry(&self, sock: SockId) -> Option<&Open> {
        self.open.get(sock.0 as usize)?.as_ref()
    }

    fn raw(&self, sock: SockId) -> io::Result<RawFd> {
        let closed = || io::Error::from_raw_os_error(libc::EBADF);
        self.entry(sock).map(|open| open.fd.as_raw_fd()).ok_or_else(closed)
    }

    fn prepare(&mut self, fd: RawFd) -> io::Result<()> {
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &1i32)?;
        // A peer that vanished is noticed after two hours (RFC 9293 §3.8.4).
        set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1i32)?;
        // Urgent data stay in line (RFC 6093 §6): out of line, reads would skip a byte that was peeked at and counted.
        set_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, &1i32)?;
        if self.peek_off {
            match set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0i32) {
                // A kernel that has none says so to the first stream.
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.peek_off = false,
                other => other?,
            }
        }
        Ok(())
    }

    /// Puts the kernel's peek offset where the next peek is to begin. Says whether the kernel has one.
    fn seek(&mut self, sock: SockId, offset: u32) -> io::Result<bool> {
        let peek_off = self.peek_off;
        let Some(open) = self.open.get_mut(sock.0 as usize).and_then(Option::as_mut) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        if open.kind == Kind::Tcp && !peek_off {
            return Ok(false);
        }
        if open.peek_at != offset {
            let value = c_int::try_from(offset).unwrap_or(c_int::MAX);
            set_option(open.fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, &value)?;
            open.peek_at = offset;
        }
        Ok(true)
    }
}

impl Machine for SysHost {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn poll(&mut self, into: &mut Vec<(Token, Events)>) -> bool {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; MAX_EVENTS];
        let room = c_int::try_from(events.len()).unwrap_or(c_int::MAX);
        // SAFETY: the array has room for the number of events that is passed.
        let n = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), room, 0) };
        let n = usize::try_from(n).unwrap_or(0);
        for event in &events[..n] {
            let bits = event.u64;
            into.extend(Token::from_bits(bits).map(|token| (token, to_events(event.events))));
        }
        n == MAX_EVENTS
    }

    fn set_timer(&mut self, after: Duration) {
        let value = libc::timespec {
            tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            // Zero would disarm it.
            tv_nsec: i64::from(after.subsec_nanos().max(1)),
        };
        let spec =
            libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // SAFETY: `spec` is valid for the call; the old value is not asked for.
        unsafe { libc::timerfd_settime(self.timer.as_raw_fd(), 0, &raw const spec, std::ptr::null_mut()) };
    }

    fn watch_bell(&mut self, bell: OwnedFd) -> io::Result<()> {
        self.register(bell.as_raw_fd(), Token { owner: Owner::Bell, slot: 0, generation: 0 })?;
        self.bell = Some(bell);
        Ok(())
    }

    fn open_sockets(&self) -> usize {
        self.open.iter().flatten().count()
    }
}

fn to_events(bits: u32) -> Events {
    let map = [
        (libc::EPOLLIN, Events::READ),
        (libc::EPOLLOUT, Events::WRITE),
        (libc::EPOLLRDHUP, Events::READ_CLOSED),
        (libc::EPOLLHUP, Events::CLOSED),
        (libc::EPOLLERR, Events::ERROR),
    ];
    map.into_iter().filter(|(bit, _)| bits & *bit as u32 != 0).map(|(_, event)| event).collect()
}

/// Scatter lists for one system call.
struct Iov<'a> {
    list: [iovec; MAX_IOV],
    len: usize,
    total: usize,
    /// The memory stays borrowed for as long as the list points into it.
    _lent: std::marker::PhantomData<VolatileSlice<'a>>,
}

impl<'a> Iov<'a> {
    fn new() -> Self {
        let empty = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { list: [empty; MAX_IOV], len: 0, total: 0, _lent: std::marker::PhantomData }
    }

    fn push(&mut self, base: *mut u8, len: usize) -> bool {
        if self.len == MAX_IOV {
            return false;
        }
        self.list[self.len] = iovec { iov_base: base.cast::<c_void>(), iov_len: len };
        self.len += 1;
        self.total += len;
        true
    }

    fn push_slice(&mut self, slice: &VolatileSlice<'a>) -> bool {
        self.push(slice.ptr_guard_mut().as_ptr(), slice.len())
    }

    fn header(&mut self) -> libc::msghdr {
        // SAFETY: an all-zero msghdr is a valid one: no name, no data, no control.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = self.list.as_mut_ptr();
        header.msg_iovlen = self.len;
        header
    }
}

impl StreamHost for SysHost {
    fn connect(&mut self, to: SocketAddrV4, token: Token) -> io::Result<SockId> {
        let fd = stream_socket()?;
        self.prepare(fd.as_raw_fd())?;
        let addr = to_sockaddr(to);
        let len = size_of::<libc::sockaddr_in>() as u32;
        // SAFETY: `addr` is a sockaddr_in and `len` its length.
        match check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) }) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        self.register(fd.as_raw_fd(), token)?;
        Ok(self.insert(fd, Kind::Tcp))
    }

    fn stream_pair(&mut self, token: Token) -> io::Result<(SockId, SockId)> {
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let mut fds = [0; 2];
        // SAFETY: `fds` has room for the two descriptors.
        check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
        let (ours, theirs) = (own(fds[0])?, own(fds[1])?);
        set_option(ours.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0i32)?;
        self.register(ours.as_raw_fd(), token)?;
        Ok((self.insert(ours, Kind::Unix), self.insert(theirs, Kind::Unix)))
    }

    fn adopt_stream(&mut self, stream: OwnedFd, token: Token) -> io::Result<SockId> {
        // Only Unix streams have a peek offset on every kernel.
        let unix = rustix::net::getsockname(&stream)?.address_family() == rustix::net::AddressFamily::UNIX;
        if !unix || rustix::net::sockopt::socket_type(&stream)? != rustix::net::SocketType::STREAM {
            return Err(io::Error::from_raw_os_error(libc::ESOCKTNOSUPPORT));
        }
        rustix::io::ioctl_fionbio(&stream, true)?;
        set_option(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0i32)?;
        self.register(stream.as_raw_fd(), token)?;
        Ok(self.insert(stream, Kind::Unix))
    }

    fn connected(&mut self, sock: SockId) -> io::Result<()> {
        let mut error: c_int = 0;
        let mut len = size_of::<c_int>() as u32;
        let fd = self.raw(sock)?;
        // SAFETY: `error` and `len` are valid, and `len` is the size of `error`.
        check(unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut error).cast(), &raw mut len)
        })?;
        if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    fn listen(&mut self, at: SocketAddrV4, token: Token) -> io::Result<SockId> {
        let fd = stream_socket()?;
        set_option(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &1i32)?;
        let addr = to_sockaddr(at);
        let len = size_of::<libc::sockaddr_in>() as u32;
        // SAFETY: `addr` is a sockaddr_in and `len` its length.
        check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), len) })?;
        // SAFETY: `listen` takes no pointers.
        check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })?;
        self.register(fd.as_raw_fd(), token)?;
        Ok(self.insert(fd, Kind::Other))
    }

    fn local_addr(&mut self, sock: SockId) -> io::Result<SocketAddrV4> {
        let mut addr = to_sockaddr(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
        let mut len = size_of::<libc::sockaddr_in>() as u32;
        // SAFETY: `addr` has room for `len` bytes; every address of an AF_INET socket fits.
        check(unsafe { libc::getsockname(self.raw(sock)?, (&raw mut addr).cast(), &raw mut len) })?;
        Ok(from_sockaddr(&addr))
    }

    fn accept(&mut self, listener: SockId) -> io::Result<(SockId, SocketAddrV4)> {
        let mut addr = to_sockaddr(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
        let mut len = size_of::<libc::sockaddr_in>() as u32;
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let listener = self.raw(listener)?;
        // SAFETY: `addr` has room for `len` bytes; every address of an AF_INET socket fits.
        let fd = own(unsafe { libc::accept4(listener, (&raw mut addr).cast(), &raw mut len, flags) })?;
        self.prepare(fd.as_raw_fd())?;
        Ok((self.insert(fd, Kind::Tcp), from_sockaddr(&addr)))
    }

    fn watch(&mut self, sock: SockId, token: Token) -> io::Result<()> {
        self.register(self.raw(sock)?, token)
    }

    fn want_write(&mut self, sock: SockId, token: Token) {
        // The call looks at the socket: it reports one that is writable now, and makes the kernel tell later of one
        // that is not (SOCK_NOSPACE), which is also what lets its send buffer grow.
        if let Ok(fd) = self.raw(sock) {
            let _ = self.control(libc::EPOLL_CTL_MOD, fd, token);
        }
    }

    fn send(
        &mut self,
        sock: SockId,
        parts: &mut dyn Iterator<Item = VolatileSlice<'_>>,
    ) -> io::Result<usize> {
        let fd = self.raw(sock)?;
        let mut iov = Iov::new();
        for part in parts {
            if !iov.push_slice(&part) {
                break;
            }
        }
        let header = iov.header();
        // SAFETY: the header points to `iov.len` pieces of memory that is lent for the duration of this function.
        check_len(unsafe { libc::sendmsg(fd, &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
    }

    fn peek(
        &mut self,
        sock: SockId,
        offset: u32,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
    ) -> io::Result<usize> {
        if self.seek(sock, offset)? {
            let got = self.peek_behind(sock, 0, parts, skip, max)?;
            if let Some(open) = self.open[sock.0 as usize].as_mut() {
                open.peek_at = offset.saturating_add(u32::try_from(got).unwrap_or(u32::MAX));
            }
            return Ok(got);
        }
        let in_flight = offset as usize;
        let got = self.peek_behind(sock, in_flight, parts, skip, max)?;
        if got > in_flight || in_flight == 0 {
            return Ok(got - in_flight);
        }
        if !self.read_closed(sock)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // The last bytes may have come between the peek and the question.
        self.peek_behind(sock, in_flight, parts, skip, max).map(|got| got.saturating_sub(in_flight))
    }

    fn discard(&mut self, sock: SockId, len: u32) {
        let Some(open) = self.open.get_mut(sock.0 as usize).and_then(Option::as_mut) else { return };
        let fd = open.fd.as_raw_fd();
        open.peek_at = open.peek_at.saturating_sub(len);
        if open.kind == Kind::Tcp {
            let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
            // SAFETY: with MSG_TRUNC, TCP drops `len` bytes and writes to no buffer (tcp(7)).
            unsafe { libc::recv(fd, std::ptr::null_mut(), len as usize, flags) };
            return;
        }
        self.scratch.resize(SCRATCH, 0);
        let mut left = len as usize;
        while left > 0 {
            let want = left.min(SCRATCH);
            // SAFETY: `scratch` has room for `want` bytes.
            let got = unsafe { libc::recv(fd, self.scratch.as_mut_ptr().cast(), want, libc::MSG_DONTWAIT) };
            match usize::try_from(got) {
                Ok(got @ 1..) => left -= got,
                _ => break,
            }
        }
    }

    fn send_space(&mut self, sock: SockId) -> SendSpace {
        let unknown = SendSpace { free: UNIX_SPACE, size: UNIX_SPACE, writable: true };
        let Some(open) = self.entry(sock).filter(|open| open.kind != Kind::Other) else { return unknown };
        // SK_MEMINFO_* of linux/sock_diag.h: the send buffer's limit, and what is charged to it.
        const WMEM_ALLOC: usize = 2;
        const SNDBUF: usize = 3;
        const WMEM_QUEUED: usize = 5;
        let mut info = [0u32; 16];
        let mut len = size_of_val(&info) as u32;
        // SAFETY: `info` has room for `len` bytes.
        let result = unsafe {
            libc::getsockopt(
                open.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                info.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result < 0 {
            return unknown;
        }
        let size = info[SNDBUF];
        if open.kind == Kind::Unix {
            // What the peer has not read, with the kernel's headers and whole pages; as unix_writable has it.
            let used = info[WMEM_ALLOC];
            let writable = used.saturating_mul(4) <= size;
            return SendSpace { free: size.saturating_sub(used) / 2, size, writable };
        }
        let free = size.saturating_sub(info[WMEM_QUEUED]);
        // The kernel charges its own headers to the buffer, too: about 2% with full segments.
        let likely = free - free / 8;
        // As the kernel's sk_stream_is_writeable has it.
        SendSpace { free: likely, size, writable: free >= info[WMEM_QUEUED] / 2 }
    }

    fn shutdown_write(&mut self, sock: SockId) {
        if let Ok(fd) = self.raw(sock) {
            // SAFETY: `shutdown` takes no pointers. A stream that is dead already needs none.
            unsafe { libc::shutdown(fd, libc::SHUT_WR) };
        }
    }

    fn close(&mut self, sock: SockId, how: Close) {
        let Some(open) = self.open.get_mut(sock.0 as usize).and_then(Option::take) else { return };
        if how == Close::Reset && open.kind == Kind::Tcp {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            let _ = set_option(open.fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger);
        }
    }
}

impl SysHost {
    /// Peeks `in_flight` bytes into the scratch buffer, and what follows into `parts`. Counts both.
    fn peek_behind(
        &mut self,
        sock: SockId,
        in_flight: usize,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
    ) -> io::Result<usize> {
        if in_flight > SCRATCH * MAX_SCRATCH {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let fd = self.raw(sock)?;
        let mut iov = Iov::new();
        let mut left = in_flight;
        if left > 0 {
            self.scratch.resize(SCRATCH, 0);
        }
        while left > 0 {
            let len = left.min(SCRATCH);
            iov.push(self.scratch.as_mut_ptr(), len);
            left -= len;
        }
        fill(&mut iov, parts, skip, max);
        let mut header = iov.header();
        // SAFETY: the header points to `iov.len` pieces, each of them lent or of `scratch`, which may be overwritten.
        check_len(unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_PEEK | libc::MSG_DONTWAIT) })
    }

    /// Whether the other side has sent its FIN.
    fn read_closed(&self, sock: SockId) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.raw(sock)?, events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: `poll` is one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, 0) };
        Ok(poll.revents & (libc::POLLRDHUP | libc::POLLHUP) != 0)
    }
}

/// Adds `max` bytes of `parts`, behind their first `skip`, to a list.
fn fill<'a>(iov: &mut Iov<'a>, parts: &[VolatileSlice<'a>], skip: usize, max: usize) {
    let (mut skip, mut left) = (skip, max);
    for part in parts {
        let here = skip.min(part.len());
        skip -= here;
        let take = (part.len() - here).min(left);
        left -= take;
        // `here + take <= part.len()`, so the piece is within the slice.
        let Ok(piece) = part.subslice(here, take) else { continue };
        if take > 0 && !iov.push_slice(&piece) {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
