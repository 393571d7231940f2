//! The registers of a hardware-reduced ACPI platform (ACPI 6.5 §4.8.3.7, §4.8.3.6): sleep and reset.
//!
//! | port | register | meaning |
//! |---|---|---|
//! | [`SLEEP_CONTROL_PORT`] | `SLEEP_CONTROL_REG` | write `SLP_EN` with `SLP_TYP` = [`S5_SLEEP_TYPE`]: power off |
//! | [`SLEEP_STATUS_PORT`] | `SLEEP_STATUS_REG` | reads 0: we never woke up |
//! | [`RESET_PORT`] | `RESET_REG` | write [`RESET_VALUE`]: reset |
//!
//! The VMM names these in the FADT (`SLEEP_CONTROL_REG`, `SLEEP_STATUS_REG`, `RESET_REG`, `RESET_VALUE`, with the
//! flag `RESET_REG_SUP`) and in the DSDT's `\_S5` package. Any other sleep type is ignored and logged: no
//! other is announced. All registers are one byte wide.

use crate::bus::BusDevice;
use crate::exit::ExitRequest;

/// First port of the block.
pub const ACPI_BASE: u16 = 0x600;
/// Ports in the block.
pub const ACPI_LEN: u16 = 3;
/// `SLEEP_CONTROL_REG`, one byte.
pub const SLEEP_CONTROL_PORT: u16 = ACPI_BASE;
/// `SLEEP_STATUS_REG`, one byte.
pub const SLEEP_STATUS_PORT: u16 = ACPI_BASE + 1;
/// `RESET_REG`, one byte.
pub const RESET_PORT: u16 = ACPI_BASE + 2;
/// The FADT's `RESET_VALUE`.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of `\_S5`.
pub const S5_SLEEP_TYPE: u8 = 5;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;

/// Sleep and reset registers, to be inserted at [`ACPI_BASE`].
///
/// ```
/// use devices::acpi::{ACPI_BASE, AcpiPower, RESET_PORT, RESET_VALUE, S5_SLEEP_TYPE};
/// use devices::{BusDevice, ExitRequest};
///
/// // SLP_EN is bit 5, the sleep type lies above bit 2.
/// assert_eq!(AcpiPower.write(0, &[1 << 5 | S5_SLEEP_TYPE << 2]), Some(ExitRequest::PowerOff));
/// assert_eq!(AcpiPower.write(0, &[1 << 5 | 3 << 2]), None, "S3 is not offered");
/// let reset = u64::from(RESET_PORT - ACPI_BASE);
/// assert_eq!(AcpiPower.write(reset, &[RESET_VALUE]), Some(ExitRequest::Reset));
/// ```
#[derive(Debug, Default)]
pub struct AcpiPower;

impl BusDevice for AcpiPower {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // SLP_EN and SLP_TYP are write-only, WAK_STS is never set, the reset register reads as zero.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitRequest> {
        let value = *data.first()?;
        match u16::try_from(offset).ok()?.checked_add(ACPI_BASE)? {
            SLEEP_CONTROL_PORT if value & SLP_EN != 0 => match value >> SLP_TYP_SHIFT & SLP_TYP_MASK {
                S5_SLEEP_TYPE => Some(ExitRequest::PowerOff),
                other => {
                    tracing::warn!(
                        sleep_type = other,
                        "the guest asked for a sleep state that was not offered"
                    );
                    None
                }
            },
            RESET_PORT if value == RESET_VALUE => Some(ExitRequest::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_enable_with_s5_powers_off() {
        // What acpi_hw_extended_sleep of Linux does: clear the wake status, then write type and enable.
        assert_eq!(AcpiPower.write(1, &[0x80]), None);
        assert_eq!(AcpiPower.write(0, &[5 << 2]), None, "without SLP_EN nothing happens");
        assert_eq!(AcpiPower.write(0, &[5 << 2 | SLP_EN]), Some(ExitRequest::PowerOff));
        assert_eq!(AcpiPower.write(0, &[3 << 2 | SLP_EN]), None, "S3 is not offered");
    }

    #[test]
    fn the_reset_value_resets() {
        assert_eq!(AcpiPower.write(2, &[0]), None);
        assert_eq!(AcpiPower.write(2, &[RESET_VALUE]), Some(ExitRequest::Reset));
        let mut byte = [9];
        AcpiPower.read(1, &mut byte);
        assert_eq!(byte, [0]);
    }
}
