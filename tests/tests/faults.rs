//! What a host may do to a machine: end its process at any moment, give it too little of everything, let it stand still. The outcome
//! is clear and nothing is left behind.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pontoon_tests::host::{Host, STAY, free_port, pid, until};
use pontoon_tests::lan::Lan;
use pontoon_tests::{have_kvm, pontoon, text};
use rustix::process::{Pid, Signal, kill_process};

/// The longest that one may have lived: it runs by then.
const LIFE: Duration = Duration::from_millis(40);

/// Moments and signals that are the same in every run.
fn moments(seed: u64, count: usize) -> impl Iterator<Item = (Duration, Signal)> {
    let mut state = seed;
    // A linear congruential generator (Knuth, MMIX).
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let micros = u64::try_from(LIFE.as_micros()).expect("it is short");
    (0..count).map(move |n| {
        let signals = [Signal::TERM, Signal::INT, Signal::HUP, Signal::KILL];
        (Duration::from_micros(random(micros)), signals[n % signals.len()])
    })
}

/// Asserts that nothing is left of machines of this host that were killed, but what their processes could not tidy up.
#[track_caller]
fn nothing_is_left(host: &Host, temporary: &std::path::Path, what: &str) {
    until(&format!("the processes end: {what}: {:?}", host.processes()), || {
        host.processes().is_empty().then_some(())
    });
    assert_eq!(host.ps(&["-a"]).len(), 0, "{what}");
    assert_eq!(host.left(), [""; 0], "{what}");
    assert_eq!(std::fs::read_dir(temporary).expect("it is ours").count(), 0, "a temporary file: {what}");
}

/// Ends `count` machines at random moments; `start` is the command, without its temporary folder.
fn at_any_moment(host: &Host, (seed, count): (u64, usize), start: impl Fn() -> Command, also: impl Fn()) {
    let temporary = tempfile::tempdir().expect("the temporary directory is writable");
    for (n, (moment, signal)) in moments(seed, count).enumerate() {
        let mut command = start();
        command.env("XDG_RUNTIME_DIR", host.dir()).env("TMPDIR", temporary.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("pontoon starts");
        std::thread::sleep(moment);
        kill_process(Pid::from_child(&child), signal).expect("it is ours");
        child.wait().expect("it is ours");
        let what = format!("machine {n} of seed {seed}, {signal:?} after {moment:?}");
        // Whoever may tidy up has done so, without anybody who looks.
        if signal != Signal::KILL {
            assert_eq!(host.left(), [""; 0], "{what}");
        }
        also();
        nothing_is_left(host, temporary.path(), &what);
    }
}

#[test]
fn a_machine_that_is_ended_at_any_moment_leaves_nothing() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let disk = tempfile::NamedTempFile::new().expect("the temporary directory is writable");
    disk.as_file().set_len(1 << 20).expect("there is room");
    let disk = format!("{},overlay", disk.path().display());
    let publish = format!("{}:80", free_port());
    let start = || {
        let mut command = Command::new(pontoon());
        command.args([
            "run",
            "probe",
            "--accel",
            "kvm",
            "--memory",
            "64M",
            "--timeout",
            "60",
            "-p",
            &publish,
        ]);
        command.args(["--disk", &disk, "--cmdline", STAY]);
        command
    };
    // All of them publish the same port, which is therefore free again at once.
    at_any_moment(&host, (1, 40), start, || {});
}

#[test]
fn a_machine_on_a_bridge_that_is_ended_at_any_moment_leaves_no_tap() {
    if !have_kvm() {
        return;
    }
    let Some(lan) = Lan::new() else { return };
    let host = Host::new();
    let start = || {
        let mut command = lan.in_host(pontoon());
        command.args(["run", "probe", "--accel", "kvm", "--memory", "64M", "--timeout", "60"]);
        command.args(["--net", "tap:br0", "--cmdline", STAY]);
        command
    };
    at_any_moment(&host, (2, 20), start, || {
        until("the kernel removes the TAP", || (lan.ports() == ["eth0"]).then_some(()));
    });
}

#[test]
fn a_detached_machine_whose_starter_is_ended_at_any_moment_is_listed_or_gone() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let start = || {
        let mut command = Command::new(pontoon());
        command.args(["run", "probe", "--accel", "kvm", "--memory", "64M", "--timeout", "60", "--detach"]);
        command.args(["--name", "a", "--cmdline", STAY]);
        command
    };
    for (n, (moment, signal)) in moments(3, 20).enumerate() {
        let mut child = start()
            .env("XDG_RUNTIME_DIR", host.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("pontoon starts");
        std::thread::sleep(moment);
        kill_process(Pid::from_child(&child), signal).expect("it is ours");
        child.wait().expect("it is ours");
        let what = format!("machine {n}, {signal:?} after {moment:?}");
        // Once the machine has told its name it stays, whether its starter could pass that on or not.
        until(&format!("it runs or is gone: {what}"), || {
            let list = host.ps(&[]);
            let settled = match list.first() {
                Some(machine) => machine["state"] == "running",
                None => host.processes().is_empty(),
            };
            settled.then_some(())
        });
        host.run(&["kill", "a"]);
        let left = host.ps(&["-a"]);
        assert!(left.iter().all(|machine| machine["exit"]["status"] == 143), "{what}: {left:?}");
        assert_eq!(host.processes(), [""; 0], "{what}");
    }
}

