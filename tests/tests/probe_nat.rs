//! The probe guest behind the NAT, on this host's KVM: what `--net nat` promises, seen from inside a machine.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use pontoon_tests::{Probe, Reports, have_kvm};
use vmm::world::World;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);

/// A probe on the default subnet, whatever this host routes.
fn probe() -> Probe {
    Probe::new().flag(["--subnet", "192.168.122.0/24"])
}

fn world() -> World {
    World::start(GATEWAY).expect("loopback has free ports")
}

/// A port of 127.0.0.1 on which nobody listens.
fn closed_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|l| l.local_addr())
        .expect("loopback has free ports")
        .port()
}

#[test]
fn a_lease_is_what_virbr0_would_give() {
    if !have_kvm() {
        return;
    }
    let reports = probe().order("dhcp").run();
    let lease = reports.all_ok().of("dhcp");
    let address: Ipv4Addr = lease["address"].as_str().and_then(|a| a.parse().ok()).expect("an address");
    assert_eq!(address.octets()[..3], [192, 168, 122]);
    assert!((2..=254).contains(&address.octets()[3]), "{address}");
    assert_eq!(lease["gateway"], "192.168.122.1");
    assert_eq!(lease["server"], "192.168.122.1");
    assert_eq!(lease["prefix"], 24);
    assert_eq!(lease["lease_s"], 3600);
    assert_eq!((&lease["t1_s"], &lease["t2_s"]), (&1800.into(), &3150.into()));
    assert_eq!(lease["broadcast"], "192.168.122.255");
}

#[test]
fn a_machine_keeps_its_address_over_a_restart() {
    if !have_kvm() {
        return;
    }
    let lease = |name| {
        let reports = probe().flag(["--name", name]).order("dhcp").run();
        reports.all_ok().of("dhcp")["address"].clone()
    };
    // No other test has these names. Their addresses are made from them, and differ.
    let first = lease("restarted");
    assert_eq!(first, lease("restarted"));
    assert_ne!(first, lease("another"));
}

#[test]
fn names_streams_and_datagrams_reach_the_world() {
    if !have_kvm() {
        return;
    }
    let world = world();
    let (tcp, udp) = (world.tcp_echo.port(), world.udp_echo.port());
    let reports = probe()
        .flag(["--host-access", "--dns", &world.dns.to_string()])
        .order("dhcp")
        .order("ping=gw,count=3,interval=1")
        .order("resolve=world.test")
        .order(format!("tcp-echo=gw:{tcp},bytes=8388608"))
        .order(format!("udp-echo=gw:{udp},bytes=1400,count=5"))
        .order(format!("tcp-rr=gw:{tcp},count=50"))
        .run();
    reports.all_ok();
    assert_eq!(reports.of("ping")["received"], 3);
    assert_eq!(reports.of("tcp-echo")["bytes"], 8_388_608);
    assert_eq!(reports.of("udp-echo")["received"], 5);
}

#[test]
fn the_hosts_loopback_is_closed_unless_it_is_opened() {
    if !have_kvm() {
        return;
    }
    let world = world();
    let reports = probe()
        .order("dhcp")
        .order(format!("tcp-connect=gw:{},expect=refused", world.tcp_echo.port()))
        .order(format!("tcp-connect=127.0.0.1:{},expect=fail,timeout=1500", world.tcp_echo.port()))
        .order(format!("udp-echo=gw:{},count=1,expect=fail", world.udp_echo.port()))
        .run();
    reports.all_ok();
}

#[test]
fn metadata_addresses_are_closed() {
    if !have_kvm() {
        return;
    }
    let reports = probe()
        .order("dhcp")
        .order("tcp-connect=169.254.169.254:80,expect=refused")
        .order("ping=169.254.169.254,count=1,expect=unreachable")
        .run();
    reports.all_ok();
}

#[test]
fn a_refused_port_of_the_world_is_refused_to_the_guest_at_once() {
    if !have_kvm() {
        return;
    }
    let reports = probe()
        .flag(["--host-access"])
        .order("dhcp")
        .order(format!("tcp-connect=gw:{},expect=refused", closed_port()))
        .run();
    reports.all_ok();
}

