//! The services of the gateway: DHCP, and DNS where the guests look for it.
//!
//! Enters: datagrams to the gateway (or to everybody) at port 67, to the gateway at port 53, and streams to its port 53.
//! Leaves: answers in the outbox. A lease that DHCP gives is at once a binding of the address to its machine in
//! [`Neighbours`](super::neighbours::Neighbours), which keeps others from using it, and a name in DNS.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use super::config::NatConfig;
use super::cx::{Cx, ServiceStream};
use super::dhcp::{self, CLIENT_PORT, Outcome, SERVER_PORT, Server};
use super::dns::{self, Dns, Names};
use super::host::Close;
use super::ipv4::{Ipv4In, protocol};
use super::poller::{Events, Token};
use super::udp::wire::{self, UDP_LEN, UdpIn};
use crate::{DropReason, MacAddr};

/// The gateway's services.
#[derive(Debug)]
pub(crate) struct Services {
    dhcp: Server,
    dns: Dns,
    /// A lease was given, renewed or given back since [`Services::take_lease_news`].
    lease_news: bool,
}

/// The guests' names, as DHCP knows them.
struct Guests<'a> {
    dhcp: &'a Server,
    config: &'a NatConfig,
    now: Instant,
}

impl Names for Guests<'_> {
    fn address(&self, label: &str) -> Option<Ipv4Addr> {
        let named = |name: Option<&str>| name.is_some_and(|name| name.eq_ignore_ascii_case(label));
        let leased = self.dhcp.leases(self.now).find(|l| named(l.name.as_deref())).map(|l| l.address);
        let reserved = || self.config.reservations.iter().find(|r| named(r.name.as_deref())).map(|r| r.addr);
        leased.or_else(reserved)
    }

    fn label(&self, address: Ipv4Addr) -> Option<String> {
        let leased = self.dhcp.leases(self.now).find(|l| l.address == address).and_then(|l| l.name);
        let reserved = || self.config.reservations.iter().find(|r| r.addr == address)?.name.clone();
        leased.or_else(reserved)
    }
}

impl Services {
    pub(crate) fn new(config: &NatConfig) -> Self {
        Self {
            dhcp: Server::new(dhcp::Config::new(config)),
            dns: Dns::new(config.dns.clone()),
            lease_news: false,
        }
    }

    /// Takes a packet if it is for a service; says whether it was.
    pub(crate) fn input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> bool {
        if packet.protocol != protocol::UDP {
            return false;
        }
        let to_gateway = packet.dst == cx.config.gateway();
        let to_all = packet.dst.is_broadcast() || packet.dst == cx.config.subnet.broadcast();
        let outcome = match UdpIn::port(packet) {
            Some(SERVER_PORT) if to_gateway || to_all => self.dhcp(cx, packet),
            Some(dns::PORT) if to_gateway => self.dns(cx, packet),
            _ => return false,
        };
        if let Err(reason) = outcome {
            cx.drop(reason, || format!("for a service of the gateway, from {} ({})", packet.src, packet.mac));
        }
        true
    }

    /// Takes a guest's connection to a port of the gateway.
    pub(crate) fn stream(&mut self, cx: &mut Cx<'_>, stream: ServiceStream) {
        match stream.port {
            dns::PORT => self.dns.stream(cx, stream),
            _ => cx.host.close(stream.sock, Close::Reset),
        }
    }

    /// A socket of a service is ready.
    pub(crate) fn ready(&mut self, cx: &mut Cx<'_>, token: Token, events: Events) {
        let names = Guests { dhcp: &self.dhcp, config: cx.config, now: cx.now };
        self.dns.ready(cx, token, events, &names);
    }

    /// When [`Self::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.dns.deadline()
    }

    pub(crate) fn expire(&mut self, cx: &mut Cx<'_>) {
        self.dns.expire(cx);
    }

    /// Sockets that are open for services.
    #[cfg(test)]
    pub(crate) fn sockets(&self) -> usize {
        self.dns.sockets()
    }

    /// A machine was unplugged from the network.
    pub(crate) fn unplug(&mut self, mac: MacAddr, now: Instant) {
        self.dhcp.unplug(mac, now);
        self.lease_news = true;
    }

    /// Whether leases have changed since this was last asked.
    pub(crate) fn take_lease_news(&mut self) -> bool {
        std::mem::take(&mut self.lease_news)
    }

    /// The leases that hold.
    pub(crate) fn leases(&self, now: Instant) -> impl Iterator<Item = dhcp::Lease> + '_ {
        self.dhcp.leases(now)
    }

    fn dns(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> Result<(), DropReason> {
        let datagram = UdpIn::parse(packet)?;
        if packet.src.is_unspecified() {
            return Err(DropReason::BadSource);
        }
        let payload = copy_payload(packet, datagram.len.min(dns::MAX_QUESTION + 1));
        let names = Guests { dhcp: &self.dhcp, config: cx.config, now: cx.now };
        self.dns.datagram(cx, datagram.from, packet.mac, &payload, &names)
    }

    fn dhcp(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> Result<(), DropReason> {
        let datagram = UdpIn::parse(packet)?;
        if datagram.len > usize::from(cx.config.mtu) {
            return Err(DropReason::TooBig);
        }
        let payload = copy_payload(packet, datagram.len);
        self.dhcp.set_search(self.dns.search(cx.now).to_vec());
        match self.dhcp.input(&payload, packet.mac, cx.now)? {
            Outcome::Reply(reply) => {
                if let Some((addr, until)) = reply.bound {
                    self.lease_news = true;
                    cx.neighbours.lease(addr, packet.mac, cx.now, until);
                }
                let from = SocketAddrV4::new(cx.config.gateway(), SERVER_PORT);
                let to = SocketAddrV4::new(reply.to, CLIENT_PORT);
                wire::post(cx, reply.mac, from, to, &reply.payload, 0);
            }
            Outcome::Freed(addr) => {
                self.lease_news = true;
                cx.neighbours.release(addr);
            }
            Outcome::Silence => {}
        }
        Ok(())
    }
}

/// Copies a datagram's payload of `len` bytes out of the guest's memory.
fn copy_payload(packet: &Ipv4In<'_>, len: usize) -> Vec<u8> {
    let mut payload = vec![0; len];
    let mut at = 0;
    for part in packet.payload.parts(UDP_LEN, len) {
        let end = at + part.len();
        // The piece is as long as its place in the buffer.
        part.copy_to(&mut payload[at..end]);
        at = end;
    }
    payload
}
