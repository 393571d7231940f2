//! Network namespaces for tests, and what stands in for a guest in them.
//!
//! A test that needs interfaces re-executes itself under `unshare`: as root with a network namespace of its own, otherwise
//! with a user namespace around that. The kernel removes everything when the process ends, also after a panic.

#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod guest;
#[path = "../../../tests/src/skip.rs"]
pub(crate) mod skip;
pub(crate) mod sys;

use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Set in the re-executed process: to 1, or to anything else by a test that executes itself once more.
const INNER: &str = "PONTOON_TEST_IN_NAMESPACE";

/// Declares tests that run in a network namespace of their own.
#[macro_export]
macro_rules! in_namespace {
    ($($(#[$meta:meta])* fn $name:ident() $body:block)*) => {
        $($(#[$meta])* #[test] fn $name() { $crate::common::isolated(stringify!($name), || $body) })*
    };
}

/// Runs `body` in a process with its own network namespace, in which the loopback is up.
pub(crate) fn isolated(name: &str, body: impl FnOnce()) {
    if let Some(how) = std::env::var_os(INNER) {
        if how == "1" {
            ip("link set lo up");
        }
        return body();
    }
    let works =
        |flags| Command::new("unshare").args([flags, "true"]).output().is_ok_and(|o| o.status.success());
    let Some(flags) = ["-n", "-rn"].into_iter().find(|flags| works(*flags)) else {
        skip::skip("this host lets us make no network namespace (unshare -rn)");
        return;
    };
    let exe = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.arg(flags).arg("--").arg(exe).args(["--exact", name, "--nocapture"]).env(INNER, "1");
    assert!(command.status().unwrap().success(), "{name} failed in its namespace");
}

/// Whether TAPs can be made here; says why not.
pub(crate) fn has_tun() -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => true,
        Err(error) => {
            skip::skip(format_args!("/dev/net/tun: {error}"));
            false
        }
    }
}

/// Runs `ip` with the words of `args` and returns what it prints.
#[track_caller]
pub(crate) fn ip(args: &str) -> String {
    let out = Command::new("ip").args(args.split_whitespace()).output().expect("iproute2 is installed");
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Whether an interface of that name exists here.
pub(crate) fn exists(name: &str) -> bool {
    Command::new("ip").args(["link", "show", "dev", name]).output().unwrap().status.success()
}

/// Waits for what a job on the LAN returns; a frame that was lost must not hold the test for ever.
#[track_caller]
pub(crate) fn wait<T>(result: &Receiver<T>) -> T {
    result.recv_timeout(Duration::from_secs(20)).expect("the job on the LAN ends within 20 seconds")
}

/// Waits until a bridge port forwards, which the kernel decides in the background once it has a carrier.
pub(crate) fn until_forwarding(port: &str) {
    while !ip(&format!("-o -d link show dev {port}")).contains("state forwarding") {}
}

/// A bridge `br0` that is up and has one port, `lan0`, whose other end, `eth0`, is in a namespace of its own with the
/// address 10.9.0.2/24: the LAN.
pub(crate) struct Lan {
    jobs: mpsc::Sender<Job>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce() + Send>;

impl Lan {
    pub(crate) fn new() -> Self {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (ready, thread_id) = mpsc::channel();
        let thread = thread::spawn(move || {
            sys::new_namespace().unwrap();
            ready.send(sys::thread_id()).unwrap();
            for job in inbox {
                job();
            }
        });
        let lan = Self { jobs, thread: Some(thread) };
        let tid = thread_id.recv().unwrap();
        ip("link add br0 type bridge stp_state 0 forward_delay 0");
        ip("link add lan0 type veth peer name eth0");
        ip(&format!("link set eth0 netns {tid}"));
        ip("link set lan0 master br0 up");
        ip("link set br0 up");
        lan.run(|| {
            ip("link set lo up");
            ip("link set eth0 address 02:00:00:00:00:02");
            ip("address add 10.9.0.2/24 dev eth0");
            ip("link set eth0 up");
            // The guest of these tests answers no ARP of its own accord.
            ip("neigh add 10.9.0.5 lladdr 02:00:00:00:00:05 dev eth0 nud permanent");
        });
        until_forwarding("lan0");
        lan
    }

    /// Runs `job` on the LAN and waits for it.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        wait(&self.start(job))
    }

    /// Starts `job` on the LAN.
    pub(crate) fn start<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || {
            // Whoever started it may have lost interest.
            let _ = done.send(job());
        });
        self.jobs.send(job).expect("the LAN's thread runs");
        result
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        let (dead, _) = mpsc::channel();
        drop(std::mem::replace(&mut self.jobs, dead));
        // A job may wait for what a failed test will not send; the process ends in any case.
        if let Some(thread) = self.thread.take().filter(|_| !thread::panicking()) {
            let _ = thread.join();
        }
    }
}
