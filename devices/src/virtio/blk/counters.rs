//! What a disk counts, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::once::Tally;

/// Totals of a disk since the machine was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    trims: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    pub(super) failed: Tally,
    pub(super) refused: Tally,
    pub(super) broken: Tally,
}

/// The values of a disk's counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkTotals {
    /// Reads that succeeded.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Flushes that reached the disk.
    pub flushes: u64,
    /// Discards and zeroes that succeeded.
    pub trims: u64,
    /// Requests that failed on the host: the guest got an I/O error.
    pub failed: u64,
    /// Requests that make no sense, and were answered so.
    pub refused: u64,
    /// How often a broken queue stopped the device until its next reset.
    pub broken: u64,
}

/// What a request was, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A read of so many bytes.
    Read(u64),
    /// A write of so many bytes.
    Write(u64),
    Flush,
    Trim,
}

impl Counters {
    /// A request of this kind succeeded.
    pub(super) fn done(&self, kind: Kind) {
        let add = |counter: &AtomicU64, n| counter.fetch_add(n, Ordering::Relaxed);
        match kind {
            Kind::Read(bytes) => {
                add(&self.reads, 1);
                add(&self.read_bytes, bytes);
            }
            Kind::Write(bytes) => {
                add(&self.writes, 1);
                add(&self.written_bytes, bytes);
            }
            Kind::Flush => {
                add(&self.flushes, 1);
            }
            Kind::Trim => {
                add(&self.trims, 1);
            }
        }
    }

    pub(super) fn totals(&self) -> BlkTotals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkTotals {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            flushes: get(&self.flushes),
            trims: get(&self.trims),
            failed: self.failed.get(),
            refused: self.refused.get(),
            broken: self.broken.get(),
        }
    }
}
