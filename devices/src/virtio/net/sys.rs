//! Spare allocations for lists of guest memory pieces, which move with their worker to another thread.
#![allow(
    unsafe_code,
    reason = "VolatileSlice holds a pointer and is not Send, even where there is none in the list"
)]

use vm_memory::VolatileSlice;

use super::pieces::recycle;

/// An empty list of pieces, kept for its allocation.
#[derive(Default)]
pub(super) struct Spare(Vec<VolatileSlice<'static>>);

// SAFETY: the list is empty whenever it can be moved: `put` stores what `recycle` returns, which has no element,
// and `take` leaves a new one. An empty vector holds no VolatileSlice, and its allocation may be freed by any thread.
unsafe impl Send for Spare {}

impl Spare {
    /// The list, for pieces that live for one turn.
    pub(super) fn take<'m>(&mut self) -> Vec<VolatileSlice<'m>> {
        recycle(std::mem::take(&mut self.0))
    }

    /// Gives the list back, emptied.
    pub(super) fn put(&mut self, list: Vec<VolatileSlice<'_>>) {
        self.0 = recycle(list);
    }
}
