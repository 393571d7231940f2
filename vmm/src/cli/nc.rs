//! `pontoon nc`: standard input and output as a TCP connection to a port of a guest, through its NAT: no root, no route, no
//! published port. `ssh -o ProxyCommand='pontoon nc %h %p' root@NAME` is what it is for.

use std::net::Ipv4Addr;

use anyhow::anyhow;
use vmm::runtime::{Entry, MachineName, Runtime};

use super::machine_args::NcArgs;
use super::registry::{asking, failure};
use super::relay::{Ended, relay};
use super::{Failure, netinfo, output};

/// Nobody listens on that port: the status of other programs of this name.
const STATUS_REFUSED: u8 = 1;

pub(crate) fn nc(args: &NcArgs) -> Result<u8, Failure> {
    let runtime = Runtime::open().map_err(failure)?;
    let (entry, guest) = find(&runtime, &args.guest)?;
    let opened = entry.control().and_then(|client| client.open(guest, args.port));
    let stream = opened.map_err(|error| asking(entry.name(), error))?;
    let where_to = format!("port {} of {}", args.port, entry.name());
    let ended = relay(&stream, None, &|| {})
        .map_err(|error| Failure::machine(anyhow!(error).context(format!("joining {where_to}"))))?;
    if ended == Ended::Refused {
        output::note(&format!("{where_to} refused the connection, or closed it without a word"));
        return Ok(STATUS_REFUSED);
    }
    Ok(0)
}

/// The machine of that name, or the one whose NAT gave out that address.
fn find(runtime: &Runtime, guest: &str) -> Result<(Entry, Option<Ipv4Addr>), Failure> {
    let Ok(address) = guest.parse::<Ipv4Addr>() else {
        let name: MachineName = guest.parse().map_err(|_| {
            Failure::usage(anyhow!("'{guest}' is neither a machine's name nor a guest's IPv4 address"))
        })?;
        let entry = runtime.find_alive(&name).map_err(failure)?;
        let guest = netinfo::address(&entry, netinfo::ask(&entry).as_ref());
        return Ok((entry, guest));
    };
    let mut living = runtime.list().map_err(failure)?;
    living.retain(|entry| {
        let leases = |entry: &Entry| netinfo::ask(entry).map(|status| status.leases).unwrap_or_default();
        entry.is_alive() && leases(entry).iter().any(|lease| lease.address == address)
    });
    let names: Vec<_> = living.iter().map(|entry| entry.name().to_string()).collect();
    match (living.pop(), names.as_slice()) {
        (Some(entry), [_]) => Ok((entry, Some(address))),
        (None, _) => {
            Err(Failure::usage(anyhow!("no machine's guest has the address {address}; see pontoon ps")))
        }
        // Each NAT is a network of its own.
        (Some(_), names) => Err(Failure::usage(anyhow!(
            "{address} is a guest of each of {}; name the machine instead",
            names.join(", ")
        ))),
    }
}
