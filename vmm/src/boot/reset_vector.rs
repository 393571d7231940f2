//! The reset vector, F000:FFF0: the only piece of firmware that this machine has.
//!
//! Some guests reset by jumping there in real mode, as into a PC's BIOS. Linux does so on its default path here: on a
//! hardware-reduced ACPI platform it prefers EFI's reset (`reboot_init`, `efi_reboot_required`), finds no EFI, and goes on
//! with the BIOS, past ACPI's reset register. The stub writes that register.

use devices::acpi::{RESET_PORT, RESET_VALUE};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::RESET_VECTOR;
use crate::memory::GuestMemory;

/// Writes the stub.
pub(super) fn write(memory: &GuestMemory) -> Result<(), BootError> {
    memory.write_slice(&stub(), GuestAddress(RESET_VECTOR)).map_err(|source| BootError::Write {
        what: "the reset vector",
        at: RESET_VECTOR,
        source,
    })
}

/// 16-bit code: mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; hlt; jmp to the hlt.
fn stub() -> [u8; 9] {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stub_fits_between_the_vector_and_1_mib() {
        assert!(RESET_VECTOR + stub().len() as u64 <= 0x10_0000);
        assert_eq!(RESET_VECTOR, 0xf000 * 16 + 0xfff0);
    }
}
