//! The store of built images: `<cache>/images/<name>/` with `vmlinuz`, `initrd`, `manifest.json`, and `disk.img` for those that
//! have a disk.
//!
//! # Promises
//!
//! - *Whole or absent.* An image is made in a directory of its own, `.NAME.RANDOM`, with the manifest written last; then the link `NAME` is
//!   replaced in one rename. A build that is killed at any point leaves the old image, and a directory that the next build removes.
//! - *One builder.* `.NAME.lock` is locked (flock) while an image is built; a second builder waits and then finds it done.
//! - *Readers need no lock.* [`Image`] holds paths into the directory that the link named; one generation is kept behind the newest, so
//!   a reader that was faster than a build still opens its files.
//! - *Instant when nothing is new.* An image is current when its manifest's recipe (a hash over all that this program puts in) and its files'
//!   SHA-256 match (a disk counts by its length: hashing 2 GB would not be instant). Newer packages are only looked for when asked ([`BuildOptions::refresh`]).
//!
//! Manifests carry a format number; one of another number counts as not built.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cpio;
use crate::deb::{self, Freshness, Suite, sha256_of};
use crate::debian;
use crate::progress::Progress;
use crate::rootfs::{self, RootfsOptions};

mod manifest;
#[cfg(test)]
mod tests;

pub use manifest::{ImageFile, KernelPackage, Manifest, PackageRecord};

/// The manifest's format. Raise it when a field changes its meaning.
pub const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
/// The images that can be built, with what each is.
pub const KNOWN: [(&str, &str); 2] = [
    ("debian", "Debian's cloud kernel, busybox, DHCP: a shell or one command"),
    (ROOTFS, "Debian with systemd, ssh and apt on a disk of its own"),
];
/// The usual name of an image with a disk.
pub const ROOTFS: &str = "debian-rootfs";

/// Why an image could not be had.
///
/// ```
/// use guest_images::{Error, Store};
///
/// let cache = tempfile::tempdir()?;
/// let store = Store::open(cache.path());
/// let missing = store.get("debian").unwrap_err();
/// assert!(matches!(&missing, Error::NotBuilt { name } if name == "debian"));
/// assert!(missing.to_string().ends_with("run: pontoon image build debian"));
/// assert!(matches!(store.get("../debian"), Err(Error::Name(_))));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Packages could not be had.
    #[error(transparent)]
    Deb(#[from] deb::Error),
    /// The initrd could not be composed.
    #[error("cannot compose the initrd: {0}")]
    Cpio(#[from] cpio::Error),
    /// An image with a disk could not be made.
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    /// There is no recipe of that name.
    #[error("no image is called {0:?}; those that can be built: debian, debian --rootfs")]
    Unknown(String),
    /// The name is no file name.
    #[error(
        "{0:?} cannot be the name of an image: 1 to 64 letters, digits, -, _ and ., beginning with a letter or digit"
    )]
    Name(String),
    /// It was never built here.
    #[error("the image {name} is not built yet; run: pontoon image build {name}")]
    NotBuilt {
        /// The image.
        name: String,
    },
    /// It is here, but not as its manifest says.
    #[error("the image {name} in {path} is damaged: {problem}; run: pontoon image build {name}")]
    Damaged {
        /// The image.
        name: String,
        /// Its directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Something that should be in a package or file is not.
    #[error("{path}: {problem}")]
    Content {
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Neither XDG_CACHE_HOME nor HOME is set to an absolute path.
    #[error("there is no place for images: set XDG_CACHE_HOME or HOME to an absolute path")]
    NoCache,
    /// A file of the cache.
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
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

/// Pontoon's cache directory: `$XDG_CACHE_HOME/pontoon`, else `~/.cache/pontoon`. Packages are kept in it too.
///
/// # Errors
/// [`Error::NoCache`].
pub fn cache_dir() -> Result<PathBuf, Error> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    base.map(|base| base.join("pontoon")).ok_or(Error::NoCache)
}

/// A built image.
///
/// ```no_run
/// use guest_images::Store;
///
/// let image = Store::open_default()?.get("debian")?;
/// image.verify()?;
/// println!("{} boots {}", image.manifest.name, image.kernel.display());
/// # Ok::<(), guest_images::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The kernel's path.
    pub kernel: PathBuf,
    /// The initial RAM disk's path.
    pub initrd: PathBuf,
    /// The disk's path, if it has one. Read it, don't change it: machines run on copies or overlays.
    pub disk: Option<PathBuf>,
    /// What it is made of.
    pub manifest: Manifest,
}

