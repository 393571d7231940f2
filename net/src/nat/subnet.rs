//! The NAT's subnet: what it is, and which one is free on this host.
//!
//! The default is 192.168.122.0/24 because that is what a virbr0 guest expects; the gateway is its first address,
//! guests get the second to the last but one. A host may have a route there already: libvirt is installed, or the
//! host is itself a guest of such a network. A guest could then not reach that part of the host's world, and
//! addresses would be ambiguous in every log. So [`choose`] takes the next free 192.168.N.0/24 (N from 123 up to
//! 254, then 2 to 121), and after those 10.122.N.0/24, for hosts whose VPN routes all of 192.168.0.0/16.
//!
//! Taken is what overlaps a route, refused ones included, or one of the host's own addresses: the kernel prints both, of all
//! its tables, in `/proc/net/fib_trie`. A route shorter than /8 counts as a default route: a VPN's 0.0.0.0/1 covers
//! everything and says nothing.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::path::Path;

use super::config::{NatConfig, Subnet};

/// Routes that are shorter than this are default routes for our purpose.
const SHORTEST_SPECIFIC_ROUTE: u8 = 8;
/// The kernel's names for kinds of routes whose destination can't be another network. The others are the broadcast addresses of
/// these, and jumps to other tables.
const TAKING: [&str; 5] = ["UNICAST", "LOCAL", "BLACKHOLE", "UNREACHABLE", "PROHIBIT"];
/// Lines of the kernel's tables that are looked at; a host with a full routing table has a million.
const MAX_LINES: usize = 100_000;
/// As many bytes of them: no line is longer than 150.
const MAX_BYTES: u64 = 150 * MAX_LINES as u64;
/// Room that most hosts' tables fit into at once.
const TABLE: usize = 8 << 10;

/// No candidate is free.
///
/// ```
/// use net::nat::{NoFreeSubnet, Taken, choose};
///
/// let lan = Taken::new([192, 168, 0, 0].into(), 16);
/// assert!(choose(&[lan]).is_ok(), "10.122.0.0/24 is left");
/// let vpn = Taken::new([10, 0, 0, 0].into(), 8);
/// assert_eq!(choose(&[lan, vpn]), Err(NoFreeSubnet));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this host routes every candidate from 192.168.0.0/16 and 10.122.0.0/16; choose one with --subnet")]
pub struct NoFreeSubnet;

/// The subnet that was chosen.
///
/// ```
/// use net::nat::{Taken, choose};
///
/// assert_eq!(choose(&[])?.conflict, None, "the default is free");
/// let virbr0 = Taken::new([192, 168, 122, 0].into(), 24);
/// let choice = choose(&[virbr0])?;
/// assert_eq!(choice.subnet.to_string(), "192.168.123.0/24");
/// assert_eq!(choice.conflict, Some(virbr0), "the reason, for a note to the user");
/// # Ok::<(), net::nat::NoFreeSubnet>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Where the guests will live.
    pub subnet: Subnet,
    /// What of the host's stood in the default's way, when it is not the default.
    pub conflict: Option<Taken>,
}

/// A destination that the host already has: a route's, or one of its own addresses (/32).
///
/// ```
/// use net::nat::{Subnet, Taken, choose};
///
/// assert_eq!(Taken::new([192, 168, 122, 7].into(), 24).to_string(), "192.168.122.0/24");
/// // One address of the default is enough to avoid it; a default route takes nothing.
/// let (own, default) = (Taken::new([192, 168, 122, 7].into(), 32), Taken::new([0, 0, 0, 0].into(), 0));
/// assert_ne!(choose(&[own])?.subnet, Subnet::DEFAULT);
/// assert_eq!(choose(&[default])?.subnet, Subnet::DEFAULT);
/// # Ok::<(), net::nat::NoFreeSubnet>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    network: Ipv4Addr,
    prefix: u8,
}

