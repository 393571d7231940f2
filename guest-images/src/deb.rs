//! Debian packages: resolved, downloaded, verified and unpacked without root and without touching the host.
//!
//! # How
//!
//! The host's own apt does what it is good at (indexes, signatures, dependencies, mirrors, proxies), with
//! a configuration whose every directory lies in our cache (`config.rs`), and an empty installed system.
//! A request goes through four stations; each may end it early:
//!
//! 1. *Remembered*: the same request was answered before, and every package of the answer is in the
//!    archive directory with the right SHA-256: no process is started, no network is touched.
//! 2. *Index*: lists are downloaded when there are none, when they are older than a day, or when asked.
//! 3. *Resolve*: `apt-get install --print-uris` names versions, sizes and the SHA-256 that the signed
//!    index vouches for. Packages that only maintainer scripts need (debconf, passwd, …) are declared
//!    as installed, since no script ever runs here: that halves most closures.
//! 4. *Download*: what is missing or damaged, by `apt-get download`; each file is checked by apt and by us
//!    before it gets its final name. When the archive has moved on meanwhile (404), the index is renewed once.
//!
//! Trust: apt verifies the archive's signature with the host's keyring; nothing unsigned is accepted.
//!
//! Layout of `<cache>/apt/<suite>/`: `apt.conf`, `sources.list`, `status`, `lists/`, `archives/*.deb`, `sets/*.json`
//! (remembered answers), `lock` (flock: one request at a time per suite, others wait), `apt.log` (what apt said last).
//!
//! Limits: amd64 and architecture-independent packages; component main; suites of [`Suite`].

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::progress::Progress;

mod apt;
mod config;
#[cfg(test)]
mod tests;

pub use config::Suite;
pub(crate) use config::sources_of_host;

/// Lists older than this are renewed before a request that was never answered before.
const LISTS_AGE: Duration = Duration::from_secs(24 * 3600);

/// Why packages could not be had.
///
/// ```
/// use guest_images::deb::{Error, Suite};
///
/// let refused = "sid".parse::<Suite>();
/// assert!(matches!(&refused, Err(Error::UnknownSuite(name)) if name == "sid"));
/// assert!(refused.unwrap_err().to_string().ends_with("use bookworm or trixie"));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program of the host is missing.
    #[error(
        "{program} is not on this host: Debian packages are fetched with it; install the package {package}, or build the image on a Debian machine and copy it"
    )]
    MissingProgram {
        /// What was to be run.
        program: &'static str,
        /// The package that holds it.
        package: &'static str,
    },
    /// The keyring that Debian's archive is verified with is missing.
    #[error("{path} is missing: Debian's archive is verified with it; install debian-archive-keyring")]
    MissingKeyring {
        /// Where it should be.
        path: PathBuf,
    },
    /// The suite is not one that is known here.
    #[error("{0:?} is not a suite that images can be built from; use bookworm or trixie")]
    UnknownSuite(String),
    /// The archive cannot be reached.
    #[error(
        "the Debian archive cannot be reached: check the network, or the proxy in /etc/apt/apt.conf.d; apt said:\n{said}"
    )]
    Unreachable {
        /// The last lines of apt.
        said: String,
    },
    /// apt failed for another reason.
    #[error("{action} failed; apt said:\n{said}")]
    Apt {
        /// What was being done.
        action: String,
        /// The last lines of apt.
        said: String,
    },
    /// apt answered something that is not understood.
    #[error(
        "{action}: apt answered {line:?}, which is not understood; please report it with the output of apt-get --version"
    )]
    Answer {
        /// What was being done.
        action: String,
        /// The line.
        line: String,
    },
    /// A package did not arrive, or not as the index describes it.
    #[error("{name}: {problem}; run it again, and delete {path} if that does not help")]
    Package {
        /// The package.
        name: String,
        /// What is wrong.
        problem: String,
        /// The file.
        path: PathBuf,
    },
    /// A file of the cache or of the host.
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

/// An error of the host about `path`; `action` completes "cannot … PATH".
fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