impl Image {
    /// Reads the image in `dir`, and checks that its files have their lengths.
    fn read(name: &str, dir: &Path) -> Result<Self, Error> {
        let damaged =
            |problem: String| Error::Damaged { name: name.to_owned(), path: dir.to_path_buf(), problem };
        let text = match fs::read(dir.join(MANIFEST)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotBuilt { name: name.to_owned() });
            }
            Err(error) => return Err(damaged(format!("{MANIFEST}: {error}"))),
        };
        // The format stands first, and alone: another format's other fields may be anything.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let format: Format =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        if format.format != FORMAT {
            return Err(Error::NotBuilt { name: name.to_owned() });
        }
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let path = |file: &ImageFile| -> Result<PathBuf, Error> {
            if file.file.contains('/') {
                return Err(damaged(format!("{MANIFEST}: {:?} is not a file name", file.file)));
            }
            let path = dir.join(&file.file);
            match fs::metadata(&path) {
                Ok(meta) if meta.len() == file.size => Ok(path),
                Ok(meta) => {
                    Err(damaged(format!("{} has {} bytes instead of {}", file.file, meta.len(), file.size)))
                }
                Err(error) => Err(damaged(format!("{}: {error}", file.file))),
            }
        };
        let disk = manifest.disk.as_ref().map(path).transpose()?;
        Ok(Self { kernel: path(&manifest.kernel)?, initrd: path(&manifest.initrd)?, disk, manifest })
    }

    /// Whether it was made by this recipe and is whole.
    fn is_current(&self, recipe: &str) -> bool {
        self.manifest.recipe == recipe
            && self.verify_boot_files().is_ok()
            && self.manifest.identity.as_ref().is_none_or(|key| key.is_file())
    }

    /// Checks the files' SHA-256, the disk's included: that takes seconds.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn verify(&self) -> Result<(), Error> {
        self.verify_boot_files()?;
        self.verify_files(self.disk.iter().zip(&self.manifest.disk))
    }

    /// Checks the SHA-256 of kernel and initrd.
    fn verify_boot_files(&self) -> Result<(), Error> {
        let Manifest { kernel, initrd, .. } = &self.manifest;
        self.verify_files([(&self.kernel, kernel), (&self.initrd, initrd)])
    }

    fn verify_files<'a>(
        &self,
        files: impl IntoIterator<Item = (&'a PathBuf, &'a ImageFile)>,
    ) -> Result<(), Error> {
        for (path, file) in files {
            let sum = sha256_of(path).map_err(io_error("read", path))?;
            if sum != file.sha256 {
                return Err(Error::Damaged {
                    name: self.manifest.name.clone(),
                    path: path.clone(),
                    problem: format!("its SHA-256 is {sum} instead of {}", file.sha256),
                });
            }
        }
        Ok(())
    }
}

/// How an image is built.
///
/// ```no_run
/// use guest_images::deb::Suite;
/// use guest_images::{BuildOptions, Silent, Store};
///
/// let options = BuildOptions { suite: Some(Suite::Bookworm), modules: vec!["btrfs".into()], ..BuildOptions::default() };
/// let image = Store::open_default()?.build("debian", &options, &mut Silent)?;
/// # Ok::<(), guest_images::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BuildOptions {
    /// The Debian suite; `None` for the one that the image was last built from, else the host's (bookworm on a host that is not Debian).
    pub suite: Option<Suite>,
    /// Look for newer packages.
    pub refresh: bool,
    /// Kernel modules besides the usual ones, with what they need.
    pub modules: Vec<String>,
}

