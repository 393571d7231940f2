//! The NIC towards the host: QEMU's user network, whose plan is fixed.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use crate::{Context, Error, machine, sys};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// Waits for eth0, which appears when its driver has probed, and gives it the address that QEMU expects.
pub(crate) fn configure() -> Result<(), Error> {
    machine::wait_for(Path::new("/sys/class/net/eth0"))?;
    sys::set_address("eth0", ADDRESS, MASK).context(|| format!("give eth0 the address {ADDRESS}"))?;
    sys::add_default_route(GATEWAY).context(|| format!("route through {GATEWAY}"))?;
    fs::write("/etc/resolv.conf", "nameserver 10.0.2.3\n").context(|| "write /etc/resolv.conf".into())
}
