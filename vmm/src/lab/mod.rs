//! The lab: an emulated AMD-V host, for machines that cannot virtualize.
//!
//! # What it is
//!
//! QEMU's TCG emulates SVM with nested paging. A stock Debian kernel under it (the *outer machine*) loads
//! its own `kvm-amd` and offers a genuine `/dev/kvm`; a guest that is started inside, by Pontoon or by
//! anybody else, runs as on an AMD host, only slower. Neither root nor KVM is needed outside.
//!
//! # What happens
//!
//! 1. *Base* ([`base`]): kernel, modules and programs come as Debian packages, and become a kernel and an
//!    initramfs. Done once per version of this program.
//! 2. *Snapshot* ([`snapshot`]): the outer machine boots once per memory size and CPU count, loads its
//!    modules, and waits in a read. Its memory is a file that is shared with the emulator (so nothing is copied),
//!    its devices' state is migrated into a second, small file.
//! 3. *Run* ([`session`]): a new emulator maps the memory file copy-on-write, takes the state, and the machine
//!    goes on within a few tenths of a second. The files of the run lie on a virtio disk whose driver is loaded
//!    only now; the command, its streams and its status travel over one virtio-serial port ([`wire`]).
//!    When the status is there the emulator is killed: nothing of a run is left, whatever it did.
//!
//! # Invariants
//!
//! - Any number of runs share one snapshot: the memory file is never written again.
//! - A cache entry is complete or absent: it is built under a lock and renamed into place. One that does not
//!   resume is thrown away and rebuilt, once.
//! - The emulator dies with the thread that started it (`PR_SET_PDEATHSIG`); the files of a run have no name
//!   in the file system. So even SIGKILL leaves nothing behind.
//! - Output is exact and in order per stream; statuses are exact, 128 + n for signal n.
//!
//! # Limits
//!
//! Memory 256 to 3072 MiB (default 2048), 1 to 8 CPUs (default 2), [`MAX_DISKS`] disks. Arguments and variables together below
//! 8 MiB. The emulated host is AMD: what depends on VT-x is not proved here. Times measured inside say
//! nothing about real hosts.

mod archive;
mod base;
mod error;
mod modules;
mod qemu;
mod qmp;
mod session;
mod snapshot;
mod sys;
mod terminal;
#[cfg(test)]
mod tests;
// One definition for both ends of the port; the other end is a package of its own, outside the workspace.
#[path = "../../../guest-images/lab-init/src/wire.rs"]
#[allow(dead_code, unreachable_pub, reason = "one file for both sides: each uses its half")]
mod wire;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_images::Progress;

pub use error::LabError;
use session::Streams;
use snapshot::Snapshot;

/// The user of the outer machine without privileges, who may open `/dev/kvm`.
pub const UNPRIVILEGED: u32 = 1000;

/// What the outer machine is made of.
///
/// ```
/// use vmm::guest_images::Silent;
/// use vmm::lab::{Config, Lab, LabError};
///
/// let config = Config { memory_mib: 1024, packages: vec!["passt".into()], ..Config::new("/var/cache/pontoon") };
/// assert_eq!((config.cpus, config.renew), (2, false));
/// // Limits are looked at before anything is fetched.
/// let refused = Lab::prepare(&Config { cpus: 9, ..config }, &mut Silent);
/// assert!(matches!(refused, Err(LabError::Config(_))));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where downloads, images and snapshots are kept; they go to `apt/` and `lab/` below it.
    pub cache: PathBuf,
    /// Memory in MiB, 256 to 3072.
    pub memory_mib: u32,
    /// Virtual CPUs, 1 to 8.
    pub cpus: u8,
    /// Debian packages (of bookworm) to install besides the ones that are always there.
    pub packages: Vec<String>,
    /// Looks for newer packages and boots the outer machine anew.
    pub renew: bool,
}

impl Config {
    /// 2048 MiB, two CPUs, no further packages.
    #[must_use]
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self { cache: cache.into(), memory_mib: 2048, cpus: 2, packages: Vec::new(), renew: false }
    }

    /// The same without `renew`, which counts once.
    fn unrenewed(&self) -> Self {
        Self { renew: false, ..self.clone() }
    }
}

/// The default cache: `$XDG_CACHE_HOME/pontoon`, or `~/.cache/pontoon`; `None` when neither variable is set.
#[must_use]
pub fn default_cache() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("pontoon"))
}

/// A port of this host that leads into the outer machine.
///
/// ```
/// use std::net::Ipv4Addr;
///
/// use vmm::lab::{Forward, Run};
///
/// let mut run = Run::new(["busybox", "httpd", "-f", "-p", "80"]);
/// // http://127.0.0.1:8080/ on this host, for as long as the command runs.
/// run.publish.push(Forward { udp: false, address: Ipv4Addr::LOCALHOST, host: 8080, lab: 80 });
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// UDP instead of TCP.
    pub udp: bool,
    /// Where to listen.
    pub address: Ipv4Addr,
    /// The port on this host.
    pub host: u16,
    /// The port in the outer machine.
    pub lab: u16,
}

