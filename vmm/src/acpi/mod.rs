//! The ACPI tables that describe the machine, written to the reserved area at [`layout::ACPI`] (ACPI 6.5 §5.2).
//!
//! ```text
//! RSDP ── XSDT ─┬─ FADT ── DSDT     hardware-reduced: no PM timer, no SCI, no FACS; sleep and reset registers
//!               └─ MADT             one local APIC per vCPU, one I/O APIC; no 8259
//! ```
//!
//! The DSDT names what cannot be discovered: virtio-mmio windows (`LNRO0005`), COM1 (`PNP0501`), the RTC (`PNP0B00`),
//! the power button (`PNP0C0C`) with the device that tells of it (`ACPI0013`), the processors, and `\_S5`. Stock distribution kernels have no other way to find them. One file per table; tests
//! compare the bytes with golden ones and let `iasl` disassemble them.

mod dsdt;
mod fadt;
mod madt;
mod rsdp;
mod xsdt;

#[cfg(test)]
mod tests;

use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory::GuestMemory;

/// Who made the tables.
const OEM_ID: [u8; 6] = *b"PNTOON";
/// Which machine they are of.
const OEM_TABLE_ID: [u8; 8] = *b"PONTOON ";
const OEM_REVISION: u32 = 1;

/// What the tables tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hardware {
    /// vCPUs, 1 to 254; their APIC ids count from 0.
    pub(crate) cpus: u8,
    /// virtio-mmio devices, at the addresses and lines of [`layout`].
    pub(crate) virtio_devices: usize,
}

/// Why the tables could not be written.
///
/// ```
/// use vmm::machine::{AcpiError, BuildError};
///
/// let error = BuildError::from(AcpiError::TooLarge(200_000));
/// assert!(matches!(error, BuildError::Acpi(AcpiError::TooLarge(_))));
/// assert!(error.to_string().ends_with("give the machine fewer vCPUs"));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are longer than their area.
    #[error("the ACPI tables need {0} bytes, their area has {area}; give the machine fewer vCPUs", area = layout::ACPI_END - layout::ACPI)]
    TooLarge(u64),
    /// Guest memory does not reach there.
    #[error("the ACPI tables could not be written at {at:#x}: {source}; give the machine more memory")]
    Write {
        /// Guest physical address.
        at: u64,
        /// What guest memory said.
        source: vm_memory::GuestMemoryError,
    },
}

/// Tables and where they stand.
struct Placed {
    at: u64,
    bytes: Vec<u8>,
}

/// The tables of `hardware` at their addresses, the RSDP first, each on a 64-byte boundary.
fn tables(hardware: Hardware) -> Vec<Placed> {
    let mut next = layout::ACPI + rsdp::LEN;
    let mut placed = Vec::with_capacity(5);
    let mut place = |bytes: Vec<u8>| {
        let at = next.next_multiple_of(64);
        next = at + bytes.len() as u64;
        placed.push(Placed { at, bytes });
        at
    };
    let dsdt = place(dsdt::build(hardware));
    let fadt = place(fadt::build(dsdt));
    let madt = place(madt::build(hardware.cpus));
    let xsdt = place(xsdt::build(&[fadt, madt]));
    placed.insert(0, Placed { at: layout::ACPI, bytes: rsdp::build(xsdt) });
    placed
}

/// Writes the tables into guest memory.
///
/// # Errors
/// [`AcpiError`], when they do not fit.
pub(crate) fn write(memory: &GuestMemory, hardware: Hardware) -> Result<(), AcpiError> {
    let tables = tables(hardware);
    let end = tables.iter().map(|table| table.at + table.bytes.len() as u64).max().unwrap_or(layout::ACPI);
    if end > layout::ACPI_END {
        return Err(AcpiError::TooLarge(end - layout::ACPI));
    }
    for Placed { at, bytes } in tables {
        memory.write_slice(&bytes, GuestAddress(at)).map_err(|source| AcpiError::Write { at, source })?;
    }
    Ok(())
}

fn to_bytes(table: &dyn acpi_tables::Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
