//! How a guest ends the machine: [`ExitRequest`], and the exit device at I/O port [`EXIT_PORT`].
//!
//! The exit device is one write-only byte. Writing it ends the machine, and the byte is the exit status of
//! `pontoon run`: 0 is success. It lets a guest without ACPI (a test kernel, an init in an initramfs) say how
//! it went. Reads give 0xff. Only the first byte of a wider write counts.

use crate::bus::BusDevice;

/// I/O port of the exit device (one byte).
pub const EXIT_PORT: u16 = 0xf4;

/// What a device's register write asks of the machine. Returned to the VMM, which acts on it.
///
/// ```
/// use devices::acpi::{AcpiPower, S5_SLEEP_TYPE};
/// use devices::exit::ExitDevice;
/// use devices::i8042::I8042;
/// use devices::{BusDevice, ExitRequest};
///
/// // `poweroff` and `reboot` of a guest, and one that says how it went.
/// assert_eq!(AcpiPower.write(0, &[1 << 5 | S5_SLEEP_TYPE << 2]), Some(ExitRequest::PowerOff));
/// assert_eq!(I8042::new().write(4, &[0xfe]), Some(ExitRequest::Reset));
/// assert_eq!(ExitDevice.write(0, &[3]), Some(ExitRequest::Status(3)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitRequest {
    /// Soft-off (ACPI S5): the guest has shut down in order.
    PowerOff,
    /// A system reset (ACPI reset register, keyboard controller).
    Reset,
    /// The guest ended itself with this exit status, 0 being success.
    Status(u8),
}

/// The exit device. See the module's documentation.
///
/// ```
/// use devices::exit::ExitDevice;
/// use devices::{BusDevice, ExitRequest};
///
/// assert_eq!(ExitDevice.write(0, &[0]), Some(ExitRequest::Status(0)), "success");
/// // `outw` instead of `outb`: the low byte is the status.
/// assert_eq!(ExitDevice.write(0, &0x0142_u16.to_le_bytes()), Some(ExitRequest::Status(0x42)));
/// ```
#[derive(Debug, Default)]
pub struct ExitDevice;

impl BusDevice for ExitDevice {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Option<ExitRequest> {
        data.first().map(|status| ExitRequest::Status(*status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_written_is_the_status() {
        assert_eq!(ExitDevice.write(0, &[0]), Some(ExitRequest::Status(0)));
        assert_eq!(ExitDevice.write(0, &[42, 1]), Some(ExitRequest::Status(42)));
    }
}
