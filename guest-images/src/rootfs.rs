//! Images with a disk: Debian as people know it, with systemd, ssh and apt, on an ext4 file system of its own.
//!
//! # How
//!
//! Debian's own mmdebstrap installs Debian's own packages: their maintainer scripts run, initramfs-tools makes the initrd, dpkg knows
//! what is there. It runs without root in a user namespace (`/etc/subuid`, newuidmap), or with fakechroot where there is none, or as
//! root; `host.rs` finds out which. Its last hook (`script.rs`) configures the system and then has mke2fs copy the tree into the image's
//! file, inside the namespace, so that owners, modes and capabilities are right. The image's file is that hook's standard input: it needs no
//! path that the namespace could reach. Kernel and initrd are read back out of the image by debugfs, without mounting (`ext4.rs`).
//!
//! # What comes out
//!
//! `disk.img` (raw, no partition table, sparse), `vmlinuz`, `initrd`, and in the manifest: packages with version and SHA-256, and the words that
//! the kernel's command line needs (`root=UUID=…`).
//!
//! - Network: systemd-networkd asks for a lease on every `en*` and `eth*`; systemd-resolved serves names.
//! - ssh: root by key only. Host keys and the machine's identity are made at the first boot.
//! - Console: ttyS0 logs root in by itself.
//! - The guest agent starts when the machine has a vsock device.
//! - The file system grows to its disk at boot.
//! - Timers that download or scrub in the background are off.
//!
//! Nothing is installed on the host; what is missing is named with its package. Debian's signatures are verified with the host's keyring.
//!
//! Limits: amd64; component main; 1 GiB to 1 TiB. The chroot takes about 600 MB of `$TMPDIR` (or /tmp) while it is made.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use crate::deb::{self, Suite, hex};
use crate::progress::Progress;
use crate::store::{KernelPackage, PackageRecord};

mod ext4;
mod host;
mod keys;
mod script;
#[cfg(test)]
mod tests;

pub(crate) use keys::authorized;

/// The image's file in its directory.
pub(crate) const DISK: &str = "disk.img";
/// Sizes that make sense, in bytes.
const SIZES: std::ops::RangeInclusive<u64> = 1 << 30..=1 << 40;
/// The agent's file while the image is made, and its place there; shell and mmdebstrap take both as they are.
const AGENT: &str = "pontoon-agent";
const AGENT_PATH: &str = "/usr/sbin/pontoon-agent";
/// How many of mmdebstrap's last lines an error shows.
const LINES_SHOWN: usize = 12;

/// Installed besides what is essential or required, and apt.
const PACKAGES: [&str; 18] = [
    "ca-certificates",
    "dbus",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libnss-myhostname",
    "libpam-systemd",
    "netbase",
    "openssh-server",
    "procps",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    // The root is merged from the start; the package that would merge it brings all of Perl.
    "usr-is-merged",
    "vim-tiny",
    "zstd",
];
/// Stands for the newest cloud kernel of its suite.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Why an image with a disk could not be made.
///
/// ```
/// use guest_images::{Error, RootfsOptions, Silent, Store, rootfs};
///
/// let cache = tempfile::tempdir()?;
/// let small = RootfsOptions { size: 1 << 20, ..RootfsOptions::default() };
/// // What can't be is refused before anything is fetched.
/// let refused = Store::open(cache.path()).build_rootfs("small", &small, &mut Silent);
/// assert!(matches!(refused, Err(Error::Rootfs(rootfs::Error::Size(1_048_576)))));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program of the host is missing.
    #[error(
        "{program} is not on this host: a disk image is made with it; run: sudo apt-get install {package}"
    )]
    Missing {
        /// What was to be run.
        program: &'static str,
        /// The package that holds it.
        package: &'static str,
    },
    /// An ordinary user has neither a range of user ids nor fakechroot.
    #[error(
        "an ordinary user builds a disk image in a user namespace, and {lacking}; run: {advice} (or, slower and less exact: \
         sudo apt-get install fakechroot fakeroot)"
    )]
    NoNamespace {
        /// What is not there.
        lacking: String,
        /// What brings it.
        advice: String,
    },
    /// The size cannot be.
    #[error("a disk image has 1G to 1024G, not {0} bytes")]
    Size(u64),
    /// A package's name cannot be one.
    #[error("{0:?} cannot be a Debian package: lower-case letters, digits, +, - and .")]
    PackageName(String),
    /// A key file holds no public key.
    #[error(
        "{path} is not a file of OpenSSH public keys (ssh-ed25519 AAAA… you@host); ssh-keygen -t ed25519 makes one"
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// A program failed.
    #[error("{action} failed; it said:\n{said}")]
    Failed {
        /// What was being done.
        action: &'static str,
        /// Its last lines.
        said: String,
    },
    /// The image has no kernel or no initrd.
    #[error("the new system has no {0} in /boot; the log of its build is beside the images")]
    NoKernel(&'static str),
    /// A file of the host.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was to be done, such as "read".
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

/// Which of Debian's kernels an image boots.
///
/// ```
/// use guest_images::deb::Suite;
/// use guest_images::{KernelSource, RootfsOptions};
///
/// // Debian 12 with Linux 6.12.
/// let kernel = KernelSource::Backports;
/// let options = RootfsOptions { suite: Some(Suite::Bookworm), kernel, ..RootfsOptions::default() };
/// assert_ne!(options.kernel, KernelSource::default());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelSource {
    /// The suite's own: 6.1 in bookworm, 6.12 in trixie.
    #[default]
    Suite,
    /// The one of the suite's backports: 6.12 in bookworm-backports.
    Backports,
    /// Both. The newer one boots; the other and its initrd are in the image's `/boot`, and so are its modules in `/lib`.
    Both,
}

