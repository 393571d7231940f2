//! The fixed ACPI description table (ACPI 6.5 §5.2.9) of a hardware-reduced platform.
//!
//! `IAPC_BOOT_ARCH` (table 5.11) tells what legacy hardware there is: devices on the ISA bus (COM1, the RTC), no VGA, no
//! 8042 keyboard controller to probe. (There is one, for resets, but no keyboard: a probe would cost time.) Power and
//! sleep buttons are said to be control-method devices: the DSDT has a power button, and no sleep button.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use devices::{acpi as power, cmos};

/// `IAPC_BOOT_ARCH`: there are devices on the ISA bus.
const LEGACY_DEVICES: u16 = 1;
/// `IAPC_BOOT_ARCH`: probing for VGA is useless.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// What `HYPERVISOR_VENDOR_ID` reads as.
const VENDOR: [u8; 8] = *b"PONTOON\0";

pub(super) fn build(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(super::OEM_ID, super::OEM_TABLE_ID, super::OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    fadt.century = cmos::CENTURY;
    fadt.reset_reg = byte_port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = byte_port(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(power::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(VENDOR).into();
    super::to_bytes(&fadt.finalize())
}

fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}
