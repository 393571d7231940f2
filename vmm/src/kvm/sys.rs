//! The one ioctl that hands memory to KVM.
#![allow(unsafe_code, reason = "KVM is given addresses of our own mappings")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemory;

/// Gives every region of `memory` a memory slot of `vm`.
///
/// The caller keeps a clone of `memory` until `vm` and all of its vCPUs are closed.
pub(super) fn map_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in memory.iter().enumerate() {
        let slot = u32::try_from(slot).expect("RAM has at most two regions");
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: address and size are those of a mapping that `memory` owns; `Vm` holds a clone of it and drops it
        // after the VM's descriptor. Guest accesses to it are data races only with volatile accesses of vm-memory.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}
