//! `pontoon lab`: a command on the emulated host, with this terminal.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use net::nat::{Publish, PublishProtocol};
use vmm::lab::{self, Config, Disk, DiskAccess, Forward, LabError, Run, RunOptions};

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
    run.publish = args.publish.iter().map(|publish| forward(publish, publish.guest_port)).collect();
    run.disks = args.disk.iter().map(|text| disk(text)).collect::<Result<_, _>>()?;
    if args.user {
        run.uid = lab::UNPRIVILEGED;
    }
    run.timeout = Some(Duration::from_secs(args.timeout.into()));
    let config =
        Config { memory_mib: args.memory, cpus: args.cpus, packages: args.package, ..Config::new(cache) };
    run_in_lab(&RunOptions { config, run })
}

/// The emulator's part of a published port: this host's leads to the lab's `port`.
pub(crate) fn forward(publish: &Publish, port: u16) -> Forward {
    Forward {
        udp: publish.protocol == PublishProtocol::Udp,
        address: publish.addr,
        host: publish.host_port,
        lab: port,
    }
}

/// Runs in the lab and turns how it ended into this process's exit status.
pub(crate) fn run_in_lab(options: &RunOptions) -> Result<u8, Failure> {
    match lab::run(options, &mut output::Bar::new()) {
        Ok(status) => Ok(status.code),
        Err(error @ LabError::TimedOut { .. }) => {
            output::error(&anyhow::Error::new(error));
            Ok(STATUS_TIMEOUT)
        }
        Err(
            error @ (LabError::QemuMissing
            | LabError::Config(_)
            | LabError::Publish { .. }
            | LabError::Disk { .. }),
        ) => Err(Failure::usage(error)),
        Err(error) => Err(Failure::machine(error)),
    }
}

fn usage(text: &str) -> Failure {
    Failure::usage(anyhow!("{text}"))
}

/// `FILE[,ro|,rw]`.
fn disk(text: &str) -> Result<Disk, Failure> {
    let modes = [(",ro", DiskAccess::ReadOnly), (",rw", DiskAccess::ReadWrite)];
    let mode = modes.into_iter().find_map(|(word, access)| Some((text.strip_suffix(word)?, access)));
    let (path, access) = mode.unwrap_or((text, DiskAccess::Private));
    if !PathBuf::from(path).exists() {
        return Err(usage(&format!("--disk {path}: there is no such file")));
    }
    Ok(Disk { path: path.into(), access })
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
