//! `pontoon net attach`: the NAT network for whatever is behind a TAP, without a machine.
//!
//! The TAP is a descriptor that somebody opened for us, or an interface of this network namespace, or of that of
//! another process (`--pid`). For the last, a child enters that process's namespaces, opens the TAP there, and passes
//! the descriptor back ([`hand_over`]); we stay where we are, so that the sockets are
//! the host's. Then the network ends with that process.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};
use net::FramePort;
use net::attach::{self, Ended};
use net::nat::{Nat, NatConfig, Publish, PublishProtocol};
use net::tap::{TapError, TapName, TapPort};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::args::{AttachArgs, NetCommand};
use super::{Failure, netinfo, network, output};

pub(crate) fn net(command: NetCommand) -> Result<u8, Failure> {
    match command {
        NetCommand::Ls(args) => netinfo::ls(&args),
        NetCommand::Inspect(args) => netinfo::inspect(&args),
        NetCommand::Attach(args) if args.hand_over => hand_over(&args),
        NetCommand::Attach(args) => attach(&args),
    }
}

fn attach(args: &AttachArgs) -> Result<u8, Failure> {
    let stop = catch_signals().context("catching signals").map_err(Failure::machine)?;
    // The TAP's descriptor would keep the process's namespace alive for ever.
    let process = args.pid.map(watch).transpose()?;
    let mut tap = tap(args)?;
    let mut nat = nat(args)?;
    announce(args, &tap, &mut nat);
    let stops: Vec<_> = [stop.as_fd()].into_iter().chain(process.as_ref().map(AsFd::as_fd)).collect();
    let ended = attach::run(&mut tap, &mut nat, &stops).map_err(Failure::machine)?;
    match ended {
        Ended::GuestGone => output::note(&format!("{} is gone, and so is its network", tap.name())),
        Ended::Stopped(_) => tracing::info!("stopped"),
    }
    if args.json {
        let counters = nat.counters();
        output::json(&serde_json::json!({
            "from_guest": { "frames": counters.tx_frames, "bytes": counters.tx_bytes },
            "to_guest": { "frames": counters.rx_frames, "bytes": counters.rx_bytes },
            "dropped": counters.drops().map(|(why, n)| (format!("{why:?}"), n.into()))
                .collect::<serde_json::Map<_, serde_json::Value>>(),
        }));
    }
    Ok(0)
}

/// A socket that becomes readable when we are asked to end.
fn catch_signals() -> io::Result<UnixStream> {
    let (ours, handlers) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, handlers.try_clone()?)?;
    }
    Ok(ours)
}

/// A descriptor that becomes readable when process `pid` has ended.
fn watch(pid: u32) -> Result<OwnedFd, Failure> {
    let known = i32::try_from(pid).ok().and_then(Pid::from_raw);
    known
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
        .with_context(|| format!("--pid {pid}: looking for that process"))
        .map_err(Failure::usage)
}

fn tap(args: &AttachArgs) -> Result<TapPort, Failure> {
    if let Some(pid) = args.pid {
        let fd = from_namespace(pid, args).map_err(Failure::machine)?;
        return TapPort::from_fd(fd).map_err(Failure::machine);
    }
    match (args.tap_fd, &args.tap) {
        (Some(number), _) => {
            let fd = attach::inherited_fd(number)
                .with_context(|| format!("--tap-fd {number}: no such descriptor was handed over"))
                .map_err(Failure::usage)?;
            TapPort::from_fd(fd).map_err(Failure::usage)
        }
        (None, Some(name)) => open(name, args.mtu),
        (None, None) => Err(Failure::usage(anyhow!("which TAP? write --tap NAME or --tap-fd NUMBER"))),
    }
}

fn open(name: &TapName, mtu: u16) -> Result<TapPort, Failure> {
    let tap = TapPort::open(name, None).map_err(|error| match error {
        TapError::Io { .. } => Failure::machine(error),
        _ => Failure::usage(error),
    })?;
    // DHCP and the MSS tell the guest's software; the interface is told by whoever configures it.
    if tap.mtu() != mtu {
        tracing::info!(
            tap = tap.name(),
            mtu = tap.mtu(),
            network = mtu,
            "the TAP's MTU is not the network's"
        );
    }
    Ok(tap)
}

fn nat(args: &AttachArgs) -> Result<Nat, Failure> {
    let config = NatConfig {
        mtu: args.mtu,
        publish: args.publish.clone(),
        host_access: args.host_access,
        dns: args.dns.iter().map(|server| server.0).collect(),
        ..NatConfig::default()
    };
    Nat::new(network::on_subnet(args.subnet, config)?).map_err(network::nat_failure)
}

/// Says what there is now; a script waits for this line.
fn announce(args: &AttachArgs, tap: &TapPort, nat: &mut Nat) {
    let name = |(port, at): (Publish, SocketAddrV4)| match port.protocol {
        PublishProtocol::Tcp => at.to_string(),
        PublishProtocol::Udp => format!("{at}/udp"),
    };
    let published: Vec<String> = nat.published().into_iter().map(name).collect();
    let (subnet, gateway) = (nat.config().subnet, nat.config().gateway());
    if args.json {
        output::json(&serde_json::json!({
            "tap": tap.name(), "subnet": subnet.to_string(), "gateway": gateway, "mtu": args.mtu,
            "published": published,
        }));
        return;
    }
    output::line(&format!("{} is on {subnet}: gateway, DHCP and DNS are {gateway}", tap.name()));
    for at in published {
        output::line(&format!("published: {at}"));
    }
}

/// Lets a child open the TAP in the namespaces of process `pid`.
fn from_namespace(pid: u32, args: &AttachArgs) -> anyhow::Result<OwnedFd> {
    let name = args.tap.as_ref().context("--pid needs --tap NAME: the TAP in that process's namespace")?;
    let exe = std::env::current_exe().context("finding our own program")?;
    let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
    let status = Command::new("nsenter")
        .args(enter(pid)?)
        .arg("--")
        .arg(exe)
        .args(["net", "attach", "--hand-over", "--tap", &name.to_string()])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .status()
        .context("starting nsenter (of util-linux), which enters the namespace")?;
    if !status.success() {
        bail!("could not open TAP '{name}' in the namespace of process {pid} (see above)");
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&ours, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)
        .context("receiving the TAP's descriptor")?;
    let mut rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    rights.by_ref().flatten().next().context("the child sent no descriptor")
}

/// The namespaces to enter: the network, and the users if they are not ours.
fn enter(pid: u32) -> anyhow::Result<Vec<String>> {
    let users = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/user"));
    let theirs = users(&pid.to_string()).with_context(|| format!("looking at process {pid}"))?;
    let mut flags = vec!["--target".to_owned(), pid.to_string(), "--net".to_owned()];
    if theirs != users("self").context("looking at ourselves")? {
        flags.extend(["--user".to_owned(), "--preserve-credentials".to_owned()]);
    }
    Ok(flags)
}

/// The child of [`from_namespace`]: opens the TAP and sends its descriptor through standard input.
fn hand_over(args: &AttachArgs) -> Result<u8, Failure> {
    let name = args.tap.as_ref().context("--hand-over needs --tap").map_err(Failure::usage)?;
    let tap = open(name, args.mtu)?;
    let fds = [tap.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(io::stdin(), &[IoSlice::new(&[0])], &mut control, SendFlags::empty())
        .context("sending the TAP's descriptor")
        .map_err(Failure::machine)?;
    Ok(0)
}
