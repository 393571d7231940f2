//! Disk images: where the bytes of a guest's disk are on this host.
//!
//! What enters: a path and how it is to be used ([`Disk::open`]); then reads, writes, flushes, discards and zeroes
//! ([`Request`]) over pieces of guest memory. What leaves: their results, in the order in which they are done.
//!
//! ```text
//!   virtio::blk ── Engine::submit ──> io_uring ────┐
//!                       │                          ├──> Storage: Raw (a file, a block device)
//!                       └──> one thread, lazily ───┘             Overlay (a base, and what was written)
//!   virtio::blk <── Engine::reap, announced by an eventfd
//! ```
//!
//! **Storage** is plain and blocking: one call, one transfer, which may be short. **[`Engine`]** makes it asynchronous. What
//! [`Storage::direct`] says is one transfer of one file goes to io_uring, without a thread of ours; everything else, and
//! everything where the host has no io_uring (an old kernel, a seccomp filter, `kernel.io_uring_disabled`), is done by
//! one thread, which is made when it is first needed. The caller never waits for a disk, but in [`Engine::drain`].
//!
//! **Bytes are not copied by us**: `preadv` and `pwritev` move them between the file's page cache and guest memory, which
//! [`GuestBuffers`] keeps mapped for as long as a transfer is in flight.
//!
//! **Truth.** A flush is an `fdatasync` and is done when that is done. A read beyond the end of a file that was truncated
//! under the machine is an error, not zeros (and no SIGBUS, since nothing is mapped). An error of the host is passed on.
//!
//! **Locks.** A writer holds `flock(LOCK_EX)` on the image, a reader and an overlay's base `LOCK_SH`, for as long as the disk
//! lives, so two machines can't write one image and any number may share a base. A block device that the host has
//! mounted is refused to a writer. Whoever takes no locks (`dd`, `mount -o loop`) is not kept out.
//!
//! **Refused** ([`DiskError`]): what is neither a file nor a block device, is empty, is no whole number of 512-byte sectors, or has a
//! format of its own (qcow2, VMDK, VDI, VHD, compressed files); what is in use.
//!
//! Limits: 256 requests in flight ([`MAX_IN_FLIGHT`]); an overlay's map takes at most 32 KiB per GiB of disk.

mod engine;
mod error;
mod format;
mod overlay;
mod raw;
mod ring;
mod sys;
#[cfg(test)]
mod tests;
mod thread;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

pub use engine::MAX_IN_FLIGHT;
pub(crate) use engine::{Engine, Operation, Range, Request};
pub use error::DiskError;
pub use format::Format;
pub(crate) use raw::Raw;
pub use sys::GuestBuffers;

use overlay::Overlay;

/// Bytes of a sector, the unit in which guests address a disk (virtio 1.3 §5.2.6).
pub const SECTOR: u64 = 512;

/// What a transfer of [`Storage::direct`] is.
///
/// ```
/// use std::fs::File;
/// use std::sync::Arc;
///
/// use devices::disk::Access;
///
/// /// The `direct` of a storage that is read from one file and written in another way.
/// fn direct(image: &Arc<File>, access: Access) -> Option<Arc<File>> {
///     (access == Access::Read).then(|| Arc::clone(image))
/// }
///
/// let image = Arc::new(tempfile::tempfile()?);
/// assert!(direct(&image, Access::Read).is_some(), "io_uring reads it, without a thread of ours");
/// assert!(direct(&image, Access::Write).is_none());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// From the disk to guest memory.
    Read,
    /// From guest memory to the disk.
    Write,
    /// A flush of the whole disk.
    Flush,
}

