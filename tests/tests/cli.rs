//! Bad input at the command line: one clear error, exit status 2, nothing left behind.

use std::fs;
use std::path::Path;
use std::process::Output;

use pontoon_tests::{Pontoon, have_kvm};

fn run(args: &[&str]) -> Output {
    Pontoon::new(args).output()
}

/// Asserts exit status 2 and one message on standard error that says all of these.
#[track_caller]
fn refused(args: &[&str], says: &[&str]) {
    let output = run(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}\n{text}");
    assert!(output.stdout.is_empty(), "{args:?} printed a result");
    for word in says {
        assert!(text.contains(word), "{args:?} does not say '{word}':\n{text}");
    }
}

fn in_dir(name: &str, content: &[u8], test: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let path = dir.path().join(name);
    fs::write(&path, content).expect("a new directory is writable");
    test(&path);
}

#[test]
fn flags_that_cannot_be_are_refused_with_what_to_write() {
    refused(&["run"], &["--kernel"]);
    refused(&["run", "probe", "--net", "bridge"], &["nat", "tap:br0", "none"]);
    refused(&["run", "probe", "--net", "tap"], &["tap:br0"]);
    refused(&["run", "probe", "-p", "http"], &["8080:80"]);
    refused(&["run", "probe", "-p", "99999:80"], &["99999"]);
    refused(&["run", "probe", "--memory", "lots"], &["512M"]);
    refused(&["run", "probe", "--cpus", "0"], &["--cpus"]);
    refused(&["run", "probe", "--mac", "52:54:00"], &["52:54:00:12:34:56"]);
    refused(&["run", "probe", "--name", "a_b"], &["--name"]);
    refused(&["run", "probe", "--subnet", "192.168.0.0"], &["192.168.122.0/24"]);
    refused(&["run", "probe", "--accel", "tcg"], &["auto", "kvm", "lab"]);
    refused(&["run", "probe", "--kernel", "x"], &["--kernel"]);
    refused(&["nonsense"], &["nonsense"]);
}

#[test]
fn flags_of_another_network_are_refused_rather_than_ignored() {
    refused(&["run", "probe", "--accel", "kvm", "--net", "none", "-p", "8080:80"], &["-p", "--net nat"]);
    refused(&["run", "probe", "--accel", "kvm", "--net", "tap:br0", "--host-access"], &["--host-access"]);
    refused(&["run", "probe", "--accel", "kvm", "--net", "none", "--pcap", "x"], &["--pcap"]);
    refused(&["run", "probe", "--accel", "kvm", "--mac", "53:54:00:12:34:56"], &["group"]);
}

#[test]
fn an_image_that_is_not_there_says_how_to_make_it() {
    refused(&["run", "fedora"], &["fedora", "pontoon image build debian"]);
    refused(&["image", "build", "fedora"], &["fedora", "debian"]);
    refused(&["image", "build", "debian", "--suite", "warty"], &["warty", "bookworm"]);
    let empty = tempfile::tempdir().expect("the temporary directory is writable");
    let mut command = Pontoon::new(["run", "debian"]);
    command.command().env("XDG_CACHE_HOME", empty.path());
    let output = command.output();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("pontoon image build debian"));
}

#[test]
fn the_probe_takes_no_command() {
    refused(&["run", "probe", "--", "ls"], &["probe.do="]);
}

