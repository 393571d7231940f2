//! The base of the outer machine: its kernel and an initramfs that holds everything else.
//!
//! From Debian packages of one fixed suite, whatever the host is, so that the lab is the same machine
//! everywhere. The root file system travels in the initramfs as one archive, which `lab-init` unpacks into
//! a tmpfs before the snapshot: programs are in the page cache when a run starts, no disk is involved, and
//! every run has a writable root of its own.
//!
//! Documentation, translations and package data are left out: 40 MB instead of 70.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use guest_images::Progress;
use guest_images::cpio::Tree as Initramfs;
use guest_images::deb::{Archive, Deb, Dependencies, Freshness, Suite};

use super::archive::Writer;
use super::error::{LabError, at};
use super::modules::{AVAILABLE, EARLY, LATE, Tree};

/// Raise it when this file changes what a base contains.
pub(super) const REVISION: u32 = 1;

/// The programs that are always there. busybox fills in for what is missing.
pub(super) const PACKAGES: [&str; 10] = [
    // scripts/bridge is written in it.
    "bash",
    "busybox-static",
    // The shell: busybox's own prefers its applets to the programs on PATH, its `ip` to iproute2's.
    "dash",
    "dnsmasq-base",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "nftables",
    "procps",
    "tcpdump",
];

/// The metapackage of the outer kernel.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Left out of the root file system.
const USELESS: [&str; 8] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/perl",
    "usr/share/info",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base",
];

/// Directories of the root that no package brings, with their modes.
const DIRECTORIES: [(&str, u32); 11] = [
    ("proc", 0o555),
    ("sys", 0o555),
    ("dev", 0o755),
    ("run", 0o755),
    ("tmp", 0o1777),
    ("var/tmp", 0o1777),
    ("root", 0o700),
    ("mnt", 0o755),
    ("lab", 0o1777),
    ("usr/local/bin", 0o755),
    ("var/lib/misc", 0o755),
];

/// Files of the root that no package brings.
const FILES: [(&str, &str); 7] = [
    ("etc/hostname", "lab\n"),
    ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 lab\n::1 localhost\n"),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    ),
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n\
         tcpdump:x:100:100::/:/bin/false\ndnsmasq:x:101:65534::/:/bin/false\n\
         nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nkvm:x:105:user\nuser:x:1000:\ntcpdump:x:100:\nnogroup:x:65534:\n"),
    ("etc/profile", "export PS1='lab:\\w\\$ '\n"),
    ("etc/shells", "/bin/sh\n"),
];

/// Makes `kernel`, `initrd` and `packages` (what they are made of, one `name version` a line) in `dir`.
pub(super) fn make(
    cache: &Path,
    dir: &Path,
    extra: &[String],
    freshness: Freshness,
    progress: &mut dyn Progress,
) -> Result<(), LabError> {
    let archive = Archive::open(cache, Suite::Bookworm)?;
    let depends = archive.depends(KERNEL, freshness, progress)?;
    let image = depends.iter().find(|name| name.starts_with("linux-image-"));
    let image = image.ok_or_else(|| LabError::Contents(format!("{KERNEL} depends on no image")))?;
    let kernel = archive.fetch(&[image], Dependencies::Ignored, freshness, progress)?;
    let extra = extra.iter().map(String::as_str);
    let names: Vec<&str> = PACKAGES.into_iter().chain(extra).collect();
    let programs = archive.fetch(&names, Dependencies::Included, freshness, progress)?;

    progress.step("lab: building the outer machine's image");
    let work = tempfile::tempdir_in(dir).map_err(at("make a directory in", dir))?;
    let (kernel_root, root) = (work.path().join("kernel"), work.path().join("root"));
    for deb in &kernel {
        deb.unpack(&kernel_root)?;
    }
    fs::create_dir_all(&root).map_err(at("make", &root))?;
    for deb in &programs {
        deb.unpack(&root)?;
    }
    merge_usr(&root)?;
    fill_root(&root)?;
    let module_lists = take_modules(&kernel_root, &root)?;
    write_initramfs(dir, &root, &module_lists)?;
    let image = only_entry(&kernel_root.join("boot"), "vmlinuz-")?;
    let to = dir.join("kernel");
    fs::copy(&image, &to).map_err(at("copy the kernel to", &to))?;
    write_versions(dir, kernel.iter().chain(&programs))
}

/// Makes `/bin`, `/sbin`, `/lib` and `/lib64` links into `/usr`, and moves there what packages brought.
fn merge_usr(root: &Path) -> Result<(), LabError> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        let (old, new) = (root.join(name), root.join("usr").join(name));
        fs::create_dir_all(&new).map_err(at("make", &new))?;
        if old.is_dir() {
            move_into(&old, &new)?;
        }
        let target = Path::new("usr").join(name);
        std::os::unix::fs::symlink(target, &old).map_err(at("make", &old))?;
    }
    Ok(())
}

