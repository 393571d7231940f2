//! `end`: the ways for a guest to stop, good and bad. None of them returns, so none leaves a line.

use super::Outcome;
use crate::cpu::Crash;
use crate::nic::Nic;
use crate::orders::Order;
use crate::stack::{Reason, Stack};

const EXIT_PORT: u16 = 0xf4;
const I8042_COMMAND: u16 = 0x64;
/// Pulses the reset line.
const I8042_RESET: u32 = 0xfe;

/// `end=STATUS|reset|panic|exception|triple-fault|hang`.
pub(super) fn end<N: Nic>(stack: &mut Stack<N>, order: &Order) -> Outcome {
    let cpu = stack.nic.cpu().ok_or(Reason::Unsupported)?;
    match order.target.as_str() {
        "reset" => cpu.port_write(I8042_COMMAND, 1, I8042_RESET),
        "panic" => cpu.crash(Crash::Panic),
        "exception" => cpu.crash(Crash::Exception),
        "triple-fault" => cpu.crash(Crash::TripleFault),
        "hang" => cpu.crash(Crash::Hang),
        status => {
            cpu.port_write(EXIT_PORT, 1, u32::from(status.parse::<u8>().map_err(|_| Reason::BadTarget)?))
        }
    }
    // Here the host has not ended the VM.
    Err(Reason::Device)
}
