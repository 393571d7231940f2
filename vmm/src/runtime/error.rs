//! Why the runtime folder, or a machine in it, could not be used.

use std::io;
use std::path::{Path, PathBuf};

use super::name::MachineName;

/// Why the runtime folder, or a machine in it, could not be used.
///
/// ```no_run
/// use vmm::runtime::{Runtime, RuntimeError};
///
/// let error = Runtime::open()?.find_alive(&"web".parse()?).err();
/// if let Some(RuntimeError::NotRunning(name) | RuntimeError::Unknown(name)) = error {
///     println!("{name} is to be started first");
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// `XDG_RUNTIME_DIR` is not an absolute path.
    #[error("XDG_RUNTIME_DIR is '{}', which is no absolute path; set it to a folder of your own, or unset it", .0.display())]
    Relative(PathBuf),
    /// The folder cannot be made or entered.
    #[error("the runtime folder {} cannot be made: {source}; set XDG_RUNTIME_DIR to a folder of your own that you may write to", .path.display())]
    Unusable {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is no folder; machines are kept track of in a folder of that name: remove it, or set XDG_RUNTIME_DIR", .0.display())]
    NotAFolder(PathBuf),
    /// Somebody else made it.
    #[error("the runtime folder {} belongs to user {owner}, and you are user {ours}; set XDG_RUNTIME_DIR to a folder of your own", .path.display())]
    Owner {
        /// The folder.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        ours: u32,
    },
    /// Others may enter it.
    #[error("others may enter the runtime folder {} (mode {mode:04o}); run: chmod 700 {}", .path.display(), .path.display())]
    Mode {
        /// The folder.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A machine of that name is alive.
    #[error("a machine called {name} is running already (process {pid}); choose another --name, or end it: pontoon stop {name}", pid = .pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string()))]
    Taken {
        /// The name.
        name: MachineName,
        /// Its process, if its state says so.
        pid: Option<u32>,
    },
    /// No machine of that name is alive.
    #[error("no machine called {0} is running; `pontoon ps -a` lists those there are")]
    NotRunning(MachineName),
    /// There is no trace of a machine of that name.
    #[error("there is no machine called {0}; `pontoon ps -a` lists those there are")]
    Unknown(MachineName),
    /// Every numbered name is in use.
    #[error("vm1 to vm{0} are all running; give the machine a --name of its own")]
    NoFreeName(u32),
    /// Somebody holds the outer lock.
    #[error("another pontoon command has held {} for five seconds; is one stopped (ctrl-Z)? end it and try again", .0.display())]
    Busy(PathBuf),
    /// A path that no socket can have.
    #[error("{} is too long for a socket's path ({max} bytes at most); choose a shorter --name or XDG_RUNTIME_DIR", .path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Most bytes that there can be.
        max: usize,
    },
    /// A system call failed.
    #[error("{what} {} failed: {source}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl RuntimeError {
    /// For `map_err`: what was being done to which file.
    pub(super) fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { what, path, source: source.into() }
    }
}
