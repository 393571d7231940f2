//! [`IrqLine`]: how a device asks for attention.

/// An edge-triggered interrupt line to the guest.
///
/// The VMM implements it by an eventfd that is registered as an irqfd. Every call is one edge: a device calls
/// it after the state that the guest is to see (a used ring, a status bit) has been written.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU32, Ordering};
///
/// use devices::serial::{Serial, Sink};
/// use devices::{BusDevice, IrqLine};
///
/// #[derive(Default)]
/// struct Edges(AtomicU32);
///
/// impl IrqLine for Edges {
///     fn raise(&self) {
///         self.0.fetch_add(1, Ordering::SeqCst);
///     }
/// }
///
/// let line = Arc::new(Edges::default());
/// let (mut com1, _) = Serial::new(line.clone(), Sink::Nowhere)?;
/// com1.write(1, &[1]); // the driver wants an interrupt for what is received
/// assert_eq!(com1.input(b"y"), 1);
/// assert_eq!(line.0.load(Ordering::SeqCst), 1);
/// # Ok::<(), std::io::Error>(())
/// ```
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
