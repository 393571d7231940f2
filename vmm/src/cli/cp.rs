//! `pontoon cp`: files and folders into a machine and out of it.

use std::ffi::{OsStr, OsString};
use std::io::{stdin, stdout};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use serde_json::json;
use vmm::agent::{AgentError, Client, Copied};
use vmm::runtime::MachineName;

use super::agent_args::CpArgs;
use super::exec::{Agent, failed};
use super::{Failure, output};

/// Something was not copied, as cp(1) says it.
const STATUS_INCOMPLETE: u8 = 1;
/// The mode of a file that comes from standard input.
const STREAM_MODE: u32 = 0o644;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    Machine(MachineName, PathBuf),
    Stream,
}

impl Side {
    /// Docker's rule: what has a colon before any slash is in a machine.
    fn parse(text: &OsString) -> Result<Self, Failure> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        match bytes.iter().position(|byte| matches!(byte, b':' | b'/')) {
            Some(at) if bytes[at] == b':' => {
                let path = PathBuf::from(OsStr::from_bytes(&bytes[at + 1..]));
                match String::from_utf8_lossy(&bytes[..at]).parse() {
                    Ok(name) if !path.as_os_str().is_empty() => Ok(Self::Machine(name, path)),
                    _ => {
                        let text = text.display();
                        let advice = anyhow!("{text}: write NAME:PATH, or ./{text} for a file here");
                        Err(Failure::usage(advice))
                    }
                }
            }
            _ => Ok(Self::Here(PathBuf::from(text))),
        }
    }
}

pub(crate) fn cp(args: &CpArgs) -> Result<u8, Failure> {
    let limit = args.limit.map_or(u64::MAX, |mib| mib.saturating_mul(1 << 20));
    let outcome = match (Side::parse(&args.source)?, Side::parse(&args.destination)?) {
        (Side::Machine(name, from), to @ (Side::Here(_) | Side::Stream)) => {
            Agent::find(&name, &args.patience)?.patiently(|client| get(client, &from, &to, limit))
        }
        (from @ (Side::Here(_) | Side::Stream), Side::Machine(name, to)) => {
            Agent::find(&name, &args.patience)?.patiently(|client| put(client, &from, &to))
        }
        (Side::Machine(..), Side::Machine(..)) => {
            return Err(Failure::usage(anyhow!(
                "both sides are in machines; copy through this host: pontoon cp A:PATH - | pontoon cp - B:PATH"
            )));
        }
        _ => {
            return Err(Failure::usage(anyhow!(
                "one side must be in a machine, as NAME:PATH (pontoon cp file vm1:/root)"
            )));
        }
    };
    match outcome {
        Ok(copied) => Ok(report(&copied, args)),
        // The machine and its agent did their part.
        Err(error @ (AgentError::Guest(_) | AgentError::Local { .. } | AgentError::Unfit { .. })) => {
            output::error(&anyhow::Error::new(error));
            Ok(STATUS_INCOMPLETE)
        }
        Err(error) => failed(error),
    }
}

fn get(client: &Client, from: &Path, to: &Side, limit: u64) -> Result<Copied, AgentError> {
    match to {
        Side::Here(path) => client.get(from, path, limit),
        Side::Stream | Side::Machine(..) => client.get_stream(from, stdout().as_fd(), limit),
    }
}

fn put(client: &Client, from: &Side, to: &Path) -> Result<Copied, AgentError> {
    match from {
        Side::Here(path) => client.put(path, to),
        Side::Stream | Side::Machine(..) => client.put_stream(stdin().as_fd(), to, STREAM_MODE),
    }
}

fn report(copied: &Copied, args: &CpArgs) -> u8 {
    for (path, why) in &copied.left_out_names {
        output::note(&format!("left out {path}: {why}"));
    }
    let unnamed = copied.left_out.saturating_sub(copied.left_out_names.len() as u64);
    if unnamed > 0 {
        output::note(&format!("left out {unnamed} more"));
    }
    if args.json {
        let Copied { files, folders, links, bytes, left_out, .. } = copied;
        output::json(&json!({
            "files": files, "folders": folders, "links": links, "bytes": bytes, "left_out": left_out,
        }));
    }
    if copied.left_out > 0 { STATUS_INCOMPLETE } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_any_slash_names_a_machine() {
        let parse = |text: &str| Side::parse(&OsString::from(text)).unwrap();
        let vm1 = || "vm1".parse().unwrap();
        assert_eq!(parse("vm1:/etc/x"), Side::Machine(vm1(), "/etc/x".into()));
        assert_eq!(parse("vm1:a:b"), Side::Machine(vm1(), "a:b".into()));
        assert_eq!(parse("./a:b"), Side::Here("./a:b".into()));
        assert_eq!(parse("/tmp/a:b"), Side::Here("/tmp/a:b".into()));
        assert_eq!(parse("file"), Side::Here("file".into()));
        assert_eq!(parse("-"), Side::Stream);
        for bad in [":/x", "vm1:", ":", "no name:/x"] {
            assert!(Side::parse(&OsString::from(bad)).is_err(), "{bad}");
        }
    }
}
