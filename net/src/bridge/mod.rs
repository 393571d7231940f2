//! Linux bridges: is there one, may we plug into it, and will frames really cross it.
//!
//! A guest on `--net tap:br0` is on the LAN because its TAP is a port of a bridge that also holds the host's NIC.
//! The bridge itself is the host's: we never create, change or remove one here (`scripts/bridge` does, on request);
//! we only add our own TAP to it, which the kernel undoes when the TAP goes away.
//!
//! [`preflight`] answers before anything is made. What makes a guest's network impossible is a [`BridgeError`] with
//! the way out in its text. What makes it silently not work is a [`Warning`]: a bridge that is down, that has no
//! other port, that runs the spanning tree protocol (a new port is deaf and mute for twice the forward delay,
//! 30 s by default), or whose frames iptables drops because `br_netfilter` is loaded and Docker has set the
//! FORWARD policy to DROP.
//!
//! Everything is asked by ioctl, which sees the network namespace of the calling thread; sysfs would show that
//! of whoever mounted it. No privilege is needed to look.

mod netfilter;
pub(crate) mod sys;

use std::fmt;
use std::io;

use sys::{Control, IfName};

/// Why a bridge can't be used.
///
/// ```
/// use net::bridge::{BridgeError, preflight};
///
/// let error = preflight("no-bridge-here").unwrap_err();
/// assert!(matches!(&error, BridgeError::Missing(name) if name == "no-bridge-here"));
/// assert!(error.to_string().contains("scripts/bridge up"), "the text says what to do");
/// // An interface's name has at most 15 bytes.
/// assert!(matches!(preflight("sixteen-bytes-br"), Err(BridgeError::BadName(_))));
/// assert!(matches!(preflight("lo"), Err(BridgeError::NotABridge { .. })));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// There is no such interface.
    #[error(
        "there is no bridge '{0}'; create one that holds your LAN's interface: scripts/bridge up {0} --nic eth0 \
         (docs/bridge.md says what it changes)"
    )]
    Missing(String),
    /// There is an interface of this name, of another kind.
    #[error(
        "'{name}' is not a bridge but a '{kind}' interface; name a bridge (list them: ip link show type bridge)"
    )]
    NotABridge {
        /// The interface.
        name: String,
        /// Its driver.
        kind: String,
    },
    /// A name that no interface can have.
    #[error("'{0}' can't be an interface's name: 1 to 15 bytes, no space, no '/'")]
    BadName(String),
    /// Not permitted.
    #[error(
        "adding '{port}' to bridge '{bridge}' takes CAP_NET_ADMIN, which this process lacks; run it as root, or have \
         root prepare the port: ip tuntap add {port} mode tap vnet_hdr user $USER && ip link set {port} master \
         {bridge} up"
    )]
    NotPermitted {
        /// The bridge.
        bridge: String,
        /// The interface that was to become its port.
        port: String,
    },
    /// The interface is a port of something else.
    #[error("'{port}' already belongs to another bridge; take it out first: ip link set {port} nomaster")]
    Busy {
        /// The interface.
        port: String,
    },
    /// Anything else that the kernel says.
    #[error("could not {doing} '{name}': {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The interface that it was tried on.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Something that will keep frames from crossing although nothing reports an error.
///
/// ```
/// use net::bridge::Warning;
///
/// let warning = Warning::StpDelay { bridge: "br0".to_owned(), seconds: 30 };
/// let text = warning.to_string();
/// assert!(text.contains("its first 30 seconds"), "what will happen");
/// assert!(text.ends_with("ip link set br0 type bridge stp_state 0"), "and what to do about it");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// The bridge is down.
    Down(String),
    /// The bridge has no port: its guests reach each other and the host, not the LAN.
    NoPorts(String),
    /// The spanning tree protocol keeps a new port silent.
    StpDelay {
        /// The bridge.
        bridge: String,
        /// How long a new port is silent.
        seconds: u32,
    },
    /// `br_netfilter` hands bridged frames to iptables, whose FORWARD policy is DROP.
    ForwardDrop(String),
    /// `br_netfilter` hands bridged frames to iptables, and its policy could not be read.
    ForwardUnknown(String),
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down(bridge) => {
                write!(f, "bridge '{bridge}' is down; bring it up: ip link set {bridge} up")
            }
            Self::NoPorts(bridge) => write!(
                f,
                "bridge '{bridge}' has no port, so its guests are not on your LAN; add the LAN's interface: \
                 scripts/bridge up {bridge} --nic eth0"
            ),
            Self::StpDelay { bridge, seconds } => write!(
                f,
                "bridge '{bridge}' runs the spanning tree protocol: a new guest is cut off for its first {seconds} \
                 seconds; if the bridge is in no loop: ip link set {bridge} type bridge stp_state 0"
            ),
            Self::ForwardDrop(bridge) => write!(
                f,
                "the firewall drops what crosses bridge '{bridge}': br_netfilter passes bridged frames to iptables, \
                 whose FORWARD policy is DROP (Docker sets it); either 'sysctl net.bridge.bridge-nf-call-iptables=0' \
                 or 'iptables -I FORWARD -i {bridge} -o {bridge} -j ACCEPT'"
            ),
            Self::ForwardUnknown(bridge) => write!(
                f,
                "br_netfilter passes what crosses bridge '{bridge}' to iptables, and the FORWARD policy could not be \
                 read; if guests get no answer: iptables -I FORWARD -i {bridge} -o {bridge} -j ACCEPT"
            ),
        }
    }
}

