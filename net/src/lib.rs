//! Frames, sockets, TAPs and bridges: what a virtual NIC is plugged into.
//!
//! The seam is [`FramePort`]; its module says what holds between a NIC and a port. This crate knows nothing of
//! KVM, virtqueues or guest physical addresses.

pub mod attach;
pub mod bridge;
pub mod checksum;
mod mac;
pub mod nat;
pub mod pcap;
mod port;
mod segment;
pub mod switch;
pub mod tap;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vnet;

pub use mac::{BadMac, MacAddr};
pub use port::{
    Counters, DropReason, ETHERNET_LEN, FramePort, Lent, MAX_FRAME, Offloads, Received, RxRing, Sent, TxFrame,
};
pub use vnet::{BadVnetHdr, GsoType, VNET_HDR_LEN, VnetFlags, VnetHdr};
