//! What a program of the host can do in a running machine: run commands, copy files, shut it down.
//!
//! A small agent in the guest listens on vsock port [`PORT`]; [`Client`] speaks to it through the machine's vsock socket. Images
//! that `pontoon image build` makes have the agent; `guest_images::AGENT` is its program for others.
//!
//! # What enters, what leaves
//!
//! Every call is a connection of its own, so calls run at the same time and end independently. The frames, and every limit
//! in numbers, are in the file that both sides compile (`guest-images/agent/src/wire.rs`).
//!
//! - [`Client::output`] runs a command and captures what it writes, up to a limit.
//! - [`Client::exec`] starts one and returns it as a [`Process`] with pipes; one thread carries its streams.
//! - [`Client::attach`] runs one on descriptors of the caller's, such as its terminal, on the calling thread.
//! - [`Client::put`] and [`Client::get`] copy files and folders; [`Client::power_off`] is the guest's own orderly end.
//!
//! # Trust
//!
//! The agent is not trusted: whoever is root in the guest can answer in its place. What it sends is held to the protocol and its
//! windows; per command at most 0.5 MB are held here, whatever comes. A copy from the guest writes at its destination
//! and below, and nowhere else: names are single components, used relative to open folders, and links that came are
//! never followed. A command that never ends is the caller's to bound ([`Command::timeout`], or dropping [`Process`]): the
//! agent then ends it with SIGHUP, and SIGKILL two seconds later.
//!
//! ```no_run
//! use vmm::agent::{Client, Command};
//!
//! let client = Client::vsock("/run/user/1000/pontoon/vm1/vsock.sock");
//! let output = client.output(Command::new("uname").arg("-r"), 4096)?;
//! assert!(output.status.success());
//! println!("{}", String::from_utf8_lossy(&output.stdout));
//! # Ok::<(), vmm::agent::AgentError>(())
//! ```

mod client;
mod connect;
mod copy;
mod error;
mod exec;
mod link;
mod pump;
#[cfg(test)]
mod tests;

// One definition for both ends of the connection; the agent is a package of its own, outside the workspace.
#[path = "../../../guest-images/agent/src/tree.rs"]
#[allow(dead_code, unreachable_pub, missing_docs, reason = "one file for both sides: each uses its half")]
mod tree;
#[path = "../../../guest-images/agent/src/wire.rs"]
#[allow(dead_code, unreachable_pub, reason = "one file for both sides: each uses its half")]
mod wire;

pub use client::Client;
pub use copy::Copied;
pub use error::AgentError;
pub use exec::{Command, ExitStatus, Output, Process, Streams};
pub use wire::PORT;
