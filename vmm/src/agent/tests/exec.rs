//! Commands: streams, statuses, signals, terminals, and what is left behind.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sha2::{Digest as _, Sha256};

use super::{Agent, sh, text};
use crate::agent::{AgentError, Command, Streams};

/// Nothing that is waited for takes this long; it only ends what hangs.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

fn first_line(from: impl std::io::Read) -> String {
    let mut line = String::new();
    BufReader::new(from).read_line(&mut line).unwrap();
    line.trim().to_owned()
}

/// A process of this host, to be waited for though it is not our child.
fn watch(pid: &str) -> OwnedFd {
    pidfd_open(Pid::from_raw(pid.parse().unwrap()).unwrap(), PidfdFlags::empty()).unwrap()
}

fn wait_for_end(process: &OwnedFd) {
    let ended = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&PATIENCE)).unwrap();
    assert_eq!(ended, 1, "it still lives");
}

/// Waits for what comes a moment later; the deadline only ends what hangs.
fn eventually(is_so: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "it has not come to pass");
        std::thread::yield_now();
    }
}

#[test]
fn streams_are_kept_apart_and_the_status_is_the_commands() {
    let agent = Agent::start();
    let output = agent.sh("echo to stdout; echo to stderr >&2; cat; exit 42");
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("to stdout\n", "to stderr\n"));
    assert_eq!((output.status.code(), output.status.signal(), output.status.success()), (42, None, false));
    assert!(agent.sh("true").status.success());
    assert_eq!(agent.client.ping().unwrap(), "0.1.0");
}

#[test]
fn what_does_not_start_has_a_shells_status_and_a_reason() {
    let agent = Agent::start();
    let status = |command: &Command| match agent.client.output(command, 99) {
        Err(AgentError::NotStarted { status, reason, .. }) => (status, reason),
        other => panic!("{other:?}"),
    };
    let (code, reason) = status(&Command::new("no-such-program"));
    assert_eq!(code, 127);
    assert!(reason.contains("run it: No such file"), "{reason}");
    assert_eq!(status(&Command::new("/no/such/program")).0, 127);
    assert_eq!(status(&Command::new("")).0, 127);
    assert_eq!(status(&Command::new("/etc/passwd")).0, 126);
    assert_eq!(status(&Command::new("/etc")).0, 126);
    let (code, reason) = status(Command::new("true").current_dir("/no/such/folder"));
    assert_eq!(code, 126);
    assert!(reason.contains("enter its folder"), "{reason}");
    let (code, reason) = status(Command::new("true").user("nobody-of-this-name"));
    assert_eq!(code, 126);
    assert!(reason.contains("/etc/passwd does not have"), "{reason}");
}

#[test]
fn a_signal_reaches_the_whole_group_and_is_its_status() {
    let agent = Agent::start();
    assert_eq!(agent.sh("kill -9 $$").status.signal(), Some(9));
    let mut process = agent.client.exec(&sh("sleep 1000 & echo $!; wait")).unwrap();
    let sleeper = watch(&first_line(process.stdout.take().unwrap()));
    process.signal(15).unwrap();
    let status = process.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (143, Some(15)));
    wait_for_end(&sleeper);
}

#[test]
fn environment_and_folder_are_the_requests_over_a_logins() {
    let agent = Agent::start();
    let mut command = sh("echo \"$PATH|$HOME|$NASTY|$TERM|$(pwd)\"; env | wc -l");
    command.env("NASTY", "a=b\n'\u{fc}").env("HOME", "/elsewhere").current_dir("/usr");
    let output = agent.client.output(&command, 4096).unwrap();
    let default = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let expected = format!("{default}|/elsewhere|a=b\n'\u{fc}|dumb|/usr\n");
    assert!(text(&output.stdout).starts_with(&expected), "{}", text(&output.stdout));
    // The agent's own environment, cargo's here, stays out.
    assert_eq!(agent.sh("echo $CARGO$PONTOON_BIN").stdout, b"\n");
    let mut command = Command::new("found-in-path");
    std::os::unix::fs::symlink("/bin/echo", agent.path("found-in-path")).unwrap();
    command.arg("hello").env("PATH", format!("/no/such:{}", agent.dir.path().display()));
    assert_eq!(agent.client.output(&command, 99).unwrap().stdout, b"hello\n");
}

#[test]
fn a_command_runs_as_the_user_that_was_asked_for() {
    if !rustix::process::geteuid().is_root() {
        return crate::skip::skip("only root can become somebody else");
    }
    let agent = Agent::start();
    let mut command = sh("id -u; id -g; echo $USER; cat /proc/self/status | grep ^Groups");
    let output = agent.client.output(command.user("daemon"), 999).unwrap();
    let lines: Vec<&str> = text(&output.stdout).lines().map(str::trim_end).collect();
    assert_eq!(lines, ["1", "1", "daemon", "Groups:\t1"]);
    assert_eq!(agent.client.output(sh("id -u").user("4567"), 99).unwrap().stdout, b"4567\n");
}

