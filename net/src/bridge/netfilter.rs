//! Whether the host's firewall swallows bridged frames.
//!
//! With the module `br_netfilter` loaded and `net.bridge.bridge-nf-call-iptables` at 1, every IPv4 frame that crosses
//! a bridge runs through iptables' FORWARD chain. Docker loads the module and sets the chain's policy to DROP: bridges
//! that worked yesterday go silent. The sysctl is read from procfs, which shows the calling thread's network namespace;
//! only when it is 1 are `nft` and `iptables` asked for the policy, since no simpler interface tells it for both.
//! Without either tool, or without the privilege to list, the answer is [`Forward::Unknown`].

use std::fs;
use std::process::{Command, Stdio};

/// The sysctl; absent when the module is not loaded.
const CALL_IPTABLES: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// What happens to a bridged IPv4 frame that no rule speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forward {
    /// Bridged frames are not shown to iptables.
    NotFiltered,
    /// They are, and pass.
    Accept,
    /// They are, and are dropped.
    Drop,
    /// They are, and the policy could not be read.
    Unknown,
}

pub(super) fn forward_verdict() -> Forward {
    if fs::read_to_string(CALL_IPTABLES).is_ok_and(|v| v.trim() == "1") {
        verdict(
            output("nft", &["list", "chains"]).as_deref(),
            output("iptables", &["-S", "FORWARD"]).as_deref(),
        )
    } else {
        Forward::NotFiltered
    }
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Reads the two listings: either tool's DROP is a DROP, since a frame must pass both.
fn verdict(nft: Option<&str>, iptables: Option<&str>) -> Forward {
    let nft_drops = nft.map(nft_drops);
    let legacy_drops = iptables.map(|rules| rules.lines().any(|line| line.trim() == "-P FORWARD DROP"));
    match (nft_drops, legacy_drops) {
        (Some(true), _) | (_, Some(true)) => Forward::Drop,
        (None, None) => Forward::Unknown,
        _ => Forward::Accept,
    }
}

/// Whether `nft list chains` shows a base chain with `hook forward` and `policy drop` in a table that sees IPv4.
fn nft_drops(listing: &str) -> bool {
    let mut sees_ipv4 = false;
    listing.lines().any(|line| {
        let line = line.trim();
        if let Some(table) = line.strip_prefix("table ") {
            sees_ipv4 = table.starts_with("ip ") || table.starts_with("inet ");
        }
        sees_ipv4 && line.contains("hook forward") && line.contains("policy drop")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCKER: &str = "table ip filter {\n\tchain DOCKER {\n\t}\n\tchain FORWARD {\n\t\t\
        type filter hook forward priority filter; policy drop;\n\t}\n}\n";

    #[test]
    fn dockers_drop_is_seen_in_either_listing() {
        assert_eq!(verdict(Some(DOCKER), None), Forward::Drop);
        assert_eq!(verdict(Some(""), Some("-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n")), Forward::Drop);
    }

    #[test]
    fn other_chains_and_families_are_not_mistaken_for_it() {
        assert_eq!(verdict(Some(&DOCKER.replace("drop", "accept")), None), Forward::Accept);
        assert_eq!(verdict(Some(&DOCKER.replace("table ip ", "table ip6 ")), None), Forward::Accept);
        assert_eq!(verdict(Some(&DOCKER.replace("hook forward", "hook input")), None), Forward::Accept);
        assert_eq!(verdict(None, Some("-P FORWARD ACCEPT\n")), Forward::Accept);
    }

    #[test]
    fn without_a_tool_the_answer_is_unknown() {
        assert_eq!(verdict(None, None), Forward::Unknown);
    }
}