/// Starts the probe with a published port and connects to it once it listens.
fn with_published(orders: &[&str], guest: u16, client: impl FnOnce(TcpStream)) -> Reports {
    let port = closed_port();
    let mut probe = probe().flag(["-p", &format!("{port}:{guest}")]).order("dhcp");
    for order in orders {
        probe = probe.order(*order);
    }
    let mut command = probe.command();
    command.command().stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.command().spawn().expect("pontoon starts");
    let deadline = Instant::now() + Duration::from_secs(20);
    // The port is open on the host from the start; the connection waits for the guest behind it.
    let stream = loop {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "the published port never opened: {error}"),
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("not zero");
    client(stream);
    Reports::from(child.wait_with_output().expect("pontoon ends"))
}

#[test]
fn a_published_port_leads_into_the_guest_with_half_close() {
    if !have_kvm() {
        return;
    }
    let reports = with_published(&["listen=80,count=1"], 80, |mut stream| {
        let sent: Vec<u8> = (0u32..200_000).flat_map(|n| n.to_le_bytes()).collect();
        let mut writer = stream.try_clone().expect("a socket can be cloned");
        let copy = sent.clone();
        let feeder = std::thread::spawn(move || {
            writer.write_all(&copy).expect("the guest takes it");
            writer.shutdown(Shutdown::Write).expect("the stream is open");
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).expect("the guest echoes and closes");
        feeder.join().expect("the feeder has not failed");
        assert!(back == sent, "{} of {} bytes, or others", back.len(), sent.len());
    });
    assert_eq!(reports.all_ok().of("listen")["bytes"], 800_000);
}

#[test]
fn a_published_port_whose_guest_port_is_closed_resets_the_client() {
    if !have_kvm() {
        return;
    }
    let reports = with_published(&["wait=3000"], 81, |mut stream| {
        let error = stream.read(&mut [0]).expect_err("a reset, not an end of file");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
    reports.all_ok();
}

#[test]
fn hostile_frames_and_floods_are_refused_and_the_network_stays_up() {
    if !have_kvm() {
        return;
    }
    let world = world();
    let reports = probe()
        .flag(["--host-access"])
        .timeout(Duration::from_secs(60))
        .order("dhcp")
        .order("bad=frames,count=2000,seed=1")
        .order("bad=dhcp-flood,count=1000")
        .order("bad=dhcp-garbage,count=500,seed=2")
        .order("ping=gw,count=1")
        .order(format!("tcp-echo=gw:{},bytes=100000", world.tcp_echo.port()))
        .run();
    reports.all_ok();
}

#[test]
fn a_device_reset_under_load_comes_back() {
    if !have_kvm() {
        return;
    }
    let world = world();
    let reports = probe()
        .flag(["--host-access"])
        .timeout(Duration::from_secs(60))
        .order("dhcp")
        .order("bad=reset,count=20")
        .order(format!("tcp-echo=gw:{},bytes=100000", world.tcp_echo.port()))
        .run();
    reports.all_ok();
}

#[test]
fn nonsense_in_registers_and_rings_leaves_the_vmm_alive() {
    if !have_kvm() {
        return;
    }
    for seed in 1..=4 {
        let reports = probe()
            .timeout(Duration::from_secs(60))
            .order(format!("bad=registers,count=300,seed={seed}"))
            .order(format!("bad=rings,count=20,seed={seed}"))
            .order("dhcp")
            .order("ping=gw,count=1")
            .run();
        reports.all_ok();
    }
}

#[test]
fn sixty_short_connections_all_work() {
    if !have_kvm() {
        return;
    }
    let world = world();
    let reports = probe()
        .flag(["--host-access"])
        .timeout(Duration::from_secs(60))
        .order("dhcp")
        .order(format!("tcp-churn=gw:{},count=60", world.tcp_echo.port()))
        .run();
    assert_eq!(reports.all_ok().of("tcp-churn")["count"], 60);
}
