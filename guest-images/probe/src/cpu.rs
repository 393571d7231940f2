//! What the drivers need of the processor.

/// How to go wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// A Rust panic.
    Panic,
    /// An invalid instruction.
    Exception,
    /// An invalid instruction without an IDT: the CPU shuts down.
    TripleFault,
    /// A loop without end and without sleep.
    Hang,
}

/// Time, sleep and port I/O.
pub trait Cpu {
    /// Microseconds since boot.
    fn now(&self) -> u64;
    /// Interrupts taken so far.
    fn interrupts(&self) -> u64;
    /// Sleeps until an interrupt after the `seen`-th, or until the clock shows `until`. No wake-up is lost
    /// between reading the count and sleeping. May return early.
    fn sleep(&self, seen: u64, until: u64);
    /// Reads an I/O port; `width` is 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, width: u8) -> u32;
    /// Writes an I/O port; `width` is 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, width: u8, value: u32);
    /// Makes the console usable after its registers were scribbled over.
    fn console_reset(&self);
    /// Crashes.
    fn crash(&self, how: Crash);
}
