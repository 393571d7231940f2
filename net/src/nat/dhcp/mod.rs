//! The DHCPv4 server at the gateway (RFC 2131, RFC 2132), without sockets or clocks.
//!
//! Enters: the payload of a datagram to port 67, the Ethernet address that it came from, and the time. Leaves: at
//! most one [`Reply`] for port 68, and a lease in the [`pool`]. The server is the only one on its network and says
//! so: it is *authoritative*, it answers NAK where another server would keep silent in favour of a colleague.
//!
//! | message | answer |
//! |---|---|
//! | DISCOVER | OFFER of the reserved, held, requested, hashed or stalest address, in this order (§4.3.1) |
//! | REQUEST, SELECTING (option 54) | ACK; NAK if the address can't be had; nothing for another server (§4.3.2) |
//! | REQUEST, INIT-REBOOT (option 50) | ACK if it is, or can be, the client's; else NAK |
//! | REQUEST, RENEWING, REBINDING (`ciaddr`) | the same |
//! | RELEASE, DECLINE | none; the address is free, or in quarantine (§4.3.3, §4.3.4) |
//! | INFORM | ACK without an address or times (§4.3.5) |
//! | BOOTP, relayed, other servers' messages | none; counted |
//!
//! **Where answers go** (§4.1): NAK by broadcast; to `ciaddr` if the client has one; by broadcast if it asked for that;
//! else to the new address, at the client's Ethernet address, with no ARP in between.
//!
//! **Options** 1 3 6 12 15 26 28 119 121 as option 55 asks for them, in its order but the mask before the router (RFC
//! 2132 §3.3); without option 55, all of the usual ones. 51 54 58 59 always; 61 as it came (RFC 6842). Option 121
//! repeats the default route, because its readers ignore option 3 (RFC 3442). T1 = 1/2, T2 = 7/8 of the lease.
//!
//! **Refused**: a hardware address that is not the frame's source (`BadSource`; on this link nobody speaks for others),
//! a hop through a relay, malformed messages.
//!
//! **Limits**: leases of at most [`Config::lease`] (3600 s), at least [`MIN_LEASE`]; the table is bounded by the pool.
//! A pool without a free address answers DISCOVER with silence, counts `TableFull`, and says so in the log.

mod message;
mod pool;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use self::message::{Answer, Kind, Refused, Request, code};
pub use self::pool::Lease;
use self::pool::{Client, Pool};
use super::config::NatConfig;
use crate::{DropReason, MacAddr};

/// Port of the server.
pub(crate) const SERVER_PORT: u16 = 67;
/// Port of the client.
pub(crate) const CLIENT_PORT: u16 = 68;
/// Shortest lease that is given to a client that asks for a short one (option 51).
pub(crate) const MIN_LEASE: Duration = Duration::from_secs(60);
/// What a client without option 55 gets.
const USUAL: [u8; 7] =
    [code::SUBNET_MASK, code::ROUTER, code::DNS, code::DOMAIN, code::MTU, code::BROADCAST, code::HOST_NAME];

/// What the server gives away.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Server, router and resolver.
    pub(crate) gateway: Ipv4Addr,
    pub(crate) mask: Ipv4Addr,
    pub(crate) broadcast: Ipv4Addr,
    /// First and last address of the pool.
    pub(crate) pool: (Ipv4Addr, Ipv4Addr),
    pub(crate) mtu: u16,
    pub(crate) lease: Duration,
    /// Option 15; the first entry of option 119.
    pub(crate) domain: String,
    /// The host's own search domains, behind ours in option 119.
    pub(crate) search: Vec<String>,
    /// Addresses for certain machines.
    pub(crate) reserved: BTreeMap<MacAddr, Ipv4Addr>,
    /// Names of certain machines (option 12).
    pub(crate) names: BTreeMap<MacAddr, String>,
}

impl Config {
    /// The server of a NAT network; guests have every address behind the gateway's.
    pub(crate) fn new(nat: &NatConfig) -> Self {
        let last = Ipv4Addr::from_bits(nat.subnet.broadcast().to_bits().saturating_sub(1));
        let named = |r: &super::config::Reservation| Some((r.mac, sanitise(r.name.as_deref()?.as_bytes())?));
        Self {
            gateway: nat.gateway(),
            mask: nat.subnet.mask(),
            broadcast: nat.subnet.broadcast(),
            pool: (nat.subnet.host(2), last),
            mtu: nat.mtu,
            lease: Duration::from_secs(3600),
            domain: nat.domain.clone(),
            search: Vec::new(),
            reserved: nat.reservations.iter().map(|r| (r.mac, r.addr)).collect(),
            names: nat.reservations.iter().filter_map(named).collect(),
        }
    }
}

/// An answer on its way to the client's port 68.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    /// The Ethernet destination.
    pub(crate) mac: MacAddr,
    /// The IP destination.
    pub(crate) to: Ipv4Addr,
    pub(crate) payload: Vec<u8>,
    /// What happened to a lease, for whoever keeps track of addresses.
    pub(crate) bound: Option<(Ipv4Addr, Instant)>,
}