/// How an image with a disk is made.
///
/// ```no_run
/// use guest_images::{RootfsOptions, Silent, Store};
///
/// let options = RootfsOptions { size: 8 << 30, packages: vec!["postgresql".into()], ..RootfsOptions::default() };
/// let image = Store::open_default()?.build_rootfs("database", &options, &mut Silent)?;
/// println!("{}", image.disk.expect("an image with a disk").display());
/// # Ok::<(), guest_images::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsOptions {
    /// The Debian suite; `None` for the one that the image was last built from, else the host's.
    pub suite: Option<Suite>,
    /// The kernel.
    pub kernel: KernelSource,
    /// The disk's size in bytes; the file is sparse.
    pub size: u64,
    /// Files of public keys that may log in as root; empty for `~/.ssh/id_*.pub`, or a pair made for the purpose.
    pub ssh_keys: Vec<PathBuf>,
    /// Debian packages besides the usual ones.
    pub packages: Vec<String>,
    /// Build it anew even if it is whole, from the newest packages.
    pub refresh: bool,
}

impl Default for RootfsOptions {
    fn default() -> Self {
        Self {
            suite: None,
            kernel: KernelSource::default(),
            size: 2 << 30,
            ssh_keys: Vec::new(),
            packages: Vec::new(),
            refresh: false,
        }
    }
}

impl RootfsOptions {
    /// Refuses what cannot be built, before anything is done.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if !SIZES.contains(&self.size) {
            return Err(Error::Size(self.size));
        }
        let good = |name: &String| {
            name.len() > 1
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
                && name.as_bytes()[0].is_ascii_alphanumeric()
        };
        self.packages
            .iter()
            .find(|name| !good(name))
            .map_or(Ok(()), |bad| Err(Error::PackageName(bad.clone())))
    }
}

/// What one build is made of; equal plans make equal systems, apart from newer packages.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) suite: Suite,
    pub(crate) options: &'a RootfsOptions,
    /// The content of root's authorized_keys.
    pub(crate) authorized: &'a str,
}

/// What came out, for the manifest.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) kernel: KernelPackage,
    pub(crate) packages: Vec<PackageRecord>,
    pub(crate) cmdline: String,
}

