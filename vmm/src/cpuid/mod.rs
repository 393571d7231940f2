//! CPUID as the guest sees it: what KVM supports here, with the topology and the clock of this machine.
//!
//! | leaf | what is told |
//! |---|---|
//! | 1 | APIC id, vCPUs, HTT, "hypervisor present", the TSC-deadline timer if KVM has it |
//! | 4, 0x8000001d | caches: each core its own, the last level shared by all |
//! | 6 | no MSR-based energy hints |
//! | 0xa, 0x80000022 | no performance counters |
//! | 0xb, 0x1f | one thread per core, all cores in one package, x2APIC id |
//! | 0x80000001, 0x80000008, 0x8000001e | AMD's way of saying the same |
//! | 0x40000000 | KVM's signature, with the leaves up to 0x40000010 |
//! | 0x40000010 | EAX: TSC frequency in kHz; EBX: LAPIC timer frequency in kHz (VMware's convention) |
//!
//! KVM's paravirtual features (0x40000001: kvmclock and others) are passed on as KVM offers them.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::kvm::VmError;

#[cfg(test)]
mod tests;

const SIGNATURE: u32 = 0x4000_0000;
const TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds: 1 GHz.
const LAPIC_KHZ: u32 = 1_000_000;

/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 1 ECX: the local APIC's timer can wait for a TSC value.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 6 ECX: `IA32_ENERGY_PERF_BIAS`.
const ENERGY_PERF_BIAS: u32 = 1 << 3;
/// Leaf 6 EAX: the local APIC timer never stops.
const ARAT: u32 = 1 << 2;
/// Leaf 0x80000001 ECX: several cores, told by leaf 0x80000008.
const CMP_LEGACY: u32 = 1 << 1;
/// Flag of [`kvm_cpuid_entry2`]: the entry's index counts.
const SIGNIFICANT_INDEX: u32 = 1;

/// What makes one vCPU's CPUID differ from the host's.
///
/// ```
/// use vmm::cpuid::{Identity, for_vcpu};
///
/// // The second of four, under a KVM that supports nothing at all.
/// let identity = Identity { id: 1, cpus: 4, tsc_khz: 2_600_000, tsc_deadline: true };
/// let told = for_vcpu(&[], identity);
/// // The timing leaf is ours, whatever the host has: the TSC's frequency in kHz.
/// let timing = told.as_slice().last().unwrap();
/// assert_eq!((timing.function, timing.eax), (0x4000_0010, 2_600_000));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// This vCPU's APIC id.
    pub id: u8,
    /// vCPUs of the machine.
    pub cpus: u8,
    /// Frequency of the TSC in kHz.
    pub tsc_khz: u32,
    /// Whether the local APICs have a TSC-deadline timer.
    pub tsc_deadline: bool,
}

/// What KVM supports here.
///
/// # Errors
/// When KVM refuses to tell.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, VmError> {
    let cpuid = crate::kvm::ioctl("tell its CPUID", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
    Ok(cpuid.as_slice().to_vec())
}

/// `supported` as the vCPU `identity` is to see it.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], identity: Identity) -> CpuId {
    let core_bits = u32::from(identity.cpus).next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        // Replaced below, where the table says so.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | TIMING))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, identity, core_bits);
    }
    for leaf in [0xb, 0x1f] {
        if supported.iter().any(|entry| entry.function == leaf) {
            entries.extend(topology(leaf, identity, core_bits));
        }
    }
    entries.push(kvm_cpuid_entry2 {
        function: TIMING,
        eax: identity.tsc_khz,
        ebx: LAPIC_KHZ,
        ..kvm_cpuid_entry2::default()
    });
    entries.truncate(KVM_MAX_CPUID_ENTRIES);
    CpuId::from_entries(&entries).expect("there are no more entries than KVM takes")
}

fn adjust(entry: &mut kvm_cpuid_entry2, identity: Identity, core_bits: u32) {
    let (id, cpus) = (u32::from(identity.id), u32::from(identity.cpus));
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | id << 24 | cpus.next_power_of_two().min(255) << 16;
            entry.ecx = (entry.ecx & !TSC_DEADLINE) | HYPERVISOR;
            if identity.tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if cpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            entry.eax =
                (entry.eax & 0x3fff) | sharing(level, core_bits) << 14 | ((1 << core_bits) - 1).min(63) << 26;
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            entry.eax = (entry.eax & 0x3fff) | sharing(level, core_bits) << 14;
        }
        6 => {
            *entry = kvm_cpuid_entry2 { function: 6, eax: entry.eax & ARAT, ..kvm_cpuid_entry2::default() };
            entry.ecx &= !ENERGY_PERF_BIAS;
        }
        0xa | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        SIGNATURE => entry.eax = entry.eax.max(TIMING),
        0x8000_0001 => {
            entry.ecx = if cpus > 1 { entry.ecx | CMP_LEGACY } else { entry.ecx & !CMP_LEGACY };
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits << 12 | (cpus - 1),
        0x8000_001e => {
            entry.eax = id;
            // Core id, one thread per core; node 0 of one.
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// How many APIC ids, less one, share a cache of this level: those of one core, or all.
fn sharing(level: u32, core_bits: u32) -> u32 {
    if level >= 3 { (1 << core_bits) - 1 } else { 0 }
}

/// The extended topology leaves (Intel SDM vol. 2, CPUID leaf 0BH): threads, then cores, then the end.
fn topology(leaf: u32, identity: Identity, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: u32::from(identity.id),
        ..kvm_cpuid_entry2::default()
    };
    [level(0, THREADS, 0, 1), level(1, CORES, core_bits, u32::from(identity.cpus)), level(2, 0, 0, 0)]
}
