//! UDP flows, without sockets: which peers an endpoint of a guest talks to, and for how long.
//!
//! An *endpoint* is an address and port of a guest, and one socket of the host that stands for it (RFC 4787 REQ-1:
//! the mapping does not depend on the destination). Its *peers* are whom the guest has sent to; only they may answer,
//! from the very address and port (RFC 4787 §5, address- and port-dependent filtering, as virbr0's connection tracking
//! does it). The endpoint of a published port belongs to the host's side: whoever sends to it becomes a peer.
//!
//! A guest sees a peer at its own address, but for the host's loopback, which has none in the guest's world: it is
//! seen at the gateway's. The peer's port is kept there unless it is taken or one of the gateway's own.
//!
//! **Lifetimes** from the last datagram in either direction (RFC 4787 REQ-5 asks for two minutes): [`UNREPLIED`]
//! until the peer has answered, then `udp_idle` of the limits (180 s); [`ONE_SHOT`] after the answer of a port where
//! a question has one answer (DNS, NTP). An endpoint without peers is closed.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use crate::nat::config::Publish;
use crate::nat::host::SockId;

/// Lifetime of a peer that has not answered.
pub(crate) const UNREPLIED: Duration = Duration::from_secs(30);
/// Lifetime of a peer that has answered a question.
pub(crate) const ONE_SHOT: Duration = Duration::from_secs(10);
/// Peers of one endpoint; the one unheard of for the longest time makes room.
pub(crate) const MAX_PEERS: usize = 1024;
/// Bytes of the guest's last packet to a peer that an ICMP error quotes: IPv4 and UDP header.
pub(crate) const QUOTE: usize = 28;

/// Whom a guest talks to.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// Its address on the host's side.
    pub(crate) real: SocketAddrV4,
    /// The host's address that it knows us by; for published ports.
    pub(crate) local: Option<Ipv4Addr>,
    /// Headers of the last packet to it, if there was one.
    pub(crate) quote: Option<[u8; QUOTE]>,
    used: Instant,
    answered: bool,
}

/// An address and port of a guest, and the socket that stands for it.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) guest: SocketAddrV4,
    pub(crate) sock: SockId,
    /// Set for the socket of a published port.
    pub(crate) publish: Option<Publish>,
    /// The socket's packets carry DF.
    pub(crate) dont_fragment: bool,
    /// It may have something to receive, and waits for its turn.
    pub(crate) queued: bool,
    /// By the address at which the guest sees them.
    peers: HashMap<SocketAddrV4, Peer>,
    used: Instant,
}

impl Endpoint {
    pub(crate) fn new(guest: SocketAddrV4, sock: SockId, publish: Option<Publish>, now: Instant) -> Self {
        Self { guest, sock, publish, dont_fragment: false, queued: false, peers: HashMap::new(), used: now }
    }

    /// The last time that anything happened.
    pub(crate) fn used(&self) -> Instant {
        self.used
    }

    pub(crate) fn peer(&self, seen: SocketAddrV4) -> Option<&Peer> {
        self.peers.get(&seen)
    }

    #[cfg(test)]
    pub(crate) fn peers(&self) -> usize {
        self.peers.len()
    }

    /// The guest sends to `seen`, which is `real` on the host's side.
    pub(crate) fn sent(&mut self, seen: SocketAddrV4, real: SocketAddrV4, quote: [u8; QUOTE], now: Instant) {
        self.used = now;
        if let Some(peer) = self.peers.get_mut(&seen) {
            peer.used = now;
            peer.quote = Some(quote);
            peer.answered |= self.publish.is_some();
            return;
        }
        let peer = Peer { real, local: None, quote: Some(quote), used: now, answered: false };
        self.insert(seen, peer);
    }

    /// Where the guest sees the sender of a datagram from `real`; nothing when nobody asked it.
    pub(crate) fn received(
        &mut self,
        real: SocketAddrV4,
        gateway: Ipv4Addr,
        now: Instant,
    ) -> Option<SocketAddrV4> {
        let seen = as_seen(real, gateway);
        let peer = self.peers.get_mut(&seen).filter(|peer| peer.real == real)?;
        (peer.used, peer.answered, self.used) = (now, true, now);
        Some(seen)
    }

    /// Where the guest sees the client `real` of a published port, who sent to the host's address `local`.
    pub(crate) fn admit(
        &mut self,
        real: SocketAddrV4,
        local: Option<Ipv4Addr>,
        gateway: Ipv4Addr,
        now: Instant,
    ) -> SocketAddrV4 {
        self.used = now;
        let known = self.peers.iter_mut().find(|(_, peer)| peer.real == real);
        if let Some((seen, peer)) = known {
            (peer.used, peer.local) = (now, local);
            return *seen;
        }
        let mut seen = as_seen(real, gateway);
        if *seen.ip() == gateway {
            // The gateway's own services must not seem to speak; and each client needs a port of its own.
            let own = (seen.port() >= 1024).then_some(seen.port());
            let free = |port: &u16| !self.peers.contains_key(&SocketAddrV4::new(gateway, *port));
            let port = own.into_iter().chain(1024..=u16::MAX).find(free).unwrap_or(u16::MAX);
            seen.set_port(port);
        }
        self.insert(seen, Peer { real, local, quote: None, used: now, answered: false });
        seen
    }

    /// The peer that an error about a datagram to `real` concerns.
    pub(crate) fn by_real(&self, real: SocketAddrV4, gateway: Ipv4Addr) -> Option<&Peer> {
        let direct = self.peers.get(&as_seen(real, gateway)).filter(|peer| peer.real == real);
        direct.or_else(|| self.peers.values().find(|peer| peer.real == real))
    }

