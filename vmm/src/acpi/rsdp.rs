//! The root system description pointer (ACPI 6.5 §5.2.5.3): revision 2, with an XSDT and no RSDT.

use acpi_tables::rsdp::Rsdp;

/// Bytes of the structure.
pub(super) const LEN: u64 = 36;

pub(super) fn build(xsdt: u64) -> Vec<u8> {
    super::to_bytes(&Rsdp::new(super::OEM_ID, xsdt))
}
