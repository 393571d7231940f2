//! Why a machine could not be built or started.

use std::io;

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::kvm::VmError;
use crate::memory::MemoryError;

/// Why a machine could not be built. The text says what to do about it.
///
/// ```
/// use vmm::machine::{BuildError, Machine};
///
/// let error = Machine::builder().build().err().expect("it has no kernel");
/// assert!(matches!(error, BuildError::NoKernel));
/// assert_eq!(error.to_string(), "the machine has no kernel; give it one with MachineBuilder::kernel");
/// ```
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No kernel was given.
    #[error("the machine has no kernel; give it one with MachineBuilder::kernel")]
    NoKernel,
    /// More devices than there are interrupt lines.
    #[error("{asked} virtio devices are more than the {max} that a machine can have; leave some out")]
    TooManyDevices {
        /// Devices wanted.
        asked: usize,
        /// Most that there can be.
        max: usize,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Kernel, initrd, command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A device could not be made.
    #[error("the {what} could not be made: {source}; check the limits of this user (ulimit -n, -u)")]
    Device {
        /// Which one.
        what: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The vsock device's socket.
    #[error(transparent)]
    Vsock(#[from] devices::virtio::vsock::VsockError),
    /// Two devices at one address: a mistake in this program.
    #[error(transparent)]
    Layout(#[from] devices::BusError),
}

/// Why a machine could not be started.
///
/// ```no_run
/// use vmm::machine::{Guest, Machine, StartError};
///
/// match Machine::builder().guest(Guest::probe())?.build()?.start() {
///     Ok(machine) => println!("{}", machine.wait()),
///     // The limits of this user; everything else was found out by `build`.
///     Err(StartError::Thread { name, source }) => println!("no thread for {name}: {source}"),
///     Err(other) => println!("{other}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A thread could not be made.
    #[error(
        "the thread {name} could not be started: {source}; check the limits of this user (ulimit -u, -v)"
    )]
    Thread {
        /// Its name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The handler of the kick signal.
    #[error(
        "the signal handler that stops vCPUs could not be installed: {0}; is a sandbox forbidding sigaction?"
    )]
    KickSignal(io::Error),
    /// The event loop.
    #[error("the event loop could not be made: {0}; raise the limit of open files (ulimit -n)")]
    Events(event_manager::Error),
}
