//! A LAN in network namespaces: a host with `br0`, and a neighbour with a DHCP server of its own.
//!
//! ```text
//!   neighbour 10.88.0.1 (dnsmasq)  ── lan0 ═ eth0 ──  br0 (host 10.88.0.2) ── the guests' TAPs
//! ```
//!
//! Both namespaces are made by the test that calls [`Lan::new`], have names of that test's process, and go
//! with the value, also when the test fails.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The neighbour's address: DHCP, DNS.
pub const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// The host's address.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);

/// The LAN.
pub struct Lan {
    id: String,
    dir: PathBuf,
    dnsmasq: Option<Child>,
}

fn ip(args: &str) {
    let out = Command::new("ip").args(args.split(' ')).output().expect("ip is installed");
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
}

impl Lan {
    /// Makes it. `None`, with a word why, where namespaces cannot be made or dnsmasq is missing.
    pub fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !crate::have_namespaces() {
            return None;
        }
        if Command::new("dnsmasq").arg("--version").stdout(Stdio::null()).status().is_err() {
            crate::skip("dnsmasq is not installed (apt-get install dnsmasq-base)");
            return None;
        }
        let id = format!("pt{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(format!("{id}.lan"));
        std::fs::create_dir_all(&dir).expect("the temporary directory is writable");
        let mut lan = Self { id, dir, dnsmasq: None };
        let (host, neighbour) = (lan.host(), lan.neighbour());
        for ns in [&host, &neighbour] {
            ip(&format!("netns add {ns}"));
            ip(&format!("-n {ns} link set lo up"));
        }
        ip(&format!("-n {host} link add eth0 type veth peer name lan0 netns {neighbour}"));
        ip(&format!("-n {neighbour} addr add {NEIGHBOUR}/24 dev lan0"));
        ip(&format!("-n {neighbour} link set lan0 up"));
        ip(&format!("-n {host} link add br0 type bridge"));
        ip(&format!("-n {host} link set eth0 master br0"));
        ip(&format!("-n {host} link set eth0 up"));
        ip(&format!("-n {host} link set br0 up"));
        ip(&format!("-n {host} addr add {HOST}/24 dev br0"));
        lan.dnsmasq = Some(lan.start_dnsmasq());
        Some(lan)
    }

    fn start_dnsmasq(&self) -> Child {
        let leases = self.dir.join("leases");
        let pid = self.dir.join("pid");
        self.in_neighbour("dnsmasq")
            .args([
                "--keep-in-foreground",
                "--no-resolv",
                "--no-hosts",
                "--conf-file=/dev/null",
                "--user=root",
            ])
            .args(["--interface=lan0", "--bind-interfaces", "--dhcp-authoritative", "--no-ping"])
            .args(["--dhcp-range=10.88.0.100,10.88.0.199,1h", "--address=/neighbour.test/10.88.0.1"])
            .arg(format!("--dhcp-leasefile={}", leases.display()))
            .arg(format!("--pid-file={}", pid.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("dnsmasq starts")
    }

    /// The name of the host's namespace.
    pub fn host(&self) -> String {
        format!("{}-host", self.id)
    }

    /// The name of the neighbour's namespace.
    pub fn neighbour(&self) -> String {
        format!("{}-lan", self.id)
    }

    /// A command in the host's namespace.
    pub fn in_host(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        inside(&self.host(), program)
    }

    /// A command in the neighbour's namespace.
    pub fn in_neighbour(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        inside(&self.neighbour(), program)
    }

    /// The names of the bridge's ports.
    pub fn ports(&self) -> Vec<String> {
        let out: Output = self
            .in_host("ip")
            .args(["-br", "link", "show", "master", "br0"])
            .output()
            .expect("ip is installed");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let first = |line: &str| line.split([' ', '@']).next().unwrap_or_default().to_owned();
        text.lines().map(first).collect()
    }
}

fn inside(namespace: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program);
    command
}

impl Drop for Lan {
    fn drop(&mut self) {
        if let Some(mut dnsmasq) = self.dnsmasq.take() {
            let _ = dnsmasq.kill();
            let _ = dnsmasq.wait();
        }
        for namespace in [self.host(), self.neighbour()] {
            let _ = Command::new("ip").args(["netns", "del", &namespace]).status();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
