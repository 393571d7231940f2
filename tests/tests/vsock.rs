//! Streams between the host's Unix sockets and a guest with a stock kernel, in the lab. The programs at both ends are
//! `tests/examples/vsockpeer/main.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use guest_images::cpio::Tree;
use guest_images::deb::Suite;
use guest_images::{BuildOptions, Image, Store};
use pontoon_tests::{Pontoon, debian_image, have_lab, skip, text};

/// The program of both ends: static, so it runs in a guest without libraries. `cargo test` builds it with the tests.
fn peer() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    // target/TRIPLE/debug/deps/TEST
    let built = test.parent().and_then(Path::parent).expect("tests are in deps/").join("examples/vsockpeer");
    if !built.exists() {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "-p", "pontoon-tests", "--example", "vsockpeer"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .expect("cargo runs, it built this test");
        assert!(status.success() && built.exists(), "no program at {}", built.display());
    }
    built
}

/// The image's initrd with the program in it.
fn initrd_with(image: &Image, peer: &Path, to: &Path) {
    let mut bytes = fs::read(&image.initrd).expect("the image has an initrd");
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let mut tree = Tree::new();
    tree.file("vsockpeer", 0o755, fs::read(peer).expect("it was built")).expect("its path is fine");
    bytes.extend(tree.to_bytes());
    fs::write(to, bytes).expect("the temporary directory is writable");
}

/// Both ends in the lab, as an ordinary user: `bytes` both ways, and `connections` at once.
fn talk(image: &Image, bytes: u64, connections: u64) -> Output {
    let (peer, dir) = (peer(), tempfile::tempdir().expect("the temporary directory is writable"));
    let initrd = dir.path().join("initrd");
    initrd_with(image, &peer, &initrd);
    let run = "pontoon run --accel kvm --kernel /lab/vmlinuz --initrd /lab/initrd --net none --vsock /tmp/v \
               --timeout 150 -- /vsockpeer guest";
    let script = format!("exec /lab/vsockpeer host /tmp/v {bytes} {connections} {run}");
    Pontoon::new([
        "lab",
        "--user",
        "--timeout",
        "200",
        "--put",
        &format!("{}:/lab/vsockpeer", peer.display()),
        "--put",
        &format!("{}:/lab/vmlinuz", image.kernel.display()),
        "--put",
        &format!("{}:/lab/initrd", initrd.display()),
        "--",
        "sh",
        "-c",
        &script,
    ])
    .output()
}

fn assert_whole(output: &Output) {
    let all = text(output);
    assert!(output.status.success() && all.contains("all streams arrived whole"), "{all}");
}

#[test]
fn a_stock_kernel_and_the_host_exchange_streams_both_ways_without_losing_a_byte() {
    let Some(image) = debian_image() else { return };
    assert_whole(&talk(&image, 4 << 20, 40));
}

#[test]
fn debian_13s_kernel_does_so_too_with_packets_in_many_pieces() {
    if !have_lab() {
        return;
    }
    // The store of `tests/tests/linux.rs`: the user's own image stays what it is.
    let store = Store::open(&guest_images::cache_dir().expect("HOME is set").join("tests-trixie"));
    let options = BuildOptions { suite: Some(Suite::Trixie), ..BuildOptions::default() };
    match store.build("debian", &options, &mut guest_images::Silent) {
        Ok(image) => {
            let output = talk(&image, 1 << 20, 10);
            assert_whole(&output);
            let out = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(out.contains("its kernel leaves payload where it is"), "no packet was in pieces\n{out}");
        }
        Err(error) => skip(format_args!("no image of Debian 13: {error}")),
    }
}

#[test]
fn a_socket_in_the_lab_is_refused_with_one_clear_error() {
    let output =
        Pontoon::new(["run", "probe", "--accel", "lab", "--net", "none", "--vsock", "/tmp/v"]).output();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("--vsock /tmp/v would be a socket of the lab"), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
}
