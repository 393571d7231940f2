//! KVM: what this host offers ([`Host`]), and a virtual machine in it ([`Vm`]).
//!
//! The rest of the crate does not call ioctls: a [`Vm`] has RAM, an interrupt controller in the kernel, lines
//! ([`IrqFd`]) and doorbells, and makes vCPUs.

mod host;
mod sys;
mod vm;

pub use host::{Accel, DEV_KVM, Host, HostError, KvmKind, MAX_CPUS};
pub(crate) use vm::ioctl;
pub use vm::{IrqFd, Vm, VmError};
