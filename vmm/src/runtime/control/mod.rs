//! The control socket of a machine: `control.sock` in its folder, JSON lines.
//!
//! A client connects, writes one [`Request`] per line and reads one answer per line: an object with `"ok": true` and what was asked
//! for, or with `"ok": false` and an `"error"` for people. Two requests turn the connection into a stream once they are answered:
//!
//! - `console`: from the console, first the last 64 KiB of what it said. One client at a time may write to it
//!   (`"writer": true` in the answer), any number reads.
//! - `connect`: a TCP connection to a port of the guest, through the NAT. The client waits for the answer before it sends anything.
//!
//! **Server** ([`Control`]): a worker on the machine's I/O thread. Nothing in it blocks; it has at most [`CLIENTS_MAX`] clients,
//! [`LINE_MAX`] bytes of a request and one unread answer for each. When all places are taken, the client that has been idle or slow
//! in asking for longest gives way. A console's reader that does not read is cut off once it has lost its place.
//!
//! **Client** ([`Client`]): blocking, with a time-out on every answer.

mod client;
mod clients;
mod flows;
mod protocol;
mod server;
#[cfg(test)]
mod tests;

pub use client::{Client, ControlError};
pub use protocol::{Flow, Lease, Nic, Request, Status};
pub use server::{Console, Control, StopAsked};

/// Most clients at a time.
pub const CLIENTS_MAX: usize = 32;
/// Most bytes of a request.
pub const LINE_MAX: usize = 4096;
