//! The network as stock userspace sets it up: lo, and a DHCP client per NIC.
//!
//! udhcpc tries for a while in the foreground, then goes on in the background, so its first process ends either with a
//! lease or with the wait; `/etc/udhcpc.script` applies leases and writes a line about each to `/run/pontoon/net/NIC`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::{say, supervise, sys};

/// A boot waits at most this long for a lease.
pub(crate) const DHCP_LIMIT: Duration = Duration::from_secs(15);
/// Discovers that are sent in the foreground, and seconds between them: less than [`DHCP_LIMIT`] together.
const DHCP_TRIES: (&str, &str) = ("6", "2");
/// What the script writes about each NIC's lease.
const STATE: &str = "/run/pontoon/net";

/// Brings up lo and every NIC that has a device behind it; with `dhcp`, waits for their leases together.
pub(crate) fn up(hostname: &str, dhcp: bool) {
    if let Err(error) = sys::interface_up("lo") {
        say!("cannot bring up lo: {error}");
    }
    let nics = nics();
    let mut clients = Vec::new();
    for nic in &nics {
        if let Err(error) = sys::interface_up(nic) {
            say!("cannot bring up {nic}: {error}");
        } else if dhcp {
            clients.extend(start_client(nic, hostname));
        }
    }
    supervise::wait_for(clients, DHCP_LIMIT);
    for nic in nics.iter().filter(|_| dhcp) {
        match fs::read_to_string(Path::new(STATE).join(nic)) {
            Ok(lease) => say!("{nic} {}", lease.trim()),
            Err(_) => say!("{nic} has no address: no DHCP server has answered yet, the client keeps trying"),
        }
    }
}

/// The names of the NICs: interfaces that a device stands behind, in the kernel's order of names.
fn nics() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    let mut names: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.path().join("device").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    // eth2 before eth10.
    names.sort_by_key(|name| (name.len(), name.clone()));
    names
}

/// Starts the DHCP client of one NIC; its process ends when it has a lease or gives up waiting.
fn start_client(nic: &str, hostname: &str) -> Option<u32> {
    let _ = fs::create_dir_all(STATE);
    let (tries, pause) = DHCP_TRIES;
    let mut client = Command::new("/sbin/udhcpc");
    client.args(["-b", "-t", tries, "-T", pause, "-A", "5", "-i", nic]);
    client.args(["-p", &format!("/run/udhcpc.{nic}.pid"), "-s", "/etc/udhcpc.script"]);
    client.args(["-x", &format!("hostname:{hostname}"), "-O", "search", "-O", "staticroutes", "-O", "mtu"]);
    client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sys::with_clean_signals(&mut client);
    match client.spawn() {
        Ok(child) => Some(child.id()),
        Err(error) => {
            say!("cannot start the DHCP client of {nic}: {error}");
            None
        }
    }
}
