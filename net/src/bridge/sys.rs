//! The ioctls behind [`super`]: interface flags, MTU, index, driver, and the bridge's own.
#![allow(
    unsafe_code,
    reason = "ioctl on a control socket; every argument is a #[repr(C)] struct that outlives the call"
)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{c_char, c_int, c_short, c_ulong, c_void, ifreq};

use crate::MacAddr;

/// `SIOCBRADDIF`, `SIOCDEVPRIVATE` of linux/sockios.h; libc has neither.
const SIOCBRADDIF: c_ulong = 0x89a2;
const SIOCDEVPRIVATE: c_ulong = 0x89f0;
/// `BRCTL_GET_BRIDGE_INFO`, `BRCTL_GET_PORT_LIST` of linux/if_bridge.h.
const BRCTL_GET_BRIDGE_INFO: c_ulong = 6;
const BRCTL_GET_PORT_LIST: c_ulong = 7;
/// `ETHTOOL_GDRVINFO` of linux/ethtool.h.
const ETHTOOL_GDRVINFO: u32 = 3;
/// Most ports of a bridge (`BR_MAX_PORTS`).
const MAX_PORTS: usize = 1024;

/// A name that fits an `ifreq`: 1 to 15 bytes, none of them NUL.
#[derive(Clone, Copy)]
pub(crate) struct IfName([c_char; libc::IFNAMSIZ]);

impl IfName {
    /// `None` when the kernel would not take the name: empty, longer than 15 bytes, or with a NUL, `/` or space.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let bad = |b: u8| b == 0 || b == b'/' || b.is_ascii_whitespace();
        if name.is_empty()
            || name.len() >= libc::IFNAMSIZ
            || name.bytes().any(bad)
            || matches!(name, "." | "..")
        {
            return None;
        }
        let mut raw = [0; libc::IFNAMSIZ];
        for (slot, byte) in raw.iter_mut().zip(name.bytes()) {
            *slot = byte.cast_signed();
        }
        Some(Self(raw))
    }

    pub(crate) fn raw(self) -> [c_char; libc::IFNAMSIZ] {
        self.0
    }
}

