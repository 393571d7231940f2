//! Networks that several machines of one process share.
//!
//! A [`Network`] is made once; [`Network::nic`] gives a machine an interface on it. Behind it is one virtual switch
//! ([`net::switch`]) whose way out, if it has one, is one NAT ([`net::nat`]): the machines see each other, share the gateway's
//! DHCP and DNS, find each other by name, and reach the world through the host's sockets. Machines may start and end in any
//! order; the network lives as long as a handle to it or one of its interfaces does.
//!
//! A machine that shares its network with nobody needs none of this: a [`Nat`] or a [`TapPort`](net::tap::TapPort)
//! is a [`FramePort`] and goes into a [`Nic`] as it is.
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
    /// The network has no NAT, and so no way from this host into it.
    #[error("this network is isolated: this host has no part in it; make it with Network::nat")]
    Isolated,
    /// The system.
    #[error("the network could not be made: {0}; raise the limit of open files (ulimit -n)")]
    Io(#[from] io::Error),
}

/// A network that machines of this process share; clones are handles to the same one.
#[derive(Clone)]
pub struct Network {
    switch: Switch,
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
        Ok(Self { switch, nat: Some(handle), published })
    }

    /// A network whose machines reach each other, and nothing else.
    pub fn isolated() -> Self {
        Self { switch: Switch::new(), nat: None, published: Vec::new() }
    }

    /// An interface for the machine called `name`, whose MAC address (52:54:00:…) is made from it: a name
    /// gets the same address, and so the same lease, every time.
    ///
    /// # Errors
    /// [`NetworkError::Plug`], when the network has a machine of that name or no room.
    pub fn nic(&self, name: &str) -> Result<Nic, NetworkError> {
        self.nic_with_mac(MacAddr::for_name("network", name))
    }

    /// An interface with this MAC address.
    ///
    /// # Errors
    /// [`NetworkError::Plug`], when the address is in use or there is no room.
    pub fn nic_with_mac(&self, mac: MacAddr) -> Result<Nic, NetworkError> {
        Ok(Nic { mac, port: Box::new(self.switch.plug(Some(mac))?) })
    }

    /// The subnet, if there is a NAT.
    pub fn subnet(&self) -> Option<Subnet> {
        self.nat.as_ref().map(NatHandle::subnet)
    }

    /// Where the published TCP ports listen, the host's choice for those given as 0.
    pub fn published(&self) -> &[(Publish, SocketAddrV4)] {
        &self.published
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
