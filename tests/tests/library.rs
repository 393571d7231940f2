//! The library as an embedder meets it: its examples run, and several machines share one process.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use net::nat::{NatConfig, Publish};
use pontoon_tests::{Pontoon, carry_images, debian_image, example, have_kvm, have_lab, text};
use vmm::agent::{AgentError, Client, ExitStatus, Process};
use vmm::boot::BootError;
use vmm::devices::disk::{Disk, DiskError, DiskMode};
use vmm::machine::{
    BuildError, Counters, ExitReason, Guest, GuestError, Machine, MachineBuilder, Nic, Remote, Running,
    RunningHere, StartError,
};
use vmm::network::{Network, NetworkError};
use vmm::runtime::control::{Control, ControlError};
use vmm::runtime::{CgroupError, Claim, Entry, Runtime, RuntimeError};

/// What a program keeps in its threads and tasks goes from one to another; an error goes anywhere.
const _: () = {
    const fn moves<T: Send + 'static>() {}
    const fn shared<T: Send + Sync + 'static>() {}
    const fn error<T: std::error::Error + Send + Sync + 'static>() {}
    moves::<(MachineBuilder, Guest, Nic, Disk)>();
    moves::<(Machine, RunningHere, Process)>();
    shared::<(Running, Remote, ExitReason, Counters)>();
    shared::<(Network, NatConfig, Client, ExitStatus)>();
    moves::<(Runtime, Claim, Entry, Control)>();
    error::<BuildError>();
    error::<StartError>();
    error::<GuestError>();
    error::<BootError>();
    error::<DiskError>();
    error::<NetworkError>();
    error::<AgentError>();
    error::<RuntimeError>();
    error::<ControlError>();
    error::<CgroupError>();
    error::<guest_images::store::Error>();
    error::<vmm::lab::LabError>();
};

fn probe(orders: &str) -> MachineBuilder {
    let guest = Guest::probe().words(format!("probe.do={orders}"));
    Machine::builder().guest(guest).expect("it is in the library").memory(64 << 20)
}