/// Runs a probe that ends with status 5, under a limit that `ulimit` sets.
fn limited(host: &Host, limit: &str) -> Output {
    let flags = "--accel kvm --memory 64M --cpus 2 --timeout 60 --cmdline probe.do=end=5";
    let script = format!("ulimit {limit} && exec \"$0\" run probe {flags}");
    let mut command = Command::new("bash");
    command.args(["-c", &script]).arg(pontoon()).env("XDG_RUNTIME_DIR", host.dir());
    command.stdin(Stdio::null()).output().expect("bash starts")
}

/// Asserts that the machine ran, or that one clear error said why not; says which.
#[track_caller]
fn ran_or_told(host: &Host, limit: &str) -> bool {
    let output = limited(host, limit);
    let errors = String::from_utf8_lossy(&output.stderr);
    let told = errors.lines().filter(|line| line.starts_with("pontoon: ")).count() > 0;
    let clear = match output.status.code() {
        Some(5) => true,
        Some(2 | 125) => told && !errors.contains("panicked"),
        _ => false,
    };
    assert!(clear, "ulimit {limit}: {}", text(&output));
    assert_eq!(host.left(), [""; 0], "ulimit {limit}: {}", text(&output));
    output.status.code() == Some(5)
}

#[test]
fn too_few_descriptors_are_one_clear_error_or_enough() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let ran: Vec<_> = (4..70).map(|limit| ran_or_told(&host, &format!("-n {limit}"))).collect();
    assert!(!ran[0] && ran[ran.len() - 1], "{ran:?}");
}

#[test]
fn too_little_memory_is_one_clear_error() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    // KiB of addresses: less than the guest's, and then what a thread's stack needs beyond that.
    let ran: Vec<_> =
        (16..100).step_by(2).map(|mib| ran_or_told(&host, &format!("-v {}", mib << 10))).collect();
    assert!(!ran[0] && ran[ran.len() - 1], "{ran:?}");
    let output = limited(&host, &format!("-v {}", 40 << 10));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains("ulimit -v"), "{}", text(&output));
}

#[test]
fn a_limit_on_files_is_an_error_and_not_the_end_by_a_signal() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let output = limited(&host, "-f 1024");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains("-f"), "{}", text(&output));
    assert_eq!(host.left(), [""; 0]);
}

/// The probe's address, once it has one.
fn address(host: &Host) -> String {
    until("it has a lease", || host.ps(&[])[0]["address"].as_str().map(str::to_owned))
}

/// What a server that echoes says to this.
fn echo(stream: &mut TcpStream, what: &[u8]) -> Vec<u8> {
    stream.write_all(what).expect("it is connected");
    let mut back = vec![0; what.len()];
    stream.read_exact(&mut back).expect("the guest answers");
    back
}

#[test]
fn a_machine_that_stood_still_goes_on_with_its_connections_and_its_lease() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let port = free_port();
    let publish = format!("{port}:7");
    host.detach(&["--name", "a", "-p", &publish], "probe.do=dhcp;listen=7,count=1;wait=60000");
    let before = address(&host);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it is published");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("no limit of zero");
    assert_eq!(echo(&mut stream, b"before"), b"before");
    let machine = pid(&host.ps(&[])[0]);
    kill_process(machine, Signal::STOP).expect("it is ours");
    // What comes meanwhile waits in the host's socket. Long enough for every timer of a round trip.
    stream.write_all(b"mean").expect("it is connected");
    std::thread::sleep(Duration::from_millis(2500));
    kill_process(machine, Signal::CONT).expect("it is ours");
    let mut meanwhile = [0; 4];
    stream.read_exact(&mut meanwhile).expect("the guest answers");
    assert_eq!(&meanwhile, b"mean");
    assert_eq!(echo(&mut stream, b"afterwards"), b"afterwards");
    assert_eq!(address(&host), before);
}

#[test]
fn a_time_out_that_passes_while_the_machine_stands_still_ends_it_when_it_goes_on() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let start = Instant::now();
    let args = ["run", "probe", "--accel", "kvm", "--memory", "64M", "--timeout", "1", "--cmdline", STAY];
    let mut child = host
        .pontoon(&args)
        .command()
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("pontoon starts");
    host.running();
    let machine = Pid::from_child(&child);
    kill_process(machine, Signal::STOP).expect("it is ours");
    std::thread::sleep(Duration::from_millis(1100).saturating_sub(start.elapsed()));
    assert!(child.try_wait().expect("it is ours").is_none(), "nothing ends it while it stands still");
    kill_process(machine, Signal::CONT).expect("it is ours");
    assert_eq!(child.wait().expect("it ends").code(), Some(124));
    assert_eq!(host.left(), [""; 0]);
}