/// The store.
///
/// ```no_run
/// use guest_images::{BuildOptions, Error, Silent, Store};
///
/// let store = Store::open_default()?;
/// let image = match store.get("debian") {
///     // Downloads some 100 MB the first time; needs no root.
///     Err(Error::NotBuilt { .. }) => store.build("debian", &BuildOptions::default(), &mut Silent)?,
///     image => image?,
/// };
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Store {
    cache: PathBuf,
}

impl Store {
    /// The store in the cache directory `cache` (see [`cache_dir`]); made when something is built.
    #[must_use]
    pub fn open(cache: &Path) -> Self {
        Self { cache: cache.to_path_buf() }
    }

    /// The user's store.
    ///
    /// # Errors
    /// [`Error::NoCache`].
    pub fn open_default() -> Result<Self, Error> {
        Ok(Self { cache: cache_dir()? })
    }

    /// Where the images are.
    #[must_use]
    pub fn images_dir(&self) -> PathBuf {
        self.cache.join("images")
    }

    /// The image `name`. Reads the manifest and looks at the files' lengths, not at their content.
    ///
    /// # Errors
    /// [`Error::NotBuilt`], [`Error::Damaged`], [`Error::Name`].
    pub fn get(&self, name: &str) -> Result<Image, Error> {
        check_name(name)?;
        match fs::canonicalize(self.images_dir().join(name)) {
            Ok(dir) => Image::read(name, &dir),
            Err(_) => Err(Error::NotBuilt { name: name.to_owned() }),
        }
    }