/// The text of a name that the kernel wrote into an `ifreq`.
pub(crate) fn name_from_raw(raw: &[c_char; libc::IFNAMSIZ]) -> String {
    let bytes = raw.map(c_char::cast_unsigned);
    CStr::from_bytes_until_nul(&bytes).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What `BRCTL_GET_BRIDGE_INFO` says, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BridgeInfo {
    /// Spanning tree protocol runs.
    pub(crate) stp: bool,
    /// Forward delay as configured, milliseconds.
    pub(crate) forward_delay_ms: u32,
}

/// `struct __bridge_info` of linux/if_bridge.h.
#[repr(C)]
#[derive(Default)]
struct RawBridgeInfo {
    designated_root: u64,
    bridge_id: u64,
    root_path_cost: u32,
    max_age: u32,
    hello_time: u32,
    forward_delay: u32,
    bridge_max_age: u32,
    bridge_hello_time: u32,
    bridge_forward_delay: u32,
    topology_change: u8,
    topology_change_detected: u8,
    root_port: u8,
    stp_enabled: u8,
    ageing_time: u32,
    gc_interval: u32,
    hello_timer_value: u32,
    tcn_timer_value: u32,
    topology_change_timer_value: u32,
    gc_timer_value: u32,
}

/// `struct ethtool_drvinfo` of linux/ethtool.h.
#[repr(C)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// A socket through which the interfaces of this thread's network namespace are configured.
#[derive(Debug)]
pub(crate) struct Control(OwnedFd);

impl Control {
    pub(crate) fn open() -> io::Result<Self> {
        // SAFETY: no memory is passed; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made `fd` for us, and nobody else closes it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn ioctl(&self, request: c_ulong, req: &mut ifreq) -> io::Result<()> {
        // SAFETY: every request used here reads and writes at most one `ifreq`, which `req` is for the whole call;
        // a pointer inside it is set by the caller to memory that it borrows for as long.
        let rc = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, std::ptr::from_mut(req)) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn request(name: IfName) -> ifreq {
        // SAFETY: an `ifreq` of zeros is valid: integers, byte arrays and a null pointer.
        let mut req: ifreq = unsafe { std::mem::zeroed() };
        req.ifr_name = name.raw();
        req
    }

    /// `IFF_UP` and friends.
    pub(crate) fn flags(&self, name: IfName) -> io::Result<c_int> {
        let mut req = Self::request(name);
        self.ioctl(libc::SIOCGIFFLAGS, &mut req)?;
        // SAFETY: SIOCGIFFLAGS has filled this member.
        Ok(c_int::from(unsafe { req.ifr_ifru.ifru_flags }))
    }

    /// Brings the interface up; nothing is written, and no privilege needed, when it already is.
    pub(crate) fn set_up(&self, name: IfName) -> io::Result<()> {
        let flags = self.flags(name)?;
        if flags & libc::IFF_UP != 0 {
            return Ok(());
        }
        let mut req = Self::request(name);
        // IFF_UP is bit 0, so that the 16 bits that an ifreq has are enough.
        req.ifr_ifru.ifru_flags = (flags | libc::IFF_UP) as c_short;
        self.ioctl(libc::SIOCSIFFLAGS, &mut req)
    }

    /// The interface's Ethernet address.
    pub(crate) fn mac(&self, name: IfName) -> io::Result<MacAddr> {
        let mut req = Self::request(name);
        self.ioctl(libc::SIOCGIFHWADDR, &mut req)?;
        // SAFETY: SIOCGIFHWADDR has filled this member.
        let data = unsafe { req.ifr_ifru.ifru_hwaddr.sa_data };
        let mut octets = [0; 6];
        for (octet, byte) in octets.iter_mut().zip(data) {
            *octet = byte.cast_unsigned();
        }
        Ok(MacAddr(octets))
    }

    /// Gives the interface another Ethernet address.
    pub(crate) fn set_mac(&self, name: IfName, mac: MacAddr) -> io::Result<()> {
        let mut req = Self::request(name);
        let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
        for (byte, octet) in address.sa_data.iter_mut().zip(mac.0) {
            *byte = octet.cast_signed();
        }
        req.ifr_ifru.ifru_hwaddr = address;
        self.ioctl(libc::SIOCSIFHWADDR, &mut req)
    }

    pub(crate) fn mtu(&self, name: IfName) -> io::Result<u32> {
        let mut req = Self::request(name);
        self.ioctl(libc::SIOCGIFMTU, &mut req)?;
        // SAFETY: SIOCGIFMTU has filled this member.
        Ok(u32::try_from(unsafe { req.ifr_ifru.ifru_mtu }).unwrap_or(0))
    }

    pub(crate) fn set_mtu(&self, name: IfName, mtu: u32) -> io::Result<()> {
        let mut req = Self::request(name);
        req.ifr_ifru.ifru_mtu = c_int::try_from(mtu).unwrap_or(c_int::MAX);
        self.ioctl(libc::SIOCSIFMTU, &mut req)
    }

    pub(crate) fn index(&self, name: IfName) -> io::Result<c_int> {
        let mut req = Self::request(name);
        self.ioctl(libc::SIOCGIFINDEX, &mut req)?;
        // SAFETY: SIOCGIFINDEX has filled this member.
        Ok(unsafe { req.ifr_ifru.ifru_ifindex })
    }

    /// The interface's driver as ethtool names it: `bridge`, `tun`, `veth`, …
    pub(crate) fn driver(&self, name: IfName) -> io::Result<String> {
        let mut info = DriverInfo { cmd: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
        let mut req = Self::request(name);
        req.ifr_ifru.ifru_data = (&raw mut info).cast::<c_char>();
        self.ioctl(libc::SIOCETHTOOL, &mut req)?;
        let driver = CStr::from_bytes_until_nul(&info.driver).map(|s| s.to_string_lossy().into_owned());
        Ok(driver.unwrap_or_default())
    }

    /// Makes the interface with this index a port of `bridge`.
    pub(crate) fn bridge_add(&self, bridge: IfName, index: c_int) -> io::Result<()> {
        let mut req = Self::request(bridge);
        req.ifr_ifru.ifru_ifindex = index;
        self.ioctl(SIOCBRADDIF, &mut req)
    }

    pub(crate) fn bridge_info(&self, bridge: IfName) -> io::Result<BridgeInfo> {
        let mut info = RawBridgeInfo::default();
        self.bridge_private(bridge, BRCTL_GET_BRIDGE_INFO, (&raw mut info).cast(), 0)?;
        // The bridge's own setting is in USER_HZ, which is 100 on every architecture that we run on; the value in effect,
        // `forward_delay`, is in jiffies of unknown length.
        let forward_delay_ms = info.bridge_forward_delay.saturating_mul(10);
        Ok(BridgeInfo { stp: info.stp_enabled != 0, forward_delay_ms })
    }

    /// The indices of the bridge's ports.
    pub(crate) fn bridge_ports(&self, bridge: IfName) -> io::Result<Vec<c_int>> {
        let mut ports: Vec<c_int> = vec![0; MAX_PORTS];
        self.bridge_private(bridge, BRCTL_GET_PORT_LIST, ports.as_mut_ptr().cast(), MAX_PORTS)?;
        // Slots are numbered by port, the unused ones hold 0.
        ports.retain(|index| *index != 0);
        Ok(ports)
    }

    /// `out` points to what `command` fills, which for the port list is `room` integers.
    fn bridge_private(
        &self,
        bridge: IfName,
        command: c_ulong,
        out: *mut c_void,
        room: usize,
    ) -> io::Result<()> {
        let mut args = [command, out.expose_provenance() as c_ulong, room as c_ulong, 0];
        let mut req = Self::request(bridge);
        req.ifr_ifru.ifru_data = args.as_mut_ptr().cast::<c_char>();
        self.ioctl(SIOCDEVPRIVATE, &mut req)
    }
}
