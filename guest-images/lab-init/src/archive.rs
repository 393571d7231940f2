//! Unpacks archives (see [`wire`](crate::wire)) into the file system, and packs what the host fetches.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::link::{CHUNK, Fetched};
use crate::wire::{EntryKind, Header};
use crate::{Context, Error, machine};

/// The disk that carries this run's files.
const DISK: &str = "/dev/vda";

/// Unpacks the archive on the files disk over the root.
pub(crate) fn unpack_disk() -> Result<(), Error> {
    machine::wait_for(Path::new(DISK))?;
    let disk = File::open(DISK).context(|| format!("open {DISK}"))?;
    unpack(&mut BufReader::with_capacity(1 << 20, disk), Path::new("/"))
}

/// Unpacks one archive below `root`, making parent directories as needed.
pub(crate) fn unpack(input: &mut impl Read, root: &Path) -> Result<(), Error> {
    loop {
        let header = Header::read(input).context(|| "read the archive".into())?;
        if matches!(header.kind, EntryKind::End) {
            return Ok(());
        }
        let relative = OsStr::from_bytes(&header.path);
        let relative = Path::new(relative).strip_prefix("/").unwrap_or(Path::new(relative));
        let path = root.join(relative);
        unpack_entry(input, &header, &path).context(|| format!("put {}", path.display()))?;
    }
}

fn unpack_entry(input: &mut impl Read, header: &Header, path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let permissions = Permissions::from_mode(header.mode & 0o7777);
    match header.kind {
        EntryKind::Directory => {
            fs::create_dir_all(path)?;
            fs::set_permissions(path, permissions)
        }
        EntryKind::File => {
            remove_if_there(path)?;
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            copy_exactly(input, &file, header.size)?;
            file.set_permissions(permissions)
        }
        EntryKind::Link => {
            let mut target = vec![0; header.size as usize];
            input.read_exact(&mut target)?;
            remove_if_there(path)?;
            symlink(OsStr::from_bytes(&target), path)
        }
        EntryKind::Missing | EntryKind::End => Err(io::Error::other("the entry carries no file")),
    }
}

fn copy_exactly(input: &mut impl Read, mut file: &File, size: u64) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut left = size;
    while left > 0 {
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let piece = buffer.get_mut(..want).unwrap_or_default();
        input.read_exact(piece)?;
        file.write_all(piece)?;
        left -= want as u64;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Sends each of `paths`, trees included, as one archive whose paths begin with the index of the request.
/// What cannot be read is sent as `Missing`, so that one bad path does not cost the others.
pub(crate) fn send(paths: &[Vec<u8>], out: Fetched<'_>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(CHUNK, out);
    for (index, path) in paths.iter().enumerate() {
        let name = PathBuf::from(index.to_string());
        pack(Path::new(OsStr::from_bytes(path)), &name, &mut out)?;
    }
    Header::write_end(&mut out)?;
    out.flush()
}

fn pack(path: &Path, name: &Path, out: &mut impl Write) -> io::Result<()> {
    if let Err(error) = pack_entry(path, name, out)? {
        let reason = format!("{}: {error}", path.display()).into_bytes();
        header(EntryKind::Missing, 0, reason.len() as u64, name).write(out)?;
        out.write_all(&reason)?;
    }
    Ok(())
}

/// The outer result is the link's, the inner one the file's (nothing has been sent for it then).
fn pack_entry(path: &Path, name: &Path, out: &mut impl Write) -> io::Result<io::Result<()>> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => return Ok(Err(error)),
    };
    let mode = metadata.permissions().mode() & 0o7777;
    if metadata.is_symlink() {
        let target = match fs::read_link(path) {
            Ok(target) => target.into_os_string().into_vec(),
            Err(error) => return Ok(Err(error)),
        };
        header(EntryKind::Link, mode, target.len() as u64, name).write(out)?;
        out.write_all(&target)?;
    } else if metadata.is_dir() {
        let entries = match fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
            Ok(entries) => entries,
            Err(error) => return Ok(Err(error)),
        };
        header(EntryKind::Directory, mode, 0, name).write(out)?;
        for entry in entries {
            pack(&entry.path(), &name.join(entry.file_name()), out)?;
        }
    } else if metadata.is_file() {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        header(EntryKind::File, mode, metadata.len(), name).write(out)?;
        // A file that shrinks meanwhile is filled with zeros, one that grows is cut: the size is promised.
        io::copy(&mut file.chain(io::repeat(0)).take(metadata.len()), out)?;
    } else {
        return Ok(Err(io::Error::other("neither a file, a directory nor a link")));
    }
    Ok(Ok(()))
}

fn header(kind: EntryKind, mode: u32, size: u64, path: &Path) -> Header {
    Header { kind, mode, size, path: path.as_os_str().as_bytes().to_vec() }
}