impl Taken {
    /// The destination that `address` with `prefix` (at most 32) stands for.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self { network: Ipv4Addr::from_bits(address.to_bits() & mask(prefix)), prefix }
    }

    /// Whether an address of `subnet` would be meant for this destination. A default route takes nothing.
    fn overlaps(self, subnet: Subnet) -> bool {
        let common = mask(self.prefix.min(subnet.prefix()));
        self.prefix >= SHORTEST_SPECIFIC_ROUTE
            && (self.network.to_bits() ^ subnet.network().to_bits()) & common == 0
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

/// Chooses the default or the next subnet that nothing of `taken` overlaps.
///
/// # Errors
/// When every candidate is taken.
pub fn choose(taken: &[Taken]) -> Result<Choice, NoFreeSubnet> {
    let conflict = |candidate: Subnet| taken.iter().copied().find(|t| t.overlaps(candidate));
    let default = NatConfig::default().subnet;
    let Some(first) = conflict(default) else {
        return Ok(Choice { subnet: default, conflict: None });
    };
    let near = (123..=254).chain(2..=121).map(|n| Ipv4Addr::new(192, 168, n, 0));
    let far = (0..=255).map(|n| Ipv4Addr::new(10, 122, n, 0));
    near.chain(far)
        .filter_map(|network| Subnet::new(network, 24).ok())
        .find(|candidate| conflict(*candidate).is_none())
        .map(|subnet| Choice { subnet, conflict: Some(first) })
        .ok_or(NoFreeSubnet)
}

/// Reads what this host routes. A table that cannot be read (no `/proc`) is taken as empty: the default subnet is
/// right on most machines, and a sandboxed caller has no better answer.
pub fn taken_by_host() -> Vec<Taken> {
    taken_under(Path::new("/proc/net"))
}

fn taken_under(proc_net: &Path) -> Vec<Taken> {
    // Files of /proc do not tell their size: with room from the start, there are not ten small reads of it.
    let mut text = Vec::with_capacity(TABLE);
    if let Ok(file) = File::open(proc_net.join("fib_trie")) {
        let _ = file.take(MAX_BYTES).read_to_end(&mut text);
    }
    parse_trie(&String::from_utf8_lossy(&text))
}

/// The routes and the host's own addresses in the format of `/proc/net/fib_trie`: the line `|-- a.b.c.d` names a leaf, and each
/// line `/prefix scope TYPE` behind it a route to it. Tables that the kernel has merged come twice.
fn parse_trie(text: &str) -> Vec<Taken> {
    let mut leaf = None;
    let mut found = Vec::new();
    for line in text.lines().take(MAX_LINES).map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse::<Ipv4Addr>().ok();
        } else if let Some(route) = line.strip_prefix('/')
            && let Some(address) = leaf
            && !address.is_loopback()
            && let [prefix, _scope, kind, ..] = *route.split_ascii_whitespace().collect::<Vec<_>>()
            && TAKING.contains(&kind)
            && let Ok(prefix) = prefix.parse()
        {
            found.push(Taken::new(address, prefix));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TRIE: &str = "Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
        /1 universe UNICAST
     +-- 10.1.0.0/16 2 0 2
        |-- 10.1.0.0
           /16 universe UNREACHABLE
        |-- 10.2.0.0
           /16 universe THROW
     +-- 192.168.122.0/24 2 0 2
        |-- 192.168.122.0
           /24 link UNICAST
Local:
  +-- 0.0.0.0/0 3 0 5
        +-- 127.0.0.0/8 2 0 2
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
     +-- 192.168.124.0/24 2 0 2
        |-- 192.168.124.7
           /32 host LOCAL
        |-- 192.168.124.255
           /32 link BROADCAST
";

    fn net(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    fn taken(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Taken {
        Taken::new(Ipv4Addr::new(a, b, c, d), prefix)
    }

    #[test]
    fn a_host_without_conflict_gets_the_default() {
        let choice = choose(&[taken(0, 0, 0, 0, 0), taken(10, 0, 0, 0, 24)]).unwrap();
        assert_eq!(choice, Choice { subnet: net("192.168.122.0/24"), conflict: None });
    }

    #[test]
    fn a_host_with_virbr0_and_an_address_in_the_next_gets_the_one_behind() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("fib_trie"), TRIE).unwrap();
        let mut all = taken_under(dir.path());
        let expected = [
            taken(0, 0, 0, 0, 0),
            taken(0, 0, 0, 0, 1),
            taken(10, 1, 0, 0, 16),
            taken(192, 168, 122, 0, 24),
            taken(192, 168, 124, 7, 32),
        ];
        assert_eq!(all, expected);
        let choice = choose(&all).unwrap();
        assert_eq!(choice.subnet, net("192.168.123.0/24"));
        assert_eq!(choice.conflict.unwrap().to_string(), "192.168.122.0/24");
        all.push(taken(192, 168, 123, 0, 24));
        assert_eq!(choose(&all).unwrap().subnet, net("192.168.125.0/24"));
    }

    #[test]
    fn a_vpn_over_all_of_192_168_moves_the_guests_to_10_122() {
        let vpn = taken(192, 168, 0, 0, 16);
        assert_eq!(choose(&[vpn]).unwrap().subnet, net("10.122.0.0/24"));
        assert_eq!(choose(&[vpn, taken(10, 0, 0, 0, 8)]), Err(NoFreeSubnet));
    }

    #[test]
    fn a_vpns_half_of_the_world_is_a_default_route() {
        let halves = [taken(0, 0, 0, 0, 1), taken(128, 0, 0, 0, 1)];
        assert_eq!(choose(&halves).unwrap().subnet, net("192.168.122.0/24"));
    }

    #[test]
    fn this_hosts_own_tables_are_understood() {
        // Every Linux has its loopback route or address somewhere; what matters is that nothing of it is misread.
        assert!(taken_by_host().iter().all(|t| t.prefix <= 32 && !t.network.is_loopback()));
    }

    proptest! {
        #[test]
        fn any_table_is_read_without_a_panic(text in "(?s)(.{0,99}|[|]-- [0-9.]{0,20}\\n|/[0-9]{0,4} link UNICAST\\n){0,9}") {
            parse_trie(&text);
        }

        #[test]
        fn a_choice_never_overlaps_what_is_taken(
            taken in proptest::collection::vec((any::<u32>(), 0u8..=32), 0..40),
        ) {
            let taken: Vec<_> = taken.into_iter()
                .map(|(bits, prefix)| Taken::new(Ipv4Addr::from_bits(bits | 0xc0a8_0000), prefix))
                .collect();
            if let Ok(choice) = choose(&taken) {
                let (first, last) = (choice.subnet.network().to_bits(), choice.subnet.broadcast().to_bits());
                for t in taken.iter().filter(|t| t.prefix >= SHORTEST_SPECIFIC_ROUTE) {
                    let (from, to) = (t.network.to_bits(), t.network.to_bits() | !mask(t.prefix));
                    prop_assert!(to < first || last < from, "{} overlaps {}", t, choice.subnet);
                }
            }
        }
    }
}
