//! [`Ring`]: transfers of files by io_uring.
//!
//! One ring per disk, of [`super::MAX_IN_FLIGHT`] entries, made at the first request. Its completions ring an eventfd. It is given up
//! at once where the host refuses it: before Linux 5.6, under a seccomp filter, with `kernel.io_uring_disabled`; a no-op tells.
//!
//! **Who holds what.** A [`Transfer`] in flight is kept here, with its file and its guest memory, until its completion has been
//! seen: the kernel may access both until then. Dropping the ring waits for that.
//!
//! **Never for long.** A transfer whose pages are cached is done by the submission itself, so large ones
//! ([`LARGE`]) are handed to the kernel's own threads; others block there, too, if they have to.

mod sys;
#[cfg(test)]
mod tests;

pub(super) use sys::{Finished, Ring};

use std::fs::File;
use std::sync::Arc;

use super::{Access, GuestBuffers};

/// Bytes from which on a transfer is not copied on the caller's time.
const LARGE: usize = 1 << 20;

/// What the ring does.
pub(super) struct Transfer {
    pub(super) access: Access,
    pub(super) file: Arc<File>,
    /// Byte of the file.
    pub(super) at: u64,
    pub(super) buffers: GuestBuffers,
    /// A write is on the medium when it is done.
    pub(super) durable: bool,
}
