//! Why the device could not be made.

use std::io;
use std::path::PathBuf;

/// Longest path of a Unix socket: `sockaddr_un` holds 108 bytes with the zero at the end.
pub const MAX_PATH: usize = 107;

/// Why a virtio-vsock device could not be made.
///
/// ```
/// use devices::virtio::vsock::{GUEST_CID, Vsock, VsockError};
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("vsock.sock");
/// std::fs::write(&path, "somebody's notes")?;
/// let refused = Vsock::new(GUEST_CID, &path).err();
/// assert!(matches!(refused, Some(VsockError::NotASocket(_))));
/// assert_eq!(std::fs::read(&path)?, b"somebody's notes");
/// // 2 is the host itself.
/// assert!(matches!(Vsock::new(2, &path).err(), Some(VsockError::Cid(2))));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// An address that is reserved or too large.
    #[error("{0} can't be a guest's CID: 0 to 2 and {max} are reserved, and it has 32 bits; 3 is usual", max = u32::MAX)]
    Cid(u64),
    /// Too long for a Unix socket.
    #[error(
        "the vsock's path {} has {len} bytes, and a Unix socket's has at most {MAX_PATH}; choose a shorter folder",
        path.display()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Somebody listens there.
    #[error(
        "the vsock's path {} is served by a running process, perhaps another machine; choose another path or end that one",
        .0.display()
    )]
    InUse(PathBuf),
    /// Something that is ours to leave alone.
    #[error(
        "the vsock's path {} exists and is not a socket; remove it or choose another path",
        .0.display()
    )]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error(
        "listening on the vsock's path {} failed: {source}; does its folder exist, and may you write to it?",
        path.display()
    )]
    Listen {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else that the host refused.
    #[error("making the vsock device failed: {0}; raise the limit of open files (ulimit -n)")]
    Host(#[from] io::Error),
}
