//! The names of the network itself, which no server of the world knows.
//!
//! | name | address |
//! |---|---|
//! | `vm1`, `vm1.internal` | that of the guest's lease or reservation; the domain is the network's (`internal`) |
//! | `gateway`, `gateway.internal`, `host.pontoon.internal` | the gateway's, where the host's own services are under `host_access` |
//! | `localhost` | 127.0.0.1 (RFC 6761 §6.3) |
//! | n.122.168.192.in-addr.arpa | the name of that guest, or none; addresses of the network are never asked for outside |
//!
//! They have A records only; every other type is there without data. A single label that is nobody's does not exist:
//! it means nothing outside (A and AAAA only; the world is asked for the NS of a top-level domain). Other names under
//! the domain are asked for outside, because hosts have names under `internal`, too.

use std::net::Ipv4Addr;

use super::wire::{Query, Rcode, Record, kind};
use crate::nat::config::Subnet;

/// A name by which every guest finds the host, whatever the domain is.
pub(crate) const HOST: &str = "host.pontoon.internal";
/// The gateway's label.
pub(crate) const GATEWAY: &str = "gateway";

/// Who has which name, for the duration of one question.
pub(crate) trait Names {
    /// The address of the guest with this label.
    fn address(&self, label: &str) -> Option<Ipv4Addr>;
    /// The label of the guest with this address.
    fn label(&self, address: Ipv4Addr) -> Option<String>;
}

/// Our answer to a question, or nothing when it is for the world.
pub(crate) fn answer(query: &Query, subnet: Subnet, domain: &str, names: &dyn Names) -> Option<Vec<u8>> {
    if query.class != 1 {
        return None;
    }
    if let Some(address) = reverse(&query.name).filter(|address| subnet.contains(*address)) {
        let name = if address == subnet.host(1) { Some(GATEWAY.to_owned()) } else { names.label(address) };
        let Some(name) = name else { return Some(query.answer(Rcode::NxDomain, true, &[])) };
        let name = if domain.is_empty() { name } else { format!("{name}.{domain}") };
        let asked = matches!(query.kind, kind::PTR | kind::ANY);
        let records = asked.then_some(Record::Ptr(name));
        return Some(query.answer(Rcode::NoError, true, records.as_slice()));
    }
    let label = match query.name.split_once('.') {
        _ if query.name == HOST => GATEWAY,
        None => query.name.as_str(),
        Some((label, behind)) if behind.eq_ignore_ascii_case(domain) => label,
        Some(_) => return None,
    };
    let address = match label {
        GATEWAY => Some(subnet.host(1)),
        "localhost" => Some(Ipv4Addr::LOCALHOST),
        _ => names.address(label),
    };
    let Some(address) = address else {
        let alone = !query.name.is_empty() && !query.name.contains('.');
        let nobody = alone && matches!(query.kind, kind::A | kind::AAAA);
        return nobody.then(|| query.answer(Rcode::NxDomain, true, &[]));
    };
    let asked = matches!(query.kind, kind::A | kind::ANY);
    Some(query.answer(Rcode::NoError, true, asked.then_some(Record::A(address)).as_slice()))
}

/// The address that a name under in-addr.arpa stands for.
fn reverse(name: &str) -> Option<Ipv4Addr> {
    let mut octets = name.strip_suffix(".in-addr.arpa")?.split('.').map(|octet| {
        octet.parse::<u8>().ok().filter(|n| n.to_string() == octet) // no leading zeros
    });
    let (d, c, b, a) = (octets.next()??, octets.next()??, octets.next()??, octets.next()??);
    octets.next().is_none().then(|| Ipv4Addr::new(a, b, c, d))
}
