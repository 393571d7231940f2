//! The PS/2 keyboard controller, with nothing plugged into it: enough to reset the machine and to be probed.
//!
//! What it is for: a guest that writes 0xFE to port 0x64 (Linux `reboot=k`, the last resort of every kernel) asks
//! for a reset. So does clearing bit 0 of the output port (command 0xD1).
//!
//! Linux probes it only when the FADT's `IAPC_BOOT_ARCH` has bit 1 ("8042") set; leave the bit clear, since there
//! is no keyboard: the reset works all the same. A guest that probes nevertheless gets an answer to every
//! command that Linux sends (`drivers/input/serio/i8042.c`): the controller's self-test passes, the auxiliary port
//! is reported broken, so nothing waits for one of its half-second time-outs.
//!
//! One byte of output and one of input state; the input buffer is always empty (`IBF` clear). Commands that
//! are not in the table below are ignored.

use crate::bus::BusDevice;
use crate::exit::ExitRequest;

/// First port of the controller.
pub const I8042_BASE: u16 = 0x60;
/// Ports to insert on the bus; 0x61 to 0x63 read as if nobody were there.
pub const I8042_LEN: u16 = 5;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Status: a byte waits at port 0x60.
const OUTPUT_FULL: u8 = 1;
/// Status: the system flag, set by the self-test.
const SYSTEM: u8 = 1 << 2;
/// Status: the last write went to port 0x64.
const LAST_WAS_COMMAND: u8 = 1 << 3;
/// Status: the keyboard is not locked.
const UNLOCKED: u8 = 1 << 4;

/// Command byte after reset: translation on, both ports disabled, no interrupts.
const DEFAULT_COMMAND_BYTE: u8 = 0x74;
/// Output port: A20 on, not in reset.
const DEFAULT_OUTPUT_PORT: u8 = 0x03;
/// Output port: the CPU runs while this is set.
const OUTPUT_PORT_RUN: u8 = 1;

/// What the next byte at port 0x60 means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    /// A byte for the keyboard, which is not there.
    #[default]
    Keyboard,
    /// The command byte (0x60).
    CommandByte,
    /// The output port (0xD1).
    OutputPort,
    /// To be returned as if from the keyboard (0xD2, 0xD3).
    Loop,
    /// A byte for the auxiliary port (0xD4): dropped.
    Nothing,
}

/// The controller. See the module's documentation.
///
/// ```
/// use devices::i8042::I8042;
/// use devices::{BusDevice, ExitRequest};
///
/// let mut i8042 = I8042::new();
/// let (mut status, mut answer) = ([0], [0]);
/// assert_eq!(i8042.write(4, &[0xaa]), None); // the self-test, at port 0x64
/// i8042.read(4, &mut status);
/// assert_eq!(status[0] & 1, 1, "an answer waits at port 0x60");
/// i8042.read(0, &mut answer);
/// assert_eq!(answer, [0x55], "passed");
/// assert_eq!(i8042.write(4, &[0xfe]), Some(ExitRequest::Reset));
/// ```
#[derive(Debug)]
pub struct I8042 {
    command_byte: u8,
    output_port: u8,
    output: Option<u8>,
    expect: Expect,
    last_was_command: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        Self {
            command_byte: DEFAULT_COMMAND_BYTE,
            output_port: DEFAULT_OUTPUT_PORT,
            output: None,
            expect: Expect::default(),
            last_was_command: false,
        }
    }
}

impl I8042 {
    /// A controller in its state after power-on.
    pub fn new() -> Self {
        Self::default()
    }

    fn status(&self) -> u8 {
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        UNLOCKED
            | self.command_byte & SYSTEM
            | flag(self.output.is_some(), OUTPUT_FULL)
            | flag(self.last_was_command, LAST_WAS_COMMAND)
    }

    fn command(&mut self, command: u8) -> Option<ExitRequest> {
        self.expect = Expect::Keyboard;
        match command {
            0x20 => self.output = Some(self.command_byte),
            0x60 => self.expect = Expect::CommandByte,
            0xa7 => self.command_byte |= 0x20,  // disable the auxiliary port
            0xa8 => self.command_byte &= !0x20, // enable it
            0xa9 => self.output = Some(0x01),   // test it: clock line stuck low
            0xaa => {
                self.command_byte |= SYSTEM;
                self.output = Some(0x55); // self-test passed
            }
            0xab => self.output = Some(0x00),   // keyboard lines are fine
            0xad => self.command_byte |= 0x10,  // disable the keyboard
            0xae => self.command_byte &= !0x10, // enable it
            0xd0 => self.output = Some(self.output_port),
            0xd1 => self.expect = Expect::OutputPort,
            0xd2 | 0xd3 => self.expect = Expect::Loop,
            0xd4 => self.expect = Expect::Nothing,
            // Pulse the output lines whose bits are clear; bit 0 is the CPU's reset.
            0xf0..=0xff if command & OUTPUT_PORT_RUN == 0 => return Some(ExitRequest::Reset),
            _ => {}
        }
        None
    }

