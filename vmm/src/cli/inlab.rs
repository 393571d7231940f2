//! `pontoon run` where this host cannot: the same command, inside the lab.
//!
//! Files that the flags name are carried in under names of their own, the command line is written again with
//! those names, and what the machine leaves (console file, capture) is carried out. Disks become disks of the lab (`carry`). Published ports go through
//! the emulator: this host's address and port lead to the lab's, and the lab's to the guest.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use devices::disk::DiskMode;
use net::nat::Publish;
use vmm::boot::Kernel;
use vmm::lab::{self, Config, Run, RunOptions};
use vmm::machine::{Guest, Init};

use super::Failure;
use super::args::{DiskSpec, NetSpec, RunArgs};
use super::carry::Carried;
use super::lab::{forward, run_in_lab};
use super::run::PROBE;

/// What the outer machine needs beside its guest's memory, in MiB.
const OUTER_MIB: u64 = 700;
/// The outer machine's usual and largest memory, in MiB.
const USUAL_MIB: u32 = 2048;
const MOST_MIB: u32 = 3072;
/// `--timeout` counts in the lab; this much later the lab itself is ended from outside.
const GRACE: Duration = Duration::from_secs(30);

pub(crate) fn run(args: &RunArgs, guest: &Guest) -> Result<u8, Failure> {
    check(args)?;
    let cache = lab::default_cache().ok_or_else(|| {
        Failure::usage(anyhow!("set XDG_CACHE_HOME or HOME: the lab keeps its snapshot there"))
    })?;
    let disks = Carried::open(&all_disks(args, guest))?;
    let config = Config { memory_mib: outer_memory(args)?, ..Config::new(cache) };
    let mut run = Run::new(["pontoon"]);
    words(args, guest, &disks, &mut run);
    run.timeout = args.timeout.map(|seconds| Duration::from_secs(seconds.into()) + GRACE);
    let status = run_in_lab(&RunOptions { config, run });
    // Locked until here.
    drop(disks);
    status
}

/// The machine's disks, in order: the image's comes first.
fn all_disks(args: &RunArgs, guest: &Guest) -> Vec<DiskSpec> {
    let own = guest.disk().map(|path| DiskSpec { path: path.to_path_buf(), mode: DiskMode::Overlay });
    own.into_iter().chain(args.disk.iter().cloned()).collect()
}

/// Flags that name something of this host which the lab does not have.
fn check(args: &RunArgs) -> Result<(), Failure> {
    if let NetSpec::Tap(bridge) = &args.net {
        return Err(Failure::usage(anyhow!(
            "the bridge {bridge} is on this host, and a Linux guest can't run on this host's KVM; run the whole \
             scene in the lab (scripts/demo and docs/lab.md show how), or use --net nat"
        )));
    }
    if args.host_access {
        return Err(Failure::usage(anyhow!(
            "--host-access would open the lab's own 127.0.0.1, not this host's; leave it out"
        )));
    }
    if let Some(path) = &args.vsock {
        return Err(Failure::usage(anyhow!(
            "--vsock {} would be a socket of the lab, out of this host's reach; run the client in the lab, too \
             (pontoon lab -- sh -c '…', docs/vsock.md), or leave it out",
            path.display()
        )));
    }
    Ok(())
}

fn outer_memory(args: &RunArgs) -> Result<u32, Failure> {
    let needed = (args.memory.0 >> 20) + OUTER_MIB;
    match u32::try_from(needed) {
        Ok(mib) if mib <= USUAL_MIB => Ok(USUAL_MIB),
        Ok(mib) if mib <= MOST_MIB => Ok(MOST_MIB),
        _ => Err(Failure::usage(anyhow!(
            "--memory {} is more than a guest in the lab can have; {}M is the most",
            args.memory,
            u64::from(MOST_MIB) - OUTER_MIB
        ))),
    }
}

/// The command line as it is written again for the inside.
struct Words(Vec<OsString>);

impl Words {
    fn flag(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.extend([name.into(), value.into()]);
    }

    fn flag_if(&mut self, name: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.flag(name, value.to_string());
        }
    }
}

/// Writes the command line again, and notes the files and ports that it needs.
fn words(args: &RunArgs, guest: &Guest, disks: &Carried, run: &mut Run) {
    let mut words = Words(vec!["pontoon".into(), "run".into()]);
    let (kernel, initrd) = guest.files();
    match kernel {
        Kernel::Path(kernel) => words.flag("--kernel", put(run, kernel, "vmlinuz")),
        // In this program, and so in the same one inside.
        Kernel::Bytes(_) => words.0.push(PROBE.into()),
    }
    if let Some(Kernel::Path(initrd)) = initrd {
        words.flag("--initrd", put(run, initrd, "initrd.img"));
    }
    words.flag("--accel", "kvm");
    words.flag_if("--name", args.name.as_ref());
    words.flag("--cpus", args.cpus.to_string());
    words.flag("--memory", args.memory.to_string());
    words.flag("--net", args.net.to_string());
    words.flag_if("--cpu-limit", args.cpu_limit);
    words.flag_if("--cpu-share", args.cpu_share);
    words.flag_if("--cmdline", Some(guest.extra_words()).filter(|words| !words.is_empty()));
    words.flag_if("--mac", args.mac);
    words.flag_if("--subnet", args.subnet);
    words.flag_if("--timeout", args.timeout);
    for disk in disks.put(run) {
        words.flag("--disk", disk);
    }
    for server in &args.dns {
        words.flag("--dns", server.0.to_string());
    }
    for publish in &args.publish {
        run.publish.push(forward(publish, publish.host_port));
        let inside = Publish { addr: Ipv4Addr::UNSPECIFIED, ..publish.clone() };
        words.flag("-p", inside.to_string());
    }
    for (name, file) in [("--pcap", &args.pcap), ("--console", &args.console)] {
        if let Some(outside) = file {
            let inside = PathBuf::from(format!("/lab/out{name}"));
            words.flag(name, inside.clone());
            run.get.push((inside, outside.clone()));
        }
    }
    if guest.init() == Init::Ours {
        words.0.push("--our-init".into());
    }
    if args.json {
        words.0.push("--json".into());
    }
    if !args.command.is_empty() {
        words.0.push("--".into());
        words.0.extend(args.command.iter().map(OsString::from));
    }
    run.argv = words.0;
}

/// Carries a file in under `name`.
fn put(run: &mut Run, path: &Path, name: &str) -> PathBuf {
    let inside = PathBuf::from("/lab").join(name);
    run.put.push((path.to_path_buf(), inside.clone()));
    inside
}
