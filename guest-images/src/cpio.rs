//! The writer of initramfs archives: cpio in the "newc" format that the kernel unpacks.
//!
//! What enters: a [`Tree`] of directories, files, symbolic links and device nodes, in any order. What
//! leaves: the archive's bytes, **the same for the same tree**: entries sorted by path (so a directory
//! precedes what is in it), owner root, time zero, inode numbers counted from 1.
//!
//! Format (Linux Documentation/driver-api/early-userspace/buffer-format.rst): per entry a header of
//! 110 bytes, `070701` and thirteen fields of eight hexadecimal digits; the name with its NUL; padding
//! to 4; the data; padding to 4. An entry named `TRAILER!!!` ends the archive, and its inode and mode are
//! zero. The kernel takes several archives in a row, also of different compressions, each at a multiple
//! of 4: later entries replace earlier ones. [`Tree::to_bytes`] pads to 512, so archives may be appended.
//!
//! Limits: a file below 4 GiB and a path below 4 KiB, by the format and by the kernel (PATH_MAX); paths are relative, `/` separated,
//! without `.` or `..`: a leading `/` is dropped, anything else is refused with [`Error::Path`].

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

#[cfg(test)]
mod tests;

const HEADER_LEN: usize = 110;
/// The format pads names and data to this.
const ALIGN: usize = 4;
/// What cpio(1) pads whole archives to; a multiple of [`ALIGN`], which is what the kernel asks for.
const BLOCK: usize = 512;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";
/// The kernel's PATH_MAX, the NUL included: it skips entries with longer names in silence.
const PATH_MAX: usize = 4096;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// Why a tree could not be made or written.
///
/// ```
/// use guest_images::cpio::{Error, Tree};
///
/// let mut tree = Tree::new();
/// tree.file("etc/hostname", 0o644, "vm1\n")?;
/// assert!(matches!(tree.file("../etc/shadow", 0o600, ""), Err(Error::Path(_))));
/// assert!(matches!(tree.symlink("etc", "usr/etc"), Err(Error::Twice(path)) if path == "etc"));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is empty, too long, holds a NUL, or holds `.` or `..`.
    #[error(
        "{0:?} cannot be the path of an initramfs entry: it must be relative, without . or .., and below 4096 bytes"
    )]
    Path(String),
    /// The path is in the tree already, as something else.
    #[error("{0:?} is in the initramfs twice, as two different things; remove one of them")]
    Twice(String),
    /// The format's sizes are of 32 bits.
    #[error("{path:?} has {len} bytes; an initramfs holds files below 4 GiB")]
    TooBig {
        /// The entry.
        path: String,
        /// Its size in bytes.
        len: usize,
    },
    /// A host file that was to be put into the tree could not be read.
    #[error("cannot read {path} for the initramfs: {source}")]
    Read {
        /// The host's path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// What stands at one path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Dir { mode: u32 },
    File { mode: u32, data: Vec<u8> },
    Link { target: Vec<u8> },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// A file system tree in memory, on its way into an archive.
///
/// ```
/// use guest_images::cpio::Tree;
///
/// let mut tree = Tree::new();
/// tree.file("sbin/hello", 0o755, "#!/bin/sh\n")?.symlink("init", "sbin/hello")?;
/// assert_eq!(tree.len(), 3); // and the folder sbin
/// let archive = tree.to_bytes();
/// assert_eq!((&archive[..6], archive.len() % 512), (&b"070701"[..], 0));
/// # Ok::<(), guest_images::cpio::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
}

impl Tree {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many entries the tree has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing has been put into it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Adds a directory with permissions `mode` (0o755), parents included (those with 0o755). A directory that is there already
    /// takes the new mode.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::Twice`] when something else stands there.
    pub fn dir(&mut self, path: impl AsRef<Path>, mode: u32) -> Result<&mut Self, Error> {
        self.insert(path.as_ref(), Node::Dir { mode: mode & 0o7777 })
    }

