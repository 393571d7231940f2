//! A nested cargo: builds one guest package, release, for the one target, under OUT_DIR.
//!
//! The environment of the outer cargo is not handed down: `cargo clippy` wraps rustc, coverage and
//! sanitizer runs set RUSTFLAGS, and a guest built with any of them would not run where guests run.
//! The package's own Cargo.lock decides its dependencies (`--locked`), and offline runs stay offline.

#![allow(clippy::panic, reason = "a build script tells cargo what is wrong by its panic")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The one target that may be relied on to be installed.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Variables of the outer build that would change the guest's code.
const NOT_FOR_GUESTS: [&str; 8] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CLIPPY_ARGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
];

/// Builds the package in `guest-images/<package>` with `rustflags` and returns the path of `binary`.
/// Ends the build with cargo's own messages when that fails.
pub(crate) fn build(package: &str, binary: &str, rustflags: &[&str]) -> PathBuf {
    let manifest_dir = PathBuf::from(env("CARGO_MANIFEST_DIR")).join(package);
    let target_dir = PathBuf::from(env("OUT_DIR")).join(format!("{package}-target"));
    for watched in ["Cargo.toml", "Cargo.lock", "src", "build.rs", "link.ld"] {
        let path = manifest_dir.join(watched);
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    let mut cargo = Command::new(env("CARGO"));
    for name in NOT_FOR_GUESTS {
        cargo.env_remove(name);
    }
    // The same goes for its profile: a guest has its own.
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO_PROFILE_"))
    {
        cargo.env_remove(name);
    }
    // Flags are separated by 0x1f in this variable, so they may hold spaces; it overrides any config file.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\u{1f}"));
    cargo.current_dir(&manifest_dir);
    cargo.args(["build", "--release", "--locked", "--target", TARGET, "--bin", binary, "--target-dir"]);
    cargo.arg(&target_dir);
    let status = cargo.status().unwrap_or_else(|error| panic!("cannot start {cargo:?}: {error}"));
    assert!(status.success(), "building the guest {package} failed ({status}); its messages are above");
    let path: &Path = target_dir.as_ref();
    path.join(TARGET).join("release").join(binary)
}

/// A variable that cargo promises to every build script.
fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|error| panic!("cargo did not set {name}: {error}"))
}
