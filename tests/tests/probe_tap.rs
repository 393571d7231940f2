//! The probe guest on a bridge, on this host's KVM: `--net tap:br0` on a LAN of network namespaces.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pontoon_tests::lan::{Lan, NEIGHBOUR};
use pontoon_tests::{Probe, Reports, have_kvm, pontoon};

/// A machine in the host's namespace.
fn start(lan: &Lan, name: &str, orders: &[&str]) -> Child {
    // A user's machines have their names to themselves, and other tests run at the same time.
    let name = format!("{name}-{}", std::process::id());
    let mut probe = Probe::new().flag(["--net", "tap:br0", "--name", &name]);
    for order in orders {
        probe = probe.order(*order);
    }
    lan.in_host(pontoon())
        .args(probe.args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip netns exec starts")
}

fn end(child: Child) -> Reports {
    Reports::from(child.wait_with_output().expect("it was started"))
}

fn wait_until(what: &str, mut fact: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !fact() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn lan() -> Option<Lan> {
    if have_kvm() { Lan::new() } else { None }
}

#[test]
fn a_guest_on_the_bridge_is_leased_an_address_by_the_lan() {
    let Some(lan) = lan() else { return };
    let reports = end(start(
        &lan,
        "vm1",
        &[
            "dhcp",
            "ping=10.88.0.1,count=3,timeout=4000",
            "ping=10.88.0.2,count=1,timeout=4000",
            "resolve=neighbour.test",
        ],
    ));
    let lease = reports.all_ok().of("dhcp");
    let address: Ipv4Addr = lease["address"].as_str().and_then(|a| a.parse().ok()).expect("an address");
    assert_eq!(address.octets()[..3], [10, 88, 0]);
    assert!((100..=199).contains(&address.octets()[3]));
    assert_eq!(lease["server"], NEIGHBOUR.to_string());
}

#[test]
fn two_guests_reach_each_other_and_the_lan_reaches_a_guest() {
    let Some(lan) = lan() else { return };
    let server = start(&lan, "vm1", &["static=10.88.0.11/24", "listen=7,count=2"]);
    wait_until("the first guest answers pings", || {
        lan.in_host("busybox")
            .args(["ping", "-c1", "-W1", "10.88.0.11"])
            .output()
            .is_ok_and(|o| o.status.success())
    });
    let client = start(
        &lan,
        "vm2",
        &[
            "static=10.88.0.12/24",
            "ping=10.88.0.11,count=3,interval=1",
            "tcp-echo=10.88.0.11:7,bytes=1000000",
        ],
    );
    end(client).all_ok();
    // From the LAN, through the kernel's own TCP: bash's /dev/tcp writes a line and reads it back.
    let said = lan
        .in_neighbour("bash")
        .args(["-c", "exec 3<>/dev/tcp/10.88.0.11/7; echo hello >&3; head -n 1 <&3"])
        .output()
        .expect("bash is installed");
    assert_eq!(String::from_utf8_lossy(&said.stdout), "hello\n");
    end(server).all_ok();
}

#[test]
fn the_tap_is_the_next_vnet_and_goes_with_its_machine() {
    let Some(lan) = lan() else { return };
    let mut child = start(&lan, "vm1", &["static=10.88.0.11/24", "wait=20000"]);
    wait_until("vnet0 is a port of br0", || lan.ports().contains(&"vnet0".to_owned()));
    let mut second = start(&lan, "vm2", &["static=10.88.0.12/24", "wait=20000"]);
    wait_until("vnet1 is a port of br0", || lan.ports().contains(&"vnet1".to_owned()));
    // SIGKILL: no handler runs, nothing may be left all the same.
    child.kill().expect("it runs");
    let _ = child.wait();
    wait_until("vnet0 is gone after SIGKILL", || !lan.ports().contains(&"vnet0".to_owned()));
    // SIGTERM: an end in order, told as a shell tells it.
    Command::new("kill").arg(second.id().to_string()).status().expect("kill is installed");
    assert_eq!(second.wait().expect("it was started").code(), Some(128 + 15));
    assert_eq!(lan.ports(), ["eth0"]);
}

#[test]
fn a_bridge_that_is_not_there_is_one_clear_error() {
    let Some(lan) = lan() else { return };
    let mut command = lan.in_host(pontoon());
    let name = format!("no-bridge-{}", std::process::id());
    let output = command
        .args(Probe::new().flag(["--net", "tap:nobr0", "--name", &name]).order("dhcp").args())
        .output()
        .expect("it starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("no bridge 'nobr0'") && text.contains("scripts/bridge up"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}
