//! Which guest has which Ethernet address.
//!
//! A binding comes from a DHCP lease, or is learned from the first frame of an address that nobody has. A leased
//! address belongs to its machine alone; a learned one may move with an ARP announcement, because a machine with a
//! static address may come back with another NIC. Bounded: when the table is full, the learned binding that was
//! silent for the longest time gives way.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::MacAddr;

/// A learned binding that was silent for so long may be taken over by traffic from another machine.
const LEARNED_IDLE: Duration = Duration::from_secs(60);

/// Addresses that are asked for in one turn.
const MAX_WANTED: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Neighbour {
    mac: MacAddr,
    heard: Instant,
    leased_until: Option<Instant>,
}

/// The table. Its bound is [`Limits::neighbours`](super::Limits::neighbours).
#[derive(Debug)]
pub(crate) struct Neighbours {
    by_addr: HashMap<Ipv4Addr, Neighbour>,
    limit: usize,
    first: Option<Ipv4Addr>,
    version: u64,
    wanted: Vec<Ipv4Addr>,
}

impl Neighbours {
    pub(crate) fn new(limit: usize) -> Self {
        Self { by_addr: HashMap::new(), limit, first: None, version: 0, wanted: Vec::new() }
    }

    /// The Ethernet address of a guest.
    pub(crate) fn mac_of(&self, addr: Ipv4Addr) -> Option<MacAddr> {
        self.by_addr.get(&addr).map(|n| n.mac)
    }

    /// The address of the machine with this Ethernet address that was heard last.
    pub(crate) fn addr_of(&self, mac: MacAddr) -> Option<Ipv4Addr> {
        self.by_addr.iter().filter(|(_, n)| n.mac == mac).max_by_key(|(_, n)| n.heard).map(|(addr, _)| *addr)
    }

    /// The guest that a port published without a name leads to.
    pub(crate) fn first(&self) -> Option<Ipv4Addr> {
        self.first
    }

    /// Somebody has something to send to `addr`, which nobody has: ARP is to ask for it.
    pub(crate) fn want(&mut self, addr: Ipv4Addr) {
        if self.wanted.len() < MAX_WANTED && !self.wanted.contains(&addr) {
            self.wanted.push(addr);
        }
    }

    /// The addresses to ask for.
    pub(crate) fn take_wanted(&mut self) -> Vec<Ipv4Addr> {
        std::mem::take(&mut self.wanted)
    }

    /// Changes whenever a binding appears or moves.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// A packet from `addr` came from `mac`: whether it may. Learns the binding if nobody has the address.
    pub(crate) fn check(&mut self, addr: Ipv4Addr, mac: MacAddr, now: Instant) -> bool {
        if let Some(n) = self.by_addr.get_mut(&addr) {
            if n.mac == mac {
                n.heard = now;
                return true;
            }
            let held = n.leased_until.is_some_and(|until| now < until) || now - n.heard < LEARNED_IDLE;
            if held {
                return false;
            }
        }
        self.bind(addr, mac, now, None)
    }

    /// An ARP announcement of `addr` by `mac`: moves a binding that no lease holds. Says whether it holds now.
    pub(crate) fn announce(&mut self, addr: Ipv4Addr, mac: MacAddr, now: Instant) -> bool {
        match self.by_addr.get(&addr) {
            Some(n) if n.mac != mac && n.leased_until.is_some_and(|until| now < until) => false,
            Some(n) => {
                let leased = n.leased_until.filter(|_| n.mac == mac);
                self.bind(addr, mac, now, leased)
            }
            None => self.bind(addr, mac, now, None),
        }
    }

    /// DHCP gave `addr` to `mac` until `until`.
    pub(crate) fn lease(&mut self, addr: Ipv4Addr, mac: MacAddr, now: Instant, until: Instant) {
        self.bind(addr, mac, now, Some(until));
    }

    /// The lease ended: the address is free.
    pub(crate) fn release(&mut self, addr: Ipv4Addr) {
        self.by_addr.remove(&addr);
        if self.first == Some(addr) {
            self.first = self.by_addr.keys().next().copied();
        }
    }

    /// All bindings.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Ipv4Addr, MacAddr)> + '_ {
        self.by_addr.iter().map(|(addr, n)| (*addr, n.mac))
    }

    fn bind(&mut self, addr: Ipv4Addr, mac: MacAddr, now: Instant, leased_until: Option<Instant>) -> bool {
        if !self.by_addr.contains_key(&addr) && self.by_addr.len() >= self.limit {
            let idle = |n: &Neighbour| n.leased_until.is_none_or(|until| until <= now);
            let oldest = self.by_addr.iter().filter(|(_, n)| idle(n)).min_by_key(|(_, n)| n.heard);
            match oldest.map(|(addr, _)| *addr) {
                Some(addr) => self.release(addr),
                None => return false,
            }
        }
        let old = self.by_addr.insert(addr, Neighbour { mac, heard: now, leased_until });
        if old.is_none_or(|n| n.mac != mac) {
            self.version += 1;
        }
        self.first.get_or_insert(addr);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
    const ADDR: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 2);

    #[test]
    fn a_leased_address_belongs_to_its_machine_until_the_lease_ends() {
        let now = Instant::now();
        let mut table = Neighbours::new(8);
        table.lease(ADDR, A, now, now + Duration::from_secs(3600));
        assert!(table.check(ADDR, A, now));
        assert!(!table.check(ADDR, B, now) && !table.announce(ADDR, B, now));
        assert!(table.check(ADDR, B, now + Duration::from_secs(3600)));
    }

    #[test]
    fn a_learned_address_moves_with_an_announcement_but_not_with_traffic() {
        let now = Instant::now();
        let mut table = Neighbours::new(8);
        assert!(table.check(ADDR, A, now));
        assert!(!table.check(ADDR, B, now));
        assert!(table.announce(ADDR, B, now));
        assert_eq!(table.mac_of(ADDR), Some(B));
        assert!(table.check(ADDR, A, now + LEARNED_IDLE));
    }

    #[test]
    fn a_full_table_forgets_the_most_silent_and_never_a_lease() {
        let now = Instant::now();
        let mut table = Neighbours::new(2);
        let addr = |n| Ipv4Addr::new(192, 168, 122, n);
        table.lease(addr(2), A, now, now + Duration::from_secs(10));
        assert!(table.check(addr(3), A, now) && table.check(addr(4), A, now + Duration::from_secs(1)));
        assert_eq!((table.mac_of(addr(2)), table.mac_of(addr(3))), (Some(A), None));
        assert_eq!(table.first(), Some(addr(2)));
    }
}
