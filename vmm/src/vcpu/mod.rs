//! A virtual CPU: its state before the first instruction, the thread that runs it, and how that thread is stopped.
//!
//! The boot CPU starts at the kernel's entry ([`crate::boot::initial_regs`]); the others wait for INIT and SIPI, which
//! KVM's local APIC delivers. Each runs on a thread of its own, named `vcpuN`, and leaves the kernel only for register
//! accesses of devices.
//!
//! **Stopping.** Whoever wants a vCPU to stop sets the machine's stop flag and sends the kick signal. The handler sets
//! `immediate_exit` of the vCPU that its thread runs: when the signal comes between the check of the flag and
//! `KVM_RUN`, the latter returns at once. So no kick is lost.

mod failure;
mod run;
mod setup;
mod sys;

pub use failure::{CpuState, Failure};
pub(crate) use run::{Buses, Ending, run};
pub(crate) use setup::create;
pub(crate) use sys::{install_kick_handler, kick_signal};
