//! The topology that guests compute from CPUID, for machines of several sizes.

use proptest::prelude::*;

use super::*;

fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
}

/// A host with 16 cores that has every leaf which we touch, each full of ones where it can be.
fn host() -> Vec<kvm_cpuid_entry2> {
    let mut host = vec![
        entry(0, 0, [0x1f, 0, 0, 0]),
        entry(1, 0, [0x0a20_0f12, 0xffff_0800, !HYPERVISOR, !0]),
        entry(6, 0, [!0; 4]),
        entry(0xa, 0, [!0; 4]),
        entry(0xb, 0, [4, 16, 0x100, 9]),
        entry(0x1f, 0, [4, 16, 0x100, 9]),
        entry(SIGNATURE, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, !0, !0]),
        entry(0x8000_0008, 0, [0x3030, 0, 0x400f, 0]),
        entry(0x8000_001e, 0, [9, 0x109, 7, 0]),
    ];
    for (index, level) in [1, 1, 2, 3].into_iter().enumerate() {
        host.push(entry(4, index as u32, [0xfc03_c001 | level << 5, 0, 0, 0]));
        host.push(entry(0x8000_001d, index as u32, [0x03_c001 | level << 5, 0, 0, 0]));
    }
    host
}

struct Guest(Vec<kvm_cpuid_entry2>);

impl Guest {
    fn new(id: u8, cpus: u8) -> Self {
        let identity = Identity { id, cpus, tsc_khz: 2_596_096, tsc_deadline: true };
        Self(for_vcpu(&host(), identity).as_slice().to_vec())
    }

    fn leaf(&self, function: u32, index: u32) -> [u32; 4] {
        let e = self.0.iter().find(|e| e.function == function && e.index == index).unwrap();
        [e.eax, e.ebx, e.ecx, e.edx]
    }
}

#[test]
fn a_single_cpu_is_alone_in_its_package() {
    let guest = Guest::new(0, 1);
    let [_, ebx, ecx, edx] = guest.leaf(1, 0);
    assert_eq!((ebx >> 24, (ebx >> 16) & 0xff, edx & HTT), (0, 1, 0));
    assert_eq!(ecx & (HYPERVISOR | TSC_DEADLINE), HYPERVISOR | TSC_DEADLINE);
    assert_eq!(guest.leaf(0xb, 1), [0, 1, 0x201, 0]);
    assert_eq!(guest.leaf(0x8000_0008, 0)[2], 0);
    assert_eq!(guest.leaf(0x8000_0001, 0)[2] & CMP_LEGACY, 0);
}

#[test]
fn the_third_of_four_cpus_knows_its_place() {
    let guest = Guest::new(2, 4);
    assert_eq!(guest.leaf(1, 0)[1] >> 24, 2);
    assert_eq!(guest.leaf(0xb, 0), [0, 1, 0x100, 2]);
    assert_eq!(guest.leaf(0xb, 1), [2, 4, 0x201, 2]);
    assert_eq!(guest.leaf(0xb, 2), [0, 0, 2, 2]);
    assert_eq!(guest.leaf(0x1f, 1), [2, 4, 0x201, 2]);
    assert_eq!(guest.leaf(0x8000_0008, 0)[2], 0x2003);
    assert_eq!(guest.leaf(0x8000_001e, 0), [2, 2, 0, 0]);
}

#[test]
fn only_the_last_level_cache_is_shared() {
    let guest = Guest::new(0, 4);
    let sharers = |leaf, index| ((guest.leaf(leaf, index)[0] >> 14) & 0xfff) + 1;
    for leaf in [4, 0x8000_001d] {
        assert_eq!([0, 1, 2, 3].map(|index| sharers(leaf, index)), [1, 1, 1, 4], "{leaf:#x}");
    }
    assert_eq!(guest.leaf(4, 3)[0] >> 26, 3, "cores in the package, less one");
}

#[test]
fn counters_and_energy_hints_are_hidden_and_the_clock_is_told() {
    let guest = Guest::new(0, 1);
    assert_eq!(guest.leaf(0xa, 0), [0; 4]);
    assert_eq!(guest.leaf(6, 0), [ARAT, 0, 0, 0]);
    assert_eq!(guest.leaf(SIGNATURE, 0)[0], TIMING);
    assert_eq!(guest.leaf(TIMING, 0), [2_596_096, 1_000_000, 0, 0]);
    assert_eq!(guest.leaf(0x4000_0001, 0)[0], 0x0100_7efb, "kvmclock and the like are KVM's to offer");
}

#[test]
fn leaves_that_the_host_lacks_are_not_invented() {
    let cpuid =
        for_vcpu(&[entry(0, 0, [1, 0, 0, 0])], Identity { id: 0, cpus: 1, tsc_khz: 1, tsc_deadline: false });
    assert!(!cpuid.as_slice().iter().any(|e| matches!(e.function, 4 | 0xb | 0x1f)));
}

proptest! {
    /// Linux shifts the APIC id by the core level's width to get the package: it must be 0 for every vCPU.
    #[test]
    fn all_cpus_are_in_package_0(cpus in 1u8..=254, id in 0u8..254) {
        let id = id % cpus;
        let guest = Guest::new(id, cpus);
        let [shift, count, ..] = guest.leaf(0xb, 1);
        prop_assert_eq!(u32::from(id) >> shift, 0);
        prop_assert_eq!(count, u32::from(cpus));
        let amd = guest.leaf(0x8000_0008, 0)[2];
        prop_assert_eq!((amd >> 12 & 0xf, amd & 0xff), (shift, u32::from(cpus) - 1));
    }
}