    /// Another guest is meant from now on: what was said to the old one does not concern it.
    pub(crate) fn redirect(&mut self, guest: SocketAddrV4) {
        if self.guest != guest {
            self.guest = guest;
            self.peers.clear();
        }
    }

    /// Forgets peers whose time has come. Says when the next one's will; `None` when there is none left.
    pub(crate) fn expire(&mut self, idle: Duration, now: Instant) -> Option<Instant> {
        self.peers.retain(|seen, peer| peer.used + lifetime(seen.port(), peer, idle) > now);
        self.peers.iter().map(|(seen, peer)| peer.used + lifetime(seen.port(), peer, idle)).min()
    }

    fn insert(&mut self, seen: SocketAddrV4, peer: Peer) {
        if self.peers.len() >= MAX_PEERS {
            let oldest = self.peers.iter().min_by_key(|(_, peer)| peer.used).map(|(seen, _)| *seen);
            oldest.and_then(|seen| self.peers.remove(&seen));
        }
        self.peers.insert(seen, peer);
    }
}

/// Where a guest sees an address of the host's side.
pub(crate) fn as_seen(real: SocketAddrV4, gateway: Ipv4Addr) -> SocketAddrV4 {
    if real.ip().is_loopback() { SocketAddrV4::new(gateway, real.port()) } else { real }
}

fn lifetime(port: u16, peer: &Peer, idle: Duration) -> Duration {
    match (peer.answered, port) {
        (false, _) => UNREPLIED.min(idle),
        (true, 53 | 123) => ONE_SHOT.min(idle),
        (true, _) => idle,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);
    const IDLE: Duration = Duration::from_secs(180);

    fn at(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    fn endpoint(now: Instant) -> Endpoint {
        Endpoint::new(at("192.168.122.2:4000"), SockId(7), None, now)
    }

    fn ask(endpoint: &mut Endpoint, peer: &str, now: Instant) {
        endpoint.sent(as_seen(at(peer), GATEWAY), at(peer), [0; QUOTE], now);
    }

    #[test]
    fn only_the_address_and_port_that_was_asked_may_answer() {
        let now = Instant::now();
        let mut endpoint = endpoint(now);
        ask(&mut endpoint, "10.0.0.1:700", now);
        assert_eq!(endpoint.received(at("10.0.0.1:700"), GATEWAY, now), Some(at("10.0.0.1:700")));
        assert_eq!(endpoint.received(at("10.0.0.1:701"), GATEWAY, now), None);
        assert_eq!(endpoint.received(at("10.0.0.2:700"), GATEWAY, now), None);
    }

    #[test]
    fn the_hosts_loopback_is_seen_at_the_gateway_and_nobody_passes_for_it() {
        let now = Instant::now();
        let mut endpoint = endpoint(now);
        ask(&mut endpoint, "127.0.0.1:700", now);
        assert_eq!(endpoint.received(at("127.0.0.1:700"), GATEWAY, now), Some(at("192.168.122.1:700")));
        assert_eq!(endpoint.received(at("127.0.0.2:700"), GATEWAY, now), None);
        assert_eq!(endpoint.received(at("192.168.122.1:700"), GATEWAY, now), None);
    }

    #[test]
    fn a_peer_lives_as_long_as_its_kind_of_talk() {
        let now = Instant::now();
        let mut endpoint = endpoint(now);
        for peer in ["10.0.0.1:700", "10.0.0.1:53", "10.0.0.1:701"] {
            ask(&mut endpoint, peer, now);
        }
        endpoint.received(at("10.0.0.1:700"), GATEWAY, now).unwrap();
        endpoint.received(at("10.0.0.1:53"), GATEWAY, now).unwrap();
        assert_eq!(endpoint.expire(IDLE, now), Some(now + ONE_SHOT));
        assert_eq!(endpoint.expire(IDLE, now + ONE_SHOT), Some(now + UNREPLIED));
        assert!(endpoint.peer(at("10.0.0.1:53")).is_none());
        assert_eq!(endpoint.expire(IDLE, now + UNREPLIED), Some(now + IDLE));
        assert_eq!(endpoint.expire(IDLE, now + IDLE), None);
    }

    #[test]
    fn clients_of_a_published_port_keep_their_address_and_loopback_ones_get_distinct_ports() {
        let now = Instant::now();
        let mut endpoint = endpoint(now);
        let mut admit = |client: &str| endpoint.admit(at(client), None, GATEWAY, now);
        assert_eq!(admit("10.0.0.9:5000"), at("10.0.0.9:5000"));
        assert_eq!(admit("127.0.0.1:5000"), at("192.168.122.1:5000"));
        assert_eq!(admit("127.0.0.2:5000"), at("192.168.122.1:1024"));
        assert_eq!(admit("127.0.0.1:53"), at("192.168.122.1:1025"));
        assert_eq!(admit("127.0.0.2:5000"), at("192.168.122.1:1024"));
        assert_eq!(endpoint.by_real(at("127.0.0.2:5000"), GATEWAY).unwrap().real, at("127.0.0.2:5000"));
        endpoint.redirect(at("192.168.122.3:4000"));
        assert_eq!(endpoint.peers(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn peers_are_bounded_and_the_last_one_asked_is_always_there(
            peers in proptest::collection::vec((any::<u32>(), any::<u16>()), 1..3000),
        ) {
            let mut now = Instant::now();
            let mut endpoint = endpoint(now);
            for (ip, port) in peers {
                let peer = SocketAddrV4::new(Ipv4Addr::from_bits(ip), port);
                endpoint.sent(as_seen(peer, GATEWAY), peer, [0; QUOTE], now);
                now += Duration::from_millis(1);
                prop_assert!(endpoint.received(peer, GATEWAY, now).is_some());
                prop_assert!(endpoint.peers() <= MAX_PEERS);
            }
        }
    }
}
