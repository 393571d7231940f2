//! `boot_params`, the "zero page": the setup header of the kernel with what the loader has to fill in (boot.rst, fields
//! marked "write" and "modify"), the e820 map and the address of the RSDP.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::initrd::Initrd;
use super::{BootError, Loaded, e820_map};
use crate::layout::{ACPI, CMDLINE, ZERO_PAGE};
use crate::memory::GuestMemory;

/// "Undefined boot loader": nobody has assigned us a number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page.
pub(super) fn write(
    memory: &GuestMemory,
    kernel: &Loaded,
    initrd: Option<Initrd>,
    cmdline_len: usize,
) -> Result<(), BootError> {
    let size = memory.iter().map(GuestMemoryRegion::len).sum();
    let params = boot_params(size, kernel, initrd, cmdline_len);
    memory.write_slice(params.as_slice(), GuestAddress(ZERO_PAGE)).map_err(|source| BootError::Write {
        what: "boot_params",
        at: ZERO_PAGE,
        source,
    })
}

fn boot_params(memory: u64, kernel: &Loaded, initrd: Option<Initrd>, cmdline_len: usize) -> boot_params {
    let mut params = boot_params { hdr: kernel.header, acpi_rsdp_addr: ACPI, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE).expect("the command line is below 1 MiB");
    params.hdr.cmdline_size = u32::try_from(cmdline_len).expect("a command line is below 64 KiB");
    if let Some(Initrd { start, size }) = initrd {
        params.hdr.ramdisk_image = start;
        params.hdr.ramdisk_size = size;
    }
    let map = e820_map(memory);
    params.e820_entries = u8::try_from(map.len()).expect("the map has at most four entries");
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.addr, size: entry.size, r#type: entry.kind as u32 };
    }
    params
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::bootparam::setup_header;

    use super::*;
    use crate::boot::KernelFormat;

    #[test]
    fn the_kernel_finds_its_initrd_command_line_memory_and_tables() {
        let kernel = Loaded {
            format: KernelFormat::BzImage,
            entry: GuestAddress(0x100_0200),
            end: 0x200_0000,
            header: setup_header { version: 0x020f, setup_sects: 39, ..setup_header::default() },
        };
        let params = boot_params(512 << 20, &kernel, Some(Initrd { start: 0x1f00_0000, size: 0x1234 }), 13);
        let bytes = params.as_slice();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes.len(), 4096);
        assert_eq!(u32_at(0x070), 0xe0000, "acpi_rsdp_addr");
        assert_eq!(bytes[0x1e8], 3, "e820_entries");
        assert_eq!(bytes[0x1ef], 0, "sentinel");
        assert_eq!(bytes[0x1f1], 39, "the kernel's own header is kept");
        assert_eq!(bytes[0x210], 0xff, "type_of_loader");
        assert_eq!((u32_at(0x218), u32_at(0x21c)), (0x1f00_0000, 0x1234), "ramdisk");
        assert_eq!((u32_at(0x228), u32_at(0x238)), (0x2_0000, 13), "command line");
        assert_eq!((u32_at(0x2d0), u32_at(0x2d8), u32_at(0x2e0)), (0, 0x9_fc00, 1), "first e820 entry");
        assert_eq!(
            (u32_at(0x2e4), u32_at(0x2ec), u32_at(0x2f4)),
            (0xe_0000, 0x2_0000, 2),
            "ACPI is reserved"
        );
    }
}
