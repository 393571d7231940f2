//! Peers that others wrote: DHCP, DNS and HTTP clients made to measure servers, and scapy, against the NAT network.
//!
//! ```text
//!   guest's namespace                                      world's namespace
//!   perfdhcp, dnsperf, wrk, h2load, scapy ── tap0 ── pontoon net attach ── 10.77.0.1: dnsmasq, httpd, nghttpd
//! ```
//!
//! Both namespaces are the test's own and go with it. Nothing is timed: each peer counts what it sent and what came
//! back, and those counts are compared. scripts/test installs the peers; without one, its test says so and passes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pontoon_tests::{have_namespaces, pontoon, skip};
use serde_json::Value;

/// The world's only address; its routes lead nowhere else.
const WORLD: &str = "10.77.0.1";
const GATEWAY: &str = "192.168.122.1";
/// Addresses that DHCP gives away: .2 to .254.
const POOL: u32 = 253;
/// Debian's own Python, for which Debian's scapy is installed.
const PYTHON: &str = "/usr/bin/python3";
/// How long any peer may take; the slowest needs a few seconds.
const PATIENCE: Duration = Duration::from_secs(45);

/// Whether these commands are installed; if not, says so for the calling test.
fn have(tools: &[(&str, &str)]) -> bool {
    let installed = |tool: &str| {
        let words =
            if tool.starts_with('/') { vec![tool] } else { vec!["sh", "-c", "command -v \"$0\"", tool] };
        let mut command = search(Command::new(words[0]));
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let missing: Vec<_> = tools.iter().filter(|(tool, _)| !installed(tool)).collect();
    for (tool, package) in &missing {
        skip(format_args!("{tool} is not installed (apt-get install {package})"));
    }
    missing.is_empty() && have_namespaces()
}

/// Debian keeps administrators' commands where an ordinary user's PATH does not look.
fn search(mut command: Command) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// The path of a script that comes with this file.
fn script(name: &str) -> String {
    format!("{}/tests/peers/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network namespace, held open by a process.
struct Namespace(Running);

impl Namespace {
    fn new() -> Self {
        let child = Command::new("unshare")
            .args(["-n", "--", "sh", "-c", "ip link set lo up; echo; exec sleep 600"])
            .stdout(Stdio::piped())
            .spawn();
        let mut holder = Running(child.expect("unshare starts"));
        // It says a line once it is in its namespace.
        let said = holder.0.stdout.take().expect("it is piped");
        BufReader::new(said).read_line(&mut String::new()).expect("it lives");
        Self(holder)
    }

    fn pid(&self) -> u32 {
        self.0.0.id()
    }

    /// A command in the namespace. What is started is the program itself: nsenter becomes it.
    fn command(&self, words: &str) -> Command {
        let mut command = search(Command::new("nsenter"));
        command.args(["-n", "-t", &self.pid().to_string(), "--"]).args(words.split(' ')).stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn run(&self, words: &str) -> String {
        told(words, bounded(&mut self.command(words)))
    }

    fn spawn(&self, words: &str) -> Running {
        let mut command = self.command(words);
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nsenter starts"))
    }

    /// Whether something listens on this TCP port of the namespace.
    fn listens(&self, port: u16) -> bool {
        let sockets = fs::read_to_string(format!("/proc/{}/net/tcp", self.pid())).expect("it lives");
        let (local, listening) = (format!(":{port:04X}"), "0A");
        sockets.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|at| at.ends_with(&local)) && words.nth(1) == Some(listening)
        })
    }

    /// A server, once it listens.
    #[track_caller]
    fn serve(&self, port: u16, words: &str) -> Running {
        let server = self.spawn(words);
        until(&format!("{words} listens"), || self.listens(port));
        server
    }
}

/// Runs a command to its end, or for [`PATIENCE`] at most (status 124).
fn bounded(command: &mut Command) -> Output {
    let mut bounded = Command::new("timeout");
    bounded.args(["--kill-after=5", &PATIENCE.as_secs().to_string()]).arg(command.get_program());
    for (key, value) in command.get_envs() {
        bounded.env(key, value.unwrap_or_default());
    }
    bounded.args(command.get_args()).stdin(Stdio::null()).output().expect("timeout starts")
}

#[track_caller]
fn told(words: &str, out: Output) -> String {
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{words}: {}\n{said}", out.status);
    said
}

/// Waits until a fact holds that nobody announces.
#[track_caller]
fn until(fact: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never came true: {fact}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The guest, the network between, and the world.
struct Room {
    guest: Namespace,
    world: Namespace,
    network: Running,
    said: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

impl Room {
    fn new() -> Self {
        let (guest, world) = (Namespace::new(), Namespace::new());
        world.run(&format!("ip address add {WORLD}/32 dev lo"));
        let binary = pontoon();
        let mut command = world.command(path(&binary));
        command.args(["net", "attach", "--pid", &guest.pid().to_string(), "--tap", "tap0"]);
        command.args(["--subnet", "192.168.122.0/24", "--dns", WORLD, "--json"]).env_remove("RUST_LOG");
        let mut network = Running(command.stdout(Stdio::piped()).spawn().expect("it starts"));
        let said = BufReader::new(network.0.stdout.take().expect("it is piped"));
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        let mut room = Self { guest, world, network, said, dir };
        assert_eq!(room.line()["gateway"], GATEWAY);
        room.guest.run("ip link set tap0 up");
        room
    }

    /// A room whose guest has an address already.
    fn furnished() -> Self {
        let room = Self::new();
        room.guest.run("ip address add 192.168.122.2/24 dev tap0");
        room.guest.run(&format!("ip route add default via {GATEWAY}"));
        room
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("it writes text");
        serde_json::from_str(&line).expect("a line of JSON: the network is up, or at its end")
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).expect("the temporary directory is writable");
        path
    }

    /// Descriptors that the network has open.
    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.network.0.id())).expect("it runs").count()
    }

    /// The most memory that the network ever had, in KiB.
    fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.network.0.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says so");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// The gateway answers a ping.
    #[track_caller]
    fn lives(&self) {
        self.guest.run(&format!("busybox ping -c 1 -W 20 {GATEWAY}"));
    }

    /// Ends it in order; the counters that it has then.
    fn stop(mut self) -> Value {
        let pid = self.network.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill starts").success());
        let last = self.line();
        assert!(self.network.0.wait().expect("it is our child").success());
        last
    }

    /// busybox's server of one file of 3000 bytes, which closes each connection after an answer.
    fn httpd(&self) -> Running {
        self.file("index.html", &[b'x'; 3000]);
        self.world.serve(8080, &format!("busybox httpd -f -p {WORLD}:8080 -h {}", path(self.dir.path())))
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("the temporary directory has a name of letters")
}