/// Whether the packages that the named ones depend on come along.
///
/// ```no_run
/// use guest_images::Silent;
/// use guest_images::deb::{Archive, Dependencies, Freshness, Suite};
///
/// let archive = Archive::open("/var/cache/pontoon".as_ref(), Suite::Bookworm)?;
/// let alone = archive.fetch(&["iproute2"], Dependencies::Ignored, Freshness::Remembered, &mut Silent)?;
/// let all = archive.fetch(&["iproute2"], Dependencies::Included, Freshness::Remembered, &mut Silent)?;
/// assert!(alone.len() == 1 && all.len() > 1);
/// # Ok::<(), guest_images::deb::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dependencies {
    /// The named packages alone.
    Ignored,
    /// The closure over Depends and Pre-Depends, without Recommends.
    Included,
}

/// Whether newer packages are looked for.
///
/// ```no_run
/// # use guest_images::Silent;
/// use guest_images::deb::{Archive, Dependencies, Freshness, Suite};
///
/// let archive = Archive::open("/var/cache/pontoon".as_ref(), Suite::Bookworm)?;
/// // With a security update in mind: the index is fetched again.
/// let debs = archive.fetch(&["busybox-static"], Dependencies::Ignored, Freshness::Newest, &mut Silent)?;
/// println!("busybox {}", debs[0].version);
/// # Ok::<(), guest_images::deb::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// What a former equal request got is good enough: no network when it is all there.
    Remembered,
    /// The index is downloaded again first.
    Newest,
}

/// One downloaded and verified package.
///
/// ```no_run
/// # use guest_images::Silent;
/// # use guest_images::deb::fetch;
/// for deb in fetch("/var/cache/pontoon".as_ref(), &["busybox-static"], false, &mut Silent)? {
///     println!("{} {}: {} bytes in {}", deb.name, deb.version, deb.size, deb.path.display());
///     deb.unpack("/tmp/root".as_ref())?;
/// }
/// # Ok::<(), guest_images::deb::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deb {
    /// The package's name, such as `iproute2`.
    pub name: String,
    /// Its Debian version, the epoch included, such as `1:1.35.0-4`.
    pub version: String,
    /// The .deb file in the cache. Read it, don't change it.
    pub path: PathBuf,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits; the signed index vouches for it.
    pub sha256: String,
    /// The file's length in bytes.
    pub size: u64,
}

impl Deb {
    /// Unpacks the package's files into the directory `into`, which is made when it is missing. No maintainer script
    /// runs; owners are those of the caller. A directory in the package follows a link that stands in its place.
    ///
    /// # Errors
    /// [`Error::MissingProgram`] without dpkg-deb, [`Error::Package`] when it can't be unpacked.
    pub fn unpack(&self, into: &Path) -> Result<(), Error> {
        fs::create_dir_all(into).map_err(io_error("make", into))?;
        let mut command = Command::new("dpkg-deb");
        command.arg("--extract").arg(&self.path).arg(into).env("LC_ALL", "C");
        let output = command.output().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::MissingProgram { program: "dpkg-deb", package: "dpkg" },
            _ => io_error("run dpkg-deb on", &self.path)(error),
        })?;
        if output.status.success() {
            return Ok(());
        }
        let problem = format!("dpkg-deb: {}", String::from_utf8_lossy(&output.stderr).trim());
        Err(Error::Package { name: self.name.clone(), problem, path: self.path.clone() })
    }
}

/// Unpacks several packages into one root that programs of them can run in: `/bin`, `/sbin`, `/lib` and `/lib64` are made
/// links into `/usr` first, which both suites are content with.
///
/// # Errors
/// Those of [`Deb::unpack`].
pub fn unpack_all(debs: &[Deb], root: &Path) -> Result<(), Error> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        let (target, link) = (Path::new("usr").join(name), root.join(name));
        let dir = root.join(&target);
        fs::create_dir_all(&dir).map_err(io_error("make", &dir))?;
        match std::os::unix::fs::symlink(&target, &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io_error("make", &link)(error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    debs.iter().try_for_each(|deb| deb.unpack(root))
}

/// Fetches `names` (and what they depend on) of the host's suite, or bookworm's elsewhere, into the cache directory `cache`,
/// remembering the answer: see [`Archive::fetch`].
///
/// # Errors
/// Those of [`Archive::open`] and [`Archive::fetch`].
pub fn fetch(
    cache: &Path,
    names: &[&str],
    with_dependencies: bool,
    progress: &mut dyn Progress,
) -> Result<Vec<Deb>, Error> {
    let dependencies = if with_dependencies { Dependencies::Included } else { Dependencies::Ignored };
    Archive::open(cache, Suite::of_host())?.fetch(names, dependencies, Freshness::Remembered, progress)
}

/// Debian's archive of one suite, as seen through a cache directory.
///
/// ```
/// use guest_images::deb::{Archive, Suite};
///
/// let cache = tempfile::tempdir()?;
/// // Nothing is fetched before it is asked for.
/// let archive = Archive::open(cache.path(), Suite::Trixie)?;
/// assert_eq!(archive.suite(), Suite::Trixie);
/// assert!(cache.path().join("apt/trixie").is_dir());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Archive {
    /// `<cache>/apt/<suite>`.
    dir: PathBuf,
    suite: Suite,
}