impl Plan<'_> {
    /// A hash over everything that this program and the user put in.
    pub(crate) fn recipe(&self) -> String {
        let mut hash = Sha256::new();
        let size = self.options.size.to_string();
        let second = self.second_kernel();
        for part in [self.script(""), self.suite.to_string(), self.includes(), size].into_iter().chain(second)
        {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hex(&hash.finalize())
    }

    fn script(&self, uuid: &str) -> String {
        script::script(uuid, self.authorized)
    }

    fn kernel_of_backports(&self) -> String {
        format!("{KERNEL}/{}-backports", self.suite)
    }

    /// A hook that installs the second kernel: the first one's package keeps its name, so that one request can't hold both.
    fn second_kernel(&self) -> Option<String> {
        let apt = "TMPDIR=\"$1/tmp\" APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get -oDPkg::Chroot-Directory=\"$1\" --yes -qq install";
        (self.options.kernel == KernelSource::Both)
            .then(|| format!("{apt} {} >&2", self.kernel_of_backports()))
    }

    /// mmdebstrap's `--include`.
    fn includes(&self) -> String {
        let kernel = match self.options.kernel {
            KernelSource::Suite | KernelSource::Both => KERNEL.to_owned(),
            KernelSource::Backports => self.kernel_of_backports(),
        };
        let usual = PACKAGES.into_iter().map(str::to_owned);
        let all: Vec<_> = usual.chain(self.options.packages.iter().cloned()).chain([kernel]).collect();
        all.join(",")
    }

    /// Makes [`DISK`], `vmlinuz` and `initrd` in the directory `into`; what mmdebstrap says goes to the file `log`.
    pub(crate) fn build(&self, into: &Path, log: &Path, progress: &mut dyn Progress) -> Result<Made, Error> {
        let host = host::Host::look()?;
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")
            .map_err(io_error("read", Path::new("/proc/sys/kernel/random/uuid")))?;
        let uuid = uuid.trim();
        let disk = into.join(DISK);
        let file = File::options().read(true).write(true).create_new(true).open(&disk);
        let file = file.map_err(io_error("make", &disk))?;
        file.set_len(self.options.size).map_err(io_error("make", &disk))?;
        // mke2fs opens it again, as another user of the namespace; the directory stays closed.
        let mode = |mode| fs::set_permissions(&disk, Permissions::from_mode(mode));
        mode(0o666).map_err(io_error("set the mode of", &disk))?;
        self.install(&host, uuid, (into, file), log, progress)?;
        mode(0o644).map_err(io_error("set the mode of", &disk))?;
        progress.step("taking kernel and initrd out of the image");
        let release = ext4::take_boot_files(&host, into, DISK)?;
        let packages = packages(&fs::read_to_string(log).map_err(io_error("read", log))?);
        let package = format!("linux-image-{release}");
        let version = packages.iter().find(|record| record.name == package);
        let version = version.map(|record| record.version.clone()).unwrap_or_default();
        Ok(Made {
            kernel: KernelPackage { package, version, release },
            packages,
            cmdline: format!("root=UUID={uuid} ro"),
        })
    }

    /// Runs mmdebstrap. What its hook prints goes to the log, too.
    fn install(
        &self,
        host: &host::Host,
        uuid: &str,
        (into, disk): (&Path, File),
        log: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        progress.step(&format!("installing Debian ({}), which takes a minute or two", self.suite));
        let backports = self.options.kernel != KernelSource::Suite;
        let sources = deb::sources_of_host(self.suite, backports).map_err(|error| Error::Failed {
            action: "looking for Debian's archive",
            said: error.to_string(),
        })?;
        let mut command = Command::new(&host.mmdebstrap);
        command.arg(format!("--mode={}", host.mode.name()));
        // What would be cleaned up is thrown away with the chroot; the image was made before.
        command.args(["--variant=minbase", "--format=null", "--skip=cleanup"]);
        // Nobody needs a chroot that survives a power cut: it is not even kept.
        command.arg("--dpkgopt=force-unsafe-io");
        command.arg(format!("--include={}", self.includes()));
        command.args(host.apt_options.iter().map(|option| format!("--aptopt={option}")));
        // Too big for an argument: mmdebstrap carries it in.
        fs::write(into.join(AGENT), crate::AGENT).map_err(io_error("write", into))?;
        command.args(self.second_kernel().map(|hook| format!("--customize-hook={hook}")));
        command.arg(format!("--customize-hook=upload {AGENT} {AGENT_PATH}"));
        command.arg(format!("--customize-hook={}", self.script(uuid)));
        command.args([self.suite.name(), "/dev/null"]).args(sources.lines());
        command.env("LC_ALL", "C").env("PATH", &host.path).env_remove("APT_CONFIG");
        command.current_dir(into).stdin(disk).stdout(Stdio::null()).stderr(Stdio::piped());
        tracing::debug!(?command, "starting mmdebstrap");
        let mut child = command.spawn().map_err(io_error("run", &host.mmdebstrap))?;
        let stderr = child.stderr.take().expect("stderr was asked to be a pipe");
        let last = follow(stderr, log, progress)?;
        let status = child.wait().map_err(io_error("wait for", &host.mmdebstrap))?;
        let _ = fs::remove_file(into.join(AGENT));
        if status.success() { Ok(()) } else { Err(Error::Failed { action: "mmdebstrap", said: last }) }
    }
}

/// Copies what mmdebstrap says to the log, tells its steps, and returns its last lines.
fn follow(stderr: impl io::Read, log: &Path, progress: &mut dyn Progress) -> Result<String, Error> {
    let mut file = File::create(log).map_err(io_error("write", log))?;
    let mut last = std::collections::VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n') {
        let line = line.map_err(io_error("read mmdebstrap's messages for", log))?;
        let line = String::from_utf8_lossy(&line).into_owned();
        io::Write::write_all(&mut file, format!("{line}\n").as_bytes()).map_err(io_error("write", log))?;
        if let Some(step) = step(&line) {
            progress.step(step);
        }
        last.push_back(line);
        if last.len() > LINES_SHOWN {
            last.pop_front();
        }
    }
    Ok(Vec::from(last).join("\n"))
}

/// The step that a line of mmdebstrap begins.
fn step(line: &str) -> Option<&'static str> {
    const STEPS: [(&str, &str); 6] = [
        ("running apt-get update", "downloading Debian's package index"),
        ("downloading packages", "downloading the essential packages"),
        ("extracting archives", "unpacking the essential packages"),
        ("installing essential packages", "configuring the essential packages"),
        ("installing remaining packages", "downloading and installing systemd, ssh, apt, the kernel"),
        ("running --customize-hook", "configuring the system and making its file system"),
    ];
    let said = line.strip_prefix("I: ")?;
    STEPS.iter().find(|(begins, _)| said.starts_with(begins)).map(|(_, step)| *step)
}

/// The packages in what the hook printed, by name. One that stands in two suites is told twice.
fn packages(said: &str) -> Vec<PackageRecord> {
    let record = |line: &str| {
        let mut words = line.strip_prefix("pontoon-package ")?.split(' ').map(str::to_owned);
        let (name, version, sha256) = (words.next()?, words.next()?, words.next()?);
        Some(PackageRecord { name, version, sha256 })
    };
    let mut records: Vec<_> = said.lines().filter_map(record).collect();
    records.sort_by(|a, b| a.name.cmp(&b.name));
    records.dedup();
    records
}