/// The number between these words in a line of what a peer printed, or before a space if none has to follow.
fn number(said: &str, before: &str, after: &str) -> Option<u64> {
    let number = said.lines().find_map(|line| {
        let (_, rest) = line.split_once(before)?;
        if after.is_empty() { rest.split_whitespace().next() } else { Some(rest.split_once(after)?.0.trim()) }
    });
    number?.parse().ok()
}

/// perfdhcp's counts: of each message's section the number that follows a label.
fn exchanges(said: &str) -> BTreeMap<(String, String), u64> {
    let (mut section, mut counts) = (String::new(), BTreeMap::new());
    for line in said.lines() {
        if let Some(title) = line.strip_prefix("***Statistics for: ") {
            section = title.trim_end_matches('*').to_owned();
        } else if let Some((label, count)) = line.split_once(": ")
            && let Ok(count) = count.trim().parse()
        {
            counts.insert((section.clone(), label.to_owned()), count);
        }
    }
    counts
}

/// One run of perfdhcp with this many new clients; `mac` is the hardware address of the first.
#[track_caller]
fn perfdhcp(room: &Room, clients: u32, mac: &str, completes: bool) -> BTreeMap<(String, String), u64> {
    let words = format!(
        "perfdhcp -4 -l 10.99.0.2 -L 67 -u -b mac={mac} -r 100 -R {clients} -n {clients} -W 500000 10.99.0.1"
    );
    let out = bounded(&mut room.guest.command(&words));
    // 3 is "some exchanges were not completed".
    assert_eq!(out.status.code(), Some(if completes { 0 } else { 3 }), "{out:?}");
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(number(&said, "Malformed packets: ", ""), Some(0), "{said}");
    exchanges(&said)
}

