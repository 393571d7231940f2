//! The `pontoon` command: see `pontoon --help` and `docs/cli.md`.
//!
//! Exit status: 0 all went well; the guest's own status for `run`; 1 a check failed; 2 bad input (a flag, a
//! file, a bridge), with one error that says what to do; 125 the machine itself failed.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
