//! Names and addresses in targets: `HOST`, `HOST:PORT`, `HOST:PORT/PATH`, where HOST is a dotted address, a
//! DNS name, `gw` (the default gateway), `dns` (the first name server) or `self`.

use super::dns;
use crate::nic::Nic;
use crate::report::Report;
use crate::stack::{Reason, Stack};
use smoltcp::wire::Ipv4Address;

/// Finds the address of a host; a name's address is reported as `address`.
pub(super) fn host<N: Nic>(
    stack: &mut Stack<N>,
    name: &str,
    report: &mut Report,
) -> Result<Ipv4Address, Reason> {
    let known = match name {
        "gw" => Some(stack.gateway.ok_or(Reason::NoAddress)?),
        "dns" => Some(stack.dns.first().copied().ok_or(Reason::NoServer)?),
        "self" => Some(stack.address().ok_or(Reason::NoAddress)?),
        _ => name.parse().ok(),
    };
    if let Some(address) = known {
        if name.parse::<Ipv4Address>().is_err() {
            report.text("address", address);
        }
        return Ok(address);
    }
    let address = dns::lookup(stack, name)?;
    report.text("address", address);
    Ok(address)
}

/// Splits `HOST:PORT[/PATH]`.
pub(super) fn split(target: &str) -> Result<(&str, u16, &str), Reason> {
    let (server, path) = target.find('/').map_or((target, "/"), |at| target.split_at(at));
    let (name, port) = server.rsplit_once(':').ok_or(Reason::BadTarget)?;
    Ok((name, port.parse().map_err(|_| Reason::BadTarget)?, path))
}

/// Finds the address and port of `HOST:PORT`.
pub(super) fn endpoint<N: Nic>(
    stack: &mut Stack<N>,
    target: &str,
    report: &mut Report,
) -> Result<(Ipv4Address, u16), Reason> {
    let (name, port, _) = split(target)?;
    Ok((host(stack, name, report)?, port))
}
