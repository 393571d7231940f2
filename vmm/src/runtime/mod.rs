//! The runtime folder: what machines of one user are there, and how another process finds and ends them.
//!
//! **What it is.** One folder per user ([`Runtime`]: `$XDG_RUNTIME_DIR/pontoon`, or see [`Runtime::open`]), mode 0700, and in
//! it one folder per machine, called as the machine is:
//!
//! | file | |
//! |---|---|
//! | `lock` | `flock`ed exclusively by the machine's process while it lives: held = alive, whatever the rest says. The kernel frees it even after SIGKILL |
//! | `state.json` | [`State`]: written by the machine's process, replaced by rename, so that a reader finds the old or the new one |
//! | `control.sock` | [`control`]: JSON lines, served on the machine's I/O thread |
//! | `console.log`, `console.log.1` | what the guest wrote to its console, if nobody watches it on a terminal: at most twice [`LOG_MAX`] |
//! | `vmm.log` | what the machine's process has to say itself, when it is detached |
//!
//! **Life.** [`Runtime::claim`] makes the folder and takes the lock: the name is ours ([`Claim`]). [`Claim::end`], or its drop, gives it
//! back. A detached machine leaves its last state and its console behind, under a free lock: it *has ended*, and the next
//! machine of that name takes the folder over. At most [`ENDED_MAX`] of these are kept. Of any other machine nothing stays. A
//! machine whose lock is free without its saying so was killed; whoever looks next ([`Runtime::list`]) tidies up after it.
//!
//! **No races.** `.lock` of the outer folder is held while a name is claimed (until the new state is written), a folder is tidied up, or
//! a process is looked up to be killed: so "the lock is held" and "the state names this process" are one fact there
//! ([`Entry::process`]), and a reused process number is never signalled. Whoever only looks takes a machine's lock shared, for
//! a moment, which a claim waits out and never takes for a machine. A process that sits on `.lock` for
//! five seconds is reported, not waited for.
//!
//! **Trust.** Files of the folder are the user's own, but they are read as if they weren't: at most 64 KiB, unknown fields and missing
//! ones are no error, and whatever cannot be understood is one [`Condition::Unreadable`] machine, not a failed listing. A folder that
//! belongs to somebody else, that others may enter, or that is a symbolic link, is refused.

mod cgroup;
mod claim;
mod console;
pub mod control;
mod error;
mod list;
mod lock;
mod name;
mod place;
mod scrollback;
mod state;
#[cfg(test)]
mod tests;

pub use cgroup::{CgroupError, CpuGroup, CpuLimits};
pub use claim::Claim;
pub use console::ConsoleLog;
pub use error::RuntimeError;
pub use list::{Condition, Entry, Process};
pub use name::{BadName, MachineName};
pub use place::Runtime;
pub use scrollback::{Scrollback, Tee};
pub use state::{Exit, Phase, State, StateError};

/// Most bytes of `console.log`; then it becomes `console.log.1`, and what that was is forgotten.
pub const LOG_MAX: u64 = 2 << 20;
/// Most machines that have ended whose last state and console are kept.
pub const ENDED_MAX: usize = 16;

/// The control socket's name in a machine's folder.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The console's log in a machine's folder.
pub const CONSOLE_LOG: &str = "console.log";
/// What [`CONSOLE_LOG`] becomes when it is full.
pub const CONSOLE_LOG_OLD: &str = "console.log.1";
/// The log of the machine's own process, when it is detached.
pub const VMM_LOG: &str = "vmm.log";
/// Where the guest's vsock ports are reached.
pub const VSOCK_SOCKET: &str = "vsock.sock";
