//! What a NAT network is made from: its subnet, its limits, and what it opens to the outside.
//!
//! Everything is closed by default: the host's loopback, link-local addresses, and every port from outside. A
//! [`Publish`] opens one host port, on 127.0.0.1 unless another address is asked for.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;
use std::time::Duration;

use super::subnet::{NoFreeSubnet, choose, taken_by_host};
use crate::MacAddr;

/// Smallest and largest MTU: RFC 791 §3.2 asks every host to take 576 bytes; 65520 is the largest that leaves room
/// for an Ethernet header in 64 KiB.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 576..=65_520;

/// How to make a [`Nat`](super::Nat). `Default` is libvirt's virbr0.
///
/// ```
/// use net::MacAddr;
/// use net::nat::{Nat, NatConfig, Publish, Reservation};
///
/// let mut config = NatConfig { publish: vec![Publish::tcp(0, 80)], ..NatConfig::on_free_subnet()? };
/// let (mac, addr) = (MacAddr::for_name("network", "web"), config.subnet.host(80));
/// config.reservations.push(Reservation { mac, addr, name: Some("web".to_owned()) });
/// let mut nat = Nat::new(config)?;
/// println!("port 80 of the guest is {}", nat.published()[0].1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct NatConfig {
    /// The guests' subnet; its first address is the gateway.
    pub subnet: Subnet,
    /// The gateway's Ethernet address.
    pub gateway_mac: MacAddr,
    /// Largest IP packet towards the guests, within [`MTU_RANGE`].
    pub mtu: u16,
    /// Host ports that lead to a guest.
    pub publish: Vec<Publish>,
    /// Whether the host's loopback is open at the gateway's address.
    pub host_access: bool,
    /// Resolvers to use instead of the host's.
    pub dns: Vec<SocketAddrV4>,
    /// Addresses that DHCP gives to particular machines only.
    pub reservations: Vec<Reservation>,
    /// Domain of the guests' names (DHCP option 15, DNS).
    pub domain: String,
    /// Bounds of the tables.
    pub limits: Limits,
}

impl Default for NatConfig {
    fn default() -> Self {
        Self {
            subnet: Subnet::DEFAULT,
            gateway_mac: MacAddr::for_name("default", "gateway"),
            mtu: 1500,
            publish: Vec::new(),
            host_access: false,
            dns: Vec::new(),
            reservations: Vec::new(),
            domain: "internal".to_owned(),
            limits: Limits::default(),
        }
    }
}

impl NatConfig {
    /// The default, on a subnet that nothing of this host is in the way of: libvirt's, or the next free one ([`super::choose`]).
    ///
    /// # Errors
    /// When every candidate is taken.
    pub fn on_free_subnet() -> Result<Self, NoFreeSubnet> {
        let subnet = choose(&taken_by_host())?.subnet;
        Ok(Self { subnet, ..Self::default() })
    }

    /// The gateway's IP address: the first of the subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.host(1)
    }

    pub(crate) fn check(&self) -> Result<(), NatError> {
        if !MTU_RANGE.contains(&self.mtu) {
            return Err(NatError::Mtu(self.mtu));
        }
        for publish in &self.publish {
            let outside = match publish.to {
                PublishTo::Addr(addr) if !self.subnet.is_guest(addr) => Some(addr),
                _ => None,
            };
            if let Some(addr) = outside {
                return Err(NatError::PublishTarget { publish: publish.clone(), addr, subnet: self.subnet });
            }
        }
        Ok(())
    }
}

