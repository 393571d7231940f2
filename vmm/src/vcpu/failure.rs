//! What is told when a vCPU cannot go on.

use std::fmt;

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// Most bytes of an instruction.
const INSTRUCTION: usize = 15;

/// Registers of a vCPU and the instruction that it was at.
///
/// ```
/// use vmm::machine::CpuState;
///
/// let state = CpuState { cs: 0x10, rip: 0x100_0000, code: vec![0x0f, 0x0b], ..CpuState::default() };
/// assert!(state.to_string().starts_with("vCPU 0 at 0010:0x1000000 (bytes: 0f 0b), "));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// The vCPU's APIC id.
    pub cpu: u8,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags.
    pub rflags: u64,
    /// RAX, RBX, RCX, RDX, RSI, RDI.
    pub general: [u64; 6],
    /// CR0, CR2, CR3, CR4.
    pub control: [u64; 4],
    /// EFER.
    pub efer: u64,
    /// Code segment's selector.
    pub cs: u16,
    /// Up to 15 bytes at RIP, when they can be read.
    pub code: Vec<u8>,
}

impl CpuState {
    /// Reads the registers of a stopped vCPU; zeros where KVM does not answer.
    pub(super) fn read(cpu: u8, fd: &VcpuFd, memory: &GuestMemory) -> Self {
        let regs = fd.get_regs().unwrap_or_default();
        let sregs = fd.get_sregs().unwrap_or_default();
        let mut code = vec![0; INSTRUCTION];
        let translated = fd.translate_gva(regs.rip).ok().filter(|t| t.valid != 0);
        let len = translated.and_then(|t| memory.read(&mut code, GuestAddress(t.physical_address)).ok());
        code.truncate(len.unwrap_or(0));
        Self {
            cpu,
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags,
            general: [regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi],
            control: [sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4],
            efer: sregs.efer,
            cs: sregs.cs.selector,
            code,
        }
    }
}

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [rax, rbx, rcx, rdx, rsi, rdi] = self.general;
        let [cr0, cr2, cr3, cr4] = self.control;
        write!(
            f,
            "vCPU {} at {:04x}:{:#x} (bytes:{}), rsp={:#x} rflags={:#x} rax={rax:#x} rbx={rbx:#x} rcx={rcx:#x} rdx={rdx:#x} \
             rsi={rsi:#x} rdi={rdi:#x} cr0={cr0:#x} cr2={cr2:#x} cr3={cr3:#x} cr4={cr4:#x} efer={:#x}",
            self.cpu,
            self.cs,
            self.rip,
            Hex(&self.code),
            self.rsp,
            self.rflags,
            self.efer,
        )
    }
}

/// Bytes, each with a blank before it.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

/// Why KVM could not run a vCPU any further.
///
/// ```no_run
/// # let builder = vmm::machine::Machine::builder();
/// use vmm::machine::{ExitReason, Failure};
///
/// match builder.build()?.start()?.wait() {
///     ExitReason::Failed(Failure::Emulation { software: true, .. }) => println!("Linux takes a KVM with hardware, or the lab"),
///     reason => println!("{reason}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// KVM had to emulate an instruction and could not.
    #[error(
        "KVM could not emulate the instruction{}; {}: {state}",
        Hex(.instruction),
        if *.software {
            "this host's KVM is software: it runs small bare-metal guests, but not Linux; use --accel lab for that"
        } else {
            "the guest jumped astray, or executes from device memory"
        }
    )]
    Emulation {
        /// Its bytes, as far as they are known.
        instruction: Vec<u8>,
        /// Whether this host's KVM is a software KVM.
        software: bool,
        /// Where it happened.
        state: Box<CpuState>,
    },
    /// Another error inside of KVM.
    #[error("KVM reports internal error {suberror}; look into the host's kernel log: {state}")]
    Internal {
        /// KVM's number for it.
        suberror: u32,
        /// Where it happened.
        state: Box<CpuState>,
    },
    /// The processor refused the guest's state.
    #[error(
        "the processor refused to enter the guest, reason {reason:#x}; look into the host's kernel log: {state}"
    )]
    Entry {
        /// The processor's number for it.
        reason: u64,
        /// Where it happened.
        state: Box<CpuState>,
    },
    /// `KVM_RUN` failed.
    #[error("KVM_RUN failed: {error}; look into the host's kernel log: {state}")]
    Run {
        /// What the kernel said.
        error: String,
        /// Where it happened.
        state: Box<CpuState>,
    },
    /// An exit that this machine never asked for.
    #[error("KVM left the guest for a reason that we do not know ({exit}); update this program: {state}")]
    UnknownExit {
        /// KVM's name for it.
        exit: String,
        /// Where it happened.
        state: Box<CpuState>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_emulation_names_the_bytes_and_the_kind_of_host() {
        let state = Box::new(CpuState {
            cpu: 1,
            cs: 0x10,
            rip: 0x10_0000,
            code: vec![0x0f, 0xae],
            ..Default::default()
        });
        let failure = |software| {
            Failure::Emulation { instruction: vec![0x0f, 0xae, 0x2f], software, state: state.clone() }
                .to_string()
        };
        assert!(
            failure(true)
                .starts_with("KVM could not emulate the instruction 0f ae 2f; this host's KVM is software")
        );
        assert!(failure(true).contains("vCPU 1 at 0010:0x100000 (bytes: 0f ae)"));
        assert!(failure(false).contains("the guest jumped astray"));
    }
}
