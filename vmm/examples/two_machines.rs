//! Boots two machines on one network of this process and lets the first ping the second, by its name.
//!
//! `two_machines`
//!
//! The guests are the built-in probe, so it needs nothing but /dev/kvm. Prints what both guests report; the exit status
//! is the first one's.

use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::process::ExitCode;

use anyhow::Result;
use net::nat::NatConfig;
use vmm::machine::{Guest, Machine, Running};
use vmm::network::Network;

/// A machine called `name` that carries out `orders` (docs/probe.md), and its console.
fn start(network: &Network, name: &str, orders: &str) -> Result<(Running, impl BufRead)> {
    let (builder, console) = Machine::builder()
        .guest(Guest::probe().words(format!("probe.do=dhcp,hostname={name};{orders}")))?
        .memory(64 << 20)
        .nic(network.nic(name)?)
        .console()?;
    Ok((builder.build()?.start()?, BufReader::new(console)))
}

fn main() -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    let network = Network::nat(NatConfig::on_free_subnet()?)?;
    let (second, mut says) = start(&network, "second", "wait=20000")?;
    // It can be found by its name once it has its lease.
    for line in says.by_ref().lines() {
        let line = line?;
        writeln!(out, "second: {line}")?;
        if line.contains(r#""order":"dhcp""#) {
            break;
        }
    }
    let (first, says) = start(&network, "first", "ping=second.internal,count=3,interval=10,timeout=3000")?;
    for line in says.lines() {
        let line = line?;
        writeln!(out, "first: {line}")?;
        if line.contains(r#""event":"exit""#) {
            break;
        }
    }
    let reason = first.wait();
    second.stop();
    writeln!(out, "first: {reason}; second: {}", second.wait())?;
    Ok(ExitCode::from(reason.status()))
}