/// How many disks of its own a run can have.
pub const MAX_DISKS: usize = 4;

/// A file of this host that is a disk in the lab.
///
/// ```
/// use vmm::lab::{Disk, DiskAccess, Run, disk_device};
///
/// let mut run = Run::new(["mount", "/dev/vdb", "/mnt"]);
/// run.disks.push(Disk { path: "big.img".into(), access: DiskAccess::Private });
/// assert_eq!(disk_device(0).as_os_str(), "/dev/vdb");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The file, raw; its length is a multiple of 512 bytes.
    pub path: PathBuf,
    /// What may be done with it.
    pub access: DiskAccess,
}

/// What the lab may do with a disk.
///
/// ```
/// use vmm::lab::{Disk, DiskAccess};
///
/// // What the command writes is in the file afterwards, and nobody else may have it meanwhile.
/// let kept = Disk { path: "data.img".into(), access: DiskAccess::ReadWrite };
/// assert_ne!(kept.access, DiskAccess::Private);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskAccess {
    /// Read it.
    ReadOnly,
    /// Read and write; what is written goes with the run, the file stays as it is.
    Private,
    /// Read and write the file.
    ReadWrite,
}

/// One command in the lab.
///
/// ```
/// use std::time::Duration;
///
/// use vmm::lab::Run;
///
/// let mut run = Run::new(["/lab/test", "--all"]);
/// run.put.push(("target/debug/test".into(), "/lab/test".into()));
/// run.get.push(("/lab/report.xml".into(), "report.xml".into()));
/// run.timeout = Some(Duration::from_secs(60));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Program and arguments, any bytes but NUL.
    pub argv: Vec<OsString>,
    /// Variables on top of `PATH`, `HOME`, `USER`, `TERM` and `LANG`.
    pub env: Vec<(OsString, OsString)>,
    /// The working directory; `/lab` (which is there, and writable for everybody) by default.
    pub cwd: PathBuf,
    /// The user: 0, or [`UNPRIVILEGED`].
    pub uid: u32,
    /// Files and trees to carry in: path here, path there.
    pub put: Vec<(PathBuf, PathBuf)>,
    /// Files and trees to carry out when the command has ended: path there, path here.
    pub get: Vec<(PathBuf, PathBuf)>,
    /// Ports of this host that lead into the lab.
    pub publish: Vec<Forward>,
    /// Disks, at most [`MAX_DISKS`]: `/dev/vdb`, `/dev/vdc`, … in the lab ([`disk_device`]).
    pub disks: Vec<Disk>,
    /// How long the command may take, from its start.
    pub timeout: Option<Duration>,
}

impl Run {
    /// A command with nothing else asked for: as root, in `/lab`, without a time limit.
    pub fn new<A: Into<OsString>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: "/lab".into(),
            uid: 0,
            put: Vec::new(),
            get: Vec::new(),
            publish: Vec::new(),
            disks: Vec::new(),
            timeout: None,
        }
    }
}

/// How a command in the lab ended.
///
/// ```no_run
/// # use vmm::lab::{Config, Lab, Run};
/// # let mut lab = Lab::prepare(&Config::new("/var/cache/pontoon"), &mut vmm::guest_images::Silent)?;
/// let status = lab.output(&Run::new(["sh", "-c", "kill -9 $$"]))?.status;
/// assert_eq!((status.code, status.oom_kills), (137, 0));
/// # Ok::<(), vmm::lab::LabError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// Its exit status, 128 + n if signal n killed it.
    pub code: u8,
    /// How many processes the outer kernel killed since its memory was exhausted.
    pub oom_kills: u32,
}

/// A command's end with everything it wrote.
///
/// ```no_run
/// # use vmm::lab::{Config, Lab, Run};
/// # let mut lab = Lab::prepare(&Config::new("/var/cache/pontoon"), &mut vmm::guest_images::Silent)?;
/// let output = lab.output(&Run::new(["sh", "-c", "echo out; echo err >&2"]))?;
/// assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
/// # Ok::<(), vmm::lab::LabError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// What [`run`] does.
///
/// ```no_run
/// use vmm::guest_images::Silent;
/// use vmm::lab::{Config, Run, RunOptions, default_cache, run};
///
/// let config = Config::new(default_cache().expect("HOME is set"));
/// let options = RunOptions { config, run: Run::new(["ls", "-l", "/dev/kvm"]) };
/// std::process::exit(run(&options, &mut Silent)?.code.into());
/// # #[allow(unreachable_code)]
/// # Ok::<(), vmm::lab::LabError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// The outer machine.
    pub config: Config,
    /// The command.
    pub run: Run,
}