    /// Adds a regular file with permissions `mode`, parents included.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::Twice`], [`Error::TooBig`].
    pub fn file(
        &mut self,
        path: impl AsRef<Path>,
        mode: u32,
        data: impl Into<Vec<u8>>,
    ) -> Result<&mut Self, Error> {
        let (path, data) = (path.as_ref(), data.into());
        if u32::try_from(data.len()).is_err() {
            return Err(Error::TooBig { path: path.display().to_string(), len: data.len() });
        }
        self.insert(path, Node::File { mode: mode & 0o7777, data })
    }

    /// Adds a symbolic link at `path` whose text is `target`, parents of `path` included.
    ///
    /// # Errors
    /// [`Error::Path`] (for an empty or overlong target also), [`Error::Twice`].
    pub fn symlink(&mut self, path: impl AsRef<Path>, target: impl AsRef<Path>) -> Result<&mut Self, Error> {
        let target = target.as_ref().as_os_str().as_bytes();
        if target.is_empty() || target.len() >= PATH_MAX || target.contains(&0) {
            return Err(Error::Path(String::from_utf8_lossy(target).into_owned()));
        }
        self.insert(path.as_ref(), Node::Link { target: target.to_vec() })
    }

    /// Adds a character device node, parents included.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::Twice`].
    pub fn char_device(
        &mut self,
        path: impl AsRef<Path>,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<&mut Self, Error> {
        self.insert(path.as_ref(), Node::CharDevice { mode: mode & 0o7777, major, minor })
    }

    /// Adds everything below the host directory `source` under `prefix` (`""` for the root): directories, regular files
    /// and symbolic links with their permissions; owners and times are not taken. Other kinds of files are
    /// left out. What is in the tree already is replaced, except that a directory does not replace a link to one
    /// (`lib -> usr/lib`): its contents go where the link points.
    ///
    /// # Errors
    /// [`Error::Read`] when something cannot be read, and those of the other methods.
    pub fn host_dir(&mut self, source: &Path, prefix: impl AsRef<Path>) -> Result<&mut Self, Error> {
        let read = |source| move |error| Error::Read { path: source, source: error };
        let prefix = self.through_link(prefix.as_ref());
        for entry in std::fs::read_dir(source).map_err(read(source.to_path_buf()))? {
            let entry = entry.map_err(read(source.to_path_buf()))?;
            let (from, to) = (entry.path(), prefix.join(entry.file_name()));
            let meta = entry.metadata().map_err(read(from.clone()))?;
            if meta.is_dir() {
                if !self.is_link(&to) {
                    self.replace(&to, Node::Dir { mode: meta.permissions().mode() & 0o7777 })?;
                }
                self.host_dir(&from, &to)?;
            } else if meta.is_symlink() {
                let target = std::fs::read_link(&from).map_err(read(from.clone()))?;
                self.replace(&to, Node::Link { target: target.as_os_str().as_bytes().to_vec() })?;
            } else if meta.is_file() {
                let data = std::fs::read(&from).map_err(read(from.clone()))?;
                if u32::try_from(data.len()).is_err() {
                    return Err(Error::TooBig { path: from.display().to_string(), len: data.len() });
                }
                self.replace(&to, Node::File { mode: meta.mode() & 0o7777, data })?;
            }
        }
        Ok(self)
    }

    /// The archive, padded to 512 bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write_to(&mut out).expect("writing to a Vec never fails");
        out
    }

