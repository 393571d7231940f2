//! [`net::bridge`] and `scripts/bridge` against the kernel, in namespaces of their own.

#![cfg(test)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{exists, has_tun, ip};
use net::bridge::{BridgeError, Warning, enslave, preflight};
use net::tap::{TapName, TapPort};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/bridge")
}

/// Runs `scripts/bridge` with the words of `args`, keeping its state in `dir`, as nobody who is logged in over SSH.
fn bridge(dir: &Path, args: &str) -> Output {
    Command::new(script())
        .args(args.split_whitespace())
        .env("PONTOON_STATE_DIR", dir)
        .env_remove("SSH_CONNECTION")
        .output()
        .unwrap()
}

#[track_caller]
fn succeeds(out: &Output) {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[track_caller]
fn fails_saying(out: &Output, text: &str) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && stderr.contains(text), "{stderr}");
}

/// A host with everything that an interface can have. Its `eth0` is a veth.
fn a_host() {
    fs::write("/proc/sys/net/ipv6/conf/default/dad_transmits", "0").unwrap();
    for line in [
        "link add eth0 type veth peer name lan0",
        "link set lan0 up",
        "link set eth0 mtu 1450 up",
        "address add 10.1.0.2/24 brd + dev eth0 label eth0:1",
        "address add 10.1.0.3/24 dev eth0",
        "address add 10.2.0.3/24 dev eth0 metric 55",
        "address add 10.3.0.3 peer 10.3.0.9/32 dev eth0",
        "address add 10.4.0.3/24 dev eth0 noprefixroute",
        "route add 10.4.0.0/24 dev eth0 proto kernel scope link src 10.4.0.3 metric 100",
        "address add fd00::2/64 dev eth0",
        "route add default via 10.1.0.1 dev eth0 metric 77",
        "route add default via 10.2.0.1 dev eth0 metric 177 proto dhcp src 10.2.0.3",
        "route add 172.16.0.0/12 via 10.2.0.1 dev eth0 table 100 mtu 1400",
        "route add 192.0.2.7 dev eth0 scope link",
        "-6 route add default via fe80::1 dev eth0 metric 512",
        "-6 route add fd01::/64 via fd00::1 dev eth0",
    ] {
        ip(line);
    }
}

/// Everything that `ip` knows of addresses and routes, but for link-local addresses that come up meanwhile.
fn everything() -> [String; 3] {
    // The kernel decides in the background that nobody else has an IPv6 address.
    while ip("-6 -o address show tentative").contains("scope global") {}
    let steady = |text: String| text.lines().filter(|l| !l.contains("fe80::")).collect::<Vec<_>>().join("\n");
    [
        steady(ip("-o -d address show dev eth0")),
        steady(ip("-4 -d route show table all")),
        steady(ip("-6 -d route show table all")),
    ]
}