/// Where a disk's bytes are: blocking calls, from any thread, any number at a time.
///
/// Ranges lie within [`Self::bytes`]; the caller has checked. Requests that overlap in time and place may be done in any order.
///
/// ```
/// use std::io;
/// use std::sync::Arc;
///
/// use devices::disk::{Disk, GuestBuffers, Storage};
///
/// /// An image that this program carries.
/// struct Carried(&'static [u8]);
///
/// impl Storage for Carried {
///     fn bytes(&self) -> u64 {
///         self.0.len() as u64
///     }
///
///     fn read(&self, buffers: &GuestBuffers, at: u64) -> io::Result<usize> {
///         let at = usize::try_from(at).map_err(io::Error::other)?;
///         Ok(buffers.put(&self.0[at..]))
///     }
///
///     fn write(&self, _: &GuestBuffers, _: u64, _: bool) -> io::Result<usize> {
///         Err(io::ErrorKind::ReadOnlyFilesystem.into())
///     }
///
///     fn flush(&self) -> io::Result<()> {
///         Ok(())
///     }
///
///     fn discard(&self, _: u64, _: u64) -> io::Result<()> {
///         Ok(())
///     }
///
///     fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
///         Err(io::ErrorKind::ReadOnlyFilesystem.into())
///     }
/// }
///
/// static IMAGE: [u8; 1 << 20] = [0; 1 << 20];
/// let disk = Disk::with_storage(Arc::new(Carried(&IMAGE)), true);
/// assert_eq!((disk.bytes(), disk.read_only()), (1 << 20, true));
/// ```
pub trait Storage: Send + Sync {
    /// Size of the disk in bytes, a multiple of [`SECTOR`]; never changes.
    fn bytes(&self) -> u64;

    /// Fills `buffers` from the disk at byte `at`, or the front of them: how many bytes it was. 0 means that the medium ends
    /// before `at`, whatever [`Self::bytes`] says.
    ///
    /// # Errors
    /// What the host says; `Interrupted` to be called again.
    fn read(&self, buffers: &GuestBuffers, at: u64) -> io::Result<usize>;

    /// Writes `buffers`, or the front of them, to the disk at byte `at`: how many bytes it was. A `durable` write is on the
    /// medium when this returns.
    ///
    /// # Errors
    /// What the host says; `Interrupted` to be called again.
    fn write(&self, buffers: &GuestBuffers, at: u64, durable: bool) -> io::Result<usize>;

    /// Everything that was written before this call is on the medium when it returns.
    ///
    /// # Errors
    /// What the host says: then it may not be.
    fn flush(&self) -> io::Result<()>;

    /// The guest does not need these bytes any more; they may read as anything it wrote, or zeros. A hint.
    ///
    /// # Errors
    /// What the host says; that it can't is no error.
    fn discard(&self, at: u64, len: u64) -> io::Result<()>;

    /// These bytes read as zeros from now on; with `unmap` they need not take space.
    ///
    /// # Errors
    /// What the host says.
    fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// The file on which this access is one transfer, at the same byte: it may then bypass [`Self::read`], [`Self::write`] and
    /// [`Self::flush`]. `None` when it must not.
    fn direct(&self, access: Access, at: u64, len: u64) -> Option<Arc<File>> {
        let _ = (access, at, len);
        None
    }

    /// Whether a flush means anything: not if nothing outlives the machine.
    fn needs_flush(&self) -> bool {
        true
    }
}

/// How an image is used.
///
/// ```
/// use devices::disk::{Disk, DiskError, DiskMode};
///
/// # let folder = tempfile::tempdir()?;
/// # let base = folder.path().join("base.img");
/// # std::fs::write(&base, [0; 4096])?;
/// // Any number of machines on one base, each with what it wrote itself.
/// let disks = [Disk::open(&base, DiskMode::Overlay)?, Disk::open(&base, DiskMode::Overlay)?];
/// assert!(disks.iter().all(|disk| !disk.read_only()));
/// // The base itself is nobody's to write meanwhile.
/// assert!(matches!(Disk::open(&base, DiskMode::ReadWrite), Err(DiskError::InUse(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskMode {
    /// The guest writes to the image; nobody else uses it meanwhile.
    #[default]
    ReadWrite,
    /// The guest reads only.
    ReadOnly,
    /// The guest writes to a file of its own without a name, which goes with the machine; the image is never written and may
    /// be the base of any number of machines.
    Overlay,
}