/// Bounds of what guests can make the network hold. Each limit's overflow is refused visibly and counted.
///
/// ```
/// use std::time::Duration;
///
/// use net::nat::{Limits, NatConfig};
///
/// // A network for a machine that is not trusted with many of this host's sockets.
/// let limits = Limits { tcp_flows: 64, udp_flows: 16, ..Limits::default() };
/// let config = NatConfig { limits, ..NatConfig::default() };
/// assert_eq!(config.limits.tcp_idle, Duration::from_secs(2 * 3600), "the others stay");
/// ```
#[derive(Clone, Debug)]
pub struct Limits {
    /// TCP connections, in all states; further ones are answered with RST.
    pub tcp_flows: usize,
    /// UDP flows (one per pair of addresses).
    pub udp_flows: usize,
    /// Ping sockets (one per guest and identifier).
    pub icmp_flows: usize,
    /// Guest addresses that are remembered with their Ethernet address.
    pub neighbours: usize,
    /// A TCP connection without a segment for so long is probed, and dropped when the guest is silent.
    pub tcp_idle: Duration,
    /// A UDP flow without a datagram for so long is closed.
    pub udp_idle: Duration,
    /// Frames that one call of `recv` passes to the guest before it lets other events run.
    pub frames_per_turn: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tcp_flows: 16_384,
            udp_flows: 4096,
            icmp_flows: 256,
            neighbours: 1024,
            tcp_idle: Duration::from_secs(7200),
            udp_idle: Duration::from_secs(180),
            frames_per_turn: 256,
        }
    }
}

/// A DHCP reservation.
///
/// ```
/// use net::MacAddr;
/// use net::nat::{NatConfig, Reservation};
///
/// let mut config = NatConfig::default();
/// let mac = MacAddr::for_name("default", "db");
/// let db = Reservation { mac, addr: config.subnet.host(10), name: Some("db".to_owned()) };
/// assert_eq!(db.addr.to_string(), "192.168.122.10");
/// assert!(config.subnet.is_guest(db.addr), "neither the gateway nor the broadcast address");
/// config.reservations.push(db);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The machine.
    pub mac: MacAddr,
    /// Its address, inside the subnet.
    pub addr: Ipv4Addr,
    /// The name that DHCP and DNS give it.
    pub name: Option<String>,
}

/// An IPv4 subnet, such as 192.168.122.0/24.
///
/// ```
/// use net::nat::Subnet;
///
/// let subnet: Subnet = "10.9.0.0/24".parse()?;
/// assert_eq!(subnet.host(1).to_string(), "10.9.0.1", "the gateway");
/// assert!(subnet.is_guest([10, 9, 0, 2].into()));
/// # Ok::<(), net::nat::BadSubnet>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

/// A text that is not a subnet for guests.
///
/// ```
/// use net::nat::Subnet;
///
/// assert!("10.9.0.0/29".parse::<Subnet>().is_ok(), "5 guests");
/// let error = "10.9.0.0/30".parse::<Subnet>().unwrap_err();
/// assert!(error.to_string().starts_with("'10.9.0.0/30' is not a subnet; write"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a subnet; write an address and a prefix length from 8 to 29, such as 192.168.122.0/24")]
pub struct BadSubnet(String);

impl Subnet {
    /// 192.168.122.0/24, as libvirt's default network.
    pub const DEFAULT: Self = Self { network: Ipv4Addr::new(192, 168, 122, 0), prefix: 24 };

    /// The subnet of `prefix` bits (8 to 29) that `addr` is in.
    ///
    /// # Errors
    /// For another prefix length.
    pub fn new(addr: Ipv4Addr, prefix: u8) -> Result<Self, BadSubnet> {
        if !(8..=29).contains(&prefix) {
            return Err(BadSubnet(format!("{addr}/{prefix}")));
        }
        let subnet = Self { network: addr, prefix };
        Ok(Self { network: Ipv4Addr::from_bits(addr.to_bits() & subnet.mask().to_bits()), prefix })
    }

    /// Its first address, which names it.
    pub fn network(&self) -> Ipv4Addr {
        self.network
    }

