//! The serial console: a 16550A at I/O port 0x3f8, over `vm_superio`'s register model.
//!
//! **Out.** A byte that the guest sends goes into a buffer of [`OUTPUT_BUFFER`] bytes, which somebody else writes to the
//! sink: the sink may be slow or block, the vCPU does not. Who that is depends on the [`Sink`]: a descriptor that can
//! be polled is written by the I/O thread ([`SinkWorker`]); anything else has a thread of its own, since it may block. When
//! the buffer is full, the vCPU waits for room for up to [`STALL_WAIT`], once; if the sink has not moved by then it counts
//! as stalled, and bytes are dropped and counted without waiting until it moves again. A sink that fails is not tried again.
//!
//! **In.** The UART's FIFO holds 64 bytes and nothing else queues: [`Serial::input`] takes what fits and says how
//! much that was, and the caller keeps the rest. [`Serial::room`] becomes readable when the guest has emptied
//! the FIFO. So an event loop stops polling its terminal at a short count and resumes on `room`; no byte is lost
//! however slowly the guest reads.
//!
//! A driver that takes the UART over empties its FIFO first, and a terminal in its first mode echoes and edits what comes
//! before somebody has changed that. So [`Serial::hold_input`] keeps input back until the guest is ready: see [`Hold`].
//!
//! All registers are one byte; a wider access touches only the first.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::exit::ExitRequest;
use crate::irq::IrqLine;

mod output;
mod sink;
#[cfg(test)]
mod tests;

use output::Output;
pub use sink::{Polled, Sink, SinkWorker};

/// First port of COM1.
pub const COM1_BASE: u16 = 0x3f8;
/// Ports of a UART.
pub const SERIAL_LEN: u16 = 8;
/// Interrupt line of COM1.
pub const COM1_GSI: u32 = 4;
/// Most bytes that wait for the sink.
pub const OUTPUT_BUFFER: usize = 64 * 1024;
/// How long a vCPU waits for a sink that has stopped taking bytes, once per stall.
pub const STALL_WAIT: Duration = Duration::from_millis(100);
/// How long a dropped [`Serial`] waits for its sink to take what is left.
pub const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Interrupt enable register, or the divisor's upper half while the divisor latch is open.
const IER_OFFSET: u8 = 1;
/// Of the IER: received data.
const IER_RECEIVED: u8 = 1;
/// Line control register.
const LCR_OFFSET: u8 = 3;
/// Of the LCR: the divisor latch is open.
const LCR_DIVISOR_LATCH: u8 = 0x80;
/// Modem control register: loopback, and the outputs.
const MCR_OFFSET: u8 = 4;
/// Of the MCR: the user-designated output 1, which leads nowhere on a PC.
const MCR_OUT1: u8 = 4;

/// Until when input is held back.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// use std::sync::Arc;
///
/// use devices::BusDevice;
/// use devices::serial::{Hold, Serial, Sink};
///
/// let (mut com1, _) = Serial::new(Arc::new(Quiet), Sink::Nowhere)?;
/// com1.hold_input(Hold::Out1);
/// assert_eq!(com1.input(b"ls\n"), 0, "nobody would read it");
/// com1.write(4, &[4]); // OUT1 in the modem control register
/// assert_eq!(com1.input(b"ls\n"), 3);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Until the guest enables the receive interrupt, as every driver does that has taken the UART over. A guest that
    /// polls never does.
    Interrupt,
    /// Until the guest sets OUT1 (`ioctl(fd, TIOCMBIS, TIOCM_OUT1)`), as the init of our images does once the console is
    /// in the mode that its command is to find.
    Out1,
}

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.raise();
        Ok(())
    }
}

/// Tells the input side when the guest has read everything.
struct Room(EventFd);

impl Room {
    fn announce(&self) {
        // Fails only when the counter is at its limit, and then it is readable anyway.
        let _ = self.0.write(1);
    }
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.announce();
    }
}

