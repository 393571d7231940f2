//! A user's machines, apart from those of all other tests: commands with a runtime folder of their own, and terminals.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::Value;

use crate::{Pontoon, text};

/// Orders of a probe that says a line and then stays until it is ended.
pub const STAY: &str = "probe.do=static=192.168.122.9/24;wait=60000";

/// A runtime folder; what still runs in it at the end is ended.
pub struct Host {
    dir: tempfile::TempDir,
}

impl Default for Host {
    fn default() -> Self {
        Self { dir: tempfile::tempdir().expect("the temporary directory is writable") }
    }
}

impl Host {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where `XDG_RUNTIME_DIR` points.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A command among this host's machines.
    pub fn pontoon(&self, args: &[&str]) -> Pontoon {
        let mut pontoon = Pontoon::new(args);
        pontoon.command().env("XDG_RUNTIME_DIR", self.dir.path());
        pontoon
    }

    /// Runs it to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        self.pontoon(args).output()
    }

    /// Standard output of a command that must end well.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}\n{}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A detached probe that stays.
    #[track_caller]
    pub fn detach(&self, flags: &[&str], orders: &str) -> String {
        let head = ["run", "probe", "--accel", "kvm", "--memory", "64M", "--timeout", "120", "--detach"];
        let words: Vec<_> = head.iter().chain(flags).chain(&["--cmdline", orders]).copied().collect();
        self.ok(&words).trim().to_owned()
    }

    /// A machine on its terminal, once it is listed.
    #[track_caller]
    pub fn in_the_foreground(&self) -> (Child, Value) {
        let args =
            ["run", "probe", "--accel", "kvm", "--memory", "64M", "--timeout", "120", "--cmdline", STAY];
        let mut pontoon = self.pontoon(&args);
        let child =
            pontoon.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("pontoon starts");
        (child, self.running())
    }

    /// A machine, once it runs.
    #[track_caller]
    pub fn running(&self) -> Value {
        until("it runs", || self.ps(&[]).into_iter().find(|m| m["state"] == "running"))
    }

    /// What `pontoon ps` tells.
    #[track_caller]
    pub fn ps(&self, flags: &[&str]) -> Vec<Value> {
        let words: Vec<_> = ["ps", "--json"].iter().chain(flags).copied().collect();
        serde_json::from_str(&self.ok(&words)).expect("--json prints JSON")
    }

    /// A machine's folder.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.dir.path().join("pontoon").join(name)
    }

    /// The names in the runtime folder, but for its lock: machines, and what should not be there.
    pub fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder("")).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name != ".lock").collect()
    }

    /// The processes that were started among this host's machines and live.
    pub fn processes(&self) -> Vec<String> {
        let ours = format!("XDG_RUNTIME_DIR={}", self.dir.path().display());
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
        let mine = |path: &PathBuf| {
            // That of a process which has ended, or is nobody's to read, is empty.
            let environment = std::fs::read(path.join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == ours.as_bytes())
        };
        entries.filter(mine).map(|path| path.display().to_string()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let output = self.run(&["ps", "--json"]);
        let left: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
        for machine in left {
            self.run(&["kill", machine["name"].as_str().unwrap_or("?")]);
        }
    }
}

/// The process of a machine that `ps` listed.
#[track_caller]
pub fn pid(machine: &Value) -> Pid {
    let pid = machine["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    pid.and_then(Pid::from_raw).expect("a machine has a process")
}

/// A port of 127.0.0.1 on which nobody listens.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has free ports");
    listener.local_addr().expect("it is bound").port()
}

/// Tries until it is so.
#[track_caller]
pub fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A new terminal.
pub struct Terminal {
    /// The person's end. Dropping it closes the terminal.
    pub master: File,
    /// The programs' end.
    pub slave: OwnedFd,
    /// What was read and not looked for yet.
    seen: Vec<u8>,
}

impl Default for Terminal {
    fn default() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("there are terminals left");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("it is ours");
        let name = ptsname(&master, Vec::new()).expect("it has a name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = open(name, flags, Mode::empty()).expect("it is unlocked");
        Self { master: master.into(), slave, seen: Vec::new() }
    }
}

impl Terminal {
    /// One that nobody has used.
    pub fn new() -> Self {
        Self::default()
    }

    /// The programs' end, for a standard stream.
    pub fn stream(&self) -> Stdio {
        self.slave.try_clone().expect("there are descriptors left").into()
    }

    /// Starts a command that is on this terminal, as from a shell: it is the terminal's own, in a session of its own.
    pub fn start(&self, command: &mut Command) -> Child {
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        session.stdin(self.stream()).stdout(self.stream()).stderr(self.stream());
        session.spawn().expect("setsid is part of util-linux")
    }

    /// Whether keys go through as they are: no echo, no lines, no signals.
    pub fn is_raw(&self) -> bool {
        is_raw(&self.slave)
    }

    /// Reads until `what` was there; what stands behind it is for the next call.
    #[track_caller]
    pub fn expect(&mut self, what: &str) {
        let found = |seen: &[u8]| seen.windows(what.len()).position(|window| window == what.as_bytes());
        loop {
            if let Some(at) = found(&self.seen) {
                self.seen.drain(..at + what.len());
                return;
            }
            let mut chunk = [0; 4096];
            let len = self.master.read(&mut chunk).unwrap_or(0);
            assert!(len > 0, "the terminal ended before '{what}': {}", String::from_utf8_lossy(&self.seen));
            self.seen.extend_from_slice(&chunk[..len]);
        }
    }
}

fn is_raw(terminal: impl AsFd) -> bool {
    let modes = tcgetattr(terminal).expect("it is a terminal").local_modes;
    !modes.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
}
