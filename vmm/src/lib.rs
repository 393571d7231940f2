//! Pontoon: a small KVM virtual machine monitor whose guests are on the network the moment they boot.

pub mod acpi;
pub mod boot;
pub mod console;
pub mod cpuid;
pub mod kvm;
pub mod lab;
pub mod layout;
pub mod machine;
pub mod memory;
#[cfg(test)]
#[path = "../../tests/src/skip.rs"]
mod skip;
mod vcpu;
pub mod world;
