//! The recipes of the README, run as they stand there: on this host, where Linux guests go to the lab by themselves, or in the lab, where
//! a host is needed that may be changed. What a recipe leaves to the reader (the time to type, an address in the world) is filled in, and
//! each such change names the words that it replaces, so that a recipe which changes has its test look again.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use pontoon_tests::{Pontoon, carry_images, debian_image, have_kvm, pontoon, shell_beside_image, text};

/// The lines of a recipe below its title.
fn recipe(number: usize) -> String {
    let readme =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).expect("it is there");
    let block =
        readme.split("```sh\n").find(|block| block.contains("# 1. Does it work")).expect("the recipes");
    let block = block.split("```").next().expect("it has an end");
    let begin = block.find(&format!("# {number}. ")).expect("the recipe has its number");
    let lines = block[begin..].split_once('\n').expect("a title").1;
    let end = lines.find(&format!("# {}. ", number + 1)).unwrap_or(lines.len());
    lines[..end].trim().to_owned()
}

/// The recipe with what a reader would fill in.
fn filled(number: usize, changes: &[(&str, &str)]) -> String {
    let mut lines = recipe(number);
    for (words, instead) in changes {
        assert!(lines.contains(words), "recipe {number} has no '{words}' any more:\n{lines}");
        lines = lines.replace(words, instead);
    }
    lines
}

/// A shell that finds `pontoon`, with a runtime folder of its own.
struct Shell(tempfile::TempDir);

impl Shell {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        std::os::unix::fs::symlink(pontoon(), dir.path().join("pontoon")).expect("it is writable");
        Self(dir)
    }

    fn start(&self, script: &str) -> Child {
        let path = std::env::var("PATH").expect("a shell has one");
        Command::new("sh")
            .args(["-e", "-c", script])
            .env("PATH", format!("{}:{path}", self.0.path().display()))
            .env("XDG_RUNTIME_DIR", self.0.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("there is a shell")
    }

    /// Runs it to its end, with `typed` as its input.
    fn run(&self, script: &str, typed: &str) -> Output {
        let mut child = self.start(script);
        let mut input = child.stdin.take().expect("it is piped");
        input.write_all(typed.as_bytes()).expect("it reads");
        drop(input);
        child.wait_with_output().expect("it is our child")
    }
}

fn says(output: &Output, facts: &[&str]) {
    let all = text(output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    for fact in facts {
        assert!(all.contains(fact), "'{fact}' is missing\n{all}");
    }
}

#[test]
fn recipe_1_checks_this_host() {
    if have_kvm() {
        says(&Shell::new().run(&recipe(1), ""), &["DHCP"]);
    }
}

#[test]
fn recipe_2_is_a_shell_in_a_guest_on_the_network() {
    if debian_image().is_some() {
        let typed = "echo $(uname -s) on $(hostname); ip -4 addr show eth0; exit\n";
        says(&Shell::new().run(&recipe(2), typed), &["Linux on vm1", "inet 192.168.122."]);
    }
}

#[test]
fn recipe_3_is_a_command_in_a_fresh_machine() {
    if debian_image().is_some() {
        // Whoever tests may have no way out: the gateway answers as the world would.
        let script = filled(3, &[("deb.debian.org", "192.168.122.1")]);
        says(&Shell::new().run(&script, ""), &["3 packets transmitted, 3 packets received"]);
    }
}

#[test]
fn recipe_4_publishes_a_server() {
    if debian_image().is_none() {
        return;
    }
    let free = TcpListener::bind(("127.0.0.1", 0))
        .and_then(|socket| socket.local_addr())
        .expect("loopback has ports");
    let port = free.port().to_string();
    let script = filled(4, &[("8080", &port), ("pontoon run", "exec pontoon run"), (" &\n", "\n")]);
    let (server, client) = script.split_once('\n').expect("a server and a client");
    assert_eq!(client, format!("curl http://127.0.0.1:{port}/"));
    let shell = Shell::new();
    let mut machine = shell.start(server);
    let end = Instant::now() + Duration::from_secs(120);
    let page = loop {
        if let Some(page) = get(free).filter(|page| !page.is_empty()) {
            break page;
        }
        let ended = machine.try_wait().expect("it is our child");
        assert!(ended.is_none() && Instant::now() < end, "no answer; the machine: {ended:?}");
        // Between two tries of a reader at the keyboard.
        sleep(Duration::from_millis(300));
    };
    machine.kill().and_then(|()| machine.wait()).expect("it is our child");
    assert!(page.starts_with("HTTP/1.") && page.contains("200 OK") && page.ends_with("hello\n"), "{page}");
}

/// What curl would print, with the headers.
fn get(server: std::net::SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(server).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    Some(page)
}

#[test]
fn recipe_5_puts_the_guest_on_the_lan() {
    let Some(image) = debian_image() else { return };
    // The emulated host is root's, and its eth0 is on a LAN with a DHCP server.
    let script = filled(
        5,
        &[
            ("sudo ", ""),
            ("scripts/bridge", "bash bridge"),
            ("tap:br0", "tap:br0 -- sh -c 'ip -4 -o addr show eth0; ping -c 2 10.0.2.2'"),
        ],
    );
    let bridge = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/bridge");
    let bridge = format!("{}:/lab/bridge", bridge.display());
    let script = format!(
        "set -e\n{script}\nip -o link show master br0\nbash bridge down br0\nip -4 -o addr show eth0\n"
    );
    let put = carry_images(&image);
    let words = ["lab", "--timeout", "200", "--put", &put, "--put", &bridge, "--", "sh", "-c", &script];
    says(&Pontoon::new(words).output(), &["2 packets transmitted, 2 packets received", "inet 10.0.2."]);
}

#[test]
fn recipe_6_is_a_machine_that_stays() {
    let Some(image) = debian_image() else { return };
    let script = filled(
        6,
        &[
            // Who pipes has no key to leave with, and is sent away.
            (
                "pontoon console web ",
                "echo 'echo console-$((6*7))' | timeout 12 pontoon console web || true ",
            ),
            ("pontoon exec web sh ", "echo 'echo exec-$((6*7)) on $(hostname)' | pontoon exec web sh "),
            // An ssh server is in the images of recipe 7, and so is the test of this line.
            ("ssh -o", "echo ssh -o"),
        ],
    );
    let output = shell_beside_image(&image, &format!("set -e\n{script}\npontoon ps\n"));
    let facts = [
        "NAME",
        "web",
        "exec-42 on web",
        "console-42",
        "52:54:00:",
        "192.168.122.",
        "ProxyCommand=pontoon nc %h %p",
    ];
    says(&output, &facts);
}

#[test]
fn recipe_8_gives_a_machine_disks() {
    let Some(image) = debian_image() else { return };
    let typed = "cat /proc/partitions; echo made it | dd of=/dev/vdb conv=fsync 2>/dev/null; poweroff";
    let script = format!(
        "set -e\ntruncate -s 8M data.img\ntruncate -s 16M golden.img\n{} <<'TYPED'\n{typed}\nTYPED\ntr -d '\\0' <golden.img | wc -c\n",
        recipe(8)
    );
    let output = shell_beside_image(&image, &script);
    says(&output, &["8192 vda", "16384 vdb"]);
    // The overlay took the write.
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("\n0\n"), "{}", text(&output));
}
