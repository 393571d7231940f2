//! What only a host of one's own may be put through, in the lab: its clock is set, it sleeps, it delegates its CPUs.

use std::process::Output;

use pontoon_tests::{Pontoon, have_lab, text};

/// A shell script on the emulated host; `None` where that cannot be.
fn in_lab(script: &str) -> Option<Output> {
    if !have_lab() {
        return None;
    }
    // What is waited for is tried again until it is there, or the lab's time is up.
    let script =
        format!("set -e\nuntil_so() {{ until \"$@\" >/dev/null 2>&1; do sleep 0.1; done; }}\n{script}");
    Some(Pontoon::new(["lab", "--timeout", "60", "--", "sh", "-c", &script]).output())
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

/// A machine `a` with a connection into its guest: `talk WORD` says a word there and waits for its echo. `within KEY LOW HIGH FILE`
/// says whether a number of a JSON text is in its bounds.
const TALK: &str = r#"
pontoon run probe -d --memory 64M --name a --timeout 600 --cmdline 'probe.do=dhcp;listen=7,count=1;wait=600000'
mkfifo typed
pontoon nc a 7 <typed >echo &
exec 3>typed
talk() { echo "$1" >&3; until_so grep -x "$1" echo; }
within() {
    n=$(sed "s/.*\"$1\":\([0-9]*\).*/\1/" "$4")
    [ "$n" -ge "$2" ] && [ "$n" -le "$3" ] && echo "$1 is within $2 and $3" || echo "$1 is $n"
}
look() {
    pontoon ps --json >ps
    pontoon net inspect a --json >net
    within uptime_s 0 50 ps
    within expires_s 3500 3600 net
    # One that hangs can't be asked: then the uptime is that of its process.
    kill -STOP "$(sed 's/.*"pid":\([0-9]*\).*/\1/' ps)"
    pontoon ps --json >ps
    within uptime_s 0 50 ps
    kill -CONT "$(sed 's/.*"pid":\([0-9]*\).*/\1/' ps)"
}
talk before
"#;

#[test]
fn a_clock_that_is_set_by_days_ends_nothing_and_prolongs_nothing() {
    let script = format!(
        r#"{TALK}
        jump() {{ date -s "@$(($(date +%s) + $1 * 86400))" >/dev/null; }}
        jump 3
        talk 'three days later'
        look
        jump -6
        talk 'three days before'
        look
        # Times that are waited for after the jump, and across one.
        pontoon run probe -d --memory 64M --name b --timeout 3 --cmdline 'probe.do=static=192.168.122.9/24;wait=60000'
        jump -3
        until_so sh -c 'pontoon ps -a | grep "b .*ended (124)"'
        echo b has timed out
        pontoon stop --time 1 a
        pontoon ps -a
        "#
    );
    let Some(output) = in_lab(&script) else { return };
    says(&output, &["b has timed out", "stopped (143): the guest did not shut down in time"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.matches("uptime_s is within").count(), 4, "{}", text(&output));
    assert_eq!(said.matches("expires_s is within").count(), 2, "{}", text(&output));
}

#[test]
fn a_host_that_sleeps_and_wakes_finds_its_machines_connections_and_leases() {
    let script = format!(
        r#"{TALK}
        # Sleeps until its clock wakes it.
        grep -q mem /sys/power/state
        echo 0 >/sys/class/rtc/rtc0/wakealarm
        echo +3 >/sys/class/rtc/rtc0/wakealarm
        echo mem >/sys/power/state
        dmesg | grep -q 'PM: suspend exit'
        talk 'after the sleep'
        look
        pontoon kill a
        "#
    );
    let Some(output) = in_lab(&script) else { return };
    says(&output, &["uptime_s is within", "expires_s is within"]);
}

#[test]
fn a_user_whose_session_is_delegated_limits_machines_and_one_without_is_told() {
    let script = r#"
        session=/sys/fs/cgroup/session
        echo +cpu >/sys/fs/cgroup/cgroup.subtree_control
        mkdir $session $session/shell
        mkdir -m 700 -p /run/user/1000
        chown user /run/user/1000
        as_user() { su user -s /bin/sh -c "XDG_RUNTIME_DIR=/run/user/1000 $*"; }
        start() {
            as_user "pontoon run probe -d --memory 64M --name a --cpu-limit 0.1 --cpu-share 20 --cmdline 'probe.do=$1'"
        }
        echo $$ >$session/shell/cgroup.procs
        start 'static=192.168.122.9/24;wait=60000' 2>told
        grep -o 'without effect.*delegated' told
        as_user pontoon ps
        as_user pontoon kill a
        # What a session's manager does to delegate.
        chown user $session $session/shell
        for file in cgroup.procs cgroup.threads cgroup.subtree_control; do chown user $session/$file $session/shell/$file; done
        start 'static=192.168.122.9/24;end=hang'
        cat $session/pontoon-a/cpu.max $session/pontoon-a/cpu.weight
        until_so sh -c "grep 'nr_throttled [1-9]' $session/pontoon-a/cpu.stat"
        echo it is held back
        as_user pontoon kill a
        [ -e $session/pontoon-a ] || echo the group is gone
    "#;
    let Some(output) = in_lab(script) else { return };
    says(
        &output,
        &["without effect", "running", "10000 100000\n20\n", "it is held back", "the group is gone"],
    );
}
