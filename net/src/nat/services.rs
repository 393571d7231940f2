//! The services of the gateway: DHCP, and DNS where the guests look for it.
//!
//! Enters: datagrams to the gateway (or to everybody) at port 67, to the gateway at port 53, and streams to its port 53.
//! Leaves: answers in the outbox. A lease that DHCP gives is at once a binding of the address to its machine in
//! [`Neighbours`](super::neighbours::Neighbours), which keeps others from using it, and a name in DNS.

use std::net::SocketAddrV4;
use std::time::Instant;

use super::config::NatConfig;
use super::cx::Cx;
use super::dhcp::{self, CLIENT_PORT, Outcome, SERVER_PORT, Server};
use super::ipv4::{Ipv4In, protocol};
use super::udp::wire::{self, UDP_LEN, UdpIn};
use crate::{DropReason, MacAddr};

/// The gateway's services.
#[derive(Debug)]
pub(crate) struct Services {
    dhcp: Server,
}

impl Services {
    pub(crate) fn new(config: &NatConfig) -> Self {
        Self { dhcp: Server::new(dhcp::Config::new(config)) }
    }

    /// Takes a packet if it is for a service; says whether it was.
    pub(crate) fn input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> bool {
        if packet.protocol != protocol::UDP {
            return false;
        }
        let to_gateway = packet.dst == cx.config.gateway();
        let outcome = match UdpIn::port(packet) {
            Some(SERVER_PORT)
                if to_gateway || packet.dst.is_broadcast() || packet.dst == cx.config.subnet.broadcast() =>
            {
                self.dhcp(cx, packet)
            }
            _ => return false,
        };
        if let Err(reason) = outcome {
            cx.drop(reason, || format!("for a service of the gateway, from {} ({})", packet.src, packet.mac));
        }
        true
    }

    /// When [`Self::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        None
    }

    pub(crate) fn expire(&mut self, _cx: &mut Cx<'_>) {}

    /// A machine was unplugged from the network.
    pub(crate) fn unplug(&mut self, mac: MacAddr, now: Instant) {
        self.dhcp.unplug(mac, now);
    }

    /// The leases that hold.
    pub(crate) fn leases(&self, now: Instant) -> impl Iterator<Item = dhcp::Lease> + '_ {
        self.dhcp.leases(now)
    }

    fn dhcp(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) -> Result<(), DropReason> {
        let datagram = UdpIn::parse(packet)?;
        if datagram.len > usize::from(cx.config.mtu) {
            return Err(DropReason::TooBig);
        }
        let mut payload = vec![0; datagram.len];
        copy_payload(packet, &mut payload);
        match self.dhcp.input(&payload, packet.mac, cx.now)? {
            Outcome::Reply(reply) => {
                if let Some((addr, until)) = reply.bound {
                    cx.neighbours.lease(addr, packet.mac, cx.now, until);
                }
                let from = SocketAddrV4::new(cx.config.gateway(), SERVER_PORT);
                let to = SocketAddrV4::new(reply.to, CLIENT_PORT);
                wire::post(cx, reply.mac, from, to, &reply.payload, 0);
            }
            Outcome::Freed(addr) => cx.neighbours.release(addr),
            Outcome::Silence => {}
        }
        Ok(())
    }
}

/// Copies a datagram's payload out of the guest's memory.
fn copy_payload(packet: &Ipv4In<'_>, payload: &mut [u8]) {
    let mut at = 0;
    for part in packet.payload.parts(UDP_LEN, payload.len()) {
        let end = at + part.len();
        // The piece is as long as its place in the buffer.
        part.copy_to(&mut payload[at..end]);
        at = end;
    }
}
