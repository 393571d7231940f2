//! What long work tells whoever waits for it: which step, how many bytes, that it is over.
//!
//! The work calls [`Progress`] and knows nothing of terminals; the command line draws a bar or prints
//! plain lines. Calls come from the thread that does the work, `bytes` a few times a second at most.

/// The listener of long work. Every method has an empty default: implement what is of interest.
///
/// Contract: `step` opens a step and closes the one before it; `bytes` only comes inside a step and its
/// `done` never falls within one; `done` comes last and only when the whole work succeeded.
///
/// ```
/// use guest_images::Progress;
///
/// struct Lines;
///
/// impl Progress for Lines {
///     fn step(&mut self, what: &str) {
///         println!("{what}…");
///     }
/// }
/// ```
pub trait Progress {
    /// A step starts: `what` is a short phrase such as `downloading 2 packages`.
    fn step(&mut self, what: &str) {
        let _ = what;
    }

    /// `done` of `total` bytes of the current step.
    fn bytes(&mut self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// All the work is done: `what` says what came out of it.
    fn done(&mut self, what: &str) {
        let _ = what;
    }
}

/// Listens to nothing.
///
/// ```no_run
/// use guest_images::{BuildOptions, Silent, Store};
///
/// // In a test, say, where nobody waits for a bar.
/// Store::open_default()?.build("debian", &BuildOptions::default(), &mut Silent)?;
/// # Ok::<(), guest_images::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}
