//! `pontoon net attach`: a network namespace of this kernel is the guest, its TCP nobody's here.
//!
//! The network's sockets are on this host's loopback (`--host-access`), and nowhere else.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pontoon_tests::{Pontoon, have_namespaces, pontoon, skip};
use serde_json::Value;

/// Opens a TAP as descriptor 3, with or without IFF_VNET_HDR, and becomes the rest of its arguments: what a launcher
/// of sandboxes does.
const LAUNCHER: &str = "
import fcntl, os, struct, sys
tap = os.open('/dev/net/tun', os.O_RDWR)
flags = 0x1002 | (0x4000 if sys.argv[1] == 'vnet' else 0)
fcntl.ioctl(tap, 0x400454ca, struct.pack('16sH22x', b'tap0', flags))
os.dup2(tap, 3)
os.set_inheritable(3, True)
os.execvp(sys.argv[2], sys.argv[2:])
";

/// Sends its input to a port of the gateway, then the end, and prints what comes back.
const CLIENT: &str = "
import shutil, socket, sys, threading
stream = socket.create_connection(('192.168.122.1', int(sys.argv[1])), 60)
def feed():
    stream.sendall(sys.stdin.buffer.read())
    stream.shutdown(socket.SHUT_WR)
threading.Thread(target=feed).start()
shutil.copyfileobj(stream.makefile('rb'), sys.stdout.buffer)
";

/// Echoes one chunk to one client on port 7000, for a minute at most. Its first packet makes the guest known, which
/// DHCP would do otherwise.
const SERVER: &str = "
import signal, socket
signal.alarm(60)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'hello', ('192.168.122.1', 9))
client, _ = socket.create_server(('192.168.122.2', 7000)).accept()
client.sendall(client.recv(100))
";

/// A process in a network namespace of its own.
struct Guest(Child);

impl Guest {
    fn new() -> Option<Self> {
        if !have_namespaces() {
            return None;
        }
        if Command::new("python3").arg("--version").stdout(Stdio::null()).status().is_err() {
            skip("python3 is not installed (apt-get install python3)");
            return None;
        }
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
            skip(format_args!("/dev/net/tun: {error}"));
            return None;
        }
        let child = Command::new("unshare")
            .args(["-n", "--", "sh", "-c", "echo; exec sleep 600"])
            .stdout(Stdio::piped())
            .spawn();
        let mut guest = Self(child.expect("unshare starts"));
        // It says a line once it is in its namespace.
        let said = guest.0.stdout.take().expect("it is piped");
        BufReader::new(said).read_line(&mut String::new()).expect("it lives");
        Some(guest)
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-n", "-t", &self.0.id().to_string(), "--"]).args(words.split(' '));
        command
    }

    #[track_caller]
    fn run(&self, words: &str) -> String {
        let out = self.command(words).output().expect("nsenter starts");
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("text")
    }

    /// Gives the TAP an address, as DHCP would.
    fn configure(&self) {
        self.run("ip link set tap0 up");
        self.run("ip address add 192.168.122.2/24 dev tap0");
        self.run("ip route add default via 192.168.122.1");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running `pontoon net attach`.
struct Attached {
    child: Child,
    out: BufReader<ChildStdout>,
    /// What it said when the network was up.
    first: Value,
}

impl Attached {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .args(["--subnet", "192.168.122.0/24", "--host-access", "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let out = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut attached = Self { child, out, first: Value::Null };
        attached.first = attached.line();
        attached
    }

    fn on_descriptor(guest: &Guest, header: &str, more: &[&str]) -> Self {
        let mut command = guest.command("python3 -c");
        command.args([LAUNCHER, header, "nsenter", "-n", "-t", &std::process::id().to_string(), "--"]);
        command.arg(pontoon()).args(["net", "attach", "--tap-fd", "3"]).args(more);
        Self::start(command)
    }

    #[track_caller]
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("it writes text");
        serde_json::from_str(&line).expect("a line of JSON")
    }

    /// Ends it in order; what it said at its end.
    fn stop(mut self) -> Value {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill starts").success());
        self.ended()
    }

    fn ended(&mut self) -> Value {
        let last = self.line();
        assert!(self.child.wait().expect("it is our child").success());
        last
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn data() -> Vec<u8> {
    (0u32..1_000_000).flat_map(u32::to_le_bytes).collect()
}

/// Accepts one client and sends back what it sends, to its end.
fn echo_server() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has free ports");
    let port = listener.local_addr().expect("it is bound").port();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut writer = stream.try_clone().expect("a socket can be cloned");
        std::io::copy(&mut stream, &mut writer).expect("the guest reads");
        writer.shutdown(Shutdown::Write).expect("it is open");
    });
    port
}