/// A package as the index describes it; also the form in which an answer is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Wanted {
    name: String,
    version: String,
    file: String,
    sha256: String,
    size: u64,
}

/// A remembered answer. The request stands in it too, since the file's name is only a hash of it.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    names: Vec<String>,
    dependencies: Dependencies,
    packages: Vec<Wanted>,
}

impl Archive {
    /// Prepares `<cache>/apt/<suite>` (made when missing). Neither apt nor the network is touched yet.
    ///
    /// # Errors
    /// [`Error::Io`] when the cache cannot be made.
    pub fn open(cache: &Path, suite: Suite) -> Result<Self, Error> {
        let dir = cache.join("apt").join(suite.name());
        for name in ["lists/partial", "archives", "sets"] {
            let path = dir.join(name);
            fs::create_dir_all(&path).map_err(io_error("make", &path))?;
        }
        Ok(Self { dir, suite })
    }

    /// The suite.
    #[must_use]
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The packages `names`, with or without what they depend on, each verified, in the order in which they can be
    /// unpacked (dependencies first as apt orders them). Waits while another process fetches from the same cache.
    ///
    /// # Errors
    /// Any of [`Error`]; [`Error::Unreachable`] only when something must be downloaded.
    pub fn fetch(
        &self,
        names: &[&str],
        dependencies: Dependencies,
        freshness: Freshness,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Deb>, Error> {
        let _lock = self.lock()?;
        let set = self.set_path(names, dependencies);
        if freshness == Freshness::Remembered
            && let Some(debs) = self.remembered(&set, names, dependencies)
        {
            return Ok(debs);
        }
        config::write(&self.dir, self.suite, names)?;
        let renewed = self.renew_lists(freshness, progress)?;
        let packages = match self.resolve_and_download(names, dependencies, progress) {
            Err(error) if !renewed => {
                tracing::info!(%error, "the index seems outdated: it is renewed, and tried once more");
                apt::update(&self.dir, progress)?;
                self.resolve_and_download(names, dependencies, progress)?
            }
            answer => answer?,
        };
        let names = names.iter().map(|&name| name.to_owned()).collect();
        let debs = packages.iter().map(|wanted| self.deb(wanted)).collect();
        self.remember(&set, &Remembered { names, dependencies, packages })?;
        Ok(debs)
    }

    /// The packages that `name` directly depends on, as the index has them: how a metapackage tells
    /// what it stands for now.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub fn depends(
        &self,
        name: &str,
        freshness: Freshness,
        progress: &mut dyn Progress,
    ) -> Result<Vec<String>, Error> {
        let _lock = self.lock()?;
        config::write(&self.dir, self.suite, &[])?;
        self.renew_lists(freshness, progress)?;
        apt::depends(&self.dir, name)
    }

