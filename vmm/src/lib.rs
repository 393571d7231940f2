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
mod vcpu;
pub mod world;