#[test]
fn perfdhcp_gets_a_lease_for_each_of_250_clients_and_silence_when_none_is_left() {
    if !have(&[("perfdhcp", "kea-admin"), (PYTHON, "python3")]) {
        return;
    }
    let room = Room::new();
    let guest = &room.guest;
    guest.run("ip link add perf0 type veth peer name lan0");
    guest.run("ip address add 10.99.0.2/24 dev perf0");
    guest.run("ip link set perf0 up");
    guest.run("ip link set lan0 up");
    guest.run("ip neighbour add 10.99.0.1 lladdr 02:00:00:00:00:43 dev perf0");
    let mut machines = guest.command(PYTHON);
    machines.args([&script("machines.py"), "tap0", "lan0", "10.99.0.2", "67"]).stdout(Stdio::piped());
    let mut machines = Running(machines.spawn().expect("python starts"));
    let mut said = BufReader::new(machines.0.stdout.take().expect("it is piped"));
    said.read_line(&mut String::new()).expect("it says when it is ready");

    let count = |counts: &BTreeMap<(String, String), u64>, section: &str, label: &str| {
        *counts.get(&(section.to_owned(), label.to_owned())).unwrap_or_else(|| panic!("{label}: {counts:?}"))
    };
    let all = perfdhcp(&room, 250, "02:00:00:00:00:00", true);
    for section in ["DISCOVER-OFFER", "REQUEST-ACK"] {
        assert_eq!(count(&all, section, "sent packets"), 250, "{all:?}");
        assert_eq!(count(&all, section, "received packets"), 250, "{all:?}");
        for bad in ["drops", "orphans", "rejected leases", "non unique addresses"] {
            assert_eq!(count(&all, section, bad), 0, "{section}, {bad}: {all:?}");
        }
    }
    // Other clients: what is left of the pool, then nothing, which is not a wrong answer either.
    let left = u64::from(POOL - 250);
    let few = perfdhcp(&room, 100, "02:00:00:55:00:00", false);
    assert_eq!(count(&few, "DISCOVER-OFFER", "received packets"), left, "{few:?}");
    assert_eq!(count(&few, "REQUEST-ACK", "received packets"), left, "{few:?}");
    assert_eq!(count(&few, "DISCOVER-OFFER", "rejected leases"), 0, "{few:?}");
    let last = room.stop();
    assert_eq!(last["dropped"]["TableFull"].as_u64(), Some(100 - left), "{last}");
}

#[test]
fn dnsperf_loses_no_question_over_udp_or_tcp() {
    if !have(&[("dnsperf", "dnsperf"), ("dnsmasq", "dnsmasq-base")]) {
        return;
    }
    let room = Room::furnished();
    let words = "dnsmasq --keep-in-foreground --no-resolv --no-hosts --conf-file=/dev/null --user=root --pid-file= \
                 --bind-interfaces --address=/peer.test/10.77.0.9";
    let _resolver = room.world.serve(53, &format!("{words} --listen-address={WORLD}"));
    let questions: String = (0..500).map(|n| format!("h{n}.peer.test A\n")).collect();
    let questions = room.file("questions", questions.as_bytes());
    let before = room.descriptors();
    // Over TCP each question has a connection of its own to dnsmasq, whose backlog holds five.
    for (mode, runs, clients, at_once) in [("udp", 40, 20, 100), ("tcp", 4, 4, 5)] {
        let file = path(&questions);
        let words =
            format!("dnsperf -m {mode} -s {GATEWAY} -d {file} -n {runs} -c {clients} -q {at_once} -t 20");
        let said = room.guest.run(&words);
        assert_eq!(number(&said, "Queries completed:", "("), Some(runs * 500), "{said}");
        assert_eq!(number(&said, "Queries lost:", "("), Some(0), "{said}");
        assert_eq!(number(&said, "NOERROR", "(100.00%)"), Some(runs * 500), "{said}");
    }
    until("every question's socket is closed", || room.descriptors() == before);
    room.lives();
}

