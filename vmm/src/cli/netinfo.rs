//! `pontoon net inspect` and `net ls`: what virsh tells with domiflist, net-dhcp-leases and domifstat, and brctl with show.
//!
//! What a machine was made with is in its state; what has happened since is asked of the machine itself. One that does not
//! answer is shown without.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use serde_json::{Value, json};
use vmm::runtime::control::{Client, Flow, Status};
use vmm::runtime::{CONTROL_SOCKET, Entry, Runtime, State};

use super::machine_args::{NetInspectArgs, NetLsArgs};
use super::registry::failure;
use super::{Failure, output};

/// How long the network may take to tell its connections.
const PATIENCE: Duration = Duration::from_secs(1);
/// The one kind of NIC that there is.
const MODEL: &str = "virtio";

pub(crate) fn inspect(args: &NetInspectArgs) -> Result<u8, Failure> {
    let entry = Runtime::open().and_then(|runtime| runtime.find_alive(&args.name)).map_err(failure)?;
    let state = entry.state().map_err(|error| Failure::machine(anyhow!("{}: {error}", args.name)))?;
    let status = ask(&entry);
    // A guest that has not started its NIC has no connections, and its network does not answer.
    let asked = Client::connect_within(&entry.file(CONTROL_SOCKET), PATIENCE);
    let flows = asked.and_then(|mut client| client.flows()).unwrap_or_default();
    if args.json {
        output::json(&describe(state, status.as_ref(), &flows));
    } else {
        print(state, status.as_ref(), &flows);
    }
    Ok(0)
}

/// What the machine says; a note if it says nothing.
pub(crate) fn ask(entry: &Entry) -> Option<Status> {
    match entry.control().and_then(|mut client| client.status()) {
        Ok(status) => Some(status),
        // It may end at any time.
        Err(_) if entry.process().is_err() => None,
        Err(error) => {
            output::note(&format!("{}: {error}", entry.name()));
            None
        }
    }
}

/// The address that the NAT gave to the machine's own NIC.
pub(crate) fn address(entry: &Entry, status: Option<&Status>) -> Option<Ipv4Addr> {
    let mac = entry.state().ok()?.mac.as_ref()?;
    Some(status?.leases.iter().find(|lease| lease.mac == *mac)?.address)
}

/// `nat` or `bridge`, as virsh calls them, and its name.
fn kind_and_source(state: &State) -> (&'static str, String) {
    match state.net.split_once(':') {
        Some(("tap", bridge)) => ("bridge", bridge.to_owned()),
        _ => ("nat", state.subnet.clone().unwrap_or_default()),
    }
}

fn describe(state: &State, status: Option<&Status>, flows: &[Flow]) -> Value {
    let (kind, source) = kind_and_source(state);
    let interfaces: Vec<_> = state
        .mac
        .iter()
        .map(|mac| {
            json!({
                "interface": state.interface, "type": kind, "source": source, "model": MODEL, "mac": mac,
                "counters": status.and_then(|status| status.nics.first()),
            })
        })
        .collect();
    json!({
        "name": state.name, "net": state.net, "subnet": state.subnet, "published": state.published,
        "interfaces": interfaces,
        "leases": status.map(|status| &status.leases),
        "flows": flows,
    })
}