#[test]
fn a_kernel_that_is_not_one_is_refused() {
    if !have_kvm() {
        return;
    }
    let kernel = |path: &Path, says: &[&str]| {
        let path = path.to_str().expect("a temporary path is text");
        let args = ["run", "--accel", "kvm", "--net", "none", "--kernel", path];
        refused(&args, says);
        // Nor is it told beforehand what this KVM would make of a Linux kernel.
        let said = run(&args).stderr;
        assert_eq!(String::from_utf8_lossy(&said).lines().count(), 1, "{}", String::from_utf8_lossy(&said));
    };
    kernel(Path::new("/nonexistent/vmlinuz"), &["/nonexistent/vmlinuz"]);
    kernel(Path::new("/"), &["/"]);
    in_dir("empty", b"", |path| kernel(path, &["empty"]));
    in_dir("text", b"#!/bin/sh\necho hello\n", |path| kernel(path, &["text"]));
    in_dir("short.elf", b"\x7fELF\x02\x01\x01", |path| kernel(path, &["short.elf"]));
    // An ELF header whose program headers lie far outside the file.
    let mut wild = vec![0u8; 64];
    wild[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    wild[16..20].copy_from_slice(&[2, 0, 62, 0]);
    wild[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    wild[54..58].copy_from_slice(&[56, 0, 255, 255]);
    in_dir("wild.elf", &wild, |path| kernel(path, &["wild.elf"]));
    // A boot sector with the bzImage's magic and nothing behind it.
    let mut truncated = vec![0u8; 1024];
    truncated[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    truncated[0x202..0x206].copy_from_slice(b"HdrS");
    truncated[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
    in_dir("truncated", &truncated, |path| kernel(path, &["truncated"]));
}

#[test]
fn an_initrd_that_is_missing_or_too_large_is_refused() {
    if !have_kvm() {
        return;
    }
    in_dir("vmlinux", guest_images::PROBE, |kernel| {
        let kernel = kernel.to_str().expect("a temporary path is text");
        refused(
            &[
                "run",
                "--accel",
                "kvm",
                "--net",
                "none",
                "--kernel",
                kernel,
                "--initrd",
                "/nonexistent/initrd",
            ],
            &["/nonexistent/initrd"],
        );
        in_dir("initrd", &vec![0; 40 << 20], |initrd| {
            let initrd = initrd.to_str().expect("a temporary path is text");
            refused(
                &[
                    "run", "--accel", "kvm", "--net", "none", "--memory", "32M", "--kernel", kernel,
                    "--initrd", initrd,
                ],
                &["at least"],
            );
        });
    });
}

#[test]
fn a_published_port_that_is_taken_is_refused() {
    if !have_kvm() {
        return;
    }
    let holder = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has free ports");
    let port = holder.local_addr().expect("it is bound").port();
    let publish = format!("{port}:80");
    refused(&["run", "probe", "--accel", "kvm", "-p", &publish], &[&port.to_string(), "in use"]);
    refused(&["run", "probe", "--accel", "kvm", "-p", "192.0.2.1:8080:80"], &["192.0.2.1"]);
}

#[test]
fn results_go_to_standard_output_and_json_is_json() {
    let output = run(&["image", "ls", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let images: serde_json::Value = serde_json::from_slice(&output.stdout).expect("--json prints JSON");
    assert!(images.is_array());
}

#[test]
fn a_full_disk_behind_the_output_is_an_error_and_behind_the_errors_changes_nothing() {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").expect("every Linux has it");
    let folder = tempfile::tempdir().expect("the temporary directory is writable");
    let pontoon = |args: &[&str]| {
        let mut pontoon = Pontoon::new(args);
        pontoon.command().env("XDG_RUNTIME_DIR", folder.path());
        pontoon
    };
    let mut lost = pontoon(&["ps", "--json"]);
    lost.command().stdout(full()).stderr(std::process::Stdio::piped());
    let output =
        lost.command().spawn().and_then(std::process::Child::wait_with_output).expect("pontoon starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("standard output") && text.lines().count() == 1, "{text}");
    let mut untold = pontoon(&["stop", "nobody"]);
    let status = untold.command().stderr(full()).status().expect("pontoon starts");
    assert_eq!(status.code(), Some(2), "as if somebody had read the error");
}

/// Errors capture backtraces then, for which a program needs its tables (docs/decisions/0003-static-binary.md).
#[test]
fn an_error_is_told_where_backtraces_are_asked_for() {
    let mut pontoon = Pontoon::new(["run", "fedora"]);
    pontoon.command().env("RUST_BACKTRACE", "1");
    let output = pontoon.output();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn completions_and_the_manual_are_made_from_the_same_definitions() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&output.stdout).contains("publish"), "{shell}");
    }
    let manual = run(&["man"]);
    assert!(String::from_utf8_lossy(&manual.stdout).contains("host\\-access"));
    assert!(
        String::from_utf8_lossy(&manual.stdout).contains("tap\\-fd"),
        "the commands of commands are in it, too"
    );
}

#[test]
fn check_proves_the_host_and_prints_figures() {
    if !have_kvm() {
        return;
    }
    let output = run(&["check", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let result: serde_json::Value = serde_json::from_str(text.trim()).expect("--json prints JSON");
    assert_eq!(result["ok"], true, "{text}");
    let names: Vec<_> = result["checks"].as_array().into_iter().flatten().map(|row| &row["check"]).collect();
    for name in ["KVM", "boot", "DHCP", "DNS", "ping gateway", "TCP echo", "UDP echo"] {
        assert!(names.iter().any(|found| *found == name), "{name} is missing in {text}");
    }
    assert_eq!(output.status.code(), Some(0));
}
