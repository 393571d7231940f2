//! Terminals: raw while a command uses them, as they were afterwards, and what happens when they close.
//!
//! `pontoon exec` is tried on the real agent, which runs here as a process of this host behind a socket that greets as a machine's
//! vsock socket does; what a stock guest's terminal shows is tested in `linux_exec.rs`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;

use pontoon_tests::have_kvm;
use pontoon_tests::host::{Host, STAY, Terminal, until};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{Winsize, tcsetwinsize};
use vmm::runtime::{Claim, Phase, Runtime, State};

/// A probe on its own terminal, once it runs and the terminal is raw.
#[track_caller]
fn run(host: &Host, terminal: &mut Terminal, orders: &str) -> Child {
    let args = ["run", "probe", "--accel", "kvm", "--memory", "64M", "--timeout", "60", "--cmdline", orders];
    let child = terminal.start(host.pontoon(&args).command());
    terminal.expect("\"event\":\"boot\"");
    child
}

#[test]
fn a_terminal_is_raw_while_the_machine_runs_and_as_it_was_after_every_orderly_end() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let mut terminal = Terminal::new();
        assert!(!terminal.is_raw());
        let mut child = run(&host, &mut terminal, STAY);
        assert!(terminal.is_raw());
        kill_process(Pid::from_child(&child), signal).expect("it is ours");
        assert_eq!(child.wait().expect("it ends").code(), Some(status));
        assert!(!terminal.is_raw(), "{signal:?}");
        assert_eq!(host.left(), [""; 0]);
    }
    let mut terminal = Terminal::new();
    let mut child = run(&host, &mut terminal, STAY);
    terminal.master.write_all(b"\x01x").expect("the terminal takes it");
    assert_eq!(child.wait().expect("it ends").code(), Some(124), "ctrl-A x");
    assert!(!terminal.is_raw());
    let mut terminal = Terminal::new();
    let mut child = run(&host, &mut terminal, "probe.do=end=3");
    assert_eq!(child.wait().expect("it ends").code(), Some(3));
    assert!(!terminal.is_raw());
}

#[test]
fn a_machine_whose_terminal_closes_ends_and_leaves_nothing() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let mut terminal = Terminal::new();
    let mut child = run(&host, &mut terminal, STAY);
    drop(terminal.master);
    assert_eq!(child.wait().expect("it ends").code(), Some(129), "128 + SIGHUP");
    assert!(host.ps(&["-a"]).is_empty() && host.left().is_empty());
}

#[test]
fn a_machine_that_was_told_to_outlive_its_terminal_does() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let mut terminal = Terminal::new();
    let args = ["run", "probe", "--accel", "kvm", "--memory", "64M", "--timeout", "60", "--cmdline", STAY];
    let mut pontoon = host.pontoon(&args);
    // As nohup(1) does; here its input and output stay the terminal.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    command.arg(pontoon.command().get_program()).args(args).env("XDG_RUNTIME_DIR", host.dir());
    let mut child = terminal.start(&mut command);
    terminal.expect("\"event\":\"boot\"");
    drop(terminal.master);
    host.ok(&["ps"]);
    assert_eq!(host.running()["name"], "vm1");
    host.ok(&["kill", "vm1"]);
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn a_console_gives_its_terminal_back_and_the_machine_outlives_it() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], STAY);
    let console = |terminal: &mut Terminal| {
        let child = terminal.start(host.pontoon(&["console", "a"]).command());
        terminal.expect("\"event\":\"boot\"");
        assert!(terminal.is_raw());
        child
    };
    let mut terminal = Terminal::new();
    let mut child = console(&mut terminal);
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it is ours");
    child.wait().expect("it ends");
    assert!(!terminal.is_raw());
    let mut terminal = Terminal::new();
    let mut child = console(&mut terminal);
    drop(terminal.master);
    assert!(!child.wait().expect("it ends").success());
    // Its place as the one who types is free again.
    let mut terminal = Terminal::new();
    let mut child = console(&mut terminal);
    terminal.master.write_all(b"\x01d").expect("the terminal takes it");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert!(!terminal.is_raw());
    assert_eq!(host.running()["name"], "a");
}

/// The agent, as a process of this host, behind a socket such as a machine's.
struct Agent {
    process: Child,
    _claim: Claim,
    _dir: tempfile::TempDir,
}

