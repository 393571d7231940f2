//! [`Overlay`]: a base that is never written, and a file of the machine's own for what the guest writes.
//!
//! The file has the size of the disk, each byte at its own place, and is sparse: it takes the space of what was written. It has
//! no name, so it is gone with the machine, however that ends. The disk is divided into clusters of [`CLUSTER`] bytes, and
//! a map has one bit for each: set when the cluster is in the file, whole. Bits are only ever set:
//!
//! ```text
//!   write to a whole cluster      write the file, set the bit
//!   write to a part of one        unless the bit is set: copy the cluster from the base; then the same
//!   discard, zeroes               whole clusters: a hole in the file, set the bits; the rest: zeros are written, or nothing
//!   read                          from the file where bits are set, else from the base
//! ```
//!
//! A Linux guest writes in pages, and pages are clusters, so copies are rare. Reads and writes whose clusters are all in one
//! file are direct; the others are done by the engine's one thread, so no two of them meet in a cluster. A direct write
//! meets only clusters that are in the file already.
//!
//! The map takes memory as the guest writes: 4 KiB for each 128 MiB that it has touched. A flush does nothing: neither the
//! file nor the guest outlives a crash of the host.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::raw;
use super::{Access, GuestBuffers, Storage};

/// Bytes that are in the base or in the file together.
pub(super) const CLUSTER: u64 = 4096;
/// Words of a part of the map, and the clusters that it is about.
const WORDS: usize = 512;
const PART: u64 = WORDS as u64 * 64;

type Part = Box<[AtomicU64; WORDS]>;

/// A base and what was written since. See the module's documentation.
pub(super) struct Overlay {
    base: Arc<File>,
    written: Arc<File>,
    bytes: u64,
    map: Vec<OnceLock<Part>>,
}

impl Overlay {
    /// The `bytes` of `base`, overlaid by `written`, an empty file of the same size.
    pub(super) fn new(base: File, written: File, bytes: u64) -> Self {
        let parts = bytes.div_ceil(CLUSTER).div_ceil(PART);
        let map = (0..parts).map(|_| OnceLock::new()).collect();
        Self { base: Arc::new(base), written: Arc::new(written), bytes, map }
    }

    fn is_written(&self, cluster: u64) -> bool {
        let (part, word, bit) = place(cluster);
        let part = self.map.get(part).and_then(OnceLock::get);
        part.is_some_and(|words| words[word].load(Ordering::Acquire) & bit != 0)
    }

    /// The file has this cluster from now on.
    fn set_written(&self, cluster: u64) {
        let (part, word, bit) = place(cluster);
        if let Some(part) = self.map.get(part) {
            let words = part.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
            words[word].fetch_or(bit, Ordering::Release);
        }
    }

    /// The file of byte `at`, and how many of `len` bytes from there on are in it.
    fn run(&self, at: u64, len: u64) -> (&Arc<File>, u64) {
        let first = at / CLUSTER;
        let written = self.is_written(first);
        let mut end = (first + 1) * CLUSTER;
        while end < at + len && self.is_written(end / CLUSTER) == written {
            end += CLUSTER;
        }
        (if written { &self.written } else { &self.base }, (end - at).min(len))
    }

    /// Puts a cluster of the base into the file, unless it is there.
    fn copy_up(&self, cluster: u64) -> io::Result<()> {
        if self.is_written(cluster) {
            return Ok(());
        }
        let at = cluster * CLUSTER;
        let len = usize::try_from(CLUSTER.min(self.bytes - at)).expect("a cluster is small");
        let mut bytes = [0; CLUSTER as usize];
        self.base.read_exact_at(&mut bytes[..len], at)?;
        self.written.write_all_at(&bytes[..len], at)?;
        self.set_written(cluster);
        Ok(())
    }

    /// The clusters that lie whole in a range: first, and behind the last. The disk's last one may be short.
    fn whole(&self, at: u64, len: u64) -> (u64, u64) {
        let end = at + len;
        let last = if end == self.bytes { end.div_ceil(CLUSTER) } else { end / CLUSTER };
        let first = at.div_ceil(CLUSTER);
        (first, last.max(first))
    }

    /// Copies the clusters of which a range is a part only.
    fn copy_up_ends(&self, at: u64, len: u64) -> io::Result<()> {
        let (first, last) = self.whole(at, len);
        let (begin, end) = (at / CLUSTER, (at + len).div_ceil(CLUSTER));
        if begin < first {
            self.copy_up(begin)?;
        }
        if last < end && end > first {
            self.copy_up(end - 1)?;
        }
        Ok(())
    }

    fn set_whole(&self, at: u64, len: u64) {
        let (first, last) = self.whole(at, len);
        (first..last).for_each(|cluster| self.set_written(cluster));
    }
}

/// Part, word and bit of a cluster.
fn place(cluster: u64) -> (usize, usize, u64) {
    let word = cluster % PART / 64;
    (usize::try_from(cluster / PART).unwrap_or(usize::MAX), word as usize, 1 << (cluster % 64))
}

impl Storage for Overlay {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, buffers: &GuestBuffers, at: u64) -> io::Result<usize> {
        let (file, len) = self.run(at, buffers.len() as u64);
        buffers.read_from(file, at, usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn write(&self, buffers: &GuestBuffers, at: u64, _durable: bool) -> io::Result<usize> {
        self.copy_up_ends(at, buffers.len() as u64)?;
        let n = buffers.write_to(&self.written, at, buffers.len(), false)?;
        self.set_whole(at, n as u64);
        if n < buffers.len() {
            // A cluster that is half written is not in the file yet: the rest begins with it again, unless it was copied.
            let end = at + n as u64;
            let back = if self.is_written(end / CLUSTER) { 0 } else { end % CLUSTER };
            return match n.checked_sub(back as usize) {
                None | Some(0) => Err(io::ErrorKind::WriteZero.into()),
                Some(n) => Ok(n),
            };
        }
        Ok(n)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        let (first, last) = self.whole(at, len);
        let (at, end) = (first * CLUSTER, (last * CLUSTER).min(self.bytes));
        // Without holes the clusters stay as they are: a discard is a hint.
        if at < end && raw::punch(&self.written, at, end - at)? {
            self.set_whole(at, end - at);
        }
        Ok(())
    }

    fn zero(&self, at: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.copy_up_ends(at, len)?;
        raw::zero(&self.written, at, len, true)?;
        self.set_whole(at, len);
        Ok(())
    }

    fn direct(&self, access: Access, at: u64, len: u64) -> Option<Arc<File>> {
        let (file, run) = self.run(at, len);
        let whole = match access {
            Access::Read => run == len,
            Access::Write => run == len && Arc::ptr_eq(file, &self.written),
            Access::Flush => false,
        };
        whole.then(|| Arc::clone(file))
    }

    fn needs_flush(&self) -> bool {
        false
    }
}
