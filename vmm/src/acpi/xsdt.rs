//! The extended system description table (ACPI 6.5 §5.2.8): where the FADT and the MADT are. The DSDT is not in it; it
//! hangs off the FADT.

use acpi_tables::xsdt::XSDT;

pub(super) fn build(tables: &[u64]) -> Vec<u8> {
    let mut xsdt = XSDT::new(super::OEM_ID, super::OEM_TABLE_ID, super::OEM_REVISION);
    for table in tables {
        xsdt.add_entry(*table);
    }
    super::to_bytes(&xsdt)
}
