//! Pontoon: a small KVM virtual machine monitor whose guests are on the network the moment they boot.
//!
//! The `pontoon` command uses nothing that an embedder can't:
//!
//! | module | what it is |
//! |---|---|
//! | [`machine`] | [`Machine::builder`](machine::Machine::builder), a running machine, why it ended: begin here |
//! | [`kvm`] | what this host's KVM is, and the virtual machine behind a machine |
//! | [`boot`], [`cpuid`], [`layout`], [`memory`] | what a kernel finds when it starts |
//! | [`agent`] | commands and files in a running machine, through a small program in the guest |
//! | [`console`] | a terminal in raw mode, its escape, serial input |
//! | [`runtime`] | the folder in which a user's machines are found, and who lives in it |
//! | [`lab`] | an emulated host with AMD-V, for hosts that have none |
//! | [`network`] | a network, of one machine or of several |
//! | [`world`] | echo and DNS servers on loopback, for guests that are to prove something |
//!
//! Three more crates belong to it, and come with it: [`net`] has what a NIC is plugged into (any [`net::FramePort`], such as
//! [`net::nat::Nat`] or [`net::tap::TapPort`]), [`devices`] the disks, [`guest_images`] the images. A [`MachineBuilder::worker`](machine::MachineBuilder::worker) is written
//! for [`event_manager`], which comes along too.

pub use {devices, event_manager, guest_images, net, vm_memory};

/// The programs in the documents.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
#[doc = include_str!("../../docs/library.md")]
struct Documents;

mod acpi;
pub mod agent;
pub mod boot;
pub mod console;
pub mod cpuid;
mod deadline;
mod folder;
pub mod kvm;
pub mod lab;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod network;
pub mod runtime;
#[cfg(test)]
#[path = "../../tests/src/skip.rs"]
mod skip;
mod vcpu;
pub mod world;
