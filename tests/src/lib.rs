//! End-to-end tests: whole machines on whole networks, and checks over the whole tree.
//!
//! The tests are in `tests/tests/`; this library holds what they share: the `pontoon` binary, the probe guest
//! with its orders, and how a test says that it cannot run here.
//!
//! A test that lacks something of its host ([`skip`]) passes, prints why, and leaves a line in the file that
//! `PONTOON_SKIPS` names; `scripts/test` prints those lines at its end.

// Test support: a broken expectation is the test's failure, and skips are told to whoever watches.
#![allow(clippy::panic, clippy::print_stderr, reason = "this crate is for tests only")]

pub mod host;
pub mod lan;
mod skip;

pub use skip::skip;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use guest_images::{Image, Store};
use serde_json::Value;

/// The `pontoon` binary: `PONTOON_BIN`, or the one that cargo built beside this test; built if it isn't there.
pub fn pontoon() -> PathBuf {
    static PONTOON: LazyLock<PathBuf> = LazyLock::new(|| match std::env::var_os("PONTOON_BIN") {
        Some(path) => path.into(),
        None => build(&["--bin", "pontoon"], "pontoon"),
    });
    PONTOON.clone()
}

/// An example program of the library, built if it isn't there.
pub fn example(name: &str) -> PathBuf {
    build(&["--example", name], &format!("examples/{name}"))
}

/// What `cargo build -p vmm` makes of `what`, at `path` beside the tests.
fn build(what: &[&str], path: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    // target/TRIPLE/debug/deps/TEST
    let built = test.parent().and_then(Path::parent).expect("tests are in deps/").join(path);
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked", "-p", "vmm"])
        .args(what)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .expect("cargo runs, it built this test");
    assert!(status.success() && built.exists(), "no binary at {}", built.display());
    built
}

/// Whether guests run on this host's KVM; if not, says so for the calling test.
pub fn have_kvm() -> bool {
    let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !usable {
        skip("/dev/kvm is not there or may not be opened");
    }
    usable
}

/// Whether the lab's emulator is installed; if not, says so for the calling test.
pub fn have_lab() -> bool {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join("qemu-system-x86_64").exists());
    if !found {
        skip("qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)");
    }
    found
}

/// Whether this process may make network namespaces; if not, says so for the calling test.
pub fn have_namespaces() -> bool {
    let ok = Command::new("unshare")
        .args(["-n", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !ok {
        skip("network namespaces cannot be made here (root)");
    }
    ok
}

/// The image `debian`, for guests in the lab; if that cannot be, says so for the calling test.
pub fn debian_image() -> Option<Image> {
    if !have_lab() {
        return None;
    }
    let image = Store::open_default().and_then(|store| store.get("debian"));
    image.inspect_err(|error| skip(error)).ok()
}

/// What `--put` needs to carry the store that this image is in into the lab, where `pontoon` finds it.
pub fn carry_images(image: &Image) -> String {
    let images = image.kernel.parent().and_then(Path::parent).expect("IMAGES/NAME/vmlinuz");
    format!("{}:/root/.cache/pontoon/images", images.display())
}

/// A shell script on the emulated host, where the store of this image is.
pub fn shell_beside_image(image: &Image, script: &str) -> Output {
    let put = carry_images(image);
    Pontoon::new(["lab", "--timeout", "200", "--put", &put, "--", "sh", "-c", script]).output()
}

/// All that a command said, with its status: for the message of an assertion that failed.
pub fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("status {:?}\nstdout:\n{out}\nstderr:\n{err}", output.status.code())
}

/// A run of `pontoon` with a bound on its time.
pub struct Pontoon {
    command: Command,
}

impl Pontoon {
    /// `pontoon` with these arguments.
    pub fn new<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Self {
        let mut command = Command::new(pontoon());
        command.args(args.into_iter().map(Into::into)).stdin(Stdio::null());
        command.env_remove("RUST_LOG");
        Self { command }
    }

    /// The command, to be changed further.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Runs it to its end.
    pub fn output(mut self) -> Output {
        self.command.output().expect("pontoon starts")
    }
}

/// A run of the probe guest through the command line.
pub struct Probe {
    flags: Vec<OsString>,
    orders: Vec<String>,
    timeout: Duration,
}

/// What a probe reported.
#[derive(Debug)]
pub struct Reports {
    /// The exit status of `pontoon run`.
    pub status: i32,
    /// One object per order, in order.
    pub lines: Vec<Value>,
    /// Everything on standard output: the guest's console.
    pub console: String,
    /// Everything on standard error.
    pub errors: String,
}

impl Default for Probe {
    fn default() -> Self {
        Self { flags: Vec::new(), orders: Vec::new(), timeout: Duration::from_secs(30) }
    }
}

impl Probe {
    /// A probe on `--net nat` without orders.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a flag of `pontoon run`, with its value if it has one.
    #[must_use]
    pub fn flag<A: Into<OsString>>(mut self, words: impl IntoIterator<Item = A>) -> Self {
        self.flags.extend(words.into_iter().map(Into::into));
        self
    }

    /// Adds an order (docs/probe.md).
    #[must_use]
    pub fn order(mut self, order: impl Into<String>) -> Self {
        self.orders.push(order.into());
        self
    }

    /// How long it may take in all, 30 seconds unless said otherwise.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The arguments of `pontoon`.
    pub fn args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> =
            ["run", "probe", "--accel", "kvm", "--memory", "64M"].iter().map(OsString::from).collect();
        args.extend([OsString::from("--timeout"), self.timeout.as_secs().to_string().into()]);
        args.extend(self.flags.iter().cloned());
        args.extend([OsString::from("--cmdline"), format!("probe.do={}", self.orders.join(";")).into()]);
        args
    }

    /// The command that runs it, for a test that starts it in its own way.
    pub fn command(&self) -> Pontoon {
        Pontoon::new(self.args())
    }

    /// Runs it to its end.
    pub fn run(&self) -> Reports {
        Reports::from(self.command().output())
    }
}

impl From<Output> for Reports {
    fn from(output: Output) -> Self {
        let console = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = console
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line.trim()).ok())
            .filter(|value| value.get("order").is_some())
            .collect();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        Self { status: output.status.code().unwrap_or(-1), lines, console, errors }
    }
}

impl Reports {
    /// Asserts that every order was as it should be.
    #[track_caller]
    pub fn all_ok(&self) -> &Self {
        assert_eq!(self.status, 0, "console:\n{}\nstderr:\n{}", self.console, self.errors);
        self
    }

    /// The `n`th report.
    #[track_caller]
    pub fn line(&self, n: usize) -> &Value {
        self.lines.get(n).unwrap_or_else(|| panic!("no report {n}\n{}\n{}", self.console, self.errors))
    }

    /// The first report of this verb.
    #[track_caller]
    pub fn of(&self, verb: &str) -> &Value {
        self.lines
            .iter()
            .find(|line| line["order"] == verb)
            .unwrap_or_else(|| panic!("no report of {verb}\n{}\n{}", self.console, self.errors))
    }
}
