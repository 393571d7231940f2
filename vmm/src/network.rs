//! Networks that several machines of one process share.
//!
//! A [`Network`] is made once; [`Network::nic`] gives a machine an interface on it. Behind it is one virtual switch
//! ([`net::switch`]) whose way out, if it has one, is one NAT ([`net::nat`]): the machines see each other, share the gateway's
//! DHCP and DNS, find each other by name, and reach the world through the host's sockets. Machines may start and end in any
//! order; the network lives as long as a handle to it or one of its interfaces does.
//!
//! A machine that shares its network with nobody needs no switch: [`Network::private`]. And whatever is a [`FramePort`], such as a
//! [`TapPort`](net::tap::TapPort) on a bridge, goes into a [`Nic`] as it is.
//!
//! ```no_run
//! use net::nat::NatConfig;
//! use vmm::machine::Machine;
//! use vmm::network::Network;
//!
//! let network = Network::nat(NatConfig::default())?;
//! let machine = |name| -> Result<_, Box<dyn std::error::Error>> {
//!     Ok(Machine::builder().kernel("vmlinuz").initrd("initrd").nic(network.nic(name)?).build()?.start()?)
//! };
//! let (first, second) = (machine("vm1")?, machine("vm2")?);
//! println!("{} {}", first.wait(), second.wait());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use net::nat::{ConnectError, Lease, Nat, NatConfig, NatError, NatHandle, Publish, Subnet};
use net::switch::{PlugError, Switch};
use net::{FramePort, MacAddr};

use crate::machine::Nic;

/// Why there is no network, or no interface on it.
///
/// ```
/// use net::nat::{NatConfig, NatError, Publish};
/// use vmm::network::{Network, NetworkError};
///
/// let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let publish = vec![Publish::tcp(taken.local_addr()?.port(), 80)];
/// let refused = Network::nat(NatConfig { publish, ..NatConfig::default() }).err().expect("the port is in use");
/// assert!(matches!(refused, NetworkError::Nat(NatError::PortInUse { .. })));
/// println!("{refused}"); // says which port, and what to do
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The NAT.
    #[error(transparent)]
    Nat(#[from] NatError),
    /// The switch.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// A stream into a guest.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The network is one machine's.
    #[error("this network belongs to one machine; make it with Network::nat for several")]
    Private,
    /// The network has no NAT, and so no way from this host into it.
    #[error("this network is isolated: this host has no part in it; make it with Network::nat")]
    Isolated,
    /// The system.
    #[error("the network could not be made: {0}; raise the limit of open files (ulimit -n)")]
    Io(#[from] io::Error),
}

/// A network that machines of this process share; clones are handles to the same one.
///
/// ```
/// use vmm::network::{Network, NetworkError};
///
/// let network = Network::isolated();
/// let (first, second) = (network.nic("vm1")?, network.nic("vm2")?);
/// assert_ne!(first.mac, second.mac);
/// // The two reach each other; this host has no way in.
/// assert!(matches!(network.connect(None, 22), Err(NetworkError::Isolated)));
/// # Ok::<(), NetworkError>(())
/// ```
#[derive(Clone)]
pub struct Network {
    /// None for a machine that has the NAT for itself.
    switch: Option<Switch>,
    nat: Option<NatHandle>,
    published: Vec<(Publish, SocketAddrV4)>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("nat", &self.nat).finish_non_exhaustive()
    }
}

impl Network {
    /// A network whose machines reach the world, and are reached through published ports only.
    ///
    /// # Errors
    /// [`NetworkError::Nat`] and [`NetworkError::Io`].
    pub fn nat(config: NatConfig) -> Result<Self, NetworkError> {
        let gateway = config.gateway_mac;
        let mut nat = Nat::new(config)?;
        let (handle, published) = (nat.handle()?, nat.published());
        let uplink: Box<dyn FramePort> = Box::new(nat);
        let switch = Switch::with_uplink(uplink, Some(gateway))?;
        Ok(Self { switch: Some(switch), nat: Some(handle), published })
    }

    /// A network for one machine, and that machine's interface: a [`Nat`] without a switch before it, as `pontoon run --net nat` has
    /// it.
    ///
    /// ```
    /// use net::MacAddr;
    /// use net::nat::{NatConfig, Publish};
    /// use vmm::network::Network;
    ///
    /// let config = NatConfig { publish: vec![Publish::tcp(0, 80)], ..NatConfig::on_free_subnet()? };
    /// let (network, nic) = Network::private(config, MacAddr::for_name("nat", "vm1"))?;
    /// println!("{} is on {}, its port 80 is {}", nic.mac, network.subnet().unwrap(), network.published()[0].1);
    /// // Machine::builder().nic(nic)…; then network.connect(None, 22), network.leases(), …
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`NetworkError::Nat`] and [`NetworkError::Io`].
    pub fn private(config: NatConfig, mac: MacAddr) -> Result<(Self, Nic), NetworkError> {
        let mut nat = Nat::new(config)?;
        let (handle, published) = (nat.handle()?, nat.published());
        Ok((Self { switch: None, nat: Some(handle), published }, Nic::new(mac, nat)))
    }

    /// A network whose machines reach each other, and nothing else.
    pub fn isolated() -> Self {
        Self { switch: Some(Switch::new()), nat: None, published: Vec::new() }
    }

    /// An interface for the machine called `name`, whose MAC address (52:54:00:…) is made from it: a name
    /// gets the same address, and so the same lease, every time.
    ///
    /// # Errors
    /// [`NetworkError::Plug`], when the network has a machine of that name or no room; [`NetworkError::Private`].
    pub fn nic(&self, name: &str) -> Result<Nic, NetworkError> {
        self.nic_with_mac(MacAddr::for_name("network", name))
    }

    /// An interface with this MAC address.
    ///
    /// # Errors
    /// [`NetworkError::Plug`], when the address is in use or there is no room; [`NetworkError::Private`].
    pub fn nic_with_mac(&self, mac: MacAddr) -> Result<Nic, NetworkError> {
        let switch = self.switch.as_ref().ok_or(NetworkError::Private)?;
        Ok(Nic::new(mac, switch.plug(Some(mac))?))
    }

    /// The subnet, if there is a NAT.
    pub fn subnet(&self) -> Option<Subnet> {
        self.nat.as_ref().map(NatHandle::subnet)
    }

    /// Where the published ports are open, the host's choice for those given as 0: TCP's, then UDP's.
    pub fn published(&self) -> &[(Publish, SocketAddrV4)] {
        &self.published
    }

    /// The NAT's own handle, if there is a NAT: what [`crate::runtime::control::Control::nat`] wants.
    pub fn handle(&self) -> Option<&NatHandle> {
        self.nat.as_ref()
    }

    /// The DHCP leases that hold; none without a NAT.
    pub fn leases(&self) -> Vec<Lease> {
        self.nat.as_ref().map(NatHandle::leases).unwrap_or_default()
    }

    /// A stream to a TCP port of a guest, from the gateway; a refusal is the stream's end. `None` is the first guest
    /// that was heard of.
    ///
    /// # Errors
    /// [`NetworkError::Isolated`] without a NAT, [`NetworkError::Connect`] when it has ended or the address is no guest's.
    pub fn connect(&self, guest: Option<Ipv4Addr>, port: u16) -> Result<UnixStream, NetworkError> {
        let nat = self.nat.as_ref().ok_or(NetworkError::Isolated)?;
        let (ours, theirs) = UnixStream::pair()?;
        nat.connect(guest, port, OwnedFd::from(theirs))?;
        Ok(ours)
    }
}