/// Moves everything below the directory `from` into `to` and removes `from`.
fn move_into(from: &Path, to: &Path) -> Result<(), LabError> {
    for entry in fs::read_dir(from).map_err(at("read", from))? {
        let entry = entry.map_err(at("read", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let is_dir = entry.file_type().map_err(at("read", from))?.is_dir();
        if is_dir && target.is_dir() {
            move_into(&source, &target)?;
        } else {
            fs::rename(&source, &target).map_err(at("move", &source))?;
        }
    }
    fs::remove_dir(from).map_err(at("remove", from))
}

/// Adds what packages lack and removes what nobody reads.
fn fill_root(root: &Path) -> Result<(), LabError> {
    for useless in USELESS {
        let path = root.join(useless);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(at("remove", &path))?;
        }
    }
    for (name, mode) in DIRECTORIES.into_iter().chain([("home/user", 0o777)]) {
        let path = root.join(name);
        fs::create_dir_all(&path).map_err(at("make", &path))?;
        fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(at("set the mode of", &path))?;
    }
    for (name, text) in FILES {
        let path = root.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(at("make", parent))?;
        }
        fs::write(&path, text).map_err(at("write", &path))?;
    }
    let shell = root.join("usr/bin/sh");
    if fs::symlink_metadata(&shell).is_ok() {
        fs::remove_file(&shell).map_err(at("remove", &shell))?;
    }
    std::os::unix::fs::symlink("dash", &shell).map_err(at("make", &shell))
}

/// The lists of modules for `lab-init`: early and late.
struct ModuleLists {
    early: String,
    late: String,
}

/// Copies the modules into the root and says which are loaded when.
fn take_modules(kernel_root: &Path, root: &Path) -> Result<ModuleLists, LabError> {
    let tree_root = only_entry(&kernel_root.join("lib/modules"), "")?;
    let version = tree_root.file_name().unwrap_or_default();
    let tree = Tree::read(&tree_root)?;
    let early: Vec<&str> = EARLY.iter().map(|(name, _)| *name).collect();
    let early = tree.in_order(&early)?;
    let late: Vec<_> = tree.in_order(&LATE)?.into_iter().filter(|path| !early.contains(path)).collect();
    let mut all = early.clone();
    all.extend(&late);
    for path in tree.in_order(&AVAILABLE)? {
        if !all.contains(&path) {
            all.push(path);
        }
    }
    let there = Path::new("lib/modules").join(version);
    let target = root.join("usr").join(&there);
    for path in &all {
        let (from, to) = (tree_root.join(path), target.join(path));
        let parent = to.parent().unwrap_or(&target);
        fs::create_dir_all(parent).map_err(at("make", parent))?;
        fs::copy(&from, &to).map_err(at("copy", &from))?;
    }
    let dep = target.join("modules.dep");
    fs::write(&dep, tree.dep_file(&all)?).map_err(at("write", &dep))?;
    let list = |paths: &[&Path]| {
        let line = |path: &&Path| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let parameters = EARLY.iter().find(|(name, _)| *name == stem).map_or("", |(_, text)| *text);
            format!("/{} {parameters}\n", there.join(path).display())
        };
        paths.iter().map(line).collect::<String>()
    };
    Ok(ModuleLists { early: list(&early), late: list(&late) })
}

fn write_initramfs(dir: &Path, root: &Path, modules: &ModuleLists) -> Result<(), LabError> {
    let mut packed = Writer::new(Vec::new());
    packed.tree(root, Path::new("/")).and_then(|()| packed.end()).map_err(at("pack", root))?;
    let mut initramfs = Initramfs::new();
    initramfs
        .file("init", 0o755, guest_images::LAB_INIT.bytes())?
        .char_device("dev/console", 0o600, 5, 1)?
        .file("early", 0o644, modules.early.as_bytes())?
        .file("late", 0o644, modules.late.as_bytes())?
        .file("root.archive", 0o644, packed.into_inner())?;
    let path = dir.join("initrd");
    let mut file = fs::File::create(&path).map_err(at("make", &path))?;
    initramfs.write_to(&mut file).map_err(at("write", &path))?;
    file.flush().map_err(at("write", &path))
}

fn write_versions<'a>(dir: &Path, debs: impl Iterator<Item = &'a Deb>) -> Result<(), LabError> {
    let text: String = debs.map(|deb| format!("{} {}\n", deb.name, deb.version)).collect();
    let path = dir.join("packages");
    fs::write(&path, text).map_err(at("write", &path))
}

/// The only entry of `dir` whose name begins with `prefix`.
fn only_entry(dir: &Path, prefix: &str) -> Result<PathBuf, LabError> {
    let mut found = None;
    for entry in fs::read_dir(dir).map_err(at("read", dir))? {
        let entry = entry.map_err(at("read", dir))?;
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes())
            && found.replace(entry.path()).is_some()
        {
            return Err(LabError::Contents(format!("{} holds several of {prefix}*", dir.display())));
        }
    }
    found.ok_or_else(|| LabError::Contents(format!("{} holds no {prefix}*", dir.display())))
}