    /// Its prefix length in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Its mask, such as 255.255.255.0.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.prefix)))
    }

    /// Its directed broadcast address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | !self.mask().to_bits())
    }

    /// Whether `addr` is in it, its network and broadcast addresses included.
    pub fn contains(&self, addr: Ipv4Addr) -> bool {
        addr.to_bits() & self.mask().to_bits() == self.network.to_bits()
    }

    /// Whether `addr` is in it and may belong to a machine, the gateway included.
    pub fn is_host(&self, addr: Ipv4Addr) -> bool {
        self.contains(addr) && addr != self.network && addr != self.broadcast()
    }

    /// Whether `addr` is in it and may belong to a guest.
    pub fn is_guest(&self, addr: Ipv4Addr) -> bool {
        self.is_host(addr) && addr != self.host(1)
    }

    /// Its `n`th address; 1 is the gateway.
    pub fn host(&self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits().wrapping_add(n))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = BadSubnet;

    fn from_str(text: &str) -> Result<Self, BadSubnet> {
        let bad = || BadSubnet(text.to_owned());
        let (addr, prefix) = text.split_once('/').ok_or_else(bad)?;
        let subnet = Self::new(addr.parse().map_err(|_| bad())?, prefix.parse().map_err(|_| bad())?);
        subnet.map_err(|_| bad())
    }
}

/// The protocol of a published port.
///
/// ```
/// use net::nat::{Publish, PublishProtocol};
///
/// let dns: Publish = "5353:53/udp".parse()?;
/// assert_eq!(dns.protocol, PublishProtocol::Udp);
/// // TCP, unless it says otherwise.
/// assert_eq!("5353:53".parse::<Publish>()?.protocol, PublishProtocol::Tcp);
/// # Ok::<(), net::nat::BadPublish>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishProtocol {
    /// `-p 8080:80`
    Tcp,
    /// `-p 5353:53/udp`
    Udp,
}

/// Which guest a published port leads to.
///
/// ```
/// use net::nat::{Nat, NatConfig, NatError, Publish, PublishTo};
///
/// let mut config = NatConfig::on_free_subnet()?;
/// let to = |addr| vec![Publish { to: PublishTo::Addr(addr), ..Publish::tcp(0, 80) }];
/// config.publish = to(config.subnet.host(5));
/// assert_eq!(Nat::new(config.clone())?.published().len(), 1);
/// // The gateway is not a guest.
/// config.publish = to(config.gateway());
/// assert!(matches!(Nat::new(config), Err(NatError::PublishTarget { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishTo {
    /// The only guest, or the first that was heard of.
    First,
    /// The machine with this Ethernet address, wherever DHCP put it.
    Mac(MacAddr),
    /// This address.
    Addr(Ipv4Addr),
}

/// A host port that leads to a port of a guest: `[addr:]host:guest[/tcp|/udp]`.
///
/// ```
/// use net::nat::Publish;
///
/// assert_eq!(Publish::tcp(8080, 80), "8080:80".parse()?);
/// assert_eq!(Publish::udp(0, 53).to_string(), "127.0.0.1:0:53/udp");
/// # Ok::<(), net::nat::BadPublish>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens: 127.0.0.1 unless asked otherwise.
    pub addr: Ipv4Addr,
    /// The port on the host; 0 lets the host choose.
    pub host_port: u16,
    /// The port of the guest.
    pub guest_port: u16,
    /// TCP unless `/udp` is written.
    pub protocol: PublishProtocol,
    /// The guest; a parsed text means the first one.
    pub to: PublishTo,
}

impl Publish {
    /// TCP port `guest_port` of the first guest, at `host_port` of 127.0.0.1; 0 lets the host choose.
    pub fn tcp(host_port: u16, guest_port: u16) -> Self {
        let (addr, protocol) = (Ipv4Addr::LOCALHOST, PublishProtocol::Tcp);
        Self { addr, host_port, guest_port, protocol, to: PublishTo::First }
    }

    /// The same for UDP.
    pub fn udp(host_port: u16, guest_port: u16) -> Self {
        Self { protocol: PublishProtocol::Udp, ..Self::tcp(host_port, guest_port) }
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.addr, self.host_port, self.guest_port)?;
        match self.protocol {
            PublishProtocol::Tcp => Ok(()),
            PublishProtocol::Udp => f.write_str("/udp"),
        }
    }
}

