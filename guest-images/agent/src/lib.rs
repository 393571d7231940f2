//! The guest agent: what the host asks of a running machine beyond its console.
//!
//! # What enters, what leaves
//!
//! One process listens on a vsock port ([`wire::PORT`]) and forks a process per connection; a connection is one request
//! (see [`wire`]): run a command, take or send a tree of files, power off, say the version. So requests can't disturb each
//! other, and what a request holds goes with its process.
//!
//! # Who may ask
//!
//! The host alone: a peer whose CID is not 2 is turned away before a byte of it is read. (With the vsock_loopback module any
//! process of the guest can reach the port too; it gets nothing.) The agent runs as root; the host owns the machine anyway.
//!
//! # Limits
//!
//! [`serve::MAX_REQUESTS`] requests at a time; more are told so. There is no allocator: a request's memory is its frames and
//! windows, 0.5 MB of stack, whatever is sent.
//!
//! # No libc
//!
//! It is a static program without any libc, since it is embedded in every `pontoon` and starts in images that may have none.
//! Users are read from /etc/passwd and /etc/group: no NSS, no PAM.
#![cfg_attr(not(test), no_std)]

pub mod serve;
pub mod tree;
pub mod wire;

mod copy;
mod exec;
mod link;
mod power;
mod queue;
mod spawn;
mod sys;
mod text;
mod users;
