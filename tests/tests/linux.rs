//! Stock Debian kernels in the lab, as a user meets them: `pontoon run`, the demo, and the probe on a KVM with
//! (emulated) hardware behind it.
//!
//! `scripts/test` builds the image beforehand; without it these tests say so and are skipped.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use guest_images::deb::Suite;
use guest_images::{BuildOptions, Store};
use pontoon_tests::{Pontoon, carry_images, debian_image, have_lab, skip, text};

/// A command in a stock Debian guest, in the lab; `flags` before the command.
fn debian(flags: &[&str], command: &[&str]) -> Output {
    let head = ["run", "debian", "--accel", "lab", "--timeout", "120"];
    Pontoon::new(head.iter().chain(flags).chain(&["--"]).chain(command)).output()
}

#[test]
fn a_stock_kernel_loads_its_modules_gets_a_lease_and_returns_the_commands_status() {
    if debian_image().is_none() {
        return;
    }
    let script =
        "ip -4 -o addr show eth0; ip route; cat /etc/resolv.conf; lsmod; ping -c 3 192.168.122.1; exit 42";
    let output = debian(&["--subnet", "192.168.122.0/24"], &["sh", "-c", script]);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(42), "{all}");
    for fact in [
        "inet 192.168.122.",
        "default via 192.168.122.1",
        "nameserver 192.168.122.1",
        "virtio_net",
        "virtio_mmio",
        "3 packets transmitted, 3 packets received, 0% packet loss",
    ] {
        assert!(all.contains(fact), "'{fact}' is missing\n{all}");
    }
}

const TOPOLOGY: &str = "nproc; free -m; ip -o link; cd /sys/devices/system/cpu; for cpu in cpu[0-9]; do
    cd $cpu/topology; echo $cpu $(cat physical_package_id core_id thread_siblings_list core_siblings_list); cd ../..
done";

#[test]
fn several_cpus_of_one_package_and_no_nic_are_what_the_guest_sees() {
    if debian_image().is_none() {
        return;
    }
    let output = debian(&["--cpus", "3", "--memory", "700M", "--net", "none"], &["sh", "-c", TOPOLOGY]);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    let first = String::from_utf8_lossy(&output.stdout);
    assert_eq!(first.lines().next().map(str::trim), Some("3"), "{all}");
    // Package, core, its threads, the package's CPUs: cores without siblings, as cpuid/mod.rs tells them.
    for fact in ["cpu0 0 0 0 0-2", "cpu1 0 1 1 0-2", "cpu2 0 2 2 0-2"] {
        assert!(all.contains(fact), "'{fact}' is missing\n{all}");
    }
    assert!(!all.contains("eth0"), "{all}");
}

#[test]
fn a_kernel_and_initrd_of_the_users_own_work_the_same() {
    let Some(image) = debian_image() else { return };
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let console = dir.path().join("console");
    let words = ["run", "--accel", "lab", "--timeout", "120", "--kernel"].map(Into::into);
    let mut args: Vec<std::ffi::OsString> = words.to_vec();
    args.extend([image.kernel.into(), "--initrd".into(), image.initrd.into()]);
    args.extend(["--console".into(), console.clone().into(), "--".into()]);
    args.extend(["sh", "-c", "echo \"it's\" $(hostname) '&' done"].map(Into::into));
    let output = Pontoon::new(args).output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let said = std::fs::read_to_string(&console).expect("the console was carried out");
    assert!(said.contains("it's vm1 & done"), "{said}");
}

#[test]
fn debian_13s_kernel_gets_a_lease_and_powers_off_as_debian_12s_does() {
    if !have_lab() {
        return;
    }
    // In a store of its own: the user's image stays what it is.
    let store = Store::open(&guest_images::cache_dir().expect("HOME is set").join("tests-trixie"));
    let options = BuildOptions { suite: Some(Suite::Trixie), ..BuildOptions::default() };
    let image = match store.build("debian", &options, &mut guest_images::Silent) {
        Ok(image) => image,
        Err(error) => return skip(format_args!("no image of Debian 13: {error}")),
    };
    let words = ["run", "--accel", "lab", "--timeout", "120", "--kernel"].map(Into::into);
    let mut args: Vec<std::ffi::OsString> = words.to_vec();
    args.extend([image.kernel.into(), "--initrd".into(), image.initrd.into(), "--".into()]);
    let script = "uname -r; ip -4 -o addr show eth0; ping -c 2 192.168.122.1; poweroff; sleep 60; exit 9";
    args.extend(["sh", "-c", script].map(Into::into));
    let output = Pontoon::new(args).output();
    let all = text(&output);
    // A power-off is an end, but no word on how the command went.
    assert_eq!(output.status.code(), Some(125), "{all}");
    for fact in ["6.12.", "inet 192.168.122.", "2 packets received", "the guest powered off without"] {
        assert!(all.contains(fact), "'{fact}' is missing\n{all}");
    }
}

#[test]
fn a_kernel_panic_and_a_guest_that_hangs_end_the_command() {
    if debian_image().is_none() {
        return;
    }
    let panicked = debian(&["--net", "none"], &["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60"]);
    assert_eq!(panicked.status.code(), Some(125), "{}", text(&panicked));
    let head = ["run", "debian", "--accel", "lab", "--net", "none", "--timeout", "12", "--", "sleep", "600"];
    let hung = Pontoon::new(head).output();
    assert_eq!(hung.status.code(), Some(124), "{}", text(&hung));
}

/// `pontoon WORDS…` on the emulated host, as an ordinary user unless `root`.
fn in_lab(root: bool, words: &[&str]) -> Output {
    let user = if root { &[][..] } else { &["--user"] };
    let head = ["lab", "--timeout", "120"];
    Pontoon::new(head.iter().chain(user).chain(&["--", "pontoon"]).chain(words)).output()
}

