//! The guest physical address map, and the lines that interrupts travel on.
//!
//! Both the code that builds the machine and the tables that describe it (e820, MADT, DSDT) take their numbers
//! from here, so that they cannot disagree.
//!
//! ```text
//! 0x0000_0500  GDT                       \
//! 0x0000_7000  boot_params (zero page)    | handed over by the boot protocol; RAM that the
//! 0x0000_9000  page tables, 6 pages       | guest may reuse once it has its own
//! 0x0002_0000  command line, 64 KiB      /
//! 0x0009_fc00  end of conventional RAM (e820), as a PC has it
//! 0x000e_0000  ACPI: RSDP first, then the tables; reserved in e820
//! 0x000f_fff0  the reset vector: 16 bytes, reserved in e820
//! 0x0010_0000  kernel, initrd, free RAM up to 3 GiB
//! 0xc000_0000  MMIO hole: virtio-mmio at 0xd000_0000, IOAPIC, LAPIC
//! 0x1_0000_0000  the rest of RAM
//! ```

/// Where the boot GDT stands.
pub const GDT: u64 = 0x500;
/// Where `boot_params` stands; RSI at entry.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the 4 KiB boot stack, 16-byte aligned.
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
/// The boot page tables: PML4, PDPT, then four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Where the kernel's command line stands, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Most bytes of a command line, its NUL included, whatever the kernel would take.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The RSDP; the other ACPI tables follow it.
pub const ACPI: u64 = 0xe_0000;
/// First byte behind the ACPI area.
pub const ACPI_END: u64 = RESET_VECTOR;
/// F000:FFF0, where a processor starts that was reset; also reserved.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First byte behind what is reserved for tables and the reset vector.
pub const RESERVED_END: u64 = 0x10_0000;
/// First byte that a kernel may occupy.
pub const HIGH_RAM: u64 = 0x10_0000;
/// First byte of the 32-bit MMIO hole: RAM beyond it continues at [`RAM_ABOVE_4G`].
pub const MMIO_HOLE: u64 = 0xc000_0000;
/// Where RAM goes on behind the hole.
pub const RAM_ABOVE_4G: u64 = 0x1_0000_0000;

/// Registers of virtio-mmio device 0; device i stands [`VIRTIO_MMIO_SIZE`] * i further.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio register window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt line of virtio-mmio device 0.
pub const VIRTIO_GSI: u32 = 16;
/// Most virtio devices: the IOAPIC has 24 pins, the first 16 belong to legacy devices.
pub const MAX_VIRTIO_DEVICES: usize = 8;
/// The I/O APIC's registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Each vCPU's local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for itself, in the hole, in nobody's way.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page that KVM on Intel needs for its identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// COM1's first I/O port.
pub const COM1_PORT: u16 = 0x3f8;
/// COM1's interrupt line.
pub const COM1_GSI: u32 = 4;
/// The power button's interrupt line: a PC's SCI, which a hardware-reduced platform does not have.
pub const POWER_BUTTON_GSI: u32 = 9;
/// The keyboard controller's interrupt line.
pub const I8042_GSI: u32 = 1;

/// Where the registers of virtio-mmio device `index` stand.
pub const fn virtio_mmio_base(index: usize) -> u64 {
    VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SIZE
}

/// The interrupt line of virtio-mmio device `index`, which is below [`MAX_VIRTIO_DEVICES`].
pub const fn virtio_gsi(index: usize) -> u32 {
    VIRTIO_GSI + index as u32
}
