//! The multiple APIC description table (ACPI 6.5 §5.2.12): one enabled local APIC per vCPU, one I/O APIC with 24 pins
//! from GSI 0. `PCAT_COMPAT` is clear: a hardware-reduced platform has no 8259.

use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};

use crate::layout::{IOAPIC, LAPIC};

/// KVM's I/O APIC has this id after reset.
const IOAPIC_ID: u8 = 0;

pub(super) fn build(cpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(
        super::OEM_ID,
        super::OEM_TABLE_ID,
        super::OEM_REVISION,
        LocalInterruptController::Address(LAPIC),
    );
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IOAPIC_ID, IOAPIC, 0));
    super::to_bytes(&madt)
}