/// Four million bytes from the guest to the host's loopback and back, with a half-close.
#[track_caller]
fn echo_from(guest: &Guest) {
    let mut client = guest
        .command("python3 -c")
        .args([CLIENT, &echo_server().to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nsenter starts");
    let mut input = client.stdin.take().expect("it is piped");
    let feeder = thread::spawn(move || input.write_all(&data()).expect("it reads"));
    let out = client.wait_with_output().expect("it is our child");
    feeder.join().expect("the feeder has not failed");
    assert!(out.stdout == data(), "{} bytes came back, or others", out.stdout.len());
}

fn frames(counters: &Value) -> (u64, u64) {
    let count = |side: &str| counters[side]["frames"].as_u64().expect("a number");
    (count("from_guest"), count("to_guest"))
}

#[test]
fn a_descriptor_with_headers_carries_segments_larger_than_the_mtu() {
    let Some(guest) = Guest::new() else { return };
    let attached = Attached::on_descriptor(&guest, "vnet", &[]);
    guest.configure();
    echo_from(&guest);
    let last = attached.stop();
    assert!(last["from_guest"]["bytes"].as_u64() > Some(4_000_000), "{last}");
    assert!(frames(&last).0 < 4_000_000 / 1500, "segments were cut: {last}");
}

#[test]
fn a_descriptor_without_headers_works_as_well() {
    let Some(guest) = Guest::new() else { return };
    let attached = Attached::on_descriptor(&guest, "plain", &[]);
    guest.configure();
    echo_from(&guest);
    let last = attached.stop();
    assert!(frames(&last).0 > 4_000_000 / 1500, "no frame is larger than the MTU: {last}");
}

#[test]
fn a_published_port_leads_into_the_namespace() {
    let Some(guest) = Guest::new() else { return };
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a port");
    let attached = Attached::on_descriptor(&guest, "vnet", &["-p", &format!("{}:7000", free.port())]);
    assert_eq!(attached.first["published"][0], free.to_string());
    guest.configure();
    let mut server = guest.command("python3 -c").arg(SERVER).spawn().expect("it starts");
    let deadline = Instant::now() + Duration::from_secs(20);
    // Until the server listens, the guest resets the client.
    let answer = loop {
        let mut stream = TcpStream::connect(free).expect("the host's port is open from the start");
        let mut answer = [0; 5];
        let said = stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut answer));
        match said {
            Ok(()) => break answer,
            Err(error) => assert!(Instant::now() < deadline, "nobody ever answered: {error}"),
        }
    };
    assert_eq!(&answer, b"hello");
    let _ = server.kill();
    let _ = server.wait();
}

#[test]
fn a_processs_namespace_is_attached_by_its_number_and_both_end_together() {
    let Some(mut guest) = Guest::new() else { return };
    let mut command = Command::new(pontoon());
    command.args(["net", "attach", "--pid", &guest.0.id().to_string(), "--tap", "tap0"]);
    let mut attached = Attached::start(command);
    assert_eq!(
        (&attached.first["tap"], &attached.first["gateway"]),
        (&"tap0".into(), &"192.168.122.1".into())
    );
    guest.configure();
    echo_from(&guest);
    guest.0.kill().expect("it lives");
    guest.0.wait().expect("it is our child");
    assert!(frames(&attached.ended()).0 > 0);
}

#[test]
fn a_tap_that_is_deleted_ends_its_network() {
    let Some(guest) = Guest::new() else { return };
    let mut attached = Attached::on_descriptor(&guest, "vnet", &[]);
    guest.configure();
    guest.run("ip link del tap0");
    attached.ended();
}

#[test]
fn what_cannot_be_attached_is_said_with_what_to_do() {
    let cases = [
        (vec!["net", "attach"], "--tap"),
        (vec!["net", "attach", "--tap-fd", "77"], "--tap-fd 77"),
        (vec!["net", "attach", "--tap-fd", "0"], "IFF_TAP"),
        (vec!["net", "attach", "--tap-fd", "0", "--tap", "tap0"], "cannot be used with"),
        (vec!["net", "attach", "--pid", "1"], "--tap"),
        (vec!["net", "attach", "--pid", "4194999", "--tap", "tap0"], "4194999"),
    ];
    for (args, says) in cases {
        let out = Pontoon::new(&args).output();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {errors}");
        assert!(errors.contains(says), "{args:?}: {errors}");
    }
}