#[test]
fn sixty_four_megabytes_pass_through_a_command_unharmed() {
    const CHUNK: usize = 1 << 16;
    const CHUNKS: usize = 1024;
    let agent = Agent::start();
    let mut process = agent.client.exec(&Command::new("cat")).unwrap();
    let (mut stdin, mut stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
    let writer = std::thread::spawn(move || {
        let (mut hash, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
        for round in 0..CHUNKS {
            for (at, byte) in chunk.iter_mut().enumerate() {
                *byte = (at * 31 + round * 7 + at / 251) as u8;
            }
            hash.update(&chunk);
            stdin.write_all(&chunk).unwrap();
        }
        hash.finalize()
    });
    let (mut hash, mut length, mut chunk) = (Sha256::new(), 0, vec![0; 70_000]);
    loop {
        let got = stdout.read(&mut chunk).unwrap();
        if got == 0 {
            break;
        }
        hash.update(&chunk[..got]);
        length += got;
    }
    assert_eq!(length, CHUNK * CHUNKS);
    assert_eq!(hash.finalize(), writer.join().unwrap());
    assert!(process.wait().unwrap().success());
}

#[test]
fn errors_flow_while_nobody_reads_the_output() {
    let agent = Agent::start();
    let mut process = agent.client.exec(&sh("yes & echo still here >&2; wait")).unwrap();
    assert_eq!(first_line(process.stderr.take().unwrap()), "still here");
    process.signal(9).unwrap();
    let mut rest = Vec::new();
    process.stdout.take().unwrap().read_to_end(&mut rest).unwrap();
    assert_eq!(process.wait().unwrap().signal(), Some(9));
}

#[test]
fn a_reader_that_goes_is_a_broken_pipe_for_the_command() {
    let agent = Agent::start();
    let mut process = agent.client.exec(&Command::new("yes")).unwrap();
    assert_eq!(first_line(process.stdout.take().unwrap()), "y");
    assert_eq!(process.wait().unwrap().signal(), Some(13));
}

#[test]
fn a_command_that_closes_its_input_is_a_broken_pipe_for_the_writer() {
    let agent = Agent::start();
    let mut process = agent.client.exec(&sh("exec 0<&-; echo closed; sleep 1000")).unwrap();
    assert_eq!(first_line(process.stdout.take().unwrap()), "closed");
    let mut stdin = process.stdin.take().unwrap();
    let error = loop {
        if let Err(error) = stdin.write_all(&[b'x'; 4096]) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn what_a_command_leaves_behind_does_not_hold_it_up() {
    let agent = Agent::start();
    // Both keep the streams; one writes without end.
    let output = agent.client.output(&sh("sleep 1000 & (exec yes) & echo $$; exit 3"), 1 << 20).unwrap();
    assert_eq!(output.status.code(), 3);
    let pid = text(&output.stdout).lines().find(|line| *line != "y").unwrap().to_owned();
    let killed = std::process::Command::new("kill").args(["-9", "--", &format!("-{pid}")]).status().unwrap();
    assert!(killed.success());
}

#[test]
fn all_that_was_written_before_the_end_arrives() {
    let agent = Agent::start();
    let output = agent.sh("head -c 60000 /dev/zero; head -c 50000 /dev/zero >&2");
    assert_eq!((output.stdout.len(), output.stderr.len()), (60_000, 50_000));
    let output =
        agent.client.output(sh("head -c 3000 /dev/zero | tr '\\0' x").terminal(24, 80), 99_999).unwrap();
    assert_eq!(output.stdout.len(), 3000);
}

#[test]
fn a_terminal_has_its_size_and_follows_it() {
    let agent = Agent::start();
    let script = "tty; stty size; trap 'stty size; exit 7' WINCH; echo ready; sleep 100 & wait";
    let mut process = agent.client.exec(sh(script).terminal(33, 101)).unwrap();
    let mut lines =
        BufReader::new(process.stdout.take().unwrap()).lines().map(|line| line.unwrap().trim().to_owned());
    assert!(lines.next().unwrap().starts_with("/dev/pts/"));
    assert_eq!(lines.next().unwrap(), "33 101");
    assert_eq!(lines.next().unwrap(), "ready");
    process.resize(50, 132).unwrap();
    assert_eq!(lines.next().unwrap(), "50 132");
    assert_eq!(process.wait().unwrap().code(), 7);
}

#[test]
fn keys_of_a_terminal_are_signals_and_its_end_of_input_is_one() {
    let agent = Agent::start();
    let mut process = agent.client.exec(sh("echo ready; cat; echo \"status $?\"").terminal(24, 80)).unwrap();
    let mut stdout = BufReader::new(process.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    process.stdin.as_mut().unwrap().write_all(b"typed\n").unwrap();
    process.stdin = None; // ^D: cat ends, and so does the shell
    stdout.read_to_string(&mut line).unwrap();
    assert_eq!(line, "ready\r\ntyped\r\ntyped\r\nstatus 0\r\n");
    assert!(process.wait().unwrap().success());

    let mut process = agent.client.exec(sh("echo ready; exec sleep 1000").terminal(24, 80)).unwrap();
    assert_eq!(first_line(process.stdout.take().unwrap()), "ready");
    process.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    assert_eq!(process.wait().unwrap().signal(), Some(2));
}

#[test]
fn a_client_that_vanishes_hangs_up() {
    let agent = Agent::start();
    let mut process = agent.client.exec(&sh("echo $$; exec sleep 1000")).unwrap();
    let sleeper = watch(&first_line(process.stdout.take().unwrap()));
    drop(process);
    wait_for_end(&sleeper);
    // One that ignores SIGHUP, and a terminal's.
    let mut stubborn = sh("trap '' HUP; echo $$; while :; do sleep 1000; done");
    for command in [stubborn.clone(), stubborn.terminal(24, 80).clone()] {
        let mut process = agent.client.exec(&command).unwrap();
        let shell = watch(&first_line(process.stdout.take().unwrap()));
        drop(process);
        wait_for_end(&shell);
    }
}

#[test]
fn a_command_that_takes_too_long_or_writes_too_much_is_ended() {
    let agent = Agent::start();
    let mut slow = sh("echo $$ >&2; exec sleep 1000");
    let error = agent.client.output(slow.timeout(Duration::from_millis(100)), 99).unwrap_err();
    assert!(matches!(error, AgentError::TimedOut { .. }), "{error}");
    let error = agent.client.output(&Command::new("yes"), 1 << 20).unwrap_err();
    assert!(matches!(error, AgentError::OutputLimit { limit: 1_048_576 }), "{error}");
}

#[test]
fn nothing_of_a_hundred_requests_is_left() {
    let agent = Agent::start();
    let before = agent.descriptors();
    std::thread::scope(|scope| {
        for worker in 0..10_u8 {
            let client = &agent.client;
            scope.spawn(move || {
                for round in 0..10_u8 {
                    let input = vec![worker * 10 + round; 100_000];
                    let output = client.output_of(&Command::new("cat"), input.clone(), 1 << 20).unwrap();
                    assert_eq!(output.stdout, input);
                }
            });
        }
    });
    let children = format!("/proc/{0}/task/{0}/children", agent.process.id());
    eventually(|| std::fs::read_to_string(&children).unwrap().is_empty() && agent.descriptors() == before);
}

#[test]
fn more_requests_than_the_limit_are_told_so() {
    let agent = Agent::start();
    let held: Vec<_> = (0..128).map(|_| agent.client.exec(&Command::new("cat")).unwrap()).collect();
    let error = agent.client.ping().unwrap_err();
    assert!(matches!(&error, AgentError::Guest(text) if text.contains("128 requests already")), "{error}");
    drop(held);
    // Requests end when they see the connection's end, a moment after the client.
    eventually(|| agent.client.ping().is_ok());
}

#[test]
fn a_command_can_be_attached_to_descriptors_of_the_callers() {
    let agent = Agent::start();
    let (stdin, mut feed) = std::io::pipe().unwrap();
    let (mut said, stdout) = std::io::pipe().unwrap();
    let (mut complained, stderr) = std::io::pipe().unwrap();
    feed.write_all(b"from a pipe").unwrap();
    drop(feed);
    let streams = Streams {
        stdin: Some(stdin.as_fd()),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        resized: None,
        signals: Vec::new(),
    };
    let status = agent.client.attach(&sh("cat; echo complaint >&2; exit 5"), &streams).unwrap();
    assert_eq!(status.code(), 5);
    drop((stdout, stderr));
    let (mut out, mut err) = (String::new(), String::new());
    said.read_to_string(&mut out).unwrap();
    complained.read_to_string(&mut err).unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("from a pipe", "complaint\n"));
}

#[test]
fn an_agent_for_tests_does_not_power_anything_off() {
    let agent = Agent::start();
    let error = agent.client.power_off().unwrap_err();
    assert!(error.to_string().contains("started for a test"), "{error}");
}

#[test]
fn what_can_not_be_asked_is_refused_before_it_is_sent() {
    let agent = Agent::start();
    for command in
        [Command::new("a\0b"), sh(&"x".repeat(300 << 10)), Command::new("true").env("", "x").clone()]
    {
        let error = agent.client.output(&command, 99).unwrap_err();
        assert!(matches!(error, AgentError::Request(_)), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn arguments_arrive_as_they_were_given(arguments in proptest::collection::vec("[^\0]{0,40}", 0..20)) {
        let agent = AGENT.with(|agent| agent.client.clone());
        let mut command = sh("for a in \"$@\"; do printf '%s\\0' \"$a\"; done");
        command.arg("sh").args(arguments.clone());
        let output = agent.output(&command, 1 << 20).unwrap();
        let expected: Vec<u8> = arguments.iter().flat_map(|text| text.bytes().chain([0])).collect();
        prop_assert_eq!(output.stdout, expected);
    }
}

thread_local! {
    static AGENT: Agent = Agent::start();
}
