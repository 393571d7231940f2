//! Why an image can't be a disk.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::SECTOR;
use super::format::Format;

/// Why an image can't be a disk.
///
/// ```
/// use devices::disk::{Disk, DiskError, DiskMode};
///
/// # let folder = tempfile::tempdir()?;
/// let image = folder.path().join("disk.qcow2");
/// std::fs::write(&image, [&b"QFI\xfb"[..], &[0; 508]].concat())?;
/// let refused = Disk::open(&image, DiskMode::ReadOnly).err().expect("it is no raw image");
/// assert!(matches!(refused, DiskError::Format { .. }));
/// assert!(refused.to_string().contains("qemu-img convert"));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Missing, not permitted, or unreadable.
    #[error("the disk image {} can't be opened: {source}; {}", path.display(), what_to_do(source))]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Readable at best.
    #[error(
        "the disk image {} can't be written: {source}; use it read-only ({name},ro) or as the base of an overlay \
         ({name},overlay)", path.display(), name = Name(path)
    )]
    NotWritable {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a device that is no disk, a socket.
    #[error(
        "{} is {} and can't be a disk; name a raw image file or a block device", path.display(),
        if *directory { "a directory" } else { "neither a file nor a block device" }
    )]
    Kind {
        /// What was named.
        path: PathBuf,
        /// It is a directory.
        directory: bool,
    },
    /// No bytes.
    #[error("the disk image {name} is empty; give it a size, such as: truncate -s 1G {name}", name = Name(.0))]
    Empty(PathBuf),
    /// No whole number of sectors.
    #[error(
        "the disk image {name} has {bytes} bytes, which is no multiple of {SECTOR}; round it up: truncate -s {rounded} {name}",
        name = Name(path), rounded = bytes.next_multiple_of(SECTOR)
    )]
    Unaligned {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// An image with a format of its own.
    #[error(
        "the disk image {name} is {what}; a disk is a raw image: {advice}",
        name = Name(path), what = format.name(), advice = format.advice(path)
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// Which one.
        format: Format,
    },
    /// Somebody uses it, and we want to write.
    #[error(
        "the disk image {name} is in use by another machine; end that machine, or let each have an overlay of its own \
         ({name},overlay)", name = Name(.0)
    )]
    InUse(PathBuf),
    /// Somebody writes to it.
    #[error("the disk image {} is being written by another machine; end that machine, or copy the image", Name(.0))]
    Written(PathBuf),
    /// A block device that the host uses itself.
    #[error(
        "the block device {name} is in use by this host (mounted, or part of a volume); unmount it, or use it \
         read-only ({name},ro)", name = Name(.0)
    )]
    Mounted(PathBuf),
    /// The file system has no locks.
    #[error("the disk image {} can't be locked: {source}; copy it to a file system that has locks", path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No room for what the guest writes.
    #[error(
        "no file for the overlay could be made in {}: {source}; set TMPDIR to a folder with room for what the \
         guest will write", folder.display()
    )]
    Overlay {
        /// Where it was to be.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn what_to_do(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "name a file that exists, or make one: truncate -s 10G FILE",
        io::ErrorKind::PermissionDenied => "choose an image that you may read, or have its owner permit it",
        _ => "name a raw image or a block device that can be read",
    }
}

/// A path as a word of a command line.
pub(super) struct Name<'a>(pub(super) &'a PathBuf);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string_lossy();
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&b));
        if plain && !text.is_empty() {
            f.write_str(&text)
        } else {
            write!(f, "'{}'", text.replace('\'', r"'\''"))
        }
    }
}