/// A UART. See the module's documentation.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// use std::sync::Arc;
///
/// use devices::BusDevice;
/// use devices::serial::{Serial, Sink};
///
/// let (mut com1, _) = Serial::new(Arc::new(Quiet), Sink::Nowhere)?;
/// let pasted = [b'x'; 100];
/// assert_eq!(com1.input(&pasted), 64, "the FIFO is full; the caller keeps the rest");
/// let mut byte = [0];
/// for _ in 0..64 {
///     com1.read(0, &mut byte);
/// }
/// assert_eq!(byte, [b'x']);
/// assert!(com1.room().read().is_ok(), "it is empty: offer the rest");
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Serial {
    uart: vm_superio::Serial<Line, Room, Output>,
    held: Option<Hold>,
    divisor_latch: bool,
}

impl Serial {
    /// A UART that interrupts through `irq` and sends its output to `sink`, with a worker that is to be served on the I/O
    /// thread if the sink wants one. Dropping the worker writes the rest.
    ///
    /// # Errors
    /// When the host refuses an eventfd or a thread.
    pub fn new(irq: Arc<dyn IrqLine>, sink: Sink) -> io::Result<(Self, Option<SinkWorker>)> {
        let (output, worker) = match sink {
            Sink::Nowhere => (Output::Nowhere, None),
            Sink::Blocking(sink) => (Output::with_thread(sink)?, None),
            Sink::Polled(sink) => {
                let (output, worker) = SinkWorker::new(sink)?;
                (output, Some(worker))
            }
        };
        Ok((Self::with_output(irq, output)?, worker))
    }

    fn with_output(irq: Arc<dyn IrqLine>, output: Output) -> io::Result<Self> {
        let room = Room(EventFd::new(EFD_NONBLOCK)?);
        let uart = vm_superio::Serial::with_events(Line(irq), room, output);
        Ok(Self { uart, held: None, divisor_latch: false })
    }

    /// Takes no input until the guest is ready; [`Self::room`] then becomes readable.
    pub fn hold_input(&mut self, until: Hold) {
        self.held = Some(until);
    }

    /// Notes what decides about held input.
    fn watch(&mut self, offset: u8, value: u8) {
        if offset == LCR_OFFSET {
            self.divisor_latch = value & LCR_DIVISOR_LATCH != 0;
        }
        let ready = match self.held {
            None => false,
            Some(Hold::Interrupt) => offset == IER_OFFSET && !self.divisor_latch && value & IER_RECEIVED != 0,
            Some(Hold::Out1) => offset == MCR_OFFSET && value & MCR_OUT1 != 0,
        };
        if ready {
            self.held = None;
            self.uart.events().announce();
        }
    }

    /// Passes `bytes` to the guest and says how many were taken; the caller offers the others again after
    /// [`Self::room`] has become readable.
    #[must_use = "bytes that were not taken must be offered again"]
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        if self.held.is_some() {
            return 0;
        }
        // FullFifo is the only error, as raising our interrupt can't fail.
        self.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Bytes that [`Self::input`] would take now.
    pub fn input_room(&self) -> usize {
        if self.held.is_some() { 0 } else { self.uart.fifo_capacity() }
    }

    /// Becomes readable each time the guest has emptied its input FIFO. Non-blocking; read it to clear it.
    pub fn room(&self) -> &EventFd {
        &self.uart.events().0
    }

    /// Waits until the sink has taken all output, for at most `limit`; false when it has not.
    pub fn flush(&self, limit: Duration) -> bool {
        self.uart.writer().flush_within(limit)
    }

    /// Bytes of output that a stalled or failed sink did not take.
    pub fn output_lost(&self) -> u64 {
        self.uart.writer().lost()
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), Some(byte)) = (u8::try_from(offset), data.first_mut()) {
            *byte = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitRequest> {
        let (offset, value) = (u8::try_from(offset).ok()?, *data.first()?);
        // Neither our line nor our output ever fails, so there is no error to report.
        let _ = self.uart.write(offset, value);
        self.watch(offset, value);
        if offset == MCR_OFFSET && self.input_room() > 0 {
            // In loopback no input is taken, whatever the room: whoever waits may try again.
            self.uart.events().announce();
        }
        None
    }
}
