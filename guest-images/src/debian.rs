//! The image `debian`: Debian's own cloud kernel, untouched, and an initrd with busybox and our init.
//!
//! What enters: two packages of Debian's archive (`linux-image-*-cloud-amd64`, `busybox-static`), [`crate::INIT`], [`crate::AGENT`], and the small
//! files below `debian/files`. What leaves: `vmlinuz` and `initrd` in a directory, and what the manifest says about them.
//! The same inputs give the same bytes.
//!
//! The initrd is not compressed: unpacking is then a copy. Measured with QEMU's instruction counter (6.1, 1 ns per instruction,
//! 6.3 MB): 64 ms of the boot plain, 174 ms with gzip (2.4 MB), 166 ms with zstd (1.8 MB). LZ4 is out: the kernel's
//! decoder fails on the padding that a second archive behind it needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};

use crate::cpio::Tree;
use crate::deb::{self, Archive, Deb, Dependencies, Freshness, Suite, hex};
use crate::progress::Progress;
use crate::store::{Error, KernelPackage, io_error};

mod modinfo;
mod modules;
#[cfg(test)]
mod tests;

/// Names the newest cloud kernel by what it depends on.
const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";
const KERNEL_PREFIX: &str = "linux-image-";
const BUSYBOX: &str = "busybox-static";

/// Modules of every image: the devices that Pontoon offers, its power button among them (and their PCI siblings, so that the image boots in QEMU too), file
/// systems that disks come in, and tunnels for those who test networks.
const MODULES: [&str; 21] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "button",
    "evdev",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
    "overlay",
    "squashfs",
    "erofs",
    "isofs",
    "loop",
    "tun",
    "veth",
    "bridge",
    "8021q",
    "dummy",
];

/// Applets that would take a name that is ours, or act as another init.
const NOT_LINKED: [&str; 2] = ["init", "linuxrc"];

/// Files of the root file system: path, mode, content.
const FILES: [(&str, u32, &str); 8] = [
    ("etc/udhcpc.script", 0o755, include_str!("debian/files/udhcpc.script")),
    ("etc/profile", 0o644, include_str!("debian/files/profile")),
    ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("etc/group", 0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/shadow", 0o600, "root:*:::::::\n"),
    ("etc/hostname", 0o644, "debian\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"),
    ("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n"),
];

/// What went into an image, for its manifest.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) kernel: KernelPackage,
    pub(crate) packages: Vec<Deb>,
    pub(crate) modules: Vec<String>,
}

/// A hash over everything of this program that goes into the image: when it changes, the image is outdated.
pub(crate) fn recipe(suite: Suite, extra_modules: &[String]) -> String {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&crate::INIT.id().to_le_bytes());
    part(crate::AGENT);
    part(suite.name().as_bytes());
    for (path, mode, content) in FILES {
        part(path.as_bytes());
        part(&mode.to_le_bytes());
        part(content.as_bytes());
    }
    MODULES.iter().for_each(|name| part(name.as_bytes()));
    extra_modules.iter().for_each(|name| part(name.as_bytes()));
    hex(&hash.finalize())
}

/// Fetches, unpacks and composes the image into `into/vmlinuz` and `into/initrd`.
pub(crate) fn build(
    cache: &Path,
    suite: Suite,
    extra_modules: &[String],
    freshness: Freshness,
    into: &Path,
    progress: &mut dyn Progress,
) -> Result<Made, Error> {
    let archive = Archive::open(cache, suite)?;
    let kernel_name = kernel_package(&archive, freshness, progress)?;
    // The index was renewed just now if it was to be; what it names need not be looked for twice.
    let names = [kernel_name.as_str(), BUSYBOX];
    let debs = archive.fetch(&names, Dependencies::Ignored, Freshness::Remembered, progress)?;
    progress.step("unpacking the packages");
    let unpacked = into.join("unpacked");
    debs.iter().try_for_each(|deb| deb.unpack(&unpacked))?;

    progress.step("composing the initrd");
    let (kernel, release) = find_kernel(&unpacked)?;
    let module_dir = first_dir(&unpacked, &["lib/modules", "usr/lib/modules"], &release)?;
    let extra: Vec<_> = extra_modules.iter().map(String::as_str).collect();
    let modules = modules::select(&module_dir, &[&MODULES[..], &extra].concat())?;
    for name in extra.iter().filter(|name| !modules.contains_key(&name.replace('-', "_"))) {
        tracing::warn!(name, release, "this kernel has no such module, or has it built in");
    }
    let busybox = first_file(&unpacked, &["bin/busybox", "usr/bin/busybox"])?;
    let tree = compose(&busybox, &release, &modules)?;
    let initrd = into.join("initrd");
    fs::write(&initrd, tree.to_bytes()).map_err(io_error("write", &initrd))?;
    let vmlinuz = into.join("vmlinuz");
    fs::rename(&kernel, &vmlinuz).map_err(io_error("write", &vmlinuz))?;
    fs::remove_dir_all(&unpacked).map_err(io_error("remove", &unpacked))?;

    let version = debs.iter().find(|deb| deb.name == kernel_name).map(|deb| deb.version.clone());
    let kernel = KernelPackage { package: kernel_name, version: version.unwrap_or_default(), release };
    Ok(Made { kernel, packages: debs, modules: modules.into_keys().collect() })
}

