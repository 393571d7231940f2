//! Which client has which address: leases, offers, and addresses that nobody may have for a while.
//!
//! The table has one entry per address of the pool that was ever given away, so it is bounded by the subnet. An
//! address is in one of these states:
//!
//! | state | entered by | left by |
//! |---|---|---|
//! | (no entry) | | an offer |
//! | `Offered` | DISCOVER | REQUEST → `Bound`; after [`OFFER_HOLD`], or another server's offer was taken → `Free` |
//! | `Bound` | REQUEST | RELEASE, or the lease ran out → `Free`; DECLINE → `Declined` |
//! | `Free` | | the same client comes back, or another gets it when nothing fresher is left |
//! | `Declined` | DECLINE | after [`QUARANTINE`], like `Free` |
//!
//! **Who is who.** A client is its Ethernet address, which it cannot choose freely (what it sends comes from there),
//! and behind that its option 61, if it sends one. So machines cloned with the same identifier are still two, and two
//! identifiers behind one Ethernet address (ipvlan) are two clients; RFC 2131 §4.2 would merge the former. `01` +
//! Ethernet address says nothing new. A machine whose first DHCP client (an initramfs, a boot loader) sends no
//! identifier and whose second one does is one machine. [`MAX_PER_MAC`] clients per Ethernet address have addresses
//! at a time, so no machine empties the pool alone.
//!
//! **Which address.** The reservation; else what the client has; else what it asks for, if that is free; else a place
//! that its Ethernet address chooses by hash, so that a machine finds its address again after a restart of the
//! network without anything written to disk; from there on the next address that nobody remembers; at last the one
//! that has been free for the longest time. None: the pool is exhausted.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::MacAddr;

/// How long an offered address waits for its REQUEST. Short, so that a flood of DISCOVERs holds the pool for
/// seconds only; clients answer an offer within milliseconds.
pub(crate) const OFFER_HOLD: Duration = Duration::from_secs(10);
/// How long an address that somebody else turned out to use is given to nobody.
pub(crate) const QUARANTINE: Duration = Duration::from_secs(600);
/// Addresses that one Ethernet address may hold, by sending different identifiers.
pub(crate) const MAX_PER_MAC: usize = 16;
/// Bytes of a client identifier that are kept; longer ones are told apart by these and their length.
const MAX_CLIENT_ID: usize = 64;

/// Who a client is. See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Client {
    mac: MacAddr,
    /// Option 61 when it says more than the Ethernet address, cut to [`MAX_CLIENT_ID`] bytes, and its full length.
    id: Option<(Vec<u8>, usize)>,
}

impl Client {
    pub(crate) fn new(mac: MacAddr, id: Option<&[u8]>) -> Self {
        let id = id
            .filter(|id| id.split_first().is_none_or(|(kind, rest)| *kind != 1 || rest != mac.octets()))
            .map(|id| (id[..id.len().min(MAX_CLIENT_ID)].to_vec(), id.len()));
        Self { mac, id }
    }

    pub(crate) fn mac(&self) -> MacAddr {
        self.mac
    }

    fn is(&self, other: &Self) -> bool {
        let same_id = self.id.is_none() || other.id.is_none() || self.id == other.id;
        self.mac == other.mac && same_id
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Offered { until: Instant },
    Bound { until: Instant },
    Free { since: Instant },
    Declined { until: Instant },
}

impl State {
    fn is_held(self) -> bool {
        matches!(self, Self::Offered { .. } | Self::Bound { .. })
    }
}

#[derive(Clone, Debug)]
struct Entry {
    client: Client,
    state: State,
    name: Option<String>,
}

/// A lease that holds.
///
/// ```
/// use std::time::Instant;
///
/// use net::nat::Lease;
///
/// /// A line of a listing.
/// fn line(lease: &Lease, now: Instant) -> String {
///     let left = lease.until.saturating_duration_since(now).as_secs();
///     format!("{} {} {} {left} s", lease.address, lease.mac, lease.name.as_deref().unwrap_or("-"))
/// }
/// # use net::MacAddr;
/// # let now = Instant::now();
/// # let mac = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
/// let until = now + std::time::Duration::from_secs(3600);
/// let lease = Lease { address: [192, 168, 122, 2].into(), mac, name: None, until };
/// assert_eq!(line(&lease, now), "192.168.122.2 52:54:00:01:02:03 - 3600 s");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The guest's Ethernet address.
    pub mac: MacAddr,
    /// Its name, if it has a usable one: a lower-case RFC 1123 label.
    pub name: Option<String>,
    /// When it ends.
    pub until: Instant,
}

