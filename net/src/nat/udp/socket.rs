//! What datagram protocols ask of the host: UDP and ping sockets, and the errors that the world sends back.
//!
//! [`DatagramHost`] stands next to [`StreamHost`](crate::nat::host::StreamHost): both are the only doors to sockets, and
//! tests play a host of their own. Sockets are non-blocking, not connected, and registered edge-triggered.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use vm_memory::VolatileSlice;

use crate::nat::host::SockId;
use crate::nat::poller::Token;

/// Largest payload of a UDP datagram over IPv4 (RFC 768, RFC 791).
pub(crate) const MAX_PAYLOAD: usize = 65_507;

/// How a datagram leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) to: SocketAddrV4,
    /// The host's address to send from; none leaves it to the host's routes.
    pub(crate) from: Option<Ipv4Addr>,
    /// 1 to 255.
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    /// What is sent is a row of datagrams of this many bytes each (the last may be shorter), which the host cuts
    /// (`UDP_SEGMENT`, udp(7)); 0 for one datagram.
    pub(crate) segment: u16,
}

/// How a datagram came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Incoming {
    pub(crate) from: SocketAddrV4,
    /// Bytes of the whole payload.
    pub(crate) len: usize,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    /// The host's address that it was sent to, if the socket was asked to tell.
    pub(crate) to: Option<Ipv4Addr>,
}

/// Which socket the host gave for pings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PingKind {
    /// `SOCK_DGRAM`: the host filters by identifier, and chooses the identifier if the wanted one is taken.
    Datagram,
    /// `SOCK_RAW`: every echo reply that the host gets arrives, its IPv4 header in front.
    Raw,
}

/// Who reported an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The host itself (too big for the way; no way).
    Local,
    /// An ICMP message of this type and code.
    Icmp(u8, u8),
}

/// An error about a datagram that was sent (`IP_RECVERR`, ip(7)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SocketError {
    pub(crate) errno: i32,
    pub(crate) origin: Origin,
    /// For "too big": the MTU of the way.
    pub(crate) mtu: u32,
    /// Who sent the ICMP message.
    pub(crate) offender: Option<Ipv4Addr>,
    /// Where the datagram was to go.
    pub(crate) to: SocketAddrV4,
    /// The beginning of its payload, as far as it came back: of UDP what is behind the UDP header, of a ping its ICMP
    /// header first.
    pub(crate) payload: Vec<u8>,
}

/// Datagram sockets. The default methods are for hosts without any.
pub(crate) trait DatagramHost {
    /// Opens a UDP socket on `at`, whose port may be 0. With `tell_local`, [`Incoming::to`] is filled in.
    ///
    /// # Errors
    /// As `bind` does.
    fn udp_open(&mut self, _at: SocketAddrV4, _tell_local: bool, _token: Token) -> io::Result<SockId> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Opens a socket for ICMP echo with the identifier `id`, if that is free.
    ///
    /// # Errors
    /// `PermissionDenied` when the host allows neither ping sockets (`net.ipv4.ping_group_range`) nor raw ones.
    fn ping_open(&mut self, _id: u16, _token: Token) -> io::Result<(SockId, PingKind)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether the host may cut datagrams that are too big for the way (as for a packet without DF), or reports them.
    fn set_dont_fragment(&mut self, _sock: SockId, _dont: bool) {}

    /// Sends one datagram, or a row of them.
    ///
    /// # Errors
    /// As `sendmsg` does, a pending error of an earlier datagram included. Of a row, all or nothing is sent; a host may
    /// refuse a row whose datagrams it would take one by one.
    fn send_datagram(
        &mut self,
        _sock: SockId,
        _out: &Outgoing,
        _parts: &mut dyn Iterator<Item = VolatileSlice<'_>>,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Receives one datagram: `max` bytes of it into the pieces behind their first `skip` bytes, the rest into `rest`
    /// (which is emptied first).
    ///
    /// # Errors
    /// `WouldBlock` when there is none; otherwise a pending error of an earlier datagram.
    fn recv_datagram(
        &mut self,
        _sock: SockId,
        _parts: &[VolatileSlice<'_>],
        _skip: usize,
        _max: usize,
        _rest: &mut Vec<u8>,
    ) -> io::Result<Incoming> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Takes the next error from the socket's queue.
    fn take_error(&mut self, _sock: SockId) -> Option<SocketError> {
        None
    }
}
