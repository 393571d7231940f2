//! Images of the tests' own, built once by the command that a user types.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_images::{Image, Store};
use pontoon_tests::{Pontoon, have_lab, skip};

/// What a host says that cannot build an image: nothing of ours is wrong then.
const LACKING: [&str; 7] = [
    "is not on this host",
    "is missing: Debian's archive is verified with it",
    "in a user namespace, and",
    "cannot be reached",
    "Could not resolve",
    "Could not connect",
    "unreachable",
];

/// What `PONTOON_ROOTFS` says.
fn wanted() -> String {
    std::env::var("PONTOON_ROOTFS").unwrap_or_default()
}

/// Whether more is wanted than what every run tests.
pub(crate) fn everything() -> bool {
    wanted() == "all"
}

/// A built image, and the key that opens it.
pub(crate) struct Built {
    /// What `XDG_CACHE_HOME` is for commands that are to find it.
    home: PathBuf,
    pub(crate) name: String,
    pub(crate) key: PathBuf,
}

impl Built {
    /// The image of this name, or nothing where this host can't build it.
    pub(crate) fn get(name: &str, flags: &[&str]) -> Option<Self> {
        if wanted() == "0" {
            skip("PONTOON_ROOTFS=0: no whole Debian is built and booted");
            return None;
        }
        if !have_lab() {
            return None;
        }
        let home = home();
        let key = key(&home)?;
        let built = Self { home, name: name.to_owned(), key };
        let public = built.key.with_extension("pub");
        let mut pontoon =
            built.pontoon(["image", "build", "debian", "--rootfs", "--name", name, "--ssh-key"]);
        pontoon.command().arg(public).args(flags);
        let output = pontoon.output();
        if output.status.success() {
            return Some(built);
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let reason = said.lines().find(|line| LACKING.iter().any(|word| line.contains(word)));
        skip(reason.unwrap_or_else(|| unreachable!("the image is not built: {said}")));
        None
    }

    /// `pontoon` with the cache in which this image is.
    pub(crate) fn pontoon<A: Into<OsString>>(&self, words: impl IntoIterator<Item = A>) -> Pontoon {
        let mut pontoon = Pontoon::new(words);
        pontoon.command().env("XDG_CACHE_HOME", &self.home);
        pontoon
    }

    pub(crate) fn image(&self) -> Image {
        Store::open(&self.home.join("pontoon")).get(&self.name).expect("it was built a moment ago")
    }

    /// Its file system as distributions ship theirs: a partition of a disk, with room to grow.
    pub(crate) fn in_a_partition(&self, to: PathBuf) -> Partitioned {
        let disk = self.image().disk.expect("it has one");
        let sectors = fs::metadata(&disk).expect("it is there").len() / SECTOR + ROOM;
        let mut command = Command::new("dd");
        command.args(["bs=1M", "seek=1", "conv=sparse", "status=none"]);
        command.arg(format!("if={}", disk.display())).arg(format!("of={}", to.display()));
        assert!(command.status().is_ok_and(|status| status.success()), "{} is not written", to.display());
        let file = fs::File::options().write(true).open(&to).expect("it was made a moment ago");
        file.set_len((START + sectors) * SECTOR).expect("it is sparse");
        // A master boot record with one partition of Linux.
        let mut entry = [0; 16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&u32::try_from(START).expect("it is small").to_le_bytes());
        entry[12..].copy_from_slice(&u32::try_from(sectors).expect("it is below 2 TiB").to_le_bytes());
        file.write_all_at(&entry, 446)
            .and_then(|()| file.write_all_at(&[0x55, 0xaa], 510))
            .expect("it is ours");
        Partitioned { path: to }
    }

    /// What debugfs answers to a request about the image's file system.
    pub(crate) fn debugfs(&self, request: &str) -> String {
        debugfs(request, self.image().disk.expect("it has one").as_os_str())
    }
}

const SECTOR: u64 = 512;
/// Where the partition begins, in sectors.
const START: u64 = 2048;
/// By how much it is larger than the file system, in sectors: 1 GiB.
const ROOM: u64 = 2 << 20;

/// A disk with a partition table.
pub(crate) struct Partitioned {
    pub(crate) path: PathBuf,
}

impl Partitioned {
    /// The file of `/boot` whose name begins with this, copied out as docs/images.md tells.
    pub(crate) fn take_out(&self, begins: &str, to: PathBuf) -> PathBuf {
        let place = format!("{}?offset={}", self.path.display(), START * SECTOR);
        let listing = debugfs("ls -p /boot", OsStr::new(&place));
        let mut names = listing.lines().filter_map(|line| line.split('/').nth(5));
        let name = names.find(|name| name.starts_with(begins)).expect("the kernel is in the image");
        debugfs(&format!("dump /boot/{name} {}", to.display()), OsStr::new(&place));
        assert!(fs::metadata(&to).is_ok_and(|meta| meta.len() > 1 << 20), "{name} was not taken out");
        to
    }
}

fn debugfs(request: &str, place: &OsStr) -> String {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new("debugfs");
    command.env("PATH", path).env("DEBUGFS_PAGER", "__none__").args(["-R", request]).arg(place);
    let output = command.output().expect("the image was built with debugfs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The cache of these tests: images of their own; packages and snapshots of the lab are the user's.
fn home() -> PathBuf {
    let user = guest_images::cache_dir().expect("HOME is set");
    let home = user.join("tests-rootfs");
    let cache = home.join("pontoon");
    fs::create_dir_all(&cache).expect("the cache is writable");
    for name in ["lab", "apt"] {
        fs::create_dir_all(user.join(name)).expect("the cache is writable");
        match symlink(user.join(name), cache.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                unreachable!("{} takes no link: {error}", cache.display())
            }
            Ok(()) | Err(_) => {}
        }
    }
    home
}

/// The private key, made once; nothing where ssh is not installed.
fn key(home: &Path) -> Option<PathBuf> {
    let key = home.join("id_ed25519");
    // All tests want the pair at once: one makes it, the others wait.
    let lock = fs::File::create(home.join("lock")).expect("the cache is writable");
    lock.lock().expect("the cache has locks");
    if !key.exists() {
        let made =
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
        if !made.is_ok_and(|status| status.success()) {
            skip("ssh-keygen is not installed (apt-get install openssh-client)");
            return None;
        }
    }
    Some(key)
}