    /// Downloads the index when that is due; says whether it did.
    fn renew_lists(&self, freshness: Freshness, progress: &mut dyn Progress) -> Result<bool, Error> {
        let age = self.lists_age();
        if freshness == Freshness::Remembered && age.is_some_and(|age| age < LISTS_AGE) {
            return Ok(false);
        }
        match apt::update(&self.dir, progress) {
            Ok(()) => Ok(true),
            Err(error @ Error::Unreachable { .. }) if freshness == Freshness::Remembered && age.is_some() => {
                tracing::warn!(%error, "the package index could not be renewed: the old one is used");
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// How long ago the lists were downloaded completely, the longest if that was before the host's clock was set back; `None` when they
    /// never were.
    fn lists_age(&self) -> Option<Duration> {
        let written = fs::metadata(apt::stamp(&self.dir)).ok()?.modified().ok()?;
        Some(SystemTime::now().duration_since(written).unwrap_or(Duration::MAX))
    }

    fn resolve_and_download(
        &self,
        names: &[&str],
        dependencies: Dependencies,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Wanted>, Error> {
        let packages = apt::resolve(&self.dir, names, dependencies)?;
        let missing: Vec<_> = packages.iter().filter(|wanted| !self.is_whole(wanted)).cloned().collect();
        if !missing.is_empty() {
            self.download(&missing, progress)?;
        }
        Ok(packages)
    }

    /// Downloads into a directory of its own and moves each file to its final name once it is verified.
    fn download(&self, missing: &[Wanted], progress: &mut dyn Progress) -> Result<(), Error> {
        let incoming = tempfile::Builder::new()
            .prefix("incoming-")
            .tempdir_in(&self.dir)
            .map_err(io_error("make a directory in", &self.dir))?;
        apt::download(&self.dir, incoming.path(), missing, progress)?;
        for wanted in missing {
            let arrived = incoming.path().join(&wanted.file);
            let problem = match sha256_of(&arrived) {
                Ok(sum) if sum == wanted.sha256 => None,
                Ok(sum) => Some(format!("its SHA-256 is {sum}, the index says {}", wanted.sha256)),
                Err(error) => Some(format!("it did not arrive: {error}")),
            };
            let path = self.path_of(wanted);
            if let Some(problem) = problem {
                return Err(Error::Package { name: wanted.name.clone(), problem, path });
            }
            fs::rename(&arrived, &path).map_err(io_error("write", &path))?;
        }
        Ok(())
    }

    fn path_of(&self, wanted: &Wanted) -> PathBuf {
        self.dir.join("archives").join(&wanted.file)
    }

    fn deb(&self, wanted: &Wanted) -> Deb {
        Deb {
            name: wanted.name.clone(),
            version: wanted.version.clone(),
            path: self.path_of(wanted),
            sha256: wanted.sha256.clone(),
            size: wanted.size,
        }
    }

    /// Whether the package is here, whole and unchanged.
    fn is_whole(&self, wanted: &Wanted) -> bool {
        let path = self.path_of(wanted);
        fs::metadata(&path).is_ok_and(|meta| meta.len() == wanted.size)
            && sha256_of(&path).is_ok_and(|sum| sum == wanted.sha256)
    }

    fn set_path(&self, names: &[&str], dependencies: Dependencies) -> PathBuf {
        let mut hash = Sha256::new();
        hash.update(format!("{dependencies:?}"));
        for name in names {
            hash.update([0]);
            hash.update(name);
        }
        self.dir.join("sets").join(format!("{}.json", hex(&hash.finalize())))
    }

    /// The remembered answer, if it is this request's and every file of it is whole.
    fn remembered(&self, set: &Path, names: &[&str], dependencies: Dependencies) -> Option<Vec<Deb>> {
        let text = fs::read(set).ok()?;
        let remembered: Remembered = serde_json::from_slice(&text)
            .inspect_err(|error| tracing::warn!(%error, set = %set.display(), "a damaged file is ignored"))
            .ok()?;
        let same = remembered.names == names && remembered.dependencies == dependencies;
        (same && remembered.packages.iter().all(|wanted| self.is_whole(wanted)))
            .then(|| remembered.packages.iter().map(|wanted| self.deb(wanted)).collect())
    }

    fn remember(&self, set: &Path, answer: &Remembered) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(answer).expect("strings and numbers are always JSON");
        write_atomically(set, &text)
    }

    /// Takes the suite's lock; it goes with the returned file.
    fn lock(&self) -> Result<File, Error> {
        let path = self.dir.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        file.lock().map_err(io_error("lock", &path))?;
        Ok(file)
    }
}

/// Writes a file whole or not at all.
fn write_atomically(path: &Path, content: &[u8]) -> Result<(), Error> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(parent)?;
        io::Write::write_all(&mut file, content)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(io_error("write", path))
}

/// The SHA-256 of a file, in lower-case hexadecimal.
pub(crate) fn sha256_of(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
