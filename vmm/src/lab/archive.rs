//! Files into the lab and out of it: the host's side of the archives that [`wire`](super::wire) defines.
//!
//! What goes in is written to a file without a name, which the emulator gets as a descriptor. What comes
//! out is not trusted: a path that would leave its destination ends the fetch.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use super::error::{LabError, at};
use super::wire::{EntryKind, Header};

/// The disk's size is a multiple of this, in bytes.
const SECTOR: u64 = 512;

/// Writes entries, then the end.
pub(super) struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out }
    }

    pub(super) fn into_inner(self) -> W {
        self.out
    }

    /// A file, link or directory of this host, with everything below it, as `path`.
    pub(super) fn tree(&mut self, source: &Path, path: &Path) -> io::Result<()> {
        self.any(source, path, fs::symlink_metadata(source)?)
    }

    fn any(&mut self, source: &Path, path: &Path, metadata: fs::Metadata) -> io::Result<()> {
        let mode = metadata.permissions().mode() & 0o7777;
        if metadata.is_symlink() {
            let target = fs::read_link(source)?;
            self.bytes(EntryKind::Link, mode, path, target.as_os_str().as_bytes())
        } else if metadata.is_dir() {
            self.bytes(EntryKind::Directory, mode, path, &[])?;
            for entry in fs::read_dir(source)? {
                let entry = entry?;
                self.tree(&entry.path(), &path.join(entry.file_name()))?;
            }
            Ok(())
        } else if metadata.is_file() {
            self.file(source, path, mode)
        } else {
            let what = format!("{} is neither a file, a directory nor a link", source.display());
            Err(io::Error::other(what))
        }
    }

    fn file(&mut self, source: &Path, path: &Path, mode: u32) -> io::Result<()> {
        let mut file = File::open(source)?;
        let size = file.metadata()?.len();
        self.header(EntryKind::File, mode, size, path)?;
        let copied = io::copy(&mut (&mut file).take(size), &mut self.out)?;
        if copied < size {
            return Err(io::Error::other(format!("{} shrank while it was read", source.display())));
        }
        Ok(())
    }

    /// An entry whose content is at hand.
    pub(super) fn bytes(&mut self, kind: EntryKind, mode: u32, path: &Path, data: &[u8]) -> io::Result<()> {
        self.header(kind, mode, data.len() as u64, path)?;
        self.out.write_all(data)
    }

    /// Nothing follows.
    pub(super) fn end(&mut self) -> io::Result<()> {
        Header::write_end(&mut self.out)
    }

    fn header(&mut self, kind: EntryKind, mode: u32, size: u64, path: &Path) -> io::Result<()> {
        Header { kind, mode, size, path: path.as_os_str().as_bytes().to_vec() }.write(&mut self.out)
    }
}

/// Packs what a run carries in (path here, path there), and `program` as `/usr/local/bin/pontoon`, into a
/// nameless file that serves as a disk. Links named in `put` are followed, links inside trees are kept.
pub(super) fn pack(put: &[(PathBuf, PathBuf)], program: &Option<PathBuf>) -> Result<File, LabError> {
    let temporary = std::env::temp_dir();
    let file = tempfile::tempfile().map_err(at("make a file in", &temporary))?;
    let mut writer = Writer::new(file);
    if let Some(program) = program {
        writer.file(program, Path::new("/usr/local/bin/pontoon"), 0o755).map_err(at("pack", program))?;
    }
    for (source, destination) in put {
        let metadata = fs::metadata(source).map_err(at("put", source))?;
        writer.any(source, destination, metadata).map_err(at("put", source))?;
    }
    writer.end().map_err(at("write a file in", &temporary))?;
    let mut file = writer.into_inner();
    let length = file.stream_position().map_err(at("write a file in", &temporary))?;
    file.set_len(length.next_multiple_of(SECTOR)).map_err(at("write a file in", &temporary))?;
    Ok(file)
}

/// Unpacks what a run brought out. The first component of each path is the index of its destination.
pub(super) fn unpack(mut archive: File, destinations: &[PathBuf]) -> Result<(), LabError> {
    let broken = |error: io::Error| LabError::Fetch(error.to_string());
    archive.seek(SeekFrom::Start(0)).map_err(broken)?;
    let mut archive = io::BufReader::new(archive);
    let mut missing = Vec::new();
    loop {
        let header = Header::read(&mut archive).map_err(broken)?;
        if matches!(header.kind, EntryKind::End) {
            break;
        }
        let path = destination(&header.path, destinations)?;
        match header.kind {
            EntryKind::Missing => {
                let mut reason = vec![0; header.size as usize];
                archive.read_exact(&mut reason).map_err(broken)?;
                missing.push(String::from_utf8_lossy(&reason).into_owned());
            }
            _ => unpack_entry(&mut archive, &header, &path).map_err(at("write", &path))?,
        }
    }
    if missing.is_empty() { Ok(()) } else { Err(LabError::Fetch(missing.join("; "))) }
}

/// Where an entry belongs: below the destination that its first component names by index.
pub(super) fn destination(name: &[u8], destinations: &[PathBuf]) -> Result<PathBuf, LabError> {
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    let refused = || LabError::Fetch(format!("the lab sent the path {}", path.display()));
    let mut components = path.components();
    let index = match components.next() {
        Some(Component::Normal(first)) => first.to_str().and_then(|text| text.parse::<usize>().ok()),
        _ => None,
    };
    let root = index.and_then(|index| destinations.get(index)).ok_or_else(refused)?;
    let mut result = root.clone();
    for component in components {
        let Component::Normal(part) = component else { return Err(refused()) };
        // A link that an earlier entry made must not lead elsewhere.
        if fs::symlink_metadata(&result).is_ok_and(|metadata| metadata.is_symlink()) {
            return Err(refused());
        }
        result.push(part);
    }
    Ok(result)
}

fn unpack_entry(archive: &mut impl Read, header: &Header, path: &Path) -> io::Result<()> {
    match header.kind {
        EntryKind::Directory => match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            answer => answer,
        },
        EntryKind::File => {
            remove_if_there(path)?;
            let mut file = File::create_new(path)?;
            let copied = io::copy(&mut archive.take(header.size), &mut file)?;
            if copied < header.size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // No set-user-ID bits from a machine in which anything may be root.
            file.set_permissions(Permissions::from_mode(header.mode & 0o777))
        }
        EntryKind::Link => {
            let mut target = vec![0; header.size as usize];
            archive.read_exact(&mut target)?;
            remove_if_there(path)?;
            symlink(std::ffi::OsStr::from_bytes(&target), path)
        }
        EntryKind::Missing | EntryKind::End => Ok(()),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
