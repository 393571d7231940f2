//! The arrows between our crates point one way: vmm → devices → net. See docs/architecture.md. And the command is made of what
//! every program that embeds the library may use.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// For each crate of ours, the crates of ours that its product code may depend on.
const ALLOWED: [(&str, &[&str]); 5] = [
    ("net", &[]),
    ("devices", &["net"]),
    ("guest-images", &[]),
    ("vmm", &["devices", "guest-images", "net"]),
    ("pontoon-tests", &["devices", "guest-images", "net", "vmm"]),
];

/// Packages of other people that a crate must not know, because the knowledge belongs to another crate.
const FOREIGN: [(&str, &[&str]); 3] = [
    ("net", &["kvm-ioctls", "kvm-bindings", "virtio-queue", "linux-loader", "event-manager"]),
    ("devices", &["kvm-ioctls", "kvm-bindings", "linux-loader", "etherparse", "dhcproto", "hickory-proto"]),
    ("vmm", &["etherparse", "dhcproto", "hickory-proto", "virtio-queue"]),
];

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs, it runs this test");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let meta: Value = serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON");
    let packages = meta["packages"].as_array().expect("metadata has packages");
    packages
        .iter()
        .map(|package| {
            let product = package["dependencies"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|dep| dep["kind"].is_null())
                .filter_map(|dep| dep["name"].as_str())
                .map(str::to_owned)
                .collect();
            (package["name"].as_str().expect("a package has a name").to_owned(), product)
        })
        .collect()
}

#[test]
fn no_crate_depends_on_one_above_it() {
    let found = dependencies();
    let ours: BTreeSet<&str> = ALLOWED.iter().map(|(name, _)| *name).collect();
    assert_eq!(found.keys().map(String::as_str).collect::<BTreeSet<_>>(), ours, "a crate without a rule");
    for (name, allowed) in ALLOWED {
        for dep in found[name].iter().filter(|dep| ours.contains(dep.as_str())) {
            assert!(allowed.contains(&dep.as_str()), "{name} must not depend on {dep}");
        }
    }
}

#[test]
fn no_crate_knows_another_ones_trade() {
    let found = dependencies();
    for (name, foreign) in FOREIGN {
        for dep in foreign {
            assert!(!found[name].contains(*dep), "{name} must not know {dep}");
        }
    }
}

#[test]
fn every_package_that_the_design_names_has_a_role() {
    let meta = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs, it runs this test");
    let text = String::from_utf8(meta.stdout).expect("cargo metadata prints UTF-8");
    for package in [
        "kvm-ioctls",
        "vm-memory",
        "virtio-queue",
        "vmm-sys-util",
        "linux-loader",
        "tun-tap",
        "etherparse",
        "event-manager",
    ] {
        assert!(text.contains(&format!("\"name\":\"{package}\"")), "{package} is not used");
    }
}

/// How machines are made, which only the library knows: the command names none of it.
const MECHANISM: [&str; 6] =
    ["acpi_tables", "kvm_bindings", "kvm_ioctls", "linux_loader", "vm_memory", "vmm_sys_util"];

/// What the command leaves to a call of the library's, and the call. Its own `attach` is no machine, and makes its NAT itself.
const LEFT_TO_THE_LIBRARY: [(&str, &str); 6] = [
    ("Nat::new(", "vmm::network::Network::private"),
    ("Box<dyn FramePort>", "vmm::machine::Nic::new"),
    ("PcapPort", "vmm::machine::Nic::capture"),
    ("guest_images::PROBE", "vmm::machine::Guest::probe"),
    ("with_request(", "vmm::machine::Guest::command"),
    ("DEFAULT_CMDLINE", "vmm::machine::Guest"),
];

/// What tells a program nothing that it could act on. `anyhow` is the command's.
const UNTYPED: [&str; 4] = ["anyhow::", "dyn Error", "dyn std::error::Error", ", String>"];

#[test]
fn the_librarys_errors_are_types() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let product = |path: &PathBuf| {
        let parts = path.strip_prefix(&top).into_iter().flat_map(Path::components);
        !parts
            .into_iter()
            .any(|part| ["cli", "tests", "tests.rs"].map(OsStr::new).contains(&part.as_os_str()))
    };
    let ours = ["net", "devices", "guest-images", "vmm"].map(|name| sources(&top.join(name).join("src")));
    let files: Vec<_> = ours.into_iter().flatten().filter(product).collect();
    assert!(files.len() > 150, "{} files", files.len());
    for path in files {
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let code = text.lines().map(str::trim_start).filter(|line| !line.starts_with("//"));
        // Maps have strings too.
        for line in code.filter(|line| !line.contains("Map<")) {
            assert!(!UNTYPED.iter().any(|word| line.contains(word)), "{}: {line}", path.display());
        }
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of the repository").flatten();
    let found = entries.flat_map(|entry| {
        let path = entry.path();
        if path.is_dir() { sources(&path) } else { vec![path] }
    });
    found.filter(|path| path.extension().is_some_and(|end| end == "rs")).collect()
}

#[test]
fn the_command_is_made_of_what_every_program_may_use() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmm/src");
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // The compiler holds the command to the library's public items, as long as it is a crate of its own…
    assert!(
        read(&source.join("main.rs")).contains("mod cli;") && !read(&source.join("lib.rs")).contains("cli")
    );
    let (command, library): (Vec<_>, Vec<_>) =
        sources(&source).into_iter().partition(|path| path.starts_with(source.join("cli")));
    assert!(command.len() > 10 && library.len() > 50, "{} and {} files", command.len(), library.len());
    for path in library {
        // …and nothing is public for it alone.
        assert!(!read(&path).contains("doc(hidden)"), "{} hides something", path.display());
    }
    for path in command {
        let text = read(&path);
        for name in MECHANISM {
            assert!(!text.contains(&format!("{name}::")), "{}: {name} is the library's", path.display());
        }
        for (own, call) in LEFT_TO_THE_LIBRARY {
            let attach = own == "Nat::new(" && path.ends_with("attach.rs");
            assert!(attach || !text.contains(own), "{}: instead of {own}, {call}", path.display());
        }
    }
}
