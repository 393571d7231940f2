//! The agent's program: its arguments, and its start without a libc. Everything else is the library of this package.
//!
//!     pontoon-agent                listens on vsock port 1024 for the host
//!     pontoon-agent --unix PATH    listens on a Unix socket, for tests: whoever connects may ask; says `listening` then
//!
//! Otherwise it says nothing, and never returns unless it can't listen: exit status 2 for wrong arguments, 3 when there is no vsock or
//! somebody else listens, 4 when the kernel fails, 5 for a panic.
#![no_std]
#![no_main]

mod start;

use core::ffi::CStr;

use agent::serve::{Place, Status, serve};

/// Entered with the program's arguments; the return value is its exit status.
fn run<'a>(mut arguments: impl Iterator<Item = &'a CStr>) -> u8 {
    let place = match (arguments.nth(1), arguments.next(), arguments.next()) {
        (None, _, _) => Place::Vsock,
        (Some(flag), Some(path), None) if flag == c"--unix" => Place::Unix(path),
        _ => return Status::Usage as u8,
    };
    serve(place) as u8
}