#[test]
fn http_clients_see_no_error_and_leave_no_flow() {
    let tools = [("wrk", "wrk"), ("h2load", "nghttp2-client"), ("nghttpd", "nghttp2-server")];
    if !have(&[&tools[..], &[("busybox", "busybox-static"), (PYTHON, "python3")]].concat()) {
        return;
    }
    let room = Room::furnished();
    let _httpd = room.httpd();
    let files = path(room.dir.path());
    let _http2 = room.world.serve(8081, &format!("nghttpd --no-tls -a {WORLD} -d {files} 8081"));
    let words = "-m http.server --protocol HTTP/1.1";
    let _http1 = room.world.serve(8082, &format!("{PYTHON} {words} --bind {WORLD} -d {files} 8082"));
    let before = room.descriptors();

    // A connection per request, fifty at a time.
    let said = room.guest.run(&format!("wrk -t 2 -c 50 -d 3s --timeout 20s http://{WORLD}:8080/index.html"));
    assert!(number(&said, "", "requests in") > Some(500), "{said}");
    assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");

    // HTTP/2: ten requests at once on each of a hundred connections; HTTP/1.1: one after the other on
    // each of four, where Python's two writes per answer cost 40 ms with or without us.
    let all = |options: &str, port: u16, requests: u64| {
        let said =
            room.guest.run(&format!("h2load {options} -n {requests} http://{WORLD}:{port}/index.html"));
        let result = format!(
            "{requests} total, {requests} started, {requests} done, {requests} succeeded, 0 failed, 0 errored, 0 timeout"
        );
        assert!(said.contains(&result) && said.contains(&format!("{requests} 2xx")), "{said}");
    };
    all("-c 100 -m 10", 8081, 40_000);
    all("--h1 -c 4", 8082, 400);

    until("every connection's socket is closed", || room.descriptors() == before);
    room.lives();
    let last = room.stop();
    assert!(last["to_guest"]["bytes"].as_u64() > Some(40_400 * 3_000), "{last}");
}

#[test]
fn what_no_honest_guest_sends_harms_nobody() {
    const MUTANTS: u64 = 20_000;
    if !have(&[(PYTHON, "python3"), ("busybox", "busybox-static")]) {
        return;
    }
    let scapy = Command::new(PYTHON).args(["-c", "import scapy"]).stderr(Stdio::null()).status();
    if !scapy.is_ok_and(|status| status.success()) {
        skip("scapy is not installed (apt-get install python3-scapy)");
        return;
    }
    let room = Room::furnished();
    let _httpd = room.httpd();
    let mut hostile = room.guest.command(PYTHON);
    hostile.args([&script("hostile.py"), "tap0", WORLD, "8080", &MUTANTS.to_string(), "1"]);
    let said = told("hostile.py", bounded(&mut hostile));
    assert!(said.trim_end().ends_with(&MUTANTS.to_string()), "{said}");

    room.lives();
    let mut stream = room.guest.command(PYTHON);
    stream.args([
        "-c",
        "import sys, urllib.request as u; print(len(u.urlopen(sys.argv[1], timeout=20).read()))",
    ]);
    let length = told("a new connection", bounded(stream.arg(format!("http://{WORLD}:8080/index.html"))));
    assert_eq!(length.trim(), "3000");
    // A few hundred half-open connections and half-received packets, each small and bounded.
    assert!(room.peak() < 64 << 10, "{} KiB", room.peak());

    let last = room.stop();
    let dropped = |reason: &str| last["dropped"][reason].as_u64().unwrap_or_default();
    for reason in ["Malformed", "BadChecksum", "BadSource", "UnknownProtocol", "Fragment", "NoFlow"] {
        assert!(dropped(reason) > 100, "{reason} was hardly tried: {last}");
    }
}