/// The addresses and who has them.
#[derive(Debug)]
pub(crate) struct Pool {
    first: Ipv4Addr,
    last: Ipv4Addr,
    reserved: BTreeMap<MacAddr, Ipv4Addr>,
    entries: BTreeMap<Ipv4Addr, Entry>,
}

impl Pool {
    /// The addresses from `first` to `last`, some of them for certain machines only.
    pub(crate) fn new(first: Ipv4Addr, last: Ipv4Addr, reserved: BTreeMap<MacAddr, Ipv4Addr>) -> Self {
        Self { first, last, reserved, entries: BTreeMap::new() }
    }

    /// The address for a client that asks for `wanted` or for any, held for it from now on. None: exhausted.
    pub(crate) fn offer(
        &mut self,
        client: &Client,
        wanted: Option<Ipv4Addr>,
        now: Instant,
    ) -> Option<Ipv4Addr> {
        self.settle(now);
        let address = self.choose(client, wanted)?;
        match self.entries.get_mut(&address) {
            // A bound client may ask again (it rebooted); its lease goes on.
            Some(Entry { state: State::Bound { .. }, .. }) => {}
            _ => self.put(address, client, State::Offered { until: now + OFFER_HOLD }),
        }
        Some(address)
    }

    /// Gives `address` to the client for `lease`, if it may have it.
    pub(crate) fn bind(&mut self, client: &Client, address: Ipv4Addr, lease: Duration, now: Instant) -> bool {
        self.settle(now);
        if !self.may_have(client, address) {
            return false;
        }
        // A client has one address: an older one, or another offer, is free now.
        let theirs = self.held_by(client);
        for other in theirs.into_iter().filter(|other| *other != address) {
            self.free(other, now);
        }
        self.put(address, client, State::Bound { until: now + lease });
        true
    }

    /// The client gives `address` back. Says whether it had it.
    pub(crate) fn release(&mut self, client: &Client, address: Ipv4Addr, now: Instant) -> bool {
        let had = self.holds(client, address);
        if had {
            self.free(address, now);
        }
        had
    }

    /// The client took another server's offer: ours is free.
    pub(crate) fn withdraw(&mut self, client: &Client, now: Instant) {
        let offered = |e: &Entry| e.client.is(client) && matches!(e.state, State::Offered { .. });
        let theirs: Vec<_> = self.entries.iter().filter(|(_, e)| offered(e)).map(|(a, _)| *a).collect();
        theirs.into_iter().for_each(|address| self.free(address, now));
    }

    /// The client found `address` in use by somebody else. Says whether it was the client's to decline.
    pub(crate) fn decline(&mut self, client: &Client, address: Ipv4Addr, now: Instant) -> bool {
        let had = self.holds(client, address);
        if had && let Some(entry) = self.entries.get_mut(&address) {
            entry.state = State::Declined { until: now + QUARANTINE };
            entry.name = None;
        }
        had
    }

    /// The machine was unplugged: its addresses are free, and remembered for its return.
    pub(crate) fn unplug(&mut self, mac: MacAddr, now: Instant) {
        let held = |e: &Entry| e.client.mac == mac && !matches!(e.state, State::Declined { .. });
        let theirs: Vec<_> = self.entries.iter().filter(|(_, e)| held(e)).map(|(a, _)| *a).collect();
        theirs.into_iter().for_each(|address| self.free(address, now));
    }

    /// Names the client that has `address`. A name that another lease has is not given twice.
    pub(crate) fn name(&mut self, address: Ipv4Addr, name: Option<String>) {
        let taken = |e: &Entry| matches!(e.state, State::Bound { .. }) && e.name == name;
        let name = if self.entries.iter().any(|(a, e)| *a != address && taken(e)) { None } else { name };
        if let Some(entry) = self.entries.get_mut(&address) {
            entry.name = name;
        }
    }

