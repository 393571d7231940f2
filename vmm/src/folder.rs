//! A folder for a socket that nobody else needs to find, in the temporary directory: mode 0700, gone with its value.
//!
//! A process that is killed can't remove its folder. So each folder has a file that is locked while its process lives, and whoever makes a
//! folder first removes those of this user's that are not: killed programs leave one folder each at most, until the next one.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use tempfile::TempDir;

/// What the folders' names begin with.
const PREFIX: &str = "pontoon-socket-";
const LOCK: &str = "lock";
/// What that file is called until it is locked: whoever finds one that is not takes its process for dead.
const NEW: &str = "lock.new";
const SOCKET: &str = "vsock.sock";

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct PrivateFolder {
    dir: TempDir,
    /// Locked.
    _lock: File,
}

impl PrivateFolder {
    /// A new one.
    pub(crate) fn new() -> io::Result<Self> {
        Self::below(&std::env::temp_dir())
    }

    fn below(place: &Path) -> io::Result<Self> {
        remove_dead(place);
        let ours = Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().prefix(PREFIX).permissions(ours).tempdir_in(place)?;
        let new = dir.path().join(NEW);
        let lock = File::create_new(&new)?;
        lock.lock()?;
        fs::rename(new, dir.path().join(LOCK))?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where the socket goes.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join(SOCKET)
    }
}

/// Removes the folders of dead processes. What can't be removed stays: it harms nobody.
fn remove_dead(place: &Path) {
    let Ok(entries) = fs::read_dir(place) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) {
            let _ = remove_if_dead(&entry.path());
        }
    }
}

fn remove_if_dead(dir: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(dir)?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    // One that has no such file yet has only just been made.
    let path = dir.join(LOCK);
    let lock = File::from(open(&path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?);
    if lock.try_lock().is_err() {
        return Ok(());
    }
    // Exactly what we make: a folder that has more in it is not ours to remove.
    match fs::remove_file(dir.join(SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::remove_file(path)?;
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as a killed process leaves it.
    fn left_behind(place: &Path) -> PathBuf {
        let PrivateFolder { dir, _lock } = PrivateFolder::below(place).unwrap();
        fs::write(dir.path().join(SOCKET), "").unwrap();
        dir.keep()
    }

    #[test]
    fn a_folder_goes_with_its_value_and_a_killed_processs_with_the_next_one() {
        let place = tempfile::tempdir().unwrap();
        let dead = left_behind(place.path());
        assert!(dead.exists());
        let first = PrivateFolder::below(place.path()).unwrap();
        assert!(!dead.exists());
        let second = PrivateFolder::below(place.path()).unwrap();
        assert!(first.socket().parent().unwrap().exists(), "its process lives");
        drop((first, second));
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_ours_stays() {
        let place = tempfile::tempdir().unwrap();
        let full = left_behind(place.path());
        fs::write(full.join("letter"), "of somebody's").unwrap();
        // One whose process has not come to the lock yet.
        let young = place.path().join(format!("{PREFIX}young"));
        fs::create_dir(&young).unwrap();
        fs::write(young.join(NEW), "").unwrap();
        let _folder = PrivateFolder::below(place.path()).unwrap();
        assert!(full.join("letter").exists() && young.join(NEW).exists());
    }
}