    /// All images that are whole, by name. Damaged ones are logged.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        let Ok(entries) = fs::read_dir(self.images_dir()) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut images: Vec<_> = names
            .filter(|name| !name.starts_with('.'))
            .filter_map(|name| {
                self.get(&name).inspect_err(|error| tracing::warn!(%error, "an image is left out")).ok()
            })
            .collect();
        images.sort_by(|a, b| a.manifest.name.cmp(&b.manifest.name));
        images
    }

    /// Builds the image `name`, or finds it current.
    ///
    /// # Errors
    /// [`Error`]; the former image stays as it was.
    pub fn build(
        &self,
        name: &str,
        options: &BuildOptions,
        progress: &mut dyn Progress,
    ) -> Result<Image, Error> {
        if !KNOWN.iter().any(|(known, _)| *known == name) {
            return Err(Error::Unknown(name.to_owned()));
        }
        if name == ROOTFS {
            let BuildOptions { suite, refresh, .. } = *options;
            return self.build_rootfs(
                name,
                &RootfsOptions { suite, refresh, ..RootfsOptions::default() },
                progress,
            );
        }
        let _lock = self.lock(name)?;
        let former = self.former(name);
        let suite = suite_of(options.suite, former.as_ref());
        let recipe = debian::recipe(suite, &options.modules);
        if let Some(image) = former.filter(|image| !options.refresh && image.is_current(&recipe)) {
            progress.done(&format!("{name} is built already: {}", describe(&image)));
            return Ok(image);
        }
        let image = self.build_locked(name, suite, recipe, options, progress)?;
        progress.done(&format!("built {name}: {}", describe(&image)));
        Ok(image)
    }

    /// Builds an image with a disk under the name `name`, or finds it current: [`rootfs`] tells what is in it.
    ///
    /// # Errors
    /// [`Error`]; the former image stays as it was. [`Error::Content`] for the name of another kind of image.
    pub fn build_rootfs(
        &self,
        name: &str,
        options: &RootfsOptions,
        progress: &mut dyn Progress,
    ) -> Result<Image, Error> {
        check_name(name)?;
        if name != ROOTFS && KNOWN.iter().any(|(known, _)| *known == name) {
            let problem = format!("{name} is an image without a disk; build this one under another name");
            return Err(Error::Content { path: self.images_dir().join(name), problem });
        }
        options.check()?;
        let authorized = rootfs::authorized(&self.cache, &options.ssh_keys)?;
        let _lock = self.lock(name)?;
        let former = self.former(name);
        let suite = suite_of(options.suite, former.as_ref());
        let plan = rootfs::Plan { suite, options, authorized: &authorized.text };
        let recipe = plan.recipe();
        if let Some(image) = former.filter(|image| !options.refresh && image.is_current(&recipe)) {
            progress.done(&format!("{name} is built already: {}", describe(&image)));
            return Ok(image);
        }
        let dir = self.new_dir(name)?;
        let log = self.images_dir().join(format!(".{name}.log"));
        let made = plan.build(dir.path(), &log, progress)?;
        progress.step("hashing the image");
        let manifest = Manifest {
            kernel_package: Some(made.kernel),
            packages: made.packages,
            disk: Some(file_record(dir.path(), rootfs::DISK)?),
            cmdline: made.cmdline,
            identity: authorized.identity,
            ..Manifest::new(name, suite.to_string(), recipe, dir.path())?
        };
        let image = self.publish(name, dir, &manifest)?;
        progress.done(&format!("built {name}: {}", describe(&image)));
        Ok(image)
    }

    fn former(&self, name: &str) -> Option<Image> {
        self.get(name).inspect_err(|error| tracing::debug!(%error, "it will be built")).ok()
    }

    fn build_locked(
        &self,
        name: &str,
        suite: Suite,
        recipe: String,
        options: &BuildOptions,
        progress: &mut dyn Progress,
    ) -> Result<Image, Error> {
        let freshness = if options.refresh { Freshness::Newest } else { Freshness::Remembered };
        let made = |freshness, progress: &mut dyn Progress| {
            let dir = self.new_dir(name)?;
            let made = debian::build(&self.cache, suite, &options.modules, freshness, dir.path(), progress)?;
            Ok((dir, made))
        };
        let (dir, made) = match made(freshness, progress) {
            // The index at hand may name a kernel that the archive has replaced since.
            Err(Error::Deb(error @ (deb::Error::Apt { .. } | deb::Error::Package { .. })))
                if freshness == Freshness::Remembered =>
            {
                tracing::info!(%error, "tried once more with a new index");
                made(Freshness::Newest, progress)?
            }
            answer => answer?,
        };
        let manifest = Manifest {
            kernel_package: Some(made.kernel),
            packages: made
                .packages
                .into_iter()
                .map(|deb| PackageRecord { name: deb.name, version: deb.version, sha256: deb.sha256 })
                .collect(),
            modules: made.modules,
            ..Manifest::new(name, suite.to_string(), recipe, dir.path())?
        };
        self.publish(name, dir, &manifest)
    }

    /// Takes a kernel and an initrd of the user's own into the store, as the image `name`; copies them.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::Io`]; [`Error::Content`] for a name that images are built under.
    pub fn import(
        &self,
        name: &str,
        kernel: &Path,
        initrd: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Image, Error> {
        check_name(name)?;
        if KNOWN.iter().any(|(known, _)| *known == name) {
            let problem = format!("{name} is an image that is built; import it under another name");
            return Err(Error::Content { path: kernel.to_path_buf(), problem });
        }
        let _lock = self.lock(name)?;
        progress.step("copying the kernel and the initrd");
        let dir = self.new_dir(name)?;
        for (from, to) in [(kernel, "vmlinuz"), (initrd, "initrd")] {
            fs::copy(from, dir.path().join(to)).map_err(io_error("copy", from))?;
        }
        let manifest = Manifest::new(name, String::new(), String::new(), dir.path())?;
        let image = self.publish(name, dir, &manifest)?;
        progress.done(&format!("imported {name}"));
        Ok(image)
    }

    /// A directory to make an image in; it goes away unless it is published.
    fn new_dir(&self, name: &str) -> Result<tempfile::TempDir, Error> {
        let images = self.images_dir();
        tempfile::Builder::new()
            .prefix(&build_prefix(name))
            .tempdir_in(&images)
            .map_err(io_error("make a directory in", &images))
    }

    /// Makes what is in `dir` the image `name`: manifest, disk, link, in this order. The lock is held.
    fn publish(&self, name: &str, dir: tempfile::TempDir, manifest: &Manifest) -> Result<Image, Error> {
        let images = self.images_dir();
        let text = serde_json::to_vec_pretty(manifest).expect("strings and numbers are always JSON");
        let path = dir.path().join(MANIFEST);
        fs::write(&path, text).map_err(io_error("write", &path))?;
        let files = [&manifest.kernel, &manifest.initrd].into_iter().chain(&manifest.disk);
        for file in files.map(|file| file.file.as_str()).chain([MANIFEST]) {
            let path = dir.path().join(file);
            File::open(&path).and_then(|file| file.sync_all()).map_err(io_error("write", &path))?;
        }
        let link = images.join(name);
        let former = fs::read_link(&link).ok();
        let dir = dir.keep();
        let target = dir.file_name().map(PathBuf::from).unwrap_or_default();
        let new_link = images.join(format!("{}link", build_prefix(name)));
        let _ = fs::remove_file(&new_link);
        std::os::unix::fs::symlink(&target, &new_link).map_err(io_error("make", &new_link))?;
        fs::rename(&new_link, &link).map_err(io_error("replace", &link))?;
        self.remove_leftovers(name, &[Some(target), former]);
        Image::read(name, &dir)
    }

    /// Removes directories of this image that are neither current nor the generation before.
    fn remove_leftovers(&self, name: &str, kept: &[Option<PathBuf>]) {
        let Ok(entries) = fs::read_dir(self.images_dir()) else { return };
        for entry in entries.flatten() {
            let file_name = PathBuf::from(entry.file_name());
            let ours = entry.file_name().to_string_lossy().starts_with(&build_prefix(name));
            if ours && entry.path().is_dir() && !kept.contains(&Some(file_name)) {
                let removed = fs::remove_dir_all(entry.path());
                tracing::debug!(path = %entry.path().display(), ?removed, "an old or unfinished build");
            }
        }
    }

    /// Takes the image's lock, which makes the store's directory; it goes with the returned file.
    fn lock(&self, name: &str) -> Result<File, Error> {
        let images = self.images_dir();
        fs::create_dir_all(&images).map_err(io_error("make", &images))?;
        let path = images.join(format!(".{name}.lock"));
        let open = File::options().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(io_error("open", &path))?;
        file.lock().map_err(io_error("lock", &path))?;
        Ok(file)
    }
}

