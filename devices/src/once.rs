//! [`Tally`]: a refusal is counted every time and logged once.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter whose first increment tells its caller to log.
#[derive(Debug, Default)]
pub(crate) struct Tally(AtomicU64);

impl Tally {
    /// Counts one; true for the first, which is the one to log.
    pub(crate) fn first(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// How many there were.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
