//! How flows begin: a guest's SYN becomes a connect of the host, and the outcome becomes the guest's answer.
//!
//! | the host says | the guest gets |
//! |---|---|
//! | connected | SYN-ACK |
//! | ECONNREFUSED, ECONNRESET | RST |
//! | ENETUNREACH | ICMP net unreachable |
//! | EHOSTUNREACH, EHOSTDOWN | ICMP host unreachable |
//! | EACCES, EPERM (the host's firewall) | ICMP administratively prohibited |
//! | ETIMEDOUT | nothing: its own timer has the same opinion |
//! | no descriptors, ports or memory | RST, counted as `TableFull` |

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::flow::{End, Flow, Marks};
use super::state::{Event, State};
use super::table::Key;
use crate::DropReason;
use crate::nat::config::NatConfig;
use crate::nat::cx::Cx;
use crate::nat::host::Close;
use crate::nat::icmp::error::IcmpError;
use crate::nat::ipv4::{DONT_FRAGMENT, Ipv4Out, TTL, protocol};
use crate::nat::policy::{self, Refusal, Route};
use crate::{ETHERNET_LEN, MacAddr};

/// The port of the DNS forwarder.
const DNS_PORT: u16 = 53;

/// What a guest's SYN leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A connect of the host.
    Connect(SocketAddrV4),
    /// A service of the gateway.
    Service(u16),
    /// A RST.
    Closed(DropReason),
    /// An ICMP error.
    Unreachable(IcmpError, DropReason),
    /// No answer at all.
    Silence(DropReason),
}

/// Where a connection to `world` goes.
pub(super) fn target(config: &NatConfig, world: SocketAddrV4) -> Target {
    match policy::route(config, *world.ip()) {
        Route::World(addr) if world.port() != 0 => Target::Connect(SocketAddrV4::new(addr, world.port())),
        Route::World(_) => Target::Closed(DropReason::Malformed),
        Route::Gateway if world.port() == DNS_PORT => Target::Service(DNS_PORT),
        Route::Gateway => match policy::gateway_port(config) {
            Some(addr) => Target::Connect(SocketAddrV4::new(addr, world.port())),
            None => Target::Closed(DropReason::Policy),
        },
        Route::Refused(Refusal::Prohibited) => Target::Closed(DropReason::Policy),
        Route::Refused(Refusal::HostUnreachable) => {
            Target::Unreachable(IcmpError::HostUnreachable, DropReason::Unreachable)
        }
        Route::Group => Target::Silence(DropReason::Multicast),
    }
}

/// What a failed connect is to the guest.
pub(super) fn failure(error: &io::Error) -> (End, DropReason) {
    let unreachable = |icmp| (End::Unreachable(icmp), DropReason::Unreachable);
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED | libc::ECONNRESET) => (End::Reset(Close::Graceful), DropReason::Unreachable),
        Some(libc::ENETUNREACH | libc::ENETDOWN) => unreachable(IcmpError::NetUnreachable),
        Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => unreachable(IcmpError::HostUnreachable),
        Some(libc::EACCES | libc::EPERM) => (End::Unreachable(IcmpError::Prohibited), DropReason::Policy),
        Some(libc::ETIMEDOUT) => (End::Quiet(Close::Graceful), DropReason::Unreachable),
        Some(
            libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EADDRNOTAVAIL | libc::ENOSPC,
        ) => (End::Reset(Close::Graceful), DropReason::TableFull),
        _ => (End::Reset(Close::Graceful), DropReason::HostSocket),
    }
}

impl Flow {
    /// The host's connect has ended, one way or the other.
    pub(super) fn dialed(&mut self, cx: &mut Cx<'_>, outcome: io::Result<()>) {
        if self.state != State::Dialing {
            return;
        }
        match outcome {
            Ok(()) => {
                self.state = self.state.on(Event::Dialed);
                self.marks |= Marks::SYN | Marks::READABLE;
            }
            Err(error) => {
                let (end, reason) = failure(&error);
                cx.drop(reason, || format!("TCP {} -> {}: {error}", self.key.guest, self.key.world));
                self.finish(end);
            }
        }
    }
}

/// The beginning of the guest's SYN, as an ICMP error quotes it: all that matters of it is still known.
pub(super) fn quote(key: &Key, seq: u32) -> [u8; 28] {
    let header = Ipv4Out {
        src: *key.guest.ip(),
        dst: *key.world.ip(),
        protocol: protocol::TCP,
        ttl: TTL,
        tos: 0,
        id: 0,
        fragment: DONT_FRAGMENT,
    };
    let mut quote = [0; 28];
    let nobody = MacAddr([0; 6]);
    quote[..20].copy_from_slice(&header.head(nobody, nobody, 20)[ETHERNET_LEN..]);
    quote[20..22].copy_from_slice(&key.guest.port().to_be_bytes());
    quote[22..24].copy_from_slice(&key.world.port().to_be_bytes());
    quote[24..].copy_from_slice(&seq.to_be_bytes());
    quote
}

/// Who a client of a published port is to the guest: itself, or the gateway if the guest could not answer it
/// there (loopback, the guests' own subnet).
pub(super) fn client(config: &NatConfig, client: Ipv4Addr) -> Ipv4Addr {
    match policy::route(config, client) {
        Route::World(addr) => addr,
        Route::Gateway | Route::Refused(_) | Route::Group => config.gateway(),
    }
}
