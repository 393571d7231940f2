//! [`IrqLine`]: how a device asks for attention.

/// An edge-triggered interrupt line to the guest.
///
/// The VMM implements it by an eventfd that is registered as an irqfd. Every call is one edge: a device calls
/// it after the state that the guest is to see (a used ring, a status bit) has been written.
pub trait IrqLine: Send + Sync {
    /// Pulses the line. Never blocks; an edge that meets a pending one merges with it.
    fn raise(&self);
}

#[cfg(test)]
pub(crate) mod testing {
    use super::IrqLine;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Counts its edges.
    #[derive(Default)]
    pub(crate) struct CountingLine(AtomicU32);

    impl CountingLine {
        pub(crate) fn new() -> Arc<Self> {
            Arc::default()
        }

        /// Edges since the last call.
        pub(crate) fn take(&self) -> u32 {
            self.0.swap(0, Ordering::SeqCst)
        }
    }

    impl IrqLine for CountingLine {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}
