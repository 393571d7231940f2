//! A virtual machine in KVM: RAM, the interrupt controllers, interrupt lines, doorbells, vCPUs.
//!
//! Interrupt controllers are KVM's own (8259 pair, I/O APIC with 24 pins, local APICs), with KVM's default routing: GSI n
//! is pin n. There is no 8254: nothing that we boot needs one.

use std::sync::Arc;

use devices::IrqLine;
use devices::virtio::Doorbell;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::host::{HostError, max_cpus, open_checked};
use super::sys;
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::GuestMemory;

/// Why KVM refused something.
///
/// ```no_run
/// use vmm::kvm::{HostError, Vm, VmError};
///
/// match Vm::new(vmm::memory::allocate(64 << 20)?, 1) {
///     Ok(_) => println!("KVM works"),
///     Err(VmError::Host(HostError::Forbidden(advice))) => println!("{advice}"),
///     Err(other) => println!("{other}"), // each says what to do
/// }
/// # Ok::<(), vmm::memory::MemoryError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM cannot be used.
    #[error(transparent)]
    Host(#[from] HostError),
    /// An ioctl failed.
    #[error(
        "KVM refused to {what}: {source}; is another hypervisor using the CPU, or a limit (ulimit -l, -n) reached?"
    )]
    Ioctl {
        /// What was to be done.
        what: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// An eventfd could not be made.
    #[error("the host gave no eventfd for {what}: {source}; raise the limit of open files (ulimit -n)")]
    EventFd {
        /// What it was for.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// More vCPUs than there can be.
    #[error("{asked} vCPUs is not between 1 and {max}, what KVM allows here; ask for fewer")]
    Cpus {
        /// vCPUs wanted.
        asked: u8,
        /// Most that there can be.
        max: u8,
    },
}

/// Names what was tried when an ioctl fails.
pub(crate) fn ioctl<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, VmError> {
    result.map_err(|source| VmError::Ioctl { what, source })
}

/// An interrupt line: an eventfd that KVM turns into an edge at a pin of the I/O APIC.
///
/// ```no_run
/// use vmm::devices::IrqLine;
/// use vmm::kvm::Vm;
///
/// let vm = Vm::new(vmm::memory::allocate(64 << 20)?, 1)?;
/// // The line of the first virtio device: an edge, however often it is raised before the guest looks.
/// let line = vm.irq_line(vmm::layout::virtio_gsi(0))?;
/// line.raise();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct IrqFd(EventFd);

impl IrqLine for IrqFd {
    fn raise(&self) {
        // It fails only when 2^64 - 2 edges wait to be taken; then the next one has nothing to add.
        let _ = self.0.write(1);
    }
}

/// A virtual machine. Fields drop in order: the VM before the memory that it was given.
///
/// ```no_run
/// use vmm::kvm::{Vm, VmError};
/// use vmm::vm_memory::GuestMemoryBackend;
///
/// let vm = Vm::new(vmm::memory::allocate(64 << 20)?, 1)?;
/// assert_eq!(vm.memory().num_regions(), 1); // two, where there is RAM beyond the hole below 4 GiB
/// let refused = Vm::new(vmm::memory::allocate(64 << 20)?, 0);
/// assert!(matches!(refused, Err(VmError::Cpus { asked: 0, .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Vm {
    fd: VmFd,
    kvm: &'static Kvm,
    memory: GuestMemory,
    tsc_deadline: bool,
}

impl Vm {
    /// Makes a machine with `memory` as its RAM and room for `cpus` vCPUs.
    ///
    /// # Errors
    /// [`VmError`], when KVM is not usable or refuses.
    pub fn new(memory: GuestMemory, cpus: u8) -> Result<Self, VmError> {
        let kvm = open_checked()?;
        // One is possible everywhere, and asking is a system call.
        let max = if cpus == 1 { 1 } else { max_cpus(kvm) };
        if !(1..=max).contains(&cpus) {
            return Err(VmError::Cpus { asked: cpus, max });
        }
        let fd = ioctl("make a virtual machine", create_vm(kvm))?;
        sys::map_memory(&fd, &memory)
            .map_err(|source| VmError::Ioctl { what: "map the guest's memory", source })?;
        let tss = usize::try_from(KVM_TSS).expect("it is below 4 GiB");
        ioctl("set the TSS address", fd.set_tss_address(tss))?;
        if let Err(error) = fd.set_identity_map_address(KVM_IDENTITY_MAP) {
            // Only Intel's older processors want one, and every KVM since Linux 2.6.31 takes it.
            tracing::debug!(%error, "KVM takes no address of an identity map");
        }
        ioctl("make the interrupt controllers", fd.create_irq_chip())?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { fd, kvm, memory, tsc_deadline })
    }

    /// The machine's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether the local APICs have the TSC-deadline timer.
    pub(crate) fn tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        self.kvm
    }

    /// A line to pin `gsi` of the I/O APIC.
    ///
    /// # Errors
    /// [`VmError`], when the host has no more eventfds or `gsi` is no pin.
    pub fn irq_line(&self, gsi: u32) -> Result<Arc<IrqFd>, VmError> {
        let fd = EventFd::new(EFD_NONBLOCK)
            .map_err(|source| VmError::EventFd { what: "an interrupt line", source })?;
        ioctl("register an interrupt line", self.fd.register_irqfd(&fd, gsi))?;
        Ok(Arc::new(IrqFd(fd)))
    }

    /// Lets a write at `address`, of any width and value, ring `doorbell` without leaving the kernel.
    ///
    /// # Errors
    /// [`VmError`], when KVM refuses.
    pub fn doorbell(&self, doorbell: &Doorbell, address: u64) -> Result<(), VmError> {
        let address = IoEventAddress::Mmio(address);
        ioctl("register a doorbell", self.fd.register_ioevent(doorbell.eventfd(), &address, NoDatamatch))
    }

    /// Makes the vCPU with this APIC id.
    pub(crate) fn create_vcpu(&self, id: u8) -> Result<VcpuFd, VmError> {
        ioctl("make a vCPU", self.fd.create_vcpu(u64::from(id)))
    }
}

/// `KVM_CREATE_VM` is interrupted by any signal (it waits for other CPUs), so it is tried again.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other,
        }
    }
}
