//! Image formats that are recognised and refused, by the first bytes of the file or its last sector.
//!
//! An image is never *guessed* to be anything but raw: a guest that writes a qcow2 header to its raw disk must not be able
//! to make the host follow it to another file at the next start. It gets this refusal instead.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::error::Name;

/// A format that is not raw.
///
/// ```
/// use devices::disk::{Disk, DiskError, DiskMode, Format};
///
/// # let folder = tempfile::tempdir()?;
/// let image = folder.path().join("debian.raw.xz");
/// std::fs::write(&image, b"\xfd7zXZ\0...")?;
/// let refused = Disk::open(&image, DiskMode::ReadOnly).err();
/// assert!(matches!(refused, Some(DiskError::Format { format: Format::Compressed("unxz"), .. })));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Known to qemu-img under this name.
    QemuImg(&'static str),
    /// Compressed, unpacked by this program.
    Compressed(&'static str),
}

const HEAD: usize = 0x48;
const TAIL: u64 = 512;

/// Offset, bytes, meaning.
const HEADS: [(usize, &[u8], Format); 12] = [
    (0, b"QFI\xfb", Format::QemuImg("qcow2")),
    (0, b"QED\0", Format::QemuImg("qed")),
    (0, b"KDMV", Format::QemuImg("vmdk")),
    (0, b"COWD", Format::QemuImg("vmdk")),
    (0, b"# Disk DescriptorFile", Format::QemuImg("vmdk")),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], Format::QemuImg("vdi")),
    (0, b"vhdxfile", Format::QemuImg("vhdx")),
    (0, b"conectix", Format::QemuImg("vpc")),
    (0, b"WithoutFreeSpace", Format::QemuImg("parallels")),
    (0, b"\x1f\x8b\x08", Format::Compressed("gunzip")),
    (0, b"\xfd7zXZ\0", Format::Compressed("unxz")),
    (0, b"\x28\xb5\x2f\xfd", Format::Compressed("unzstd")),
];

/// What `file` is, if it isn't raw.
pub(super) fn recognise(file: &File, bytes: u64) -> io::Result<Option<Format>> {
    let head = read_up_to(file, 0, HEAD)?;
    let found =
        HEADS.iter().find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    if let Some((_, _, format)) = found {
        return Ok(Some(*format));
    }
    // A VHD of fixed size has a footer only.
    let tail = read_up_to(file, bytes.saturating_sub(TAIL), 8)?;
    Ok((bytes >= TAIL && tail == b"conectix").then_some(Format::QemuImg("vpc")))
}

fn read_up_to(file: &File, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let (mut bytes, mut got) = (vec![0; len], 0);
    loop {
        match file.read_at(bytes.get_mut(got..).unwrap_or_default(), at + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(got);
    Ok(bytes)
}

impl Format {
    /// What it is, with its article.
    pub(super) fn name(self) -> String {
        match self {
            Self::QemuImg(name) => format!("a {name} image"),
            Self::Compressed(_) => "compressed".to_owned(),
        }
    }

    /// The command that makes a raw image of it.
    pub(super) fn advice(self, path: &PathBuf) -> String {
        match self {
            Self::QemuImg(name) => {
                let raw = path.with_extension("raw");
                format!("qemu-img convert -f {name} -O raw {} {}", Name(path), Name(&raw))
            }
            Self::Compressed(program) => format!("{program} -k {}", Name(path)),
        }
    }
}
