//! The loop of a vCPU thread: run, serve the exit, run again.

use std::sync::atomic::{AtomicBool, Ordering};

use devices::{Bus, ExitRequest};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::failure::{CpuState, Failure};
use super::sys::{Kickable, internal_error, io_access};
use crate::kvm::{Host, KvmKind};
use crate::memory::GuestMemory;

/// `KVM_INTERNAL_ERROR_EMULATION`
const EMULATION: u32 = 1;

/// The devices of a machine, shared by its vCPUs.
#[derive(Default)]
pub(crate) struct Buses {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
}

/// Why a vCPU no longer runs.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The machine's stop flag was set.
    Stopped,
    /// The guest asked a device for an end.
    Asked(ExitRequest),
    /// Triple fault, or another event that shuts the processor down.
    Shutdown(Box<CpuState>),
    /// KVM cannot go on.
    Failed(Failure),
}

/// What to do after an exit.
enum Next {
    Run,
    End(ExitRequest),
    Shutdown,
    InternalError,
    FailEntry(u64),
    Unknown(String),
    Error(kvm_ioctls::Error),
}

/// Runs the vCPU `cpu` on the calling thread until the machine ends or `stop` is set and the thread kicked.
pub(crate) fn run(cpu: u8, fd: VcpuFd, buses: &Buses, memory: &GuestMemory, stop: &AtomicBool) -> Ending {
    let mut vcpu = Kickable::new(fd);
    let fd = vcpu.fd();
    loop {
        if stop.load(Ordering::Acquire) {
            return Ending::Stopped;
        }
        let next = step(fd, buses);
        let state = |fd: &VcpuFd| Box::new(CpuState::read(cpu, fd, memory));
        match next {
            Next::Run => {}
            Next::End(request) => return Ending::Asked(request),
            Next::Shutdown => return Ending::Shutdown(state(fd)),
            Next::InternalError => return Ending::Failed(internal(fd, state(fd))),
            Next::FailEntry(reason) => return Ending::Failed(Failure::Entry { reason, state: state(fd) }),
            Next::Unknown(exit) => return Ending::Failed(Failure::UnknownExit { exit, state: state(fd) }),
            Next::Error(e) => {
                return Ending::Failed(Failure::Run { error: e.to_string(), state: state(fd) });
            }
        }
    }
}

/// Runs until one exit and serves it.
fn step(fd: &mut VcpuFd, buses: &Buses) -> Next {
    match fd.run() {
        Ok(VcpuExit::IoIn(..)) => port_read(fd, &buses.ports),
        Ok(VcpuExit::IoOut(..)) => port_write(fd, &buses.ports),
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.mmio.read(address, data);
            Next::Run
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            buses.mmio.write(address, data).map_or(Next::Run, Next::End)
        }
        // With the local APIC in the kernel HLT does not come here; what does is of no concern.
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Next::Run,
        // 2 is KVM_SYSTEM_EVENT_RESET, 1 KVM_SYSTEM_EVENT_SHUTDOWN: para-virtual requests of the guest.
        Ok(VcpuExit::SystemEvent(1, _)) => Next::End(ExitRequest::PowerOff),
        Ok(VcpuExit::SystemEvent(2, _)) => Next::End(ExitRequest::Reset),
        Ok(VcpuExit::Shutdown) => Next::Shutdown,
        Ok(VcpuExit::InternalError) => Next::InternalError,
        Ok(VcpuExit::FailEntry(reason, _)) => Next::FailEntry(reason),
        Ok(other) => Next::Unknown(format!("{other:?}")),
        Err(e) if e.errno() == libc::EINTR => {
            // A kick, or another signal. The loop looks at the stop flag after this store, and whoever kicks sets the
            // flag first: a kick that this store undoes is seen by its flag.
            fd.set_kvm_immediate_exit(0);
            Next::Run
        }
        Err(e) if e.errno() == libc::EAGAIN => Next::Run,
        Err(e) => Next::Error(e),
    }
}

fn port_read(fd: &mut VcpuFd, ports: &Bus) -> Next {
    let Some(io) = io_access(fd) else { return Next::Unknown("malformed KVM_EXIT_IO".into()) };
    for item in io.data.chunks_exact_mut(io.size) {
        ports.read(u64::from(io.port), item);
    }
    Next::Run
}

fn port_write(fd: &mut VcpuFd, ports: &Bus) -> Next {
    let Some(io) = io_access(fd) else { return Next::Unknown("malformed KVM_EXIT_IO".into()) };
    for item in io.data.chunks_exact(io.size) {
        if let Some(request) = ports.write(u64::from(io.port), item) {
            return Next::End(request);
        }
    }
    Next::Run
}

fn internal(fd: &mut VcpuFd, state: Box<CpuState>) -> Failure {
    match internal_error(fd) {
        (EMULATION, bytes) => {
            let instruction = bytes.filter(|b| !b.is_empty()).unwrap_or_else(|| state.code.clone());
            let software = matches!(Host::probe().kind, KvmKind::Software(_));
            Failure::Emulation { instruction, software, state }
        }
        (suberror, _) => Failure::Internal { suberror, state },
    }
}