impl Agent {
    /// Stands for a machine of this name: the test's own process is the machine's.
    fn start(host: &Host, name: &str) -> Self {
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        let program = dir.path().join("agent");
        // Written by another process: while a thread of ours forks, a file that is open for writing can't be run.
        let mut cat = Command::new("sh")
            .args(["-c", "cat >\"$0\""])
            .arg(&program)
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell starts");
        cat.stdin.take().expect("it is piped").write_all(guest_images::AGENT).expect("cat reads");
        assert!(cat.wait().expect("it ends").success());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).expect("it is ours");
        let socket = dir.path().join("socket");
        let mut process = Command::new(&program)
            .arg("--unix")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the agent starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("it is piped"))
            .read_line(&mut line)
            .expect("it says a line");
        let runtime = Runtime::at(host.folder("")).expect("it is ours");
        let name = name.parse().expect("it is a name");
        let mut claim = runtime.claim(&name, State::default()).expect("nobody has it");
        claim.update(|state| state.state = Phase::Running).expect("the folder is ours");
        let vsock = claim.state().vsock.clone().expect("every machine has one");
        let listener = UnixListener::bind(vsock).expect("the folder is ours");
        thread::spawn(move || {
            for guest in listener.incoming().map_while(Result::ok) {
                let agent = UnixStream::connect(&socket).expect("it listens");
                thread::spawn(move || join(guest, agent));
            }
        });
        Self { process, _claim: claim, _dir: dir }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Firecracker's greeting, then both ways.
fn join(mut guest: UnixStream, agent: UnixStream) {
    let mut greeting = Vec::new();
    while greeting.last() != Some(&b'\n') {
        let mut byte = [0];
        guest.read_exact(&mut byte).expect("it greets");
        greeting.extend(byte);
    }
    assert_eq!(greeting, b"CONNECT 1024\n");
    guest.write_all(b"OK 1\n").expect("it listens");
    let copy = |from: &UnixStream, to: &UnixStream| {
        let (mut from, mut to) = (from, to);
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
        // Whoever has gone hears nothing any more, either.
        let _ = from.shutdown(Shutdown::Read);
    };
    thread::scope(|scope| {
        scope.spawn(|| copy(&guest, &agent));
        copy(&agent, &guest);
    });
}

/// A shell script in the machine `a`, on this terminal.
fn exec(host: &Host, terminal: &Terminal, script: &str) -> Child {
    terminal.start(host.pontoon(&["exec", "a", "--", "sh", "-c", script]).command())
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn a_command_on_a_terminal_has_its_size_follows_it_and_gives_it_back() {
    let host = Host::new();
    let _agent = Agent::start(&host, "a");
    let mut terminal = Terminal::new();
    tcsetwinsize(&terminal.master, size(33, 101)).expect("it is a terminal");
    let script = "stty size; trap 'stty size; exit 7' WINCH; echo ready; sleep 60 & wait";
    let mut child = exec(&host, &terminal, script);
    terminal.expect("33 101");
    terminal.expect("ready");
    assert!(terminal.is_raw());
    tcsetwinsize(&terminal.master, size(50, 132)).expect("it is a terminal");
    terminal.expect("50 132");
    assert_eq!(child.wait().expect("it ends").code(), Some(7));
    assert!(!terminal.is_raw());
}

#[test]
fn ctrl_c_on_a_terminal_is_the_commands_and_signals_give_the_terminal_back() {
    let host = Host::new();
    let _agent = Agent::start(&host, "a");
    let mut terminal = Terminal::new();
    let mut child = exec(&host, &terminal, "echo ready; exec sleep 60");
    terminal.expect("ready");
    terminal.master.write_all(b"\x03").expect("the terminal takes it");
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    assert!(!terminal.is_raw());
    let mut terminal = Terminal::new();
    let mut child = exec(&host, &terminal, "echo ready; exec sleep 60");
    terminal.expect("ready");
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it is ours");
    assert_eq!(child.wait().expect("it ends").signal(), Some(15));
    assert!(!terminal.is_raw());
}

#[test]
fn a_command_whose_terminal_closes_is_hung_up() {
    let host = Host::new();
    let _agent = Agent::start(&host, "a");
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let mut terminal = Terminal::new();
    let said: PathBuf = dir.path().join("said");
    let script = format!("trap 'echo hung up >{}; exit' HUP; echo ready; sleep 60 & wait", said.display());
    let mut child = exec(&host, &terminal, &script);
    terminal.expect("ready");
    drop(terminal.master);
    assert_eq!(child.wait().expect("it ends").signal(), Some(1));
    until("the command is hung up", || fs::read_to_string(&said).ok().filter(|said| said == "hung up\n"));
}
