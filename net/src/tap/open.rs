//! Making a TAP, or taking one over, and everything that can be wrong with that.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::str::FromStr;

use libc::c_uint;

use super::{TapPort, sys};
use crate::bridge::sys::{Control, IfName};
use crate::bridge::{self, BridgeError};
use crate::port::{Counters, MAX_FRAME, Offloads};
use crate::vnet::VNET_HDR_LEN;

/// The device through which TAPs are made.
const TUN: &str = "/dev/net/tun";

/// Which interface to make.
///
/// ```
/// use net::tap::TapName;
///
/// let name: TapName = "web%d".parse()?;
/// assert_eq!(name, TapName::Numbered("web".to_owned()), "web0, or the first that is free");
/// assert_eq!(TapName::Exact("tap7".to_owned()).to_string(), "tap7");
/// assert_eq!(TapName::default().to_string(), "vnet%d");
/// # Ok::<(), std::convert::Infallible>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapName {
    /// A free number behind a prefix of at most 12 bytes: `vnet` becomes `vnet0`, `vnet1`, … Always a new interface.
    Numbered(String),
    /// This name. A persistent TAP of that name is attached to if nobody holds it.
    Exact(String),
}

impl Default for TapName {
    /// `vnet0`, `vnet1`, … as libvirt names them.
    fn default() -> Self {
        Self::Numbered("vnet".to_owned())
    }
}

impl FromStr for TapName {
    type Err = std::convert::Infallible;

    /// `vnet%d` is numbered, anything else exact; whether the kernel takes the name is found out on opening.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.strip_suffix("%d") {
            Some(prefix) => Self::Numbered(prefix.to_owned()),
            None => Self::Exact(text.to_owned()),
        })
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Numbered(prefix) => write!(f, "{prefix}%d"),
            Self::Exact(name) => f.write_str(name),
        }
    }
}

/// Why a TAP can't be had.
///
/// ```
/// use std::fs::File;
///
/// use net::bridge::BridgeError;
/// use net::tap::{TapError, TapName, TapPort};
///
/// // Both are found out before anything is made, and without a privilege.
/// let error = TapPort::open(&TapName::Exact("sixteen-bytes-up".to_owned()), None).unwrap_err();
/// assert!(matches!(error, TapError::BadName(_)), "{error}");
/// let error = TapPort::open(&TapName::default(), Some("no-bridge-here")).unwrap_err();
/// assert!(matches!(error, TapError::Bridge(BridgeError::Missing(_))), "{error}");
/// // A descriptor that a launcher handed over by mistake.
/// let error = TapPort::from_fd(File::open("/dev/null")?.into()).unwrap_err();
/// assert!(matches!(error, TapError::NotATapFd(_)), "{error}");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// `/dev/net/tun` does not exist.
    #[error(
        "there is no {TUN}; load the driver: modprobe tun (in a container: --device {TUN} --cap-add NET_ADMIN)"
    )]
    NoTun,
    /// `/dev/net/tun` may not be opened, or no interface may be made.
    #[error(
        "making TAP '{name}' takes CAP_NET_ADMIN, which this process lacks ({source}); run it as root, have root \
         prepare it (ip tuntap add tap0 mode tap vnet_hdr user $USER), or use --net nat, which needs no privilege"
    )]
    NotPermitted {
        /// The name asked for.
        name: TapName,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another process holds the TAP.
    #[error(
        "TAP '{0}' is in use by another process; give this machine its own, or leave the name out (vnet%d)"
    )]
    InUse(TapName),
    /// The name is taken by something that is no TAP, or by a TAP of an incompatible kind.
    #[error("'{0}' exists and is no TAP that can be attached to (another kind of interface, or multi-queue)")]
    NotATap(TapName),
    /// A name that no interface can have.
    #[error("'{0}' can't be an interface's name: 1 to 15 bytes (numbers included), no space, no '/', no '%'")]
    BadName(TapName),
    /// The descriptor that was handed over is no TAP.
    #[error(
        "the file descriptor handed over is no TAP ({0}); pass one on which TUNSETIFF with IFF_TAP succeeded"
    )]
    NotATapFd(io::Error),
    /// Its bridge can't be used.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// Anything else that the kernel says.
    #[error("could not {doing} TAP '{name}': {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The interface.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Numbers 0 to 999 fit behind a prefix of 12 bytes.
const MAX_PREFIX: usize = 12;

pub(super) fn open(name: &TapName, bridge: Option<&str>) -> Result<TapPort, TapError> {
    let raw = raw_name(name).ok_or_else(|| TapError::BadName(name.clone()))?;
    // Before anything is made: a missing bridge is the likelier mistake.
    let mtu = bridge.map(bridge::preflight).transpose()?.map(|found| found.mtu);
    let tun = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN);
    let fd: OwnedFd = tun.map_err(|source| opening(name, source))?.into();
    let exclusive = match name {
        TapName::Numbered(_) => libc::IFF_TUN_EXCL,
        TapName::Exact(_) => 0,
    };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | exclusive;
    sys::set_iff(&fd, raw, flags).map_err(|source| attaching(name, source))?;
    let mut port = adopt(fd)?;
    configure(&mut port, bridge, mtu)?;
    Ok(port)
}

