//! The state of a vCPU before its first instruction.

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::boot::{Entry, initial_regs, initial_sregs};
use crate::cpuid::{self, Identity};
use crate::kvm::{Vm, VmError, ioctl};

/// `IA32_MISC_ENABLE`, bit 0: fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, memory is write-back. Without it Linux takes all of RAM as uncacheable.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Local APIC registers: LINT0 takes the 8259's interrupts, LINT1 is NMI, as firmware leaves them.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// Makes the vCPU with APIC id `id`. With an `entry` it is the boot CPU, without one it waits for a SIPI.
pub(crate) fn create(
    vm: &Vm,
    supported: &[kvm_cpuid_entry2],
    id: u8,
    cpus: u8,
    entry: Option<Entry>,
) -> Result<VcpuFd, VmError> {
    let fd = vm.create_vcpu(id)?;
    let tsc_khz = ioctl("tell the TSC's frequency", fd.get_tsc_khz())?;
    let identity = Identity { id, cpus, tsc_khz, tsc_deadline: vm.tsc_deadline() };
    ioctl("set CPUID", fd.set_cpuid2(&cpuid::for_vcpu(supported, identity)))?;
    set_msrs(&fd)?;
    set_lint(&fd)?;
    if let Some(entry) = entry {
        let reset = ioctl("read system registers", fd.get_sregs())?;
        ioctl("set system registers", fd.set_sregs(&initial_sregs(reset)))?;
        ioctl("set registers", fd.set_regs(&initial_regs(entry)))?;
    }
    Ok(fd)
}

fn set_msrs(fd: &VcpuFd) -> Result<(), VmError> {
    let entries =
        [MISC_ENABLE, MTRR_DEF_TYPE].map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).expect("two entries are within KVM's limit");
    let set = ioctl("set MSRs", fd.set_msrs(&msrs))?;
    if set < entries.len() {
        // KVM on another vendor's CPU may lack one; both only make the guest faster.
        tracing::debug!(index = entries[set].index, "KVM does not take this MSR");
    }
    Ok(())
}

fn set_lint(fd: &VcpuFd) -> Result<(), VmError> {
    let mut lapic = ioctl("read the local APIC", fd.get_lapic())?;
    put_register(&mut lapic, LVT_LINT0, DELIVERY_EXTINT);
    put_register(&mut lapic, LVT_LINT1, DELIVERY_NMI);
    ioctl("set the local APIC", fd.set_lapic(&lapic))
}

fn put_register(lapic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (slot, byte) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
        *slot = i8::from_ne_bytes([byte]);
    }
}
