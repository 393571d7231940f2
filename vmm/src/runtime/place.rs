//! Where the runtime folder is, and whether it may be trusted.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use super::error::RuntimeError;
use super::name::MachineName;

/// `sun_path` has 108 bytes, the last of them NUL.
const SOCKET_PATH_MAX: usize = 107;
/// The longest name that a file beside the sockets gets appended (`vsock.sock_` and a port).
const LONGEST_SOCKET: &str = "vsock.sock_4294967295";

/// The folder of all machines of a user.
///
/// ```
/// use vmm::runtime::{MachineName, Runtime, RuntimeError, State};
///
/// # let folder = tempfile::tempdir()?;
/// // Runtime::open() is the user's own, which `pontoon ps` lists.
/// let runtime = Runtime::at(folder.path().join("machines"))?;
/// let name: MachineName = "web".parse()?;
/// let claim = runtime.claim(&name, State { cpus: 2, ..State::default() })?;
/// assert!(matches!(runtime.claim(&name, State::default()), Err(RuntimeError::Taken { .. })));
/// for machine in runtime.list()? {
///     println!("{} is {}", machine.name(), machine.condition().as_str());
/// }
/// drop(claim);
/// assert!(matches!(runtime.find(&name), Err(RuntimeError::Unknown(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Runtime {
    base: PathBuf,
}

impl Runtime {
    /// The runtime folder of this user, made if it isn't there: `$XDG_RUNTIME_DIR/pontoon`; without that variable
    /// `/run/pontoon` for root, `/run/user/UID/pontoon` for others, and where there is no such folder `/tmp/pontoon-UID`.
    ///
    /// # Errors
    /// When it cannot be made, belongs to somebody else, or is open to others.
    pub fn open() -> Result<Self, RuntimeError> {
        let uid = geteuid();
        let base = match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
            Some(dir) => {
                let dir = PathBuf::from(dir);
                if !dir.is_absolute() {
                    return Err(RuntimeError::Relative(dir));
                }
                // Root with the environment of somebody else would make a folder there that is not theirs.
                match fs::metadata(&dir) {
                    Ok(meta) if meta.uid() != uid.as_raw() => {
                        return Err(RuntimeError::Owner { path: dir, owner: meta.uid(), ours: uid.as_raw() });
                    }
                    _ => dir.join("pontoon"),
                }
            }
            None if uid.is_root() => PathBuf::from("/run/pontoon"),
            None => {
                let user = PathBuf::from(format!("/run/user/{}", uid.as_raw()));
                match fs::symlink_metadata(&user) {
                    Ok(meta) if meta.is_dir() && meta.uid() == uid.as_raw() => user.join("pontoon"),
                    _ => PathBuf::from(format!("/tmp/pontoon-{}", uid.as_raw())),
                }
            }
        };
        Self::at(base)
    }

    /// The same at a place of your own.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn at(base: impl Into<PathBuf>) -> Result<Self, RuntimeError> {
        let base = base.into();
        make_private(&base)?;
        Ok(Self { base })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.base
    }

    /// The folder of one machine.
    pub(super) fn machine(&self, name: &MachineName) -> PathBuf {
        self.base.join(name.as_str())
    }

    /// Whether the sockets of this machine have paths that the system takes.
    pub(super) fn check_length(&self, name: &MachineName) -> Result<(), RuntimeError> {
        let path = self.machine(name).join(LONGEST_SOCKET);
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(RuntimeError::PathTooLong { path, max: SOCKET_PATH_MAX });
        }
        Ok(())
    }
}

/// Makes a folder that is ours alone, or checks that it is.
pub(super) fn make_private(path: &Path) -> Result<bool, RuntimeError> {
    let unusable = |source| RuntimeError::Unusable { path: path.to_path_buf(), source };
    let new = match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
        Err(e) => return Err(unusable(e)),
    };
    let meta = fs::symlink_metadata(path).map_err(unusable)?;
    if !meta.is_dir() {
        return Err(RuntimeError::NotAFolder(path.to_path_buf()));
    }
    let (owner, ours) = (meta.uid(), geteuid().as_raw());
    if owner != ours {
        return Err(RuntimeError::Owner { path: path.to_path_buf(), owner, ours });
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(RuntimeError::Mode { path: path.to_path_buf(), mode });
    }
    Ok(new)
}
