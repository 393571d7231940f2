//! From `--net` and its companions to a NIC that is plugged in.

use anyhow::{Context, anyhow};
use net::bridge::{self, BridgeError};
use net::nat::{self, Nat, NatConfig, NatError, NatHandle, Publish, PublishProtocol, Subnet};
use net::pcap::{PcapPort, SNAPLEN_ALL};
use net::tap::{TapError, TapName, TapPort};
use net::{FramePort, MacAddr};
use vmm::machine::Nic;

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
            Ok(Network { interface, ..Network::new(capture(args, mac, port)?) })
        }
        NetSpec::Nat => {
            let mut nat = nat(args)?;
            let network = Some(nat.config().subnet.to_string());
            let published = published(&mut nat);
            let handle = nat.handle().context("making the NAT's door").map_err(Failure::machine)?;
            Ok(Network { network, published, handle: Some(handle), ..Network::new(capture(args, mac, nat)?) })
        }
    }
}

/// The published ports as `-p` would name them, with the ports that they really have.
fn published(nat: &mut Nat) -> Vec<String> {
    let tcp = nat.published().into_iter();
    let tcp = tcp.map(|(port, at)| Publish { addr: *at.ip(), host_port: at.port(), ..port });
    let udp = nat.config().publish.iter().filter(|port| port.protocol == PublishProtocol::Udp).cloned();
    tcp.chain(udp.collect::<Vec<_>>()).map(|port| port.to_string()).collect()
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
fn nat(args: &RunArgs) -> Result<Nat, Failure> {
    let config = NatConfig {
        publish: args.publish.clone(),
        host_access: args.host_access,
        dns: args.dns.iter().map(|server| server.0).collect(),
        ..NatConfig::default()
    };
    make_nat(args.subnet, config)
}

/// A NAT on `subnet`, or else on one that this host does not use for anything else.
pub(crate) fn make_nat(subnet: Option<Subnet>, config: NatConfig) -> Result<Nat, Failure> {
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
    Nat::new(NatConfig { subnet, ..config }).map_err(|error| match error {
        NatError::System { .. } => Failure::machine(error),
        _ => Failure::usage(error),
    })
}

fn capture(args: &RunArgs, mac: MacAddr, port: impl FramePort + 'static) -> Result<Nic, Failure> {
    let port: Box<dyn FramePort> = match &args.pcap {
        None => Box::new(port),
        Some(path) => Box::new(
            PcapPort::create(port, path, SNAPLEN_ALL)
                .with_context(|| format!("creating the capture file {}", path.display()))
                .map_err(Failure::usage)?,
        ),
    };
    Ok(Nic { mac, port })
}