/// The versioned package that the metapackage stands for now.
fn kernel_package(
    archive: &Archive,
    freshness: Freshness,
    progress: &mut dyn Progress,
) -> Result<String, Error> {
    let depends = archive.depends(KERNEL_METAPACKAGE, freshness, progress)?;
    depends.iter().find(|name| name.starts_with(KERNEL_PREFIX)).cloned().ok_or_else(|| {
        Error::Deb(deb::Error::Answer {
            action: format!("looking for the kernel that {KERNEL_METAPACKAGE} stands for"),
            line: depends.join(", "),
        })
    })
}

/// The kernel in an unpacked package, and its release.
fn find_kernel(root: &Path) -> Result<(PathBuf, String), Error> {
    let boot = root.join("boot");
    let entries = fs::read_dir(&boot).map_err(io_error("read", &boot))?;
    entries
        .flatten()
        .find_map(|entry| {
            let release = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            Some((entry.path(), release))
        })
        .ok_or_else(|| Error::Content { path: boot, problem: "there is no vmlinuz in it".to_owned() })
}

fn first_dir(root: &Path, below: &[&str], name: &str) -> Result<PathBuf, Error> {
    let found = below.iter().map(|dir| root.join(dir).join(name)).find(|path| path.is_dir());
    found.ok_or_else(|| Error::Content {
        path: root.to_path_buf(),
        problem: format!("the kernel package has no modules for {name}"),
    })
}

fn first_file(root: &Path, paths: &[&str]) -> Result<PathBuf, Error> {
    let found = paths.iter().map(|path| root.join(path)).find(|path| path.is_file());
    found.ok_or_else(|| Error::Content {
        path: root.to_path_buf(),
        problem: format!("the package {BUSYBOX} has no busybox"),
    })
}

/// The root file system.
fn compose(busybox: &Path, release: &str, modules: &modules::Modules) -> Result<Tree, Error> {
    let mut tree = Tree::new();
    for name in ["bin", "sbin", "lib", "lib64"] {
        tree.dir(format!("usr/{name}"), 0o755)?.symlink(name, format!("usr/{name}"))?;
    }
    for name in ["dev", "proc", "sys", "run", "mnt", "var", "home"] {
        tree.dir(name, 0o755)?;
    }
    tree.dir("root", 0o700)?.dir("tmp", 0o1777)?;
    tree.symlink("var/run", "/run")?.symlink("var/tmp", "/tmp")?;
    // The kernel opens it for init before anything is mounted.
    tree.char_device("dev/console", 0o600, 5, 1)?;
    tree.file("init", 0o755, crate::INIT.bytes())?;
    tree.file("usr/sbin/pontoon-agent", 0o755, crate::AGENT)?;
    for (path, mode, content) in FILES {
        tree.file(path, mode, content)?;
    }
    let program = fs::read(busybox).map_err(io_error("read", busybox))?;
    tree.file("usr/bin/busybox", 0o755, program)?;
    for applet in applets(busybox)? {
        let place =
            if applet.starts_with("sbin/") || applet.starts_with("usr/sbin/") { "sbin" } else { "bin" };
        let name = applet.rsplit('/').next().unwrap_or(&applet);
        if name != "busybox" && !NOT_LINKED.contains(&name) {
            tree.symlink(format!("usr/{place}/{name}"), "/usr/bin/busybox")?;
        }
    }
    let dir = format!("usr/lib/modules/{release}");
    for module in modules.values() {
        tree.file(format!("{dir}/{}", module.file), 0o644, module.elf.as_slice())?;
    }
    tree.file(format!("{dir}/modules.dep"), 0o644, modules::dep_index(modules))?;
    tree.file(format!("{dir}/modules.alias"), 0o644, modules::alias_index(modules))?;
    Ok(tree)
}

/// What busybox can be called as, with the directories of those names. It tells itself; it is a static program from a verified
/// package, and runs on every host that can run the image.
fn applets(busybox: &Path) -> Result<Vec<String>, Error> {
    let output = Command::new(busybox).arg("--list-full").output().map_err(io_error("run", busybox))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let applets: Vec<_> = text.lines().map(str::to_owned).collect();
    if !applets.iter().any(|applet| applet.ends_with("/sh")) {
        return Err(Error::Content {
            path: busybox.to_path_buf(),
            problem: format!("its list of applets has no shell ({})", output.status),
        });
    }
    Ok(applets)
}