fn print(state: &State, status: Option<&Status>, flows: &[Flow]) {
    let Some(mac) = &state.mac else {
        output::line(&format!("{} has no network interface (--net none)", state.name));
        return;
    };
    let (kind, source) = kind_and_source(state);
    let interface = state.interface.clone().unwrap_or_else(|| "-".to_owned());
    let row = [interface, kind.to_owned(), source, MODEL.to_owned(), mac.clone()].map(output::cell);
    output::table(&["INTERFACE", "TYPE", "SOURCE", "MODEL", "MAC"], &[row.to_vec()]);
    if !state.published.is_empty() {
        output::line(&format!("published: {}", output::cell(state.published.join(" "))));
    }
    let Some(status) = status else { return };
    if !status.leases.is_empty() {
        output::line("");
        let rows: Vec<_> = status
            .leases
            .iter()
            .map(|lease| {
                let name = lease.name.clone().unwrap_or_default();
                let expires = format!("{}s", lease.expires_s);
                [lease.mac.clone(), lease.address.to_string(), name, expires].map(output::cell).to_vec()
            })
            .collect();
        output::table(&["MAC", "ADDRESS", "HOST NAME", "EXPIRES"], &rows);
    }
    for nic in &status.nics {
        output::line("");
        let row =
            |way: &str, frames: u64, bytes: u64| vec![way.to_owned(), frames.to_string(), bytes.to_string()];
        let rows = [
            row("to the guest", nic.to_guest_frames, nic.to_guest_bytes),
            row("from the guest", nic.from_guest_frames, nic.from_guest_bytes),
        ];
        output::table(&["WAY", "FRAMES", "BYTES"], &rows);
        if !nic.dropped.is_empty() {
            let reasons: Vec<_> = nic.dropped.iter().map(|(why, n)| format!("{why} {n}")).collect();
            output::line(&format!("refused: {}", output::cell(reasons.join(", "))));
        }
    }
    if !flows.is_empty() {
        output::line("");
        let rows: Vec<_> = flows
            .iter()
            .map(|flow| {
                [flow.guest.clone(), flow.world.clone(), flow.state.clone()].map(output::cell).to_vec()
            })
            .collect();
        output::table(&["GUEST", "WORLD", "STATE"], &rows);
    }
}

/// A network and who is on it.
#[derive(Default)]
struct Net {
    subnet: Option<String>,
    machines: Vec<Value>,
    interfaces: Vec<String>,
}

pub(crate) fn ls(args: &NetLsArgs) -> Result<u8, Failure> {
    let entries = Runtime::open().and_then(|runtime| runtime.list()).map_err(failure)?;
    let mut nets: BTreeMap<String, Net> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.is_alive()) {
        let Ok(state) = entry.state() else { continue };
        if state.mac.is_none() {
            continue;
        }
        // Each `nat` is a network of its own.
        let name = if state.net == "nat" { format!("nat ({})", entry.name()) } else { state.net.clone() };
        let net = nets.entry(name).or_default();
        net.subnet.clone_from(&state.subnet);
        net.machines.push(json!({ "name": entry.name(), "mac": state.mac, "interface": state.interface }));
        net.interfaces.extend(state.interface.clone());
    }
    // A bridge has other members, too.
    for (name, net) in &mut nets {
        if let Some(bridge) = name.strip_prefix("tap:") {
            net.interfaces = members(bridge);
        }
    }
    if args.json {
        let list: Vec<_> = nets
            .iter()
            .map(|(name, net)| {
                let name = name.split_once(" (").map_or(name.as_str(), |(kind, _)| kind);
                json!({ "net": name, "subnet": net.subnet, "interfaces": net.interfaces, "machines": net.machines })
            })
            .collect();
        output::json(&list);
        return Ok(0);
    }
    let names = |net: &Net| -> Vec<String> {
        net.machines.iter().filter_map(|machine| machine["name"].as_str().map(str::to_owned)).collect()
    };
    let rows: Vec<_> = nets
        .iter()
        .map(|(name, net)| {
            let name = name.split_once(" (").map_or(name.as_str(), |(kind, _)| kind).to_owned();
            let subnet = net.subnet.clone().unwrap_or_default();
            [name, subnet, net.interfaces.join(" "), names(net).join(" ")].map(output::cell).to_vec()
        })
        .collect();
    output::table(&["NET", "SUBNET", "INTERFACES", "MACHINES"], &rows);
    Ok(0)
}

/// The interfaces that are ports of a bridge, as the kernel lists them.
fn members(bridge: &str) -> Vec<String> {
    let folder = Path::new("/sys/class/net").join(bridge).join("brif");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
