//! `pontoon exec` and `pontoon cp` with a stock Debian guest, in the lab: the commands of docs/exec.md as a user types them.
//!
//! What the agent and its client do in detail is tested where they run fast, in `vmm/src/agent/tests`. `scripts/test` builds the
//! image beforehand; without it these tests say so and are skipped.

use pontoon_tests::{debian_image, shell_beside_image, text};

/// What a shell script printed on the emulated host, where the image is, line by line; `None` where that cannot be.
fn in_lab(script: &str) -> Option<Vec<String>> {
    let output = shell_beside_image(&debian_image()?, script);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    Some(String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim_end().to_owned()).collect())
}

#[test]
fn commands_and_files_go_into_a_running_guest_and_out_of_it() {
    let script = r#"
        pontoon run debian --detach --name vm1 --memory 256M --net none -- sleep 1000
        # Nobody waits for the boot: exec does.
        pontoon exec vm1 -- sh -c 'echo to stdout; echo to stderr >&2; exit 7' 2>/tmp/errors
        echo "status $? $(cat /tmp/errors)"
        echo through a pipe | pontoon exec -i -e A=b -w /etc vm1 sh -c 'cat; echo "$A $PWD $USER"'
        pontoon exec vm1 no-such-program 2>/dev/null; echo "status $?"
        pontoon exec vm1 kill -9 0; echo "status $?"
        pontoon exec -t vm1 -- sh -c 'tty; stty size' </dev/null

        head -c 1000000 /dev/urandom >/tmp/big
        mkdir -p /tmp/tree/sub; ln -s sub/nothing /tmp/tree/link; echo small >'/tmp/tree/sub/a file'
        pontoon exec vm1 md5sum </tmp/big | cut -c1-32 >/tmp/sum; md5sum </tmp/big | grep -cf /tmp/sum
        pontoon cp /tmp/big vm1:/root && pontoon cp vm1:/root/big - | cmp - /tmp/big && echo same
        pontoon cp /tmp/tree vm1:/tmp/there && pontoon exec vm1 find /tmp/there | sort
        pontoon cp --json vm1:/tmp/there/. /tmp/back && cat '/tmp/back/sub/a file' && readlink /tmp/back/link
        echo from a stream | pontoon cp - vm1:/tmp/stream && pontoon exec vm1 cat /tmp/stream
        pontoon cp vm1:/no/such /tmp 2>&1; echo "status $?"

        # Ten at once, and the agent is there again after its end.
        for n in 0 1 2 3 4 5 6 7 8 9; do (echo $n | pontoon exec vm1 cat) & done | sort | tr -d '\n'; echo
        pontoon exec vm1 pidof pontoon-agent >/tmp/pids; echo
        pontoon exec -n vm1 sh -c 'kill -9 $(pidof pontoon-agent)' 2>/tmp/errors; echo "status $?"
        pontoon exec vm1 echo again

        pontoon exec no-such-machine true 2>/dev/null; echo "status $?"
        pontoon stop --time 60 vm1; echo "status $?"
        pontoon ps -a
    "#;
    let Some(lines) = in_lab(script) else { return };
    let expected = [
        "vm1",
        "to stdout",
        "status 7 to stderr",
        "through a pipe",
        "b /etc root",
        "status 127",
        "status 137",
        "/dev/pts/0",
        "24 80",
        "1",
        "same",
        "/tmp/there",
        "/tmp/there/link",
        "/tmp/there/sub",
        "/tmp/there/sub/a file",
        r#"{"bytes":6,"files":1,"folders":2,"left_out":0,"links":1}"#,
        "small",
        "sub/nothing",
        "from a stream",
        "pontoon: in the machine: find /no/such: No such file or directory (os error 2)",
        "status 1",
        "0123456789",
        "",
        "status 125",
        "again",
        "status 2",
        "vm1",
        "status 0",
    ];
    assert_eq!(lines[..expected.len()], expected);
    assert!(lines.iter().any(|line| line.contains("the guest powered off")), "{lines:?}");
}
