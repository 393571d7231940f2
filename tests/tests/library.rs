//! The library as an embedder meets it: its examples run, and several machines share one process.

use std::borrow::Cow;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output};
use std::time::Duration;

use net::nat::{NatConfig, Publish};
use pontoon_tests::{Pontoon, carry_images, debian_image, example, have_kvm, text};
use vmm::boot::Kernel;
use vmm::machine::{ExitReason, Machine, MachineBuilder};
use vmm::network::{Network, NetworkError};

fn probe(orders: &str) -> MachineBuilder {
    Machine::builder()
        .kernel(Kernel::Bytes(Cow::Borrowed(guest_images::PROBE)))
        .bare_metal(true)
        .cmdline(format!("probe.do={orders}"))
        .memory(64 << 20)
}

#[test]
fn two_machines_of_one_process_ping_each_other_by_name() {
    if !have_kvm() {
        return;
    }
    let output = Command::new(example("two_machines")).output().expect("it was built");
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    assert!(all.contains(r#""received":3"#), "{all}");
}

#[test]
fn a_stream_of_the_program_reaches_a_port_of_a_guest() {
    if !have_kvm() {
        return;
    }
    let network = Network::nat(NatConfig::default()).expect("a network needs no privilege");
    let (builder, console) = probe("dhcp,hostname=vm1;listen=80,count=1,timeout=60000")
        .nic(network.nic("vm1").expect("the first"))
        .console()
        .expect("descriptors");
    let machine = builder.build().expect("a probe boots").start().expect("threads");
    let mut lines = BufReader::new(console).lines();
    lines.by_ref().map_while(Result::ok).find(|line| line.contains(r#""order":"dhcp""#)).expect("a lease");
    let leases = network.leases();
    assert_eq!(leases.len(), 1);
    assert_eq!(leases[0].name.as_deref(), Some("vm1"));
    // The listener comes up right behind the lease; a refusal before that is a stream that ends.
    let echoed = (0..200).find_map(|_| {
        let mut stream = network.connect(Some(leases[0].address), 80).expect("the network is up");
        stream.write_all(b"hello").ok()?;
        stream.shutdown(std::net::Shutdown::Write).ok()?;
        let mut back = Vec::new();
        stream.read_to_end(&mut back).ok()?;
        (!back.is_empty()).then_some(back)
    });
    assert_eq!(echoed.as_deref(), Some(&b"hello"[..]));
    assert_eq!(machine.wait_for(Duration::from_secs(60)), Some(ExitReason::Status(0)));
    assert!(machine.counters().nics[0].port.tx_frames > 0);
    drop(machine);
}

#[test]
fn a_dropped_machine_gives_its_name_and_its_port_back() {
    if !have_kvm() {
        return;
    }
    let publish: Publish = "1:80".parse().expect("a port");
    let config = NatConfig { publish: vec![Publish { host_port: 0, ..publish }], ..NatConfig::default() };
    let network = Network::nat(config).expect("a network needs no privilege");
    let port = network.published()[0].1;
    let machine =
        probe("dhcp;wait=60000").nic(network.nic("vm1").expect("the first")).build().expect("it boots");
    let machine = machine.start().expect("threads");
    assert!(matches!(network.nic("vm1"), Err(NetworkError::Plug(_))), "the name is taken");
    drop(machine);
    network.nic("vm1").expect("the name is free");
    drop(network);
    TcpStream::connect(port).expect_err("the published port is closed");
}

#[test]
fn an_isolated_network_has_no_way_in() {
    let network = Network::isolated();
    assert!(matches!(network.connect(None, 80), Err(NetworkError::Isolated)));
    assert!(network.subnet().is_none() && network.leases().is_empty() && network.published().is_empty());
}

/// An example in the lab, with the image `debian`.
fn in_lab(name: &str, words: &[&str]) -> Option<Output> {
    let images = carry_images(&debian_image()?);
    let put = format!("{}:/usr/local/bin/{name}", example(name).display());
    let mut args = vec!["lab", "--timeout", "200", "--put", &put, "--put", &images, "--", name];
    args.extend(words);
    Some(Pontoon::new(args).output())
}

#[test]
fn a_command_of_the_agent_has_its_output_its_errors_and_its_status() {
    let words = ["sh", "-c", "uname -r; echo bad >&2; exit 5"];
    let Some(output) = in_lab("run_command", &words) else { return };
    let all = text(&output);
    assert_eq!(output.status.code(), Some(5), "{all}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("cloud-amd64"), "{all}");
    assert!(all.contains("bad"), "{all}");
}

#[test]
fn a_sandbox_runs_a_command_without_a_network_and_returns_its_status() {
    let Some(output) = in_lab("sandbox", &["100", "sh", "-c", "echo out; ip -o link; exit 3"]) else {
        return;
    };
    let all = text(&output);
    assert_eq!(output.status.code(), Some(3), "{all}");
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("out") && out.contains("lo:") && !out.contains("eth0"), "{all}");
}

#[test]
fn a_sandbox_is_ended_at_its_deadline_by_its_power_button() {
    let Some(output) = in_lab("sandbox", &["15", "sh", "-c", "echo begun; sleep 1000"]) else { return };
    let all = text(&output);
    assert_eq!(output.status.code(), Some(124), "{all}");
    assert!(all.contains("the guest powered off"), "{all}");
}
