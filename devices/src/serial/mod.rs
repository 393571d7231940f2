//! The serial console: a 16550A at I/O port 0x3f8, over `vm_superio`'s register model.
//!
//! **Out.** A byte that the guest sends goes into a buffer of [`OUTPUT_BUFFER`] bytes, which a thread of its own
//! writes to the sink: the sink may be slow or block, the vCPU does not. When the buffer is full, the vCPU waits
//! for room for up to [`STALL_WAIT`], once; if the sink has not moved by then it counts as stalled, and bytes are
//! dropped and counted without waiting until it moves again. A sink that fails is not tried again.
//!
//! **In.** The UART's FIFO holds 64 bytes and nothing else queues: [`Serial::input`] takes what fits and says how
//! much that was, and the caller keeps the rest. [`Serial::room`] becomes readable when the guest has emptied
//! the FIFO. So an event loop stops polling its terminal at a short count and resumes on `room`; no byte is lost
//! however slowly the guest reads.
//!
//! All registers are one byte; a wider access touches only the first.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::exit::ExitRequest;
use crate::irq::IrqLine;

mod output;
#[cfg(test)]
mod tests;

use output::Output;

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

/// Modem control register: loopback.
const MCR_OFFSET: u8 = 4;

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
pub struct Serial {
    uart: vm_superio::Serial<Line, Room, Output>,
}

impl Serial {
    /// A UART that interrupts through `irq` and sends its output to `sink`.
    ///
    /// # Errors
    /// When the host refuses an eventfd or a thread.
    pub fn new(irq: Arc<dyn IrqLine>, sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let room = Room(EventFd::new(EFD_NONBLOCK)?);
        let output = Output::new(sink)?;
        Ok(Self { uart: vm_superio::Serial::with_events(Line(irq), room, output) })
    }

    /// Passes `bytes` to the guest and says how many were taken; the caller offers the others again after
    /// [`Self::room`] has become readable.
    #[must_use = "bytes that were not taken must be offered again"]
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        // FullFifo is the only error, as raising our interrupt can't fail.
        self.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Bytes that [`Self::input`] would take now.
    pub fn input_room(&self) -> usize {
        self.uart.fifo_capacity()
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
        if offset == MCR_OFFSET && self.input_room() > 0 {
            // In loopback no input is taken, whatever the room: whoever waits may try again.
            self.uart.events().announce();
        }
        None
    }
}
