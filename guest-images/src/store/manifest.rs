//! What an image is made of, as it stands in its `manifest.json`. A field that came later has a default, so that images built
//! before it stay images.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, FORMAT, file_record};

/// A file of an image.
///
/// ```no_run
/// use guest_images::Store;
///
/// let image = Store::open_default()?.get("debian")?;
/// let kernel = &image.manifest.kernel;
/// println!("{}  {}", kernel.sha256, kernel.file); // as sha256sum has it
/// # Ok::<(), guest_images::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Its name in the image's directory.
    pub file: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its SHA-256, 64 lower-case hexadecimal digits.
    pub sha256: String,
}

/// Where the kernel is from.
///
/// ```no_run
/// use guest_images::Store;
///
/// let image = Store::open_default()?.get("debian")?;
/// // None for an image that somebody imported.
/// if let Some(kernel) = &image.manifest.kernel_package {
///     println!("{} {} ({})", kernel.package, kernel.version, kernel.release);
/// }
/// # Ok::<(), guest_images::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelPackage {
    /// The Debian package.
    pub package: String,
    /// Its Debian version.
    pub version: String,
    /// The kernel's release, as `uname -r` tells it.
    pub release: String,
}

/// A package that went into an image.
///
/// ```no_run
/// use guest_images::Store;
///
/// let image = Store::open_default()?.get("debian")?;
/// for package in &image.manifest.packages {
///     println!("{} {}", package.name, package.version);
/// }
/// # Ok::<(), guest_images::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageRecord {
    /// Its name.
    pub name: String,
    /// Its Debian version.
    pub version: String,
    /// The SHA-256 of its .deb file.
    pub sha256: String,
}

/// What an image is made of: the content of its `manifest.json`.
///
/// ```
/// use guest_images::Manifest;
///
/// let file = r#"{"file": "vmlinuz", "size": 1, "sha256": ""}"#;
/// let text = format!(
///     r#"{{"format": 1, "name": "mine", "suite": "", "recipe": "", "kernel": {file}, "initrd": {file},
///         "kernel_package": null, "packages": [], "modules": []}}"#
/// );
/// let manifest: Manifest = serde_json::from_str(&text)?;
/// // What came later has a default: an image from before is an image still.
/// assert_eq!((manifest.disk, manifest.cmdline.as_str()), (None, ""));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The image's name.
    pub name: String,
    /// The Debian suite, such as `bookworm`; empty for an image that was not built from Debian.
    pub suite: String,
    /// A hash over what the building program put in.
    pub recipe: String,
    /// The kernel.
    pub kernel: ImageFile,
    /// The initial RAM disk.
    pub initrd: ImageFile,
    /// Where the kernel is from; `None` for an image that was not built from Debian.
    pub kernel_package: Option<KernelPackage>,
    /// The packages, in the order of unpacking.
    pub packages: Vec<PackageRecord>,
    /// The kernel modules in the initrd, sorted; empty where others made the initrd.
    pub modules: Vec<String>,
    /// The disk that the system is on, raw; `None` when all of it is in the initrd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<ImageFile>,
    /// What the kernel's command line must have, such as `root=UUID=…`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// The private key that logs in as root, when it was made here; an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<PathBuf>,
}

impl Manifest {
    /// Of kernel and initrd in `dir`, and nothing else.
    pub(super) fn new(name: &str, suite: String, recipe: String, dir: &Path) -> Result<Self, Error> {
        Ok(Self {
            format: FORMAT,
            name: name.to_owned(),
            suite,
            recipe,
            kernel: file_record(dir, "vmlinuz")?,
            initrd: file_record(dir, "initrd")?,
            kernel_package: None,
            packages: Vec::new(),
            modules: Vec::new(),
            disk: None,
            cmdline: String::new(),
            identity: None,
        })
    }
}
