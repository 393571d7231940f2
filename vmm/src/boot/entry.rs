//! What the boot vCPU's registers say at the first instruction (boot.rst, "64-bit Boot Protocol": long mode, CPL0, flat
//! segments `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18, interrupts off, RSI = `boot_params`).
//!
//! CR0, CR4 and EFER have SSE on and no lazy-FPU traps, so that a bare-metal guest may use SSE without further ado:
//! CR0 = 0x80050033, CR4 = 0x620, EFER = 0xd01. Application processors have no such state: they wait for a SIPI.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::{BOOT_STACK_TOP, GDT, PAGE_TABLES, ZERO_PAGE};
use crate::memory::GuestMemory;

/// Where a kernel starts.
///
/// ```
/// use vmm::boot::{Entry, initial_regs};
///
/// let registers = initial_regs(Entry { rip: 0x100_0200 });
/// assert_eq!((registers.rip, registers.rflags), (0x100_0200, 2)); // interrupts are off
/// assert_eq!(registers.rsi, vmm::layout::ZERO_PAGE); // where Linux looks for boot_params
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical (and, identity-mapped, virtual) address of the first instruction.
    pub rip: u64,
}

/// PE, MP, ET, NE, WP, AM, PG (Intel SDM vol. 3 §2.5).
const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 0x620;
/// SCE, LME, LMA, NXE.
const EFER: u64 = 0xd01;
/// Bit 1 is always set; IF is clear.
const RFLAGS: u64 = 2;

/// A flat segment of the boot GDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    selector: u16,
    /// Access byte: present, DPL 0, type.
    access: u8,
    /// G, D/B, L, AVL: the high nibble of the limit's third byte.
    flags: u8,
}

/// `__BOOT_CS`: 64-bit code, execute/read, accessed.
const CODE: Segment = Segment { selector: 0x10, access: 0x9b, flags: 0xa };
/// `__BOOT_DS`: data, read/write, accessed.
const DATA: Segment = Segment { selector: 0x18, access: 0x93, flags: 0xc };
/// A busy 64-bit TSS of no use, which VT-x demands in TR.
const TSS: Segment = Segment { selector: 0x20, access: 0x8b, flags: 0x8 };
const LIMIT: u32 = 0xf_ffff;
const GDT_ENTRIES: usize = 5;

impl Segment {
    /// The descriptor as it stands in the GDT, base 0, limit 0xfffff (SDM vol. 3 §3.4.5).
    fn descriptor(self) -> u64 {
        let limit = u64::from(LIMIT);
        (limit & 0xffff) | u64::from(self.access) << 40 | (limit >> 16) << 48 | u64::from(self.flags) << 52
    }

    fn register(self) -> kvm_segment {
        let bit = |byte: u8, n: u8| (byte >> n) & 1;
        kvm_segment {
            base: 0,
            // KVM takes the limit in bytes, with the granularity applied.
            limit: LIMIT << 12 | 0xfff,
            selector: self.selector,
            type_: self.access & 0xf,
            s: bit(self.access, 4),
            dpl: 0,
            present: bit(self.access, 7),
            avl: bit(self.flags, 0),
            l: bit(self.flags, 1),
            db: bit(self.flags, 2),
            g: bit(self.flags, 3),
            unusable: 0,
            padding: 0,
        }
    }
}

/// Writes the boot GDT.
pub(super) fn write_gdt(memory: &GuestMemory) -> Result<(), BootError> {
    let bytes: Vec<u8> = gdt().iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(GDT)).map_err(|source| BootError::Write {
        what: "the GDT",
        at: GDT,
        source,
    })
}

fn gdt() -> [u64; GDT_ENTRIES] {
    let mut gdt = [0; GDT_ENTRIES];
    for segment in [CODE, DATA, TSS] {
        gdt[usize::from(segment.selector / 8)] = segment.descriptor();
    }
    gdt
}

/// The general registers at the first instruction.
pub fn initial_regs(entry: Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rsi: ZERO_PAGE,
        rsp: BOOT_STACK_TOP,
        rbp: BOOT_STACK_TOP,
        rflags: RFLAGS,
        ..kvm_regs::default()
    }
}

/// The system registers at the first instruction. `reset` is what KVM gave the vCPU: its APIC base is kept.
pub fn initial_sregs(reset: kvm_sregs) -> kvm_sregs {
    let data = DATA.register();
    kvm_sregs {
        cs: CODE.register(),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: TSS.register(),
        gdt: kvm_dtable { base: GDT, limit: (GDT_ENTRIES * 8 - 1) as u16, ..kvm_dtable::default() },
        idt: kvm_dtable::default(),
        cr0: CR0,
        cr3: PAGE_TABLES,
        cr4: CR4,
        efer: EFER,
        ..reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gdt_is_the_one_of_the_boot_protocol() {
        assert_eq!(gdt(), [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff]);
    }

    #[test]
    fn segment_registers_agree_with_their_descriptors() {
        let code = CODE.register();
        assert_eq!((code.selector, code.type_, code.l, code.db, code.g, code.s), (0x10, 0xb, 1, 0, 1, 1));
        let tss = TSS.register();
        assert_eq!((tss.type_, tss.s, tss.present), (0xb, 0, 1));
    }

    #[test]
    fn the_apic_base_of_the_reset_state_is_kept() {
        let reset = kvm_sregs { apic_base: 0xfee0_0900, ..kvm_sregs::default() };
        let sregs = initial_sregs(reset);
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8005_0033, 0x620, 0xd01));
    }
}