/// The suite to build from: the one asked for, the one before, or the host's.
fn suite_of(asked: Option<Suite>, former: Option<&Image>) -> Suite {
    let former = || former.and_then(|image| image.manifest.suite.parse().ok());
    asked.or_else(former).unwrap_or_else(Suite::of_host)
}

/// How the directories of an image's builds begin. The name can't end in a way that makes it another's: see [`check_name`].
fn build_prefix(name: &str) -> String {
    format!(".{name}@")
}

fn check_name(name: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let good = (1..=64).contains(&name.len())
        && name.bytes().all(allowed)
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if good { Ok(()) } else { Err(Error::Name(name.to_owned())) }
}

fn file_record(dir: &Path, file: &str) -> Result<ImageFile, Error> {
    let path = dir.join(file);
    let size = fs::metadata(&path).map_err(io_error("read", &path))?.len();
    let sha256 = sha256_of(&path).map_err(io_error("read", &path))?;
    Ok(ImageFile { file: file.to_owned(), size, sha256 })
}

/// One line about an image.
fn describe(image: &Image) -> String {
    let Manifest { kernel_package, kernel, initrd, disk, .. } = &image.manifest;
    let release = kernel_package.as_ref().map_or("its own kernel", |kernel| kernel.release.as_str());
    let megabytes = |bytes: u64| format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000);
    let disk = disk.as_ref().map(|disk| format!(", disk {}", megabytes(disk.size))).unwrap_or_default();
    format!("{release}, kernel {}, initrd {}{disk}", megabytes(kernel.size), megabytes(initrd.size))
}