/// A text that is not a published port.
///
/// ```
/// use net::nat::{BadPublish, Publish};
///
/// let refused = |text: &str| text.parse::<Publish>().unwrap_err();
/// assert!(matches!(refused("80"), BadPublish::Form(_)));
/// assert!(matches!(refused("65536:80"), BadPublish::Port { port, .. } if port == "65536"));
/// assert!(matches!(refused("::1:8080:80"), BadPublish::Form(_)), "IPv4 only");
/// let text = refused("8080:80/sctp").to_string();
/// assert_eq!(text, "'/sctp' in '8080:80/sctp' can't be published; write /tcp or /udp");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPublish {
    /// Not of the form at all.
    #[error(
        "'{0}' does not name a published port; write [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp], such as 8080:80"
    )]
    Form(String),
    /// A port that is not one.
    #[error("'{port}' in '{text}' is not a port; write a number from 1 to 65535")]
    Port {
        /// The whole text.
        text: String,
        /// The part of it.
        port: String,
    },
    /// An address that is not IPv4.
    #[error("'{addr}' in '{text}' is not an IPv4 address to listen on, such as 127.0.0.1 or 0.0.0.0")]
    Addr {
        /// The whole text.
        text: String,
        /// The part of it.
        addr: String,
    },
    /// A protocol that can't be published.
    #[error("'/{protocol}' in '{text}' can't be published; write /tcp or /udp")]
    Protocol {
        /// The whole text.
        text: String,
        /// The part of it.
        protocol: String,
    },
}

impl FromStr for Publish {
    type Err = BadPublish;

    fn from_str(text: &str) -> Result<Self, BadPublish> {
        let whole = || text.to_owned();
        let (ports, protocol) = match text.split_once('/') {
            None => (text, PublishProtocol::Tcp),
            Some((ports, "tcp")) => (ports, PublishProtocol::Tcp),
            Some((ports, "udp")) => (ports, PublishProtocol::Udp),
            Some((_, other)) => {
                return Err(BadPublish::Protocol { text: whole(), protocol: other.to_owned() });
            }
        };
        let parts: Vec<&str> = ports.split(':').collect();
        let (addr, host, guest) = match parts[..] {
            [host, guest] => (Ipv4Addr::LOCALHOST, host, guest),
            [addr, host, guest] => {
                let bad = |_| BadPublish::Addr { text: whole(), addr: addr.to_owned() };
                (addr.parse().map_err(bad)?, host, guest)
            }
            _ => return Err(BadPublish::Form(whole())),
        };
        let port = |port: &str| match port.parse::<u16>() {
            Ok(number @ 1..) => Ok(number),
            _ => Err(BadPublish::Port { text: whole(), port: port.to_owned() }),
        };
        let (host_port, guest_port) = (port(host)?, port(guest)?);
        Ok(Self { addr, host_port, guest_port, protocol, to: PublishTo::First })
    }
}