/// Runs one command with this process's standard streams: what `pontoon lab` does. On a terminal the
/// command gets a terminal of its own, and this one is raw until it ends.
///
/// # Errors
/// Any of [`LabError`].
pub fn run(options: &RunOptions, progress: &mut dyn Progress) -> Result<ExitStatus, LabError> {
    let mut lab = Lab::prepare(&options.config, progress)?;
    let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    let raw = if interactive { Some(terminal::RawMode::enter()?) } else { None };
    let stdin = io::stdin();
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    let streams =
        Streams { stdin: Some(&stdin), stdout: &mut stdout, stderr: &mut stderr, terminal: raw.as_ref() };
    let status = lab.run_with(&options.run, streams, progress)?;
    drop(raw);
    if status.oom_kills > 0 {
        let note = format!(
            "lab: the {} MiB of the outer machine were exhausted and its kernel killed {} process(es); \
             give it more memory\n",
            options.config.memory_mib, status.oom_kills
        );
        stderr.write_all(note.as_bytes()).map_err(LabError::Stream)?;
    }
    Ok(status)
}

/// An outer machine that is ready to be resumed, any number of times.
///
/// ```no_run
/// use guest_images::Silent;
/// use vmm::lab::{Config, Lab, Run, default_cache};
///
/// // A minute and some downloads the first time, a third of a second later.
/// let mut lab = Lab::prepare(&Config::new(default_cache().expect("HOME is set")), &mut Silent)?;
/// let output = lab.output(&Run::new(["sh", "-c", "ls -l /dev/kvm"]))?;
/// assert_eq!(output.status.code, 0);
/// # Ok::<(), vmm::lab::LabError>(())
/// ```
#[derive(Debug)]
pub struct Lab {
    config: Config,
    /// `None` while, and after, a damaged one could not be replaced.
    snapshot: Option<Snapshot>,
    /// Whether this snapshot has resumed at least once, so that a later failure is not its fault.
    proven: bool,
}

impl Lab {
    /// Finds the snapshot in the cache or makes it: packages, image, boot. That takes about a minute the
    /// first time (mostly downloads), nothing later.
    ///
    /// # Errors
    /// [`LabError::QemuMissing`], [`LabError::Packages`] and others; each says what to do.
    pub fn prepare(config: &Config, progress: &mut dyn Progress) -> Result<Self, LabError> {
        let snapshot = Snapshot::find_or_make(config, progress)?;
        Ok(Self { config: config.unrenewed(), snapshot: Some(snapshot), proven: false })
    }

    /// Runs a command without standard input and collects what it writes.
    ///
    /// # Errors
    /// Any of [`LabError`]. That the command failed is not an error.
    pub fn output(&mut self, run: &Run) -> Result<Output, LabError> {
        self.collect(run, None)
    }

    /// Runs a command whose standard input is `stdin` (a file, a pipe or a socket) to its end, and collects
    /// what it writes.
    ///
    /// # Errors
    /// Any of [`LabError`]. That the command failed is not an error.
    pub fn output_of(&mut self, run: &Run, stdin: &OwnedFd) -> Result<Output, LabError> {
        self.collect(run, Some(stdin))
    }

    fn collect(&mut self, run: &Run, stdin: Option<&OwnedFd>) -> Result<Output, LabError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let stdin = stdin.map(|fd| fd as &dyn session::Input);
        let streams = Streams { stdin, stdout: &mut stdout, stderr: &mut stderr, terminal: None };
        let status = self.run_with(run, streams, &mut guest_images::Silent)?;
        Ok(Output { status, stdout, stderr })
    }

    fn run_with(
        &mut self,
        run: &Run,
        mut streams: Streams<'_>,
        progress: &mut dyn Progress,
    ) -> Result<ExitStatus, LabError> {
        let files = archive::pack(&run.put, &own_binary())?;
        let snapshot = match self.snapshot.take() {
            Some(snapshot) => snapshot,
            None => Snapshot::find_or_make(&self.config, progress)?,
        };
        match session::run(&snapshot, run, &files, &mut streams) {
            Err(error) if error.blames_snapshot() && !self.proven => {
                progress.step(&format!("lab: the snapshot did not resume, making a new one ({error})"));
                // Let go of first: making one waits for everybody who holds the old one.
                snapshot.discard()?;
                let renewed = Snapshot::find_or_make(&self.config, progress)?;
                self.proven = true;
                session::run(self.snapshot.insert(renewed), run, &files, &mut streams)
            }
            answer => {
                self.proven = true;
                self.snapshot = Some(snapshot);
                answer
            }
        }
    }
}

/// This very program, which is at hand in the lab as `/usr/local/bin/pontoon`. A library's embedder gets its
/// own binary there, which may be of use or not.
fn own_binary() -> Option<PathBuf> {
    std::env::current_exe().ok().filter(|path| path.file_name() == Some("pontoon".as_ref()))
}

/// Where the lab has the disk with this index in [`Run::disks`]: the first is `/dev/vdb`.
#[must_use]
pub fn disk_device(index: usize) -> PathBuf {
    let letter = char::from(b'b' + u8::try_from(index.min(MAX_DISKS)).unwrap_or(0));
    PathBuf::from(format!("/dev/vd{letter}"))
}

/// The name of a path's last component, for files that are put without a destination.
#[must_use]
pub fn default_destination(source: &Path) -> Option<PathBuf> {
    Some(Path::new("/lab").join(source.file_name()?))
}
