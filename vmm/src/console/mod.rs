//! The console of the program: a terminal in raw mode, its escape key, and the way of its bytes to the guest's COM1.
//!
//! **Raw mode** ([`RawMode`]): every key goes to the guest, Ctrl-C included. The terminal is put back when the guard is
//! dropped, when the process exits, and when a signal kills it, whichever comes first.
//!
//! **Escape** ([`Escape`]): Ctrl-A x stops the machine; Ctrl-A Ctrl-A sends one Ctrl-A; Ctrl-A and any other key sends
//! both; Ctrl-A d leaves a console that one is attached to. These are QEMU's and `screen`'s habits.
//!
//! **Input** ([`SerialInput`]) comes from any descriptor: a terminal, a pipe, a socket, a file, `/dev/null`. Its end is not
//! the machine's. Bytes wait in the descriptor, not in this process, until the guest reads them: at most
//! [`CHUNK`] bytes are held.

mod escape;
mod input;
mod sys;
mod tty;

pub use escape::{Escape, Key};
pub use input::CHUNK;
pub(crate) use input::SerialInput;
pub use tty::{RawMode, TtyError};