/// Why a NAT network could not be made.
///
/// ```
/// use std::net::TcpListener;
///
/// use net::nat::{Nat, NatConfig, NatError, Publish};
///
/// let somebody = TcpListener::bind("127.0.0.1:0")?;
/// let publish = vec![Publish::tcp(somebody.local_addr()?.port(), 80)];
/// let taken = Nat::new(NatConfig { publish, ..NatConfig::default() });
/// assert!(matches!(taken, Err(NatError::PortInUse { .. })));
/// // RFC 791 wants 576 bytes of everybody.
/// let small = Nat::new(NatConfig { mtu: 575, ..NatConfig::default() });
/// assert!(matches!(small, Err(NatError::Mtu(575))));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NatError {
    /// The MTU is out of range.
    #[error("an MTU of {0} bytes is not possible; choose one from 576 to 65520")]
    Mtu(u16),
    /// A published port leads out of the subnet.
    #[error("published port {publish} leads to {addr}, which is not a guest's address of {subnet}")]
    PublishTarget {
        /// The published port.
        publish: Publish,
        /// Where it leads.
        addr: Ipv4Addr,
        /// Where it should.
        subnet: Subnet,
    },
    /// Somebody listens there already.
    #[error("can't publish {publish}: port {port} is already in use on {addr}; choose another host port",
        port = publish.host_port, addr = publish.addr)]
    PortInUse {
        /// The published port.
        publish: Publish,
    },
    /// A port below `net.ipv4.ip_unprivileged_port_start`.
    #[error(
        "can't publish {publish}: port {port} is privileged on this host; choose one from 1024 up, or lower \
         sysctl net.ipv4.ip_unprivileged_port_start", port = publish.host_port
    )]
    PortPrivileged {
        /// The published port.
        publish: Publish,
    },
    /// The address to listen on is not the host's.
    #[error("can't publish {publish}: this host has no address {addr}; see `ip address`", addr = publish.addr)]
    NoSuchAddress {
        /// The published port.
        publish: Publish,
    },
    /// The host refused to listen for another reason.
    #[error("can't publish {publish}: {source}")]
    Publish {
        /// The published port.
        publish: Publish,
        /// What the host said.
        source: io::Error,
    },
    /// The host refused something that every process may have.
    #[error("can't set up the network: {what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_port_is_on_loopback_unless_asked_otherwise() {
        let publish: Publish = "8080:80".parse().unwrap();
        assert_eq!((publish.addr, publish.host_port, publish.guest_port), (Ipv4Addr::LOCALHOST, 8080, 80));
        assert_eq!(publish.protocol, PublishProtocol::Tcp);
        let publish: Publish = "0.0.0.0:5353:53/udp".parse().unwrap();
        assert_eq!(publish.addr, Ipv4Addr::UNSPECIFIED);
        assert_eq!(publish.protocol, PublishProtocol::Udp);
        assert_eq!(publish.to_string().parse(), Ok(publish));
    }

    #[test]
    fn nonsense_is_refused_by_what_is_wrong_with_it() {
        let refuse = |text: &str| text.parse::<Publish>().unwrap_err();
        assert!(matches!(refuse("8080"), BadPublish::Form(_)));
        assert!(matches!(refuse("1:2:3:4"), BadPublish::Form(_)));
        assert!(matches!(refuse("0:80"), BadPublish::Port { .. }));
        assert!(matches!(refuse("80:70000"), BadPublish::Port { .. }));
        assert!(matches!(refuse("::1:80:80"), BadPublish::Form(_)));
        assert!(matches!(refuse("localhost:80:80"), BadPublish::Addr { .. }));
        assert!(matches!(refuse("80:80/sctp"), BadPublish::Protocol { .. }));
    }

    #[test]
    fn a_subnet_knows_its_edges() {
        let subnet: Subnet = "192.168.122.77/24".parse().unwrap();
        assert_eq!(subnet.to_string(), "192.168.122.0/24");
        assert_eq!(subnet.broadcast(), Ipv4Addr::new(192, 168, 122, 255));
        assert_eq!(subnet.mask(), Ipv4Addr::new(255, 255, 255, 0));
        assert!(subnet.is_host(subnet.host(1)) && !subnet.is_guest(subnet.host(1)));
        assert!(!subnet.is_host(subnet.network()));
        assert!(!subnet.contains(Ipv4Addr::new(192, 168, 123, 1)));
        for bad in ["192.168.122.0", "10.0.0.0/30", "10.0.0.0/7", "x/24"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_published_to_an_address_outside_is_refused() {
        let mut config = NatConfig::default();
        let mut publish: Publish = "8080:80".parse().unwrap();
        publish.to = PublishTo::Addr(Ipv4Addr::new(10, 0, 0, 1));
        config.publish.push(publish);
        assert!(matches!(config.check(), Err(NatError::PublishTarget { .. })));
    }
}