in_namespace! {
    fn a_missing_bridge_says_how_to_make_one() {
        let error = preflight("br7").unwrap_err();
        assert!(matches!(error, BridgeError::Missing(_)));
        assert!(error.to_string().contains("scripts/bridge up br7 --nic eth0"));
    }

    fn what_is_no_bridge_is_refused() {
        ip("link add veth7 type veth peer name veth8");
        let Err(BridgeError::NotABridge { name, kind }) = preflight("veth7") else { panic!() };
        assert_eq!((name.as_str(), kind.as_str()), ("veth7", "veth"));
        assert!(matches!(preflight("a-name-that-is-too-long"), Err(BridgeError::BadName(_))));
        assert!(matches!(preflight(""), Err(BridgeError::BadName(_))));
    }

    fn what_keeps_a_bridge_silent_is_warned_of() {
        ip("link add br7 type bridge stp_state 1 forward_delay 1500");
        let bridge = preflight("br7").unwrap();
        let name = || "br7".to_owned();
        let stp = Warning::StpDelay { bridge: name(), seconds: 30 };
        assert_eq!(bridge.warnings, [Warning::Down(name()), Warning::NoPorts(name()), stp]);
        ip("link add veth7 type veth peer name veth8");
        ip("link set veth7 master br7 up");
        ip("link set br7 mtu 1400 up type bridge stp_state 0");
        let bridge = preflight("br7").unwrap();
        assert_eq!((bridge.mtu, bridge.ports, bridge.warnings), (1400, 1, vec![]));
    }

    fn an_interface_becomes_a_port_once_and_of_one_bridge() {
        ip("link add br7 type bridge");
        ip("link add br8 type bridge");
        ip("link add veth7 type veth peer name veth8");
        enslave("br7", "veth7").unwrap();
        enslave("br7", "veth7").unwrap();
        assert!(ip("-o link show master br7").contains("veth7"));
        assert!(matches!(enslave("br8", "veth7"), Err(BridgeError::Busy { .. })));
        assert!(matches!(enslave("br9", "veth7"), Err(BridgeError::Missing(_))));
    }

    fn without_the_capability_the_error_names_it() {
        if std::env::var_os("PONTOON_TEST_POWERLESS").is_some() {
            preflight("br7").unwrap();
            let error = enslave("br7", "veth7").unwrap_err();
            assert!(matches!(error, BridgeError::NotPermitted { .. }), "{error}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"));
            return;
        }
        ip("link add br7 type bridge");
        ip("link add veth7 type veth peer name veth8");
        // A user namespace of its own has no power over a network namespace that is older.
        let status = Command::new("unshare")
            .args(["-U", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "without_the_capability_the_error_names_it", "--nocapture"])
            .env("PONTOON_TEST_POWERLESS", "1")
            .env("PONTOON_TEST_IN_NAMESPACE", "as it is")
            .status()
            .unwrap();
        assert!(status.success());
    }

    fn a_dry_run_changes_nothing_and_prints_every_command() {
        a_host();
        let dir = tempfile::tempdir().unwrap();
        let before = everything();
        let out = bridge(dir.path(), "up br0 --nic eth0 --dry-run");
        succeeds(&out);
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(text.lines().all(|line| line.starts_with("ip ")), "{text}");
        assert!(text.contains("ip -4 route replace default via 10.1.0.1 metric 77 dev br0"));
        assert_eq!(everything(), before);
        assert!(!exists("br0"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    fn up_moves_everything_and_down_restores_it_exactly() {
        a_host();
        let dir = tempfile::tempdir().unwrap();
        let (before, mac) = (everything(), ip("-br link show dev eth0"));
        succeeds(&bridge(dir.path(), "up br0 --nic eth0"));
        let moved = |text: &str| text.replace("eth0", "br0");
        assert_eq!(everything()[1], moved(&before[1]));
        let on_bridge = ip("-o -d address show dev br0");
        for address in ["10.1.0.2/24", "10.1.0.3/24", "10.2.0.3/24 metric 55", "10.3.0.3 peer 10.3.0.9/32", "fd00::2/64"] {
            assert!(on_bridge.contains(address), "{address} in {on_bridge}");
        }
        assert!(!ip("-o address show dev eth0").contains("scope global"));
        let same = ip("-br link show dev br0");
        assert_eq!(same.split_whitespace().nth(2), mac.split_whitespace().nth(2));
        assert_eq!(preflight("br0").map(|b| (b.mtu, b.ports, b.warnings)).unwrap(), (1450, 1, vec![]));
        fails_saying(&bridge(dir.path(), "up br0 --nic eth0"), "undo: scripts/bridge down br0");

        succeeds(&bridge(dir.path(), "down br0"));
        assert_eq!(everything(), before);
        assert!(!exists("br0"));
        fails_saying(&bridge(dir.path(), "down br0"), "was not put up by this script");
    }

    fn a_step_that_fails_is_rolled_back() {
        a_host();
        let dir = tempfile::tempdir().unwrap();
        let fake = dir.path().join("ip");
        let real = String::from_utf8(Command::new("sh").args(["-c", "command -v ip"]).output().unwrap().stdout).unwrap();
        // An `ip` that can't set the very last route.
        let text = format!("#!/bin/sh\ncase \"$*\" in *'fd01::/64'*'dev br0') exit 2 ;; esac\nexec {} \"$@\"\n", real.trim());
        fs::write(&fake, text).unwrap();
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
        let before = everything();
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let out = Command::new(script())
            .args(["up", "br0", "--nic", "eth0"])
            .env("PATH", path)
            .env("PONTOON_STATE_DIR", dir.path().join("state"))
            .env_remove("SSH_CONNECTION")
            .output()
            .unwrap();
        fails_saying(&out, "it has what it had before");
        assert_eq!(everything(), before);
        assert!(!exists("br0"));
    }

    fn a_guest_that_uses_the_bridge_is_not_cut_off_unasked() {
        if !has_tun() { return; }
        a_host();
        let dir = tempfile::tempdir().unwrap();
        succeeds(&bridge(dir.path(), "up br0 --nic eth0"));
        let _guest = TapPort::open(&TapName::default(), Some("br0")).unwrap();
        fails_saying(&bridge(dir.path(), "down br0"), "still using 'br0': vnet0");
        assert!(exists("br0"));
        succeeds(&bridge(dir.path(), "down br0 --yes"));
        assert!(!exists("br0"));
    }

    fn a_login_over_the_interface_asks_for_yes() {
        a_host();
        let dir = tempfile::tempdir().unwrap();
        let up = |args: &str| {
            Command::new(script())
                .args(args.split_whitespace())
                .env("PONTOON_STATE_DIR", dir.path())
                .env("SSH_CONNECTION", "10.1.0.9 50000 10.1.0.3 22")
                .output()
                .unwrap()
        };
        fails_saying(&up("up br0 --nic eth0"), "logged in over eth0 (10.1.0.3)");
        assert!(!exists("br0"));
        succeeds(&up("up br0 --nic eth0 --yes"));
    }

    fn what_the_script_cannot_move_is_refused_untouched() {
        a_host();
        let dir = tempfile::tempdir().unwrap();
        ip("link add br7 type bridge");
        fails_saying(&bridge(dir.path(), "up br7 --nic eth0"), "was not made by this script");
        fails_saying(&bridge(dir.path(), "up br0 --nic eth9"), "there is no interface 'eth9'");
        fails_saying(&bridge(dir.path(), "up br0"), "say which interface");
        fails_saying(&bridge(dir.path(), "up a/b --nic eth0"), "can't be a bridge's name");
        ip("route add 10.9.0.0/16 nexthop via 10.1.0.1 dev eth0 nexthop via 10.2.0.1 dev eth0");
        let before = everything();
        fails_saying(&bridge(dir.path(), "up br0 --nic eth0"), "several next hops");
        assert_eq!(everything(), before);
        ip("link set lan0 master br7");
        fails_saying(&bridge(dir.path(), "up br0 --nic lan0"), "already belongs to 'br7'");
    }

    fn an_interface_that_was_down_goes_down_again() {
        ip("link add eth0 type veth peer name lan0");
        let dir = tempfile::tempdir().unwrap();
        let before = everything();
        succeeds(&bridge(dir.path(), "up br0 --nic eth0"));
        assert!(ip("-o link show dev eth0").contains("master br0"));
        succeeds(&bridge(dir.path(), "down br0"));
        assert_eq!(everything(), before);
        assert!(!ip("-o link show dev eth0").contains("UP"));
    }
}