/// What a message led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Reply(Reply),
    /// This address is free again.
    Freed(Ipv4Addr),
    /// Nothing to say, as the protocol wants it.
    Silence,
}

/// The server.
#[derive(Debug)]
pub(crate) struct Server {
    config: Config,
    pool: Pool,
    exhausted_logged: bool,
}

impl Server {
    pub(crate) fn new(config: Config) -> Self {
        let pool = Pool::new(config.pool.0, config.pool.1, config.reserved.clone());
        Self { config, pool, exhausted_logged: false }
    }

    /// The search domains that the host has now.
    pub(crate) fn set_search(&mut self, search: Vec<String>) {
        self.config.search = search;
    }

    /// The leases that hold.
    pub(crate) fn leases(&self, now: Instant) -> impl Iterator<Item = Lease> + '_ {
        self.pool.leases(now)
    }

    /// A machine was unplugged from the network: what it had is free, and kept for its return.
    pub(crate) fn unplug(&mut self, mac: MacAddr, now: Instant) {
        self.pool.unplug(mac, now);
    }

    /// Takes the payload of a datagram to port 67 that came from the Ethernet address `source`.
    ///
    /// # Errors
    /// Why there is no answer, to be counted.
    pub(crate) fn input(
        &mut self,
        payload: &[u8],
        source: MacAddr,
        now: Instant,
    ) -> Result<Outcome, DropReason> {
        let request = Request::parse(payload).map_err(|refused| match refused {
            Refused::Malformed => DropReason::Malformed,
            Refused::NotARequest => DropReason::UnknownProtocol,
            Refused::Relayed => DropReason::Policy,
        })?;
        if request.mac != source {
            return Err(DropReason::BadSource);
        }
        let client = Client::new(request.mac, request.client_id.as_deref());
        match request.kind {
            Kind::Discover => self.discover(&request, &client, now),
            Kind::Request => self.request(&request, &client, now),
            Kind::Release => {
                let had = self.pool.release(&client, request.ciaddr, now);
                Ok(if had { Outcome::Freed(request.ciaddr) } else { Outcome::Silence })
            }
            Kind::Decline => Ok(self.decline(&request, &client, now)),
            Kind::Inform => self.inform(&request),
            Kind::Offer | Kind::Ack | Kind::Nak => Err(DropReason::UnknownProtocol), // never parsed as a request
        }
    }

    fn discover(&mut self, request: &Request, client: &Client, now: Instant) -> Result<Outcome, DropReason> {
        let Some(address) = self.pool.offer(client, request.requested, now) else {
            if !std::mem::replace(&mut self.exhausted_logged, true) {
                let (first, last) = self.config.pool;
                tracing::warn!(%first, %last, mac = %client.mac(), "no address is left for another guest");
            }
            return Err(DropReason::TableFull);
        };
        let options = self.times(request).into_iter().chain(self.parameters(request)).collect();
        Ok(Outcome::Reply(self.answer(request, Kind::Offer, address, options)))
    }

    /// RFC 2131 §4.3.2: the state of the client shows in which fields are set.
    fn request(&mut self, request: &Request, client: &Client, now: Instant) -> Result<Outcome, DropReason> {
        if request.server.is_some_and(|server| server != self.config.gateway) {
            self.pool.withdraw(client, now);
            return Ok(Outcome::Silence);
        }
        let in_use = Some(request.ciaddr).filter(|a| !a.is_unspecified());
        let address = request.requested.or(in_use).ok_or(DropReason::Malformed)?;
        let lease = self.lease(request);
        if !self.pool.bind(client, address, lease, now) {
            tracing::info!(%address, mac = %client.mac(), "DHCP: a guest asked for an address that it can't have");
            let why = (code::MESSAGE, b"this address is not for you here".to_vec());
            let mut nak = self.answer(request, Kind::Nak, Ipv4Addr::UNSPECIFIED, vec![why]);
            (nak.mac, nak.to) = (MacAddr::BROADCAST, Ipv4Addr::BROADCAST);
            return Ok(Outcome::Reply(nak));
        }
        let own_name = || request.host_name.as_deref().and_then(sanitise);
        let name = self.config.names.get(&client.mac()).cloned().or_else(own_name);
        self.pool.name(address, name);
        let options = self.times(request).into_iter().chain(self.parameters(request)).collect();
        let mut ack = self.answer(request, Kind::Ack, address, options);
        ack.bound = Some((address, now + lease));
        Ok(Outcome::Reply(ack))
    }

    fn decline(&mut self, request: &Request, client: &Client, now: Instant) -> Outcome {
        let Some(address) = request.requested else { return Outcome::Silence };
        if !self.pool.decline(client, address, now) {
            return Outcome::Silence;
        }
        tracing::warn!(%address, mac = %client.mac(), "DHCP: a guest found its address in use by another machine");
        Outcome::Freed(address)
    }

    fn inform(&self, request: &Request) -> Result<Outcome, DropReason> {
        if request.ciaddr.is_unspecified() {
            return Err(DropReason::Malformed);
        }
        Ok(Outcome::Reply(self.answer(request, Kind::Ack, Ipv4Addr::UNSPECIFIED, self.parameters(request))))
    }

    fn lease(&self, request: &Request) -> Duration {
        let asked = request.lease_time.map_or(self.config.lease, |secs| Duration::from_secs(secs.into()));
        asked.max(MIN_LEASE).min(self.config.lease)
    }

    /// The lease time, T1 and T2.
    fn times(&self, request: &Request) -> [(u8, Vec<u8>); 3] {
        // A lease is at most a configured hour or so; it fits.
        let lease = u32::try_from(self.lease(request).as_secs()).unwrap_or(u32::MAX);
        let time = |secs: u32| secs.to_be_bytes().to_vec();
        [(code::LEASE_TIME, time(lease)), (code::T1, time(lease / 2)), (code::T2, time(lease - lease / 8))]
    }

    /// What the client asks for in option 55, each once.
    fn parameters(&self, request: &Request) -> Vec<(u8, Vec<u8>)> {
        let mut wanted: Vec<u8> = Vec::new();
        for code in request.parameters.as_deref().unwrap_or(&USUAL) {
            if !wanted.contains(code) {
                wanted.push(*code);
            }
        }
        let at = |code| wanted.iter().position(|c| *c == code);
        if let (Some(mask), Some(router)) = (at(code::SUBNET_MASK), at(code::ROUTER))
            && router < mask
        {
            wanted.remove(mask);
            wanted.insert(router, code::SUBNET_MASK);
        }
        wanted.into_iter().filter_map(|code| Some((code, self.parameter(code, request)?))).collect()
    }

    fn parameter(&self, code: u8, request: &Request) -> Option<Vec<u8>> {
        let config = &self.config;
        Some(match code {
            code::SUBNET_MASK => config.mask.octets().to_vec(),
            code::ROUTER | code::DNS => config.gateway.octets().to_vec(),
            code::BROADCAST => config.broadcast.octets().to_vec(),
            code::MTU => config.mtu.to_be_bytes().to_vec(),
            code::DOMAIN if !config.domain.is_empty() => config.domain.clone().into_bytes(),
            code::HOST_NAME => config.names.get(&request.mac)?.clone().into_bytes(),
            code::SEARCH => {
                let all = std::iter::once(&config.domain).chain(&config.search);
                Some(search_list(all.map(String::as_str))).filter(|list| !list.is_empty())?
            }
            // RFC 3442: width 0, no octets of a destination, the router.
            code::ROUTES => [&[0], &config.gateway.octets()[..]].concat(),
            _ => return None,
        })
    }

    fn answer(&self, request: &Request, kind: Kind, yiaddr: Ipv4Addr, more: Vec<(u8, Vec<u8>)>) -> Reply {
        let mut options = vec![
            (code::MESSAGE_TYPE, vec![kind.code()]),
            (code::SERVER_ID, self.config.gateway.octets().to_vec()),
        ];
        options.extend(request.client_id.clone().map(|id| (code::CLIENT_ID, id)));
        options.extend(more);
        // §4.3.1 table 3: ciaddr is 0 in OFFER and NAK.
        let ciaddr = if kind == Kind::Ack { request.ciaddr } else { Ipv4Addr::UNSPECIFIED };
        let (xid, broadcast, mac) = (request.xid, request.broadcast, request.mac);
        let answer = Answer { xid, broadcast, ciaddr, yiaddr, mac, options };
        let (mac, to) = if !ciaddr.is_unspecified() {
            (mac, ciaddr)
        } else if broadcast {
            (MacAddr::BROADCAST, Ipv4Addr::BROADCAST)
        } else {
            (mac, yiaddr)
        };
        Reply { mac, to, payload: answer.to_bytes(request.max_size, self.config.mtu), bound: None }
    }
}

/// A host name as a DNS label: its first label in lower case, if that has letters, digits and hyphens only, none of
/// them at an edge, and 1 to 63 of them (RFC 1123 §2.1).
pub(crate) fn sanitise(name: &[u8]) -> Option<String> {
    let name = name.split(|b| *b == b'.' || *b == 0).next().unwrap_or_default();
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let good = name.len() <= 63
        && edge(name.first())
        && edge(name.last())
        && name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-');
    let label = String::from_utf8(name.to_ascii_lowercase()).ok().filter(|_| good)?;
    (label != "localhost").then_some(label)
}

/// Domains in the form of RFC 3397, without compression; what is no domain name is left out.
fn search_list<'a>(domains: impl Iterator<Item = &'a str>) -> Vec<u8> {
    let mut list = Vec::new();
    for domain in domains {
        let labels = domain.trim_end_matches('.').split('.');
        if domain.len() > 253 || labels.clone().any(|l| l.is_empty() || l.len() > 63) {
            continue;
        }
        for label in labels {
            list.push(u8::try_from(label.len()).unwrap_or(63)); // at most 63, as checked
            list.extend_from_slice(label.as_bytes());
        }
        list.push(0);
    }
    list
}