pub(super) fn adopt(fd: OwnedFd) -> Result<TapPort, TapError> {
    let info = sys::get_iff(fd.as_fd()).map_err(TapError::NotATapFd)?;
    if info.flags & libc::IFF_TAP == 0 {
        return Err(TapError::NotATapFd(io::Error::other(format!(
            "{} is a TUN: it has no Ethernet",
            info.name
        ))));
    }
    if info.flags & libc::IFF_NO_PI == 0 {
        let text =
            format!("{} puts packet information in front of frames: open it with IFF_NO_PI", info.name);
        return Err(TapError::NotATapFd(io::Error::other(text)));
    }
    let vnet_hdr = info.flags & libc::IFF_VNET_HDR != 0;
    let failed = |doing| {
        let name = info.name.clone();
        move |source| TapError::Io { doing, name, source }
    };
    sys::set_nonblocking(fd.as_fd()).map_err(failed("make non-blocking the descriptor of"))?;
    let mut offered = Offloads::all();
    if vnet_hdr {
        sys::set_vnet_hdr_len(&fd, VNET_HDR_LEN).map_err(failed("set the header length of"))?;
        // Linux has UDP segmentation on TAPs since 6.2; without a header it is done here.
        if sys::set_offload(fd.as_fd(), tun_features(offered)).is_err() {
            offered -= Offloads::USO;
        }
        // Nothing is agreed yet.
        sys::set_offload(fd.as_fd(), 0).map_err(failed("reset the offloads of"))?;
    }
    Ok(TapPort {
        mtu: current_mtu(&info.name).unwrap_or(1500),
        fd,
        name: info.name,
        vnet_hdr,
        offered,
        granted: Offloads::empty(),
        up: true,
        parked: None,
        spill: vec![0; MAX_FRAME].into_boxed_slice(),
        counters: Counters::default(),
    })
}

/// The MTU of the interface, unless it is in a namespace that this thread does not see.
fn current_mtu(name: &str) -> Option<u16> {
    let mtu = Control::open().ok()?.mtu(IfName::new(name)?).ok()?;
    Some(u16::try_from(mtu).unwrap_or(u16::MAX))
}

/// Sets the MTU, plugs the TAP into its bridge and brings it up, leaving alone what is already so: an unprivileged
/// process may use a TAP that root has prepared.
fn configure(port: &mut TapPort, bridge: Option<&str>, mtu: Option<u16>) -> Result<(), TapError> {
    let failed = |doing| {
        let name = port.name.clone();
        move |source: io::Error| TapError::Io { doing, name, source }
    };
    let raw = IfName::new(&port.name).ok_or_else(|| TapError::BadName(TapName::Exact(port.name.clone())))?;
    let control = Control::open().map_err(failed("open a socket to configure"))?;
    if let Some(mtu) = mtu.filter(|mtu| *mtu != port.mtu) {
        control.set_mtu(raw, u32::from(mtu)).map_err(failed("set the MTU of"))?;
        port.mtu = mtu;
    }
    if let Some(bridge) = bridge {
        // A bridge without an address of its own takes the lowest of its ports: a random low one would change it, and
        // the host would be gone from its neighbours' ARP tables. 0xfe, as libvirt gives it, is never the lowest.
        let mut mac = control.mac(raw).map_err(failed("read the address of"))?;
        mac.0[0] = 0xfe;
        control.set_mac(raw, mac).map_err(failed("set the address of"))?;
        bridge::enslave(bridge, &port.name)?;
    }
    control.set_up(raw).map_err(failed("bring up"))
}

fn raw_name(name: &TapName) -> Option<IfName> {
    match name {
        TapName::Numbered(prefix) if prefix.len() <= MAX_PREFIX && !prefix.contains('%') => {
            IfName::new(&format!("{prefix}%d"))
        }
        TapName::Numbered(_) => None,
        TapName::Exact(name) => IfName::new(name).filter(|_| !name.contains('%')),
    }
}

fn opening(name: &TapName, source: io::Error) -> TapError {
    match source.raw_os_error() {
        // ENODEV, ENXIO: a device node whose driver is not there.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun,
        Some(libc::EACCES | libc::EPERM) => TapError::NotPermitted { name: name.clone(), source },
        _ => TapError::Io { doing: "open /dev/net/tun for", name: name.to_string(), source },
    }
}

fn attaching(name: &TapName, source: io::Error) -> TapError {
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::InUse(name.clone()),
        Some(libc::EINVAL) => TapError::NotATap(name.clone()),
        Some(libc::EACCES | libc::EPERM) => TapError::NotPermitted { name: name.clone(), source },
        _ => TapError::Io { doing: "make", name: name.to_string(), source },
    }
}

/// `TUN_F_*` for what a guest accepts. Segmentation means nothing to the kernel without checksums.
pub(super) fn tun_features(guest: Offloads) -> c_uint {
    if !guest.contains(Offloads::CSUM) {
        return 0;
    }
    let table = [
        (Offloads::CSUM, libc::TUN_F_CSUM),
        (Offloads::TSO4, libc::TUN_F_TSO4),
        (Offloads::TSO6, libc::TUN_F_TSO6),
        (Offloads::ECN, libc::TUN_F_TSO_ECN),
        (Offloads::USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    table.iter().filter(|(has, _)| guest.contains(*has)).fold(0, |bits, (_, bit)| bits | bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_cut_are_refused() {
        let bad = ["", "seventeen-letters", "a b", "a/b", "..", "a%d%d", "%", "thirteenbytes%d"];
        for name in bad {
            let error = TapPort::open(&name.parse().unwrap(), None).unwrap_err();
            assert!(matches!(error, TapError::BadName(_)), "{name}: {error}");
        }
        assert!(raw_name(&TapName::default()).is_some());
        assert_eq!("vnet%d".parse(), Ok(TapName::default()));
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(TapPort::from_fd(file.into()), Err(TapError::NotATapFd(_))));
    }

    #[test]
    fn segmentation_is_not_asked_for_without_checksums() {
        assert_eq!(tun_features(Offloads::TSO4 | Offloads::USO), 0);
        assert_eq!(tun_features(Offloads::CSUM | Offloads::TSO4), libc::TUN_F_CSUM | libc::TUN_F_TSO4);
    }
}
