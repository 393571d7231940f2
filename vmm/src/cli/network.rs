//! From `--net` and its companions to a NIC that is plugged in.

use anyhow::{Context, anyhow};
use net::MacAddr;
use net::bridge::{self, BridgeError};
use net::nat::{self, NatConfig, NatError, NatHandle, Publish, Subnet};
use net::tap::{TapError, TapName, TapPort};
use vmm::machine::Nic;
use vmm::network::NetworkError;

use super::args::{NetSpec, RunArgs};
use super::{Failure, output};

/// The NIC of a machine, and what to tell about it.
pub(crate) struct Network {
    /// The NIC; none with `--net none`.
    pub(crate) nic: Option<Nic>,
    /// Its address.
    pub(crate) mac: Option<MacAddr>,
    /// The NAT's subnet.
    pub(crate) network: Option<String>,
    /// The host's interface: the TAP.
    pub(crate) interface: Option<String>,
    /// The door of the NAT.
    pub(crate) handle: Option<NatHandle>,
    /// The published ports, once the host has chosen those that were given as 0.
    pub(crate) published: Vec<String>,
}

impl Network {
    fn new(nic: Nic) -> Self {
        let mac = Some(nic.mac);
        Self { nic: Some(nic), mac, network: None, interface: None, handle: None, published: Vec::new() }
    }
}

/// Makes what `--net` asks for. Flags that mean nothing to that network are an error, not ignored.
pub(crate) fn plug(args: &RunArgs) -> Result<Network, Failure> {
    let mac = args.mac.unwrap_or_else(|| MacAddr::for_name(&args.net.to_string(), args.host_name()));
    if mac.is_group() {
        return Err(Failure::usage(anyhow!("--mac {mac} is a group address; a NIC has an even first octet")));
    }
    if args.net != NetSpec::Nat {
        refuse_nat_flags(args)?;
    }
    match &args.net {
        NetSpec::None => {
            if args.pcap.is_some() || args.mac.is_some() {
                return Err(Failure::usage(anyhow!("--pcap and --mac need a NIC; leave out --net none")));
            }
            Ok(Network {
                nic: None,
                mac: None,
                network: None,
                interface: None,
                handle: None,
                published: Vec::new(),
            })
        }
        NetSpec::Tap(name) => {
            let port = tap(name)?;
            let interface = Some(port.name().to_owned());
            Ok(Network { interface, ..Network::new(capture(args, Nic::new(mac, port))?) })
        }
        NetSpec::Nat => {
            let private = vmm::network::Network::private(nat_config(args)?, mac);
            let (nat, nic) = private.map_err(|error| match error {
                NetworkError::Nat(error) => nat_failure(error),
                other => Failure::machine(other),
            })?;
            let network = nat.subnet().map(|subnet| subnet.to_string());
            let (published, handle) = (published(&nat), nat.handle().cloned());
            Ok(Network { network, published, handle, ..Network::new(capture(args, nic)?) })
        }
    }
}

/// The published ports as `-p` would name them, with the ports that they really have.
fn published(nat: &vmm::network::Network) -> Vec<String> {
    let ports = nat.published().iter();
    let ports = ports.map(|(port, at)| Publish { addr: *at.ip(), host_port: at.port(), ..port.clone() });
    ports.map(|port| port.to_string()).collect()
}

fn refuse_nat_flags(args: &RunArgs) -> Result<(), Failure> {
    let given = [
        ("-p", !args.publish.is_empty()),
        ("--host-access", args.host_access),
        ("--subnet", args.subnet.is_some()),
        ("--dns", !args.dns.is_empty()),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(Failure::usage(anyhow!(
            "{flag} belongs to --net nat; with --net {} there is nothing for it to do, leave it out",
            args.net
        ))),
    }
}

fn tap(name: &str) -> Result<TapPort, Failure> {
    let bridge = bridge::preflight(name).map_err(|error| match error {
        BridgeError::Io { .. } => Failure::machine(error),
        _ => Failure::usage(error),
    })?;
    for warning in &bridge.warnings {
        output::note(&format!("warning: {warning}"));
    }
    TapPort::open(&TapName::default(), Some(name)).map_err(|error| match error {
        TapError::Io { .. } => Failure::machine(error),
        _ => Failure::usage(error),
    })
}

/// The NAT as the flags describe it.
fn nat_config(args: &RunArgs) -> Result<NatConfig, Failure> {
    let config = NatConfig {
        publish: args.publish.clone(),
        host_access: args.host_access,
        dns: args.dns.iter().map(|server| server.0).collect(),
        ..NatConfig::default()
    };
    on_subnet(args.subnet, config)
}

/// A NAT on `subnet`, or else on one that this host does not use for anything else.
pub(crate) fn on_subnet(subnet: Option<Subnet>, config: NatConfig) -> Result<NatConfig, Failure> {
    let subnet = match subnet {
        Some(subnet) => subnet,
        None => {
            let choice = nat::choose(&nat::taken_by_host()).map_err(Failure::usage)?;
            if let Some(taken) = choice.conflict {
                output::note(&format!(
                    "this host routes {taken} already, so the NAT's subnet is {}",
                    choice.subnet
                ));
            }
            choice.subnet
        }
    };
    Ok(NatConfig { subnet, ..config })
}

/// Why there is no NAT.
pub(crate) fn nat_failure(error: NatError) -> Failure {
    match error {
        NatError::System { .. } => Failure::machine(error),
        _ => Failure::usage(error),
    }
}

fn capture(args: &RunArgs, nic: Nic) -> Result<Nic, Failure> {
    match &args.pcap {
        None => Ok(nic),
        Some(path) => nic
            .capture(path)
            .with_context(|| format!("creating the capture file {}", path.display()))
            .map_err(Failure::usage),
    }
}
