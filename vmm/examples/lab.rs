//! Runs a command in the lab through the library: `cargo run -p vmm --example lab -- COMMAND…`.
//!
//! Options before the command: `--put SRC DEST`, `--get SRC DEST`, `--timeout SECONDS`, `--user`.
#![allow(clippy::print_stderr, reason = "an example talks to whoever runs it")]

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use guest_images::Progress;
use vmm::lab::{self, Config, Run, RunOptions};

struct Lines;

impl Progress for Lines {
    fn step(&mut self, what: &str) {
        eprintln!("{what}");
    }
}

fn options() -> Option<RunOptions> {
    let mut run = Run::new(Vec::<OsString>::new());
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--put") => run.put.push((arguments.next()?.into(), arguments.next()?.into())),
            Some("--get") => run.get.push((arguments.next()?.into(), arguments.next()?.into())),
            Some("--timeout") => {
                let seconds = arguments.next()?.to_str()?.parse().ok()?;
                run.timeout = Some(Duration::from_secs_f64(seconds));
            }
            Some("--user") => run.uid = lab::UNPRIVILEGED,
            Some("--") => run.argv = arguments.by_ref().collect(),
            _ => return None,
        }
    }
    let config = Config::new(lab::default_cache()?);
    (!run.argv.is_empty()).then_some(RunOptions { config, run })
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("usage: lab [--put SRC DEST] [--get SRC DEST] [--timeout SECONDS] [--user] -- COMMAND…");
        return ExitCode::from(2);
    };
    match lab::run(&options, &mut Lines) {
        Ok(status) => ExitCode::from(status.code),
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::from(125)
        }
    }
}