    /// The leases that hold, in the order of their addresses.
    pub(crate) fn leases(&self, now: Instant) -> impl Iterator<Item = Lease> + '_ {
        self.entries.iter().filter_map(move |(address, entry)| match entry.state {
            State::Bound { until } if until > now => {
                Some(Lease { address: *address, mac: entry.client.mac, name: entry.name.clone(), until })
            }
            _ => None,
        })
    }

    /// Entries in the table, whatever their state.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Moves what has run out to `Free`.
    fn settle(&mut self, now: Instant) {
        for entry in self.entries.values_mut() {
            match entry.state {
                State::Offered { until } | State::Bound { until } | State::Declined { until }
                    if until <= now =>
                {
                    entry.state = State::Free { since: until };
                    entry.name = None;
                }
                _ => {}
            }
        }
    }

    fn choose(&self, client: &Client, wanted: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        let may = |address: &Ipv4Addr| self.may_have(client, *address);
        if let Some(reserved) = self.reserved.get(&client.mac).filter(|a| may(a)) {
            return Some(*reserved);
        }
        // Its own, the livelier state first; then what it asks for.
        let own = self.entries.iter().filter(|(a, e)| e.client.is(client) && may(a));
        let rank = |state: &State| match state {
            State::Bound { .. } => 0,
            State::Offered { .. } => 1,
            State::Free { .. } | State::Declined { .. } => 2,
        };
        let own = own.min_by_key(|(_, e)| rank(&e.state));
        if let Some((address, entry)) = own
            && (rank(&entry.state) == 0 || wanted.is_none_or(|w| !may(&w)))
        {
            return Some(*address);
        }
        let theirs = self.entries.values().filter(|e| e.client.mac == client.mac && e.state.is_held());
        if theirs.count() >= MAX_PER_MAC {
            return None;
        }
        wanted.filter(may).or_else(|| self.fresh(client.mac)).or_else(|| self.stalest(client))
    }

    /// The first address that nobody remembers, from the one that the hash of `mac` chooses.
    fn fresh(&self, mac: MacAddr) -> Option<Ipv4Addr> {
        let size = self.last.to_bits().checked_sub(self.first.to_bits())?.checked_add(1)?;
        let hash =
            mac.octets().iter().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193));
        let start = (hash ^ (hash >> 16)) % size;
        (0..size)
            .map(|n| Ipv4Addr::from_bits(self.first.to_bits() + (start + n) % size))
            .find(|a| !self.entries.contains_key(a) && self.reserved.values().all(|r| r != a))
    }

    fn stalest(&self, client: &Client) -> Option<Ipv4Addr> {
        let free = self.entries.iter().filter_map(|(address, entry)| match entry.state {
            State::Free { since } if self.may_have(client, *address) => Some((since, *address)),
            _ => None,
        });
        free.min().map(|(_, address)| address)
    }

    /// Whether the client may have `address`: in the pool, and neither reserved for, nor held by, somebody else.
    fn may_have(&self, client: &Client, address: Ipv4Addr) -> bool {
        let reserved = self.reserved.iter().find(|(_, a)| **a == address).map(|(mac, _)| *mac);
        let in_pool = (self.first..=self.last).contains(&address);
        let free = self.entries.get(&address).is_none_or(|entry| match entry.state {
            State::Free { .. } => true,
            State::Offered { .. } | State::Bound { .. } => entry.client.is(client),
            State::Declined { .. } => false,
        });
        free && reserved.map_or(in_pool, |mac| mac == client.mac)
    }

    fn holds(&self, client: &Client, address: Ipv4Addr) -> bool {
        self.entries.get(&address).is_some_and(|entry| entry.client.is(client) && entry.state.is_held())
    }

    fn held_by(&self, client: &Client) -> Vec<Ipv4Addr> {
        self.entries.keys().copied().filter(|address| self.holds(client, *address)).collect()
    }

    fn free(&mut self, address: Ipv4Addr, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&address) {
            entry.state = State::Free { since: now };
            entry.name = None;
        }
    }

    fn put(&mut self, address: Ipv4Addr, client: &Client, state: State) {
        let (mut client, mut name) = (client.clone(), None);
        if let Some(old) = self.entries.remove(&address).filter(|old| old.client.is(&client)) {
            // Once known, an identifier stays: else a third client could pass for the same machine.
            client.id = client.id.or(old.client.id);
            name = old.name;
        }
        self.entries.insert(address, Entry { client, state, name });
    }
}