    /// Writes the archive, padded to 512 bytes. Returns its length in bytes.
    ///
    /// # Errors
    /// What `out` answers.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<u64> {
        let mut written = 0;
        let mut ino = 0;
        for (path, node) in &self.nodes {
            ino += 1;
            written += write_entry(out, ino, path, node)?;
        }
        written += write_raw(out, &Header::default(), TRAILER.as_bytes(), &[])?;
        let padding = padding(written, BLOCK);
        out.write_all(&[0; BLOCK][..padding])?;
        Ok((written + padding) as u64)
    }

    fn is_link(&self, path: &Path) -> bool {
        normal(path).is_ok_and(|path| matches!(self.nodes.get(&path), Some(Node::Link { .. })))
    }

    /// Where `path` leads when it is itself a link in the tree, relative to its parent.
    fn through_link(&self, path: &Path) -> PathBuf {
        let Ok(key) = normal(path) else { return path.to_path_buf() };
        match self.nodes.get(&key) {
            Some(Node::Link { target }) => {
                let target = Path::new(std::ffi::OsStr::from_bytes(target));
                path.parent().map_or_else(|| target.to_path_buf(), |parent| parent.join(target))
            }
            _ => path.to_path_buf(),
        }
    }

    fn insert(&mut self, path: &Path, node: Node) -> Result<&mut Self, Error> {
        let key = normal(path)?;
        match self.nodes.get(&key) {
            None => {}
            Some(Node::Dir { .. }) if matches!(node, Node::Dir { .. }) => {}
            Some(there) if *there == node => {}
            Some(_) => return Err(Error::Twice(path.display().to_string())),
        }
        self.replace(path, node)
    }

    fn replace(&mut self, path: &Path, node: Node) -> Result<&mut Self, Error> {
        let key = normal(path)?;
        for (at, _) in key.iter().enumerate().filter(|&(_, &byte)| byte == b'/') {
            let parent = self.nodes.entry(key[..at].to_vec()).or_insert(Node::Dir { mode: 0o755 });
            if !matches!(parent, Node::Dir { .. }) {
                return Err(Error::Twice(String::from_utf8_lossy(&key[..at]).into_owned()));
            }
        }
        self.nodes.insert(key, node);
        Ok(self)
    }
}

/// The path as the archive spells it: relative, without empty components.
fn normal(path: &Path) -> Result<Vec<u8>, Error> {
    let refused = || Error::Path(path.display().to_string());
    let bytes = path.as_os_str().as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    for part in bytes.split(|&byte| byte == b'/').filter(|part| !part.is_empty()) {
        if part == b"." || part == b".." || part.contains(&0) {
            return Err(refused());
        }
        if !out.is_empty() {
            out.push(b'/');
        }
        out.extend_from_slice(part);
    }
    if out.is_empty() || out.len() >= PATH_MAX || out == TRAILER.as_bytes() {
        return Err(refused());
    }
    Ok(out)
}

/// The fields that differ between entries; the others are constants of this writer.
#[derive(Default)]
struct Header {
    ino: u32,
    mode: u32,
    nlink: u32,
    rdev: (u32, u32),
}

fn write_entry(out: &mut impl Write, ino: u32, path: &[u8], node: &Node) -> io::Result<usize> {
    let header = |mode, nlink, rdev| Header { ino, mode, nlink, rdev };
    match node {
        Node::Dir { mode } => write_raw(out, &header(S_IFDIR | mode, 2, (0, 0)), path, &[]),
        Node::File { mode, data } => write_raw(out, &header(S_IFREG | mode, 1, (0, 0)), path, data),
        Node::Link { target } => write_raw(out, &header(S_IFLNK | 0o777, 1, (0, 0)), path, target),
        Node::CharDevice { mode, major, minor } => {
            write_raw(out, &header(S_IFCHR | mode, 1, (*major, *minor)), path, &[])
        }
    }
}

fn write_raw(out: &mut impl Write, header: &Header, name: &[u8], data: &[u8]) -> io::Result<usize> {
    let zero = 0;
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    write!(
        out,
        "070701{:08X}{:08X}{zero:08X}{zero:08X}{:08X}{zero:08X}{:08X}{zero:08X}{zero:08X}{:08X}{:08X}{:08X}{zero:08X}",
        header.ino,
        header.mode,
        header.nlink.max(1),
        data.len(),
        header.rdev.0,
        header.rdev.1,
        name.len() + 1,
    )?;
    out.write_all(name)?;
    let head = HEADER_LEN + name.len() + 1;
    let after_name = padding(head, ALIGN);
    out.write_all(&[0; 1 + ALIGN][..=after_name])?;
    out.write_all(data)?;
    let after_data = padding(data.len(), ALIGN);
    out.write_all(&[0; ALIGN][..after_data])?;
    Ok(head + after_name + data.len() + after_data)
}

/// How many bytes bring `len` to a multiple of `align`.
fn padding(len: usize, align: usize) -> usize {
    len.next_multiple_of(align) - len
}