#[test]
fn an_ordinary_user_needs_no_privilege_for_the_nat() {
    if !have_lab() {
        return;
    }
    let orders = "probe.do=dhcp;ping=gw,count=2;resolve=gateway.internal;tcp-connect=169.254.169.254:80,expect=refused";
    let output = in_lab(false, &["run", "probe", "--memory", "64M", "--cmdline", orders]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    // And where the kernel forbids unprivileged ping, the guest is told so and nobody fakes an answer.
    let output = in_lab(
        false,
        &[
            "run",
            "probe",
            "--memory",
            "64M",
            "--cmdline",
            "probe.do=dhcp;ping=10.0.2.2,count=1,expect=unreachable",
        ],
    );
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    assert!(all.contains("ping_group_range"), "{all}");
}

#[test]
fn the_check_passes_on_emulated_amd_v() {
    if !have_lab() {
        return;
    }
    let output = in_lab(true, &["check", "--json"]);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    let result: serde_json::Value = serde_json::from_str(line.trim()).expect("--json prints JSON");
    assert_eq!((&result["ok"], &result["kvm"]), (&true.into(), &"AMD-V".into()), "{all}");
}

#[test]
fn what_is_piped_in_reaches_the_command_whole() {
    if debian_image().is_none() {
        return;
    }
    let head = ["run", "debian", "--accel", "lab", "--timeout", "120", "--net", "none", "--"];
    let script = "read first; echo \"[$first]\"; head -n 400 | md5sum; exit 3";
    let mut pontoon = Pontoon::new(head.iter().chain(&["sh", "-c", script]));
    let command = pontoon.command().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("pontoon starts");
    let mut lines = String::from("the first line\n");
    for n in 0..400 {
        writeln!(lines, "line {n} of what is piped in").expect("a String takes everything");
    }
    // Written at once, long before there is a guest; the pipe stays open, as a terminal's would.
    let mut stdin = child.stdin.take().expect("it is piped");
    std::io::Write::write_all(&mut stdin, lines.as_bytes()).expect("pontoon reads");
    let output = child.wait_with_output().expect("pontoon ends");
    drop(stdin);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(3), "{all}");
    let expected = Command::new("sh")
        .args(["-c", &format!("printf %s '{}' | tail -n 400 | md5sum", lines)])
        .output()
        .expect("md5sum is installed");
    assert!(all.contains("[the first line]"), "{all}");
    assert!(all.contains(String::from_utf8_lossy(&expected.stdout).trim()), "{all}");
}

/// The test binary `name` that was built beside this one; the newest, if older builds are still about.
fn sibling(name: &str) -> PathBuf {
    let here = std::env::current_exe().expect("a test has a path");
    let entries = fs::read_dir(here.parent().expect("it is in a folder")).expect("the folder is readable");
    let is_binary = |path: &PathBuf| {
        let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        path.extension().is_none() && stem.rsplit_once('-').is_some_and(|(test, _)| test == name)
    };
    let modified = |path: &PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let found = entries.flatten().map(|entry| entry.path()).filter(is_binary).max_by_key(modified);
    found.expect("it is built with the other tests: cargo nextest run -p pontoon-tests")
}

/// Runs one of the probe's test binaries, which are static, on the emulated host.
fn tests_in_lab(name: &str) {
    if !have_lab() {
        return;
    }
    let put = format!("{}:/lab/{name}", sibling(name).display());
    let output = Pontoon::new([
        "lab",
        "--timeout",
        "200",
        "--put",
        &put,
        "--",
        "env",
        "PONTOON_BIN=/usr/local/bin/pontoon",
        &format!("/lab/{name}"),
        "--test-threads=1",
    ])
    .output();
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    assert!(all.contains("test result: ok.") && !all.contains("SKIPPED"), "{all}");
}

#[test]
fn the_probes_tests_of_the_nat_pass_on_emulated_amd_v() {
    tests_in_lab("probe_nat");
}

#[test]
fn the_probes_tests_of_the_bridge_pass_on_emulated_amd_v() {
    tests_in_lab("probe_tap");
}

#[test]
fn a_kvm_that_is_absent_or_forbidden_is_one_clear_error() {
    if !have_lab() {
        return;
    }
    let run = "pontoon run probe --accel kvm --cmdline probe.do=dhcp";
    let script =
        format!("chmod 600 /dev/kvm; su -s /bin/sh nobody -c '{run}'; echo $?; rm /dev/kvm; {run}; echo $?");
    let output = Pontoon::new(["lab", "--timeout", "100", "--", "sh", "-c", &script]).output();
    let all = text(&output);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(stdout.lines().collect::<Vec<_>>(), ["2", "2"], "{all}");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains("/dev/kvm may not be opened"), "{all}");
    assert!(errors.contains("there is no /dev/kvm") && errors.contains("modprobe kvm_amd"), "{all}");
}

#[test]
fn the_demo_passes() {
    let Some(image) = debian_image() else { return };
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts");
    let output = Pontoon::new([
        "lab".to_owned(),
        "--timeout".to_owned(),
        "280".to_owned(),
        "--put".to_owned(),
        format!("{demo}/demo.d/story:/usr/local/share/pontoon/demo.d/story"),
        "--put".to_owned(),
        format!("{demo}/bridge:/usr/local/share/pontoon/bridge"),
        "--put".to_owned(),
        carry_images(&image),
        "--".to_owned(),
        "/usr/local/share/pontoon/demo.d/story".to_owned(),
    ])
    .output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains(" passed, 0 failed"), "{}", text(&output));
}
