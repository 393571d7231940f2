//! `pontoon lab`: a command on the emulated host, with this terminal.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use vmm::lab::{self, Config, LabError, Run, RunOptions};

use super::args::LabArgs;
use super::{Failure, STATUS_TIMEOUT, output};

pub(crate) fn lab(args: LabArgs) -> Result<u8, Failure> {
    let cache = lab::default_cache().ok_or_else(|| {
        Failure::usage(anyhow!("set XDG_CACHE_HOME or HOME: the lab keeps its snapshot there"))
    })?;
    let mut run = Run::new(args.command);
    for put in &args.put {
        run.put.push(pair(put)?);
    }
    for get in &args.get {
        let (there, here) = get.split_once(':').ok_or_else(|| usage("--get takes PATH-THERE:PATH-HERE"))?;
        run.get.push((there.into(), here.into()));
    }
    if args.user {
        run.uid = lab::UNPRIVILEGED;
    }
    run.timeout = Some(Duration::from_secs(args.timeout.into()));
    let config =
        Config { memory_mib: args.memory, cpus: args.cpus, packages: args.package, ..Config::new(cache) };
    run_in_lab(&RunOptions { config, run })
}

/// Runs in the lab and turns how it ended into this process's exit status.
pub(crate) fn run_in_lab(options: &RunOptions) -> Result<u8, Failure> {
    match lab::run(options, &mut output::Bar::new()) {
        Ok(status) => Ok(status.code),
        Err(error @ LabError::TimedOut { .. }) => {
            output::error(&anyhow::Error::new(error));
            Ok(STATUS_TIMEOUT)
        }
        Err(error @ (LabError::QemuMissing | LabError::Config(_) | LabError::Publish { .. })) => {
            Err(Failure::usage(error))
        }
        Err(error) => Err(Failure::machine(error)),
    }
}

fn usage(text: &str) -> Failure {
    Failure::usage(anyhow!("{text}"))
}

/// `SRC[:DEST]`, where DEST is an absolute path in the lab.
fn pair(text: &str) -> Result<(PathBuf, PathBuf), Failure> {
    let (source, dest) = match text.split_once(':') {
        Some((source, dest)) => (PathBuf::from(source), Some(PathBuf::from(dest))),
        None => (PathBuf::from(text), None),
    };
    if !source.exists() {
        return Err(usage(&format!("--put {}: there is no such file", source.display())));
    }
    let dest = dest
        .or_else(|| lab::default_destination(&source))
        .filter(|dest| dest.is_absolute())
        .ok_or_else(|| usage(&format!("--put {text}: write SRC:DEST with an absolute DEST")))?;
    Ok((source, dest))
}