    fn data(&mut self, value: u8) -> Option<ExitRequest> {
        match std::mem::take(&mut self.expect) {
            Expect::CommandByte => self.command_byte = value,
            Expect::OutputPort => {
                self.output_port = value;
                if value & OUTPUT_PORT_RUN == 0 {
                    return Some(ExitRequest::Reset);
                }
            }
            Expect::Loop => self.output = Some(value),
            Expect::Keyboard | Expect::Nothing => {}
        }
        None
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(byte) = data.first_mut() else { return };
        match offset {
            DATA => *byte = self.output.take().unwrap_or(0),
            COMMAND => *byte = self.status(),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitRequest> {
        let value = *data.first()?;
        match offset {
            DATA => {
                self.last_was_command = false;
                self.data(value)
            }
            COMMAND => {
                self.last_was_command = true;
                self.command(value)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(dev: &mut I8042, offset: u64) -> u8 {
        let mut byte = [0];
        dev.read(offset, &mut byte);
        byte[0]
    }

    /// Sends a command as Linux does and reads its answer, which must be there at once.
    fn ask(dev: &mut I8042, command: u8) -> u8 {
        assert_eq!(dev.write(COMMAND, &[command]), None);
        assert_eq!(read(dev, COMMAND) & OUTPUT_FULL, OUTPUT_FULL, "no answer to {command:#x}");
        read(dev, DATA)
    }

    #[test]
    fn the_reset_command_resets() {
        assert_eq!(I8042::new().write(COMMAND, &[0xfe]), Some(ExitRequest::Reset));
        assert_eq!(I8042::new().write(DATA, &[0xfe]), None, "data is no command");
    }

    #[test]
    fn clearing_the_run_bit_of_the_output_port_resets() {
        let mut dev = I8042::new();
        assert_eq!(dev.write(COMMAND, &[0xd1]), None);
        assert_eq!(dev.write(DATA, &[0x03]), None, "the A20 gate alone is harmless");
        assert_eq!(dev.write(COMMAND, &[0xd1]), None);
        assert_eq!(dev.write(DATA, &[0x02]), Some(ExitRequest::Reset));
    }

    #[test]
    fn the_probe_of_linux_never_waits() {
        let mut dev = I8042::new();
        // i8042_flush, i8042_controller_selftest, i8042_controller_init
        assert_eq!(read(&mut dev, COMMAND) & OUTPUT_FULL, 0);
        assert_eq!(ask(&mut dev, 0xaa), 0x55);
        let ctr = ask(&mut dev, 0x20);
        assert_eq!(dev.write(COMMAND, &[0x60]), None);
        assert_eq!(dev.write(DATA, &[ctr | 0x30]), None);
        assert_eq!(ask(&mut dev, 0x20), ctr | 0x30);
        assert_eq!(read(&mut dev, COMMAND) & 0x20, 0, "no byte comes from the auxiliary port");
        // i8042_check_aux: the loop comes back as keyboard data, so Linux tests the port and gives up.
        assert_eq!(dev.write(COMMAND, &[0xd3]), None);
        assert_eq!(dev.write(DATA, &[0x5a]), None);
        assert_eq!(read(&mut dev, COMMAND) & (OUTPUT_FULL | 0x20), OUTPUT_FULL);
        assert_eq!(read(&mut dev, DATA), 0x5a);
        assert_eq!(ask(&mut dev, 0xa9), 0x01);
    }

    #[test]
    fn any_sequence_of_bytes_keeps_the_input_buffer_empty() {
        let mut dev = I8042::new();
        for value in 0..=u8::MAX {
            for offset in [COMMAND, DATA, 1, 2, 3] {
                let _ = dev.write(offset, &[value]);
                assert_eq!(read(&mut dev, COMMAND) & 0x02, 0);
            }
        }
    }
}