/// A bridge that can be used.
///
/// ```
/// use net::bridge::{BridgeError, preflight};
///
/// match preflight("br0") {
///     Ok(bridge) => {
///         println!("{}: MTU {}, {} ports", bridge.name, bridge.mtu, bridge.ports);
///         bridge.warnings.iter().for_each(|warning| println!("warning: {warning}"));
///     }
///     // Most hosts have none; nothing was changed by looking.
///     Err(error) => assert!(matches!(error, BridgeError::Missing(_)), "{error}"),
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: String,
    /// Its MTU, bytes.
    pub mtu: u16,
    /// How many ports it has.
    pub ports: usize,
    /// What will keep frames from crossing.
    pub warnings: Vec<Warning>,
}

/// Looks at the bridge `name` in this thread's network namespace. Changes nothing.
///
/// # Errors
/// When there is no bridge of that name.
pub fn preflight(name: &str) -> Result<Bridge, BridgeError> {
    let raw = IfName::new(name).ok_or_else(|| BridgeError::BadName(name.to_owned()))?;
    let failed = |doing| move |source| BridgeError::Io { doing, name: name.to_owned(), source };
    let control = Control::open().map_err(failed("open a socket to look at"))?;
    is_bridge(&control, name, raw)?;
    let mtu = control.mtu(raw).map_err(failed("read the MTU of"))?;
    let up = control.flags(raw).map_err(failed("read the flags of"))? & libc::IFF_UP != 0;
    let ports = control.bridge_ports(raw).map_err(failed("list the ports of"))?.len();
    let info = control.bridge_info(raw).map_err(failed("read the parameters of"))?;

    let bridge = || name.to_owned();
    let mut warnings = Vec::new();
    if !up {
        warnings.push(Warning::Down(bridge()));
    }
    if ports == 0 {
        warnings.push(Warning::NoPorts(bridge()));
    }
    // Listening and learning take one forward delay each; with STP off a port forwards at once.
    if info.stp && info.forward_delay_ms > 0 {
        let seconds = info.forward_delay_ms.saturating_mul(2).div_ceil(1000);
        warnings.push(Warning::StpDelay { bridge: bridge(), seconds });
    }
    match netfilter::forward_verdict() {
        netfilter::Forward::NotFiltered | netfilter::Forward::Accept => {}
        netfilter::Forward::Drop => warnings.push(Warning::ForwardDrop(bridge())),
        netfilter::Forward::Unknown => warnings.push(Warning::ForwardUnknown(bridge())),
    }
    let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
    Ok(Bridge { name: bridge(), mtu, ports, warnings })
}

/// Makes the interface `port` a port of `bridge`; nothing happens, and no privilege is needed, if it is one.
///
/// # Errors
/// When either is missing, `port` belongs elsewhere, or CAP_NET_ADMIN is.
pub fn enslave(bridge: &str, port: &str) -> Result<(), BridgeError> {
    let raw = |name: &str| IfName::new(name).ok_or_else(|| BridgeError::BadName(name.to_owned()));
    let (raw_bridge, raw_port) = (raw(bridge)?, raw(port)?);
    let failed = |doing| move |source| BridgeError::Io { doing, name: port.to_owned(), source };
    let control = Control::open().map_err(failed("open a socket to configure"))?;
    is_bridge(&control, bridge, raw_bridge)?;
    let index = control.index(raw_port).map_err(failed("look up"))?;
    let ports = control.bridge_ports(raw_bridge).map_err(failed("list the bridge's ports before adding"))?;
    if ports.contains(&index) {
        return Ok(());
    }
    control.bridge_add(raw_bridge, index).map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => BridgeError::NotPermitted { bridge: bridge.to_owned(), port: port.to_owned() },
        Some(libc::EBUSY) => BridgeError::Busy { port: port.to_owned() },
        _ => failed("add to the bridge the interface")(source),
    })
}

fn is_bridge(control: &Control, name: &str, raw: IfName) -> Result<(), BridgeError> {
    control.index(raw).map_err(|source| match source.raw_os_error() {
        Some(libc::ENODEV) => BridgeError::Missing(name.to_owned()),
        _ => BridgeError::Io { doing: "look up", name: name.to_owned(), source },
    })?;
    // Interfaces without ethtool operations answer EOPNOTSUPP; a bridge has them.
    let kind = control.driver(raw).unwrap_or_else(|_| "unknown".to_owned());
    if kind == "bridge" { Ok(()) } else { Err(BridgeError::NotABridge { name: name.to_owned(), kind }) }
}
