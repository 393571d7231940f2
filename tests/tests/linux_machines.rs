//! Many machines with stock Debian guests, in the lab: the commands of docs/machines.md as a user types them.
//!
//! `scripts/test` builds the image beforehand; without it these tests say so and are skipped.

use std::process::Output;

use pontoon_tests::{Pontoon, debian_image, have_lab, shell_beside_image, text};

/// A shell script on the emulated host, where the image is; `None` where that cannot be.
fn in_lab(script: &str) -> Option<Output> {
    let image = debian_image()?;
    // What is waited for is tried again until it is there, or the lab's time is up.
    let script =
        format!("set -e\nuntil_so() {{ until \"$@\" >/dev/null 2>&1; do sleep 0.3; done; }}\n{script}");
    Some(shell_beside_image(&image, &script))
}

#[test]
fn limits_are_the_kernels_and_go_with_the_machine() {
    if !have_lab() {
        return;
    }
    let script = r#"
        set -e
        start() {
            pontoon run probe -d --memory 64M --name a --cpu-limit 0.5 --cpu-share 20 --cmdline 'probe.do=wait=60000'
        }
        gone() { test -e /sys/fs/cgroup/pontoon-a && echo "$1: still there" || echo "$1: gone"; }
        start
        cat /sys/fs/cgroup/pontoon-a/cpu.max /sys/fs/cgroup/pontoon-a/cpu.weight
        pid() { pontoon ps --json | sed 's/.*"pid":\([0-9]*\).*/\1/'; }
        # KVM has a kernel thread in there, too.
        grep -qx "$(pid)" /sys/fs/cgroup/pontoon-a/cgroup.procs
        pontoon kill a
        gone ended
        start
        kill -9 "$(pid)"
        until pontoon ps -a | grep 'ended (137)'; do sleep 0.1; done
        gone killed
    "#;
    let output = Pontoon::new(["lab", "--timeout", "100", "--", "sh", "-c", script]).output();
    says(&output, &["50000 100000\n20\n", "ended: gone", "killed: gone"]);
}

#[test]
fn machines_on_a_bridge_are_shown_with_their_taps_which_go_with_them() {
    if !have_lab() {
        return;
    }
    let script = r#"
        set -e
        ip link add br0 type bridge
        ip link set br0 up
        for name in a b; do
            pontoon run probe -d --memory 64M --name $name --net tap:br0 --cmdline 'probe.do=static=10.9.0.2/24;wait=60000'
        done
        pontoon net ls
        pontoon net inspect b
        pontoon nc a 22 </dev/null || echo "nc: $?"
        pontoon kill a b
        ip -o link | grep vnet || echo no TAP is left
    "#;
    let output = Pontoon::new(["lab", "--timeout", "100", "--", "sh", "-c", script]).output();
    let rows = ["tap:br0  -       vnet0 vnet1  a b", "vnet1      bridge  br0     virtio  52:54:00:"];
    says(&output, &[&rows[..], &["nc: 2", "no TAP is left"]].concat());
}

/// Asserts that the script went well and printed all of these.
#[track_caller]
fn says(output: &Output, facts: &[&str]) {
    let all = text(output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for fact in facts {
        assert!(said.contains(fact), "'{fact}' is missing\n{all}");
    }
}

#[test]
fn a_debian_guest_serves_nc_and_is_shown_with_its_lease() {
    let script = r#"
        pontoon run debian -d --name web -- sh -c 'mkdir /www; echo hello from $(hostname) >/www/index.html; httpd -f -h /www'
        # The address comes with the guest's own DHCP client.
        until_so sh -c 'pontoon net inspect web | grep 192.168.122'
        get() { printf 'GET /index.html HTTP/1.0\r\n\r\n' | pontoon nc "$1" 80; }
        until_so sh -c "printf 'GET / HTTP/1.0\r\n\r\n' | pontoon nc web 80"
        get web
        get "$(pontoon ps --json | sed 's/.*"address":"\([0-9.]*\)".*/\1/')"
        pontoon nc web 81 </dev/null || echo "closed: $?"
        pontoon net inspect web
        pontoon kill web
    "#;
    let Some(output) = in_lab(script) else { return };
    let facts =
        ["hello from web", "closed: 1", "nat", "192.168.122.0/24", "virtio", "52:54:00:", "from the guest"];
    says(&output, &facts);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).matches("hello from web").count(),
        2,
        "{}",
        text(&output)
    );
}

#[test]
fn a_guest_that_is_stopped_shuts_down_itself() {
    let script = r#"
        pontoon run debian -d --name a
        until_so sh -c 'pontoon logs a | grep "eth0 192.168.122"'
        pontoon stop --time 60 a
        pontoon run debian -d --name b --memory 256M -- sh -c 'echo it works; exec sleep 600'
        until_so sh -c 'pontoon logs b | grep "it works"'
        pontoon stop --time 60 b
        pontoon ps -a
        pontoon ps -a --json
    "#;
    let Some(output) = in_lab(script) else { return };
    says(
        &output,
        &[
            "stopped (0): the guest powered off, as it was asked to",
            "stopped (143): the guest powered off, as it was asked to",
            "\"stopped\":true",
        ],
    );
}

#[test]
fn detached_debian_guests_are_listed_logged_typed_to_and_end_by_themselves() {
    let script = r#"
        pontoon run debian --detach --name shell
        pontoon run debian -d --memory 256M -- sh -c 'echo said by the guest; exit 9'
        pontoon ps
        until_so sh -c 'pontoon ps -a | grep "ended (9)"'
        pontoon logs vm1
        # What is typed before the guest is up waits for it.
        (echo 'echo marker $((6 * 7))'
         until pontoon logs shell | grep -q '^marker 42'; do sleep 0.3; done
         echo poweroff) | pontoon console shell >/dev/null
        pontoon logs shell | grep -c '^marker 42'
        until_so sh -c 'pontoon ps -a | grep "ended (0)"'
        pontoon ps -a
    "#;
    let Some(output) = in_lab(script) else { return };
    says(
        &output,
        &["shell", "512M", "256M", "said by the guest", "\n1\n", "ended (0): the guest powered off"],
    );
}
