//! The logic of the probe guest, free of the machine: it also builds and is tested on the host.
//!
//! The command line ([`cmdline`]) names devices, settings and orders ([`orders`]); [`run`] carries the orders
//! out one by one over a smoltcp [`stack`] on a [`nic::Nic`], and each leaves one line ([`report`]). The NIC
//! is [`virtio::net::VirtioNet`] in the guest. The language and the output are documented in docs/probe.md.
//!
//! smoltcp is here because it is *not* ours: the network under test is judged by an independent stack.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod cmdline;
pub mod cpu;
pub mod nic;
pub mod observe;
pub mod orders;
pub mod pattern;
pub mod report;
pub mod rng;
pub mod run;
pub mod stack;
pub mod virtio;