/// A disk for one machine. Dropping it, or the machine that has it, ends its lock.
///
/// ```
/// use devices::disk::{Disk, DiskError, DiskMode};
///
/// let folder = tempfile::tempdir()?;
/// let image = folder.path().join("disk.img");
/// std::fs::File::create(&image)?.set_len(1 << 20)?;
///
/// let disk = Disk::open(&image, DiskMode::ReadWrite)?;
/// assert_eq!(disk.bytes(), 1 << 20);
/// // One writer: a second machine is refused until the first one has ended.
/// assert!(matches!(Disk::open(&image, DiskMode::Overlay), Err(DiskError::Written(_))));
/// drop(disk);
/// Disk::open(&image, DiskMode::Overlay)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Disk {
    storage: Arc<dyn Storage>,
    read_only: bool,
}

impl Disk {
    /// Opens the raw image or block device `path`.
    ///
    /// # Errors
    /// [`DiskError`]: each says what to do.
    pub fn open(path: impl AsRef<Path>, mode: DiskMode) -> Result<Self, DiskError> {
        let path = path.as_ref();
        let (file, bytes) = open_image(path, mode)?;
        let storage: Arc<dyn Storage> = match mode {
            DiskMode::ReadWrite | DiskMode::ReadOnly => Arc::new(Raw::new(file, bytes)),
            DiskMode::Overlay => {
                let folder = overlay_folder();
                let written = tempfile::tempfile_in(&folder)
                    .and_then(|file| file.set_len(bytes).map(|()| file))
                    .map_err(|source| DiskError::Overlay { folder, source })?;
                Arc::new(Overlay::new(file, written, bytes))
            }
        };
        Ok(Self { storage, read_only: mode == DiskMode::ReadOnly })
    }

    /// A disk that lives somewhere else. The guest may not write to it if it is `read_only`.
    pub fn with_storage(storage: Arc<dyn Storage>, read_only: bool) -> Self {
        Self { storage, read_only }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.storage.bytes()
    }

    /// Whether the guest may not write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    pub(crate) fn into_storage(self) -> Arc<dyn Storage> {
        self.storage
    }
}

/// Where overlays are: `TMPDIR`, else `/var/tmp`, which is on a disk where `/tmp` may be memory, else `/tmp`.
fn overlay_folder() -> std::path::PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(folder) if !folder.is_empty() => folder.into(),
        _ if Path::new("/var/tmp").is_dir() => "/var/tmp".into(),
        _ => "/tmp".into(),
    }
}

/// The image, locked, and its size.
fn open_image(path: &Path, mode: DiskMode) -> Result<(File, u64), DiskError> {
    let named = || path.to_path_buf();
    let failed = |source: io::Error| DiskError::Open { path: named(), source };
    // Asked before it is opened: opening a FIFO would wait for its other end.
    let kind = fs::metadata(path).map_err(failed)?.file_type();
    if !(kind.is_file() || kind.is_block_device()) {
        return Err(DiskError::Kind { path: named(), directory: kind.is_dir() });
    }
    let write = mode == DiskMode::ReadWrite;
    let mut options = OpenOptions::new();
    options.read(true).write(write);
    if write && kind.is_block_device() {
        // On a block device: not while the host has it mounted (open(2)).
        options.custom_flags(libc::O_EXCL);
    }
    let file = options.open(path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if write => {
            DiskError::NotWritable { path: named(), source }
        }
        io::ErrorKind::ResourceBusy => DiskError::Mounted(named()),
        _ => failed(source),
    })?;
    let locked = if write { file.try_lock() } else { file.try_lock_shared() };
    locked.map_err(|error| match error {
        fs::TryLockError::WouldBlock if write => DiskError::InUse(named()),
        fs::TryLockError::WouldBlock => DiskError::Written(named()),
        fs::TryLockError::Error(source) => DiskError::Lock { path: named(), source },
    })?;
    // Seeking tells the size of block devices, too.
    let bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(failed)?;
    if bytes == 0 {
        return Err(DiskError::Empty(named()));
    }
    if let Some(format) = format::recognise(&file, bytes).map_err(failed)? {
        return Err(DiskError::Format { path: named(), format });
    }
    if !bytes.is_multiple_of(SECTOR) {
        return Err(DiskError::Unaligned { path: named(), bytes });
    }
    Ok((file, bytes))
}