/// Reads the console until the probe has its lease.
fn until_leased(console: UnixStream) -> BufReader<UnixStream> {
    let mut console = BufReader::new(console);
    console
        .by_ref()
        .lines()
        .map_while(Result::ok)
        .find(|line| line.contains(r#""order":"dhcp""#))
        .expect("a lease");
    console
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
fn a_kernel_boots_on_this_terminal_and_its_status_is_the_programs() {
    if !have_kvm() {
        return;
    }
    let folder = tempfile::tempdir().expect("the temporary directory is writable");
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, guest_images::PROBE).expect("room for a kernel");
    let output = Command::new(example("boot"))
        .arg(&kernel)
        .args(["--bare-metal", "--memory", "64", "--cmdline", "probe.do=stats"])
        .output()
        .expect("it was built");
    let all = text(&output);
    // The probe's status for want of a network.
    assert_eq!(output.status.code(), Some(3), "{all}");
    assert!(String::from_utf8_lossy(&output.stdout).contains(r#""reason":"no-nic""#), "{all}");
}

#[test]
fn a_command_in_the_lab_has_this_programs_streams_and_gives_its_status() {
    if !have_lab() {
        return;
    }
    let words = ["--timeout", "100", "--", "sh", "-c", "echo out; echo bad >&2; exit 3"];
    let output = Command::new(example("lab")).args(words).output().expect("it was built");
    let all = text(&output);
    assert_eq!(output.status.code(), Some(3), "{all}");
    assert_eq!((output.stdout.as_slice(), all.contains("bad")), (&b"out\n"[..], true), "{all}");
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
    let _console = until_leased(console);
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
    let config = NatConfig { publish: vec![Publish::tcp(0, 80)], ..NatConfig::default() };
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

#[test]
fn six_machines_of_one_process_have_an_address_each_and_end_apart() {
    if !have_kvm() {
        return;
    }
    const COUNT: u8 = 6;
    let count = usize::from(COUNT);
    let network = Network::nat(NatConfig::default()).expect("a network needs no privilege");
    let machines: Vec<(Running, UnixStream)> = (0..COUNT)
        .map(|n| {
            let nic = network.nic(&format!("vm{n}")).expect("there is room");
            let (builder, console) = probe(&format!("dhcp,hostname=vm{n};listen=80,timeout=60000;end={n}"))
                .nic(nic)
                .console()
                .expect("descriptors");
            (builder.build().expect("a probe boots").start().expect("threads"), console)
        })
        .collect();
    let machines: Vec<_> =
        machines.into_iter().map(|(machine, console)| (machine, until_leased(console))).collect();
    let leases = network.leases();
    assert_eq!(leases.len(), count);
    assert_eq!(leases.iter().map(|lease| lease.address).collect::<BTreeSet<_>>().len(), count);
    assert!(machines.iter().all(|(machine, _)| machine.exit_reason().is_none()), "all of them run");
    // The last one first: none waits for another.
    for (n, (machine, _console)) in (0..COUNT).zip(machines).rev() {
        let name = format!("vm{n}");
        let lease = leases.iter().find(|lease| lease.name.as_ref() == Some(&name)).expect("its lease");
        let served = (0..200).any(|_| {
            let mut stream = network.connect(Some(lease.address), 80).expect("the network is up");
            let mut back = Vec::new();
            let said = stream.write_all(b"x").and_then(|()| stream.shutdown(std::net::Shutdown::Write));
            said.and_then(|()| stream.read_to_end(&mut back)).is_ok_and(|count| count == 1)
        });
        assert!(served, "{name} answers");
        assert_eq!(machine.wait(), ExitReason::Status(n));
    }
}

/// Set in the process of [`nothing_is_left_of_machines_that_were_dropped_in_full_flight`].
const CHILD: &str = "PONTOON_TEST_LIBRARY_CHILD";

/// What this process has open, its threads, and the guests' memories among its mappings.
fn belongings() -> (Vec<PathBuf>, Vec<String>, usize) {
    let entries = |folder| fs::read_dir(folder).expect("/proc is there").flatten();
    let mut open: Vec<_> = entries("/proc/self/fd").filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    open.retain(|target| !target.starts_with("/proc"));
    let threads =
        entries("/proc/self/task").filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    let maps = fs::read_to_string("/proc/self/maps").expect("/proc is there");
    let mut threads: Vec<_> = threads.collect();
    open.sort();
    threads.sort();
    (open, threads, maps.lines().filter(|line| line.contains("memfd:")).count())
}

/// Three machines with everything that a machine can have, dropped while their guests run.
fn drop_machines_in_full_flight(base: &Path) {
    let config =
        NatConfig { publish: vec![Publish::tcp(0, 80), Publish::udp(0, 53)], ..NatConfig::default() };
    let network = Network::nat(config).expect("a network needs no privilege");
    let machines: Vec<_> = (0..3)
        .map(|n| {
            let disk = Disk::open(base, DiskMode::Overlay).expect("a base is shared");
            let builder = probe(&format!("dhcp,hostname=vm{n};end=hang"));
            let builder =
                builder.cpus(2).disk(disk).nic(network.nic(&format!("vm{n}")).expect("there is room"));
            let (builder, agent) = builder.agent().expect("a folder");
            let (builder, console) = builder.console().expect("descriptors");
            let machine = builder.build().expect("a probe boots").start().expect("threads");
            (machine, agent, until_leased(console))
        })
        .collect();
    let sockets = fs::read_dir(std::env::temp_dir()).expect("it is there").flatten();
    let modes: Vec<u32> = sockets.map(|entry| entry.metadata().expect("ours").permissions().mode()).collect();
    assert_eq!(modes, [0o40700; 3], "a folder for each agent's socket, closed to others");
    assert!(machines.iter().all(|(machine, ..)| machine.exit_reason().is_none()), "all of them run");
}

/// In a process of its own, since other tests have machines too.
#[test]
fn nothing_is_left_of_machines_that_were_dropped_in_full_flight() {
    if !have_kvm() {
        return;
    }
    let Some(base) = std::env::var_os(CHILD).map(PathBuf::from) else {
        let folder = tempfile::tempdir().expect("the temporary directory is writable");
        let (base, temporary) = (folder.path().join("base.img"), folder.path().join("tmp"));
        fs::create_dir(&temporary).expect("an empty folder");
        fs::write(&base, [7; 4096]).expect("room for a page");
        let output = Command::new(std::env::current_exe().expect("a test has a path"))
            .args(["--exact", "nothing_is_left_of_machines_that_were_dropped_in_full_flight"])
            .env(CHILD, &base)
            .env("TMPDIR", &temporary)
            .output()
            .expect("it is running already");
        assert!(output.status.success(), "{}", text(&output));
        let left: Vec<OsString> =
            fs::read_dir(&temporary).expect("it is there").flatten().map(|entry| entry.file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
        return;
    };
    // The first time opens what std keeps open.
    drop_machines_in_full_flight(&base);
    let before = belongings();
    drop_machines_in_full_flight(&base);
    assert_eq!(belongings(), before);
    assert_eq!(before.2, 0, "no guest's memory is mapped");
    Disk::open(&base, DiskMode::ReadWrite).expect("no machine has the disk any more");
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
