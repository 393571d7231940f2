//! Machines that are claims of this process, or of threads of it: a `flock` is held by an open file, so they exclude one
//! another as processes do.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Barrier;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn runtime() -> (tempfile::TempDir, Runtime) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::at(dir.path().join("pontoon")).unwrap();
    (dir, runtime)
}

fn name(text: &str) -> MachineName {
    text.parse().unwrap()
}

fn detached() -> State {
    State { detached: true, ..State::default() }
}

fn names(runtime: &Runtime) -> Vec<String> {
    runtime.list().unwrap().iter().map(|entry| entry.name().to_string()).collect()
}

/// What SIGKILL leaves: the files, and no lock.
fn killed(mut claim: Claim) {
    claim.update(|state| state.state = Phase::Running).unwrap();
    claim.crash();
}

#[test]
fn a_name_is_taken_while_its_machine_lives_and_free_afterwards() {
    let (_dir, runtime) = runtime();
    let claim = runtime.claim(&name("web"), State::default()).unwrap();
    let refused = runtime.claim(&name("web"), State::default()).unwrap_err();
    assert!(matches!(&refused, RuntimeError::Taken { pid: Some(pid), .. } if *pid == std::process::id()));
    assert!(refused.to_string().contains("pontoon stop web"), "{refused}");
    claim.end(0, "the guest powered off");
    runtime.claim(&name("web"), State::default()).unwrap();
}

#[test]
fn of_many_who_claim_one_name_at_once_exactly_one_gets_it() {
    let (_dir, runtime) = runtime();
    let (start, done) = (Barrier::new(9), Barrier::new(9));
    std::thread::scope(|scope| {
        let claimers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    let claim = runtime.claim(&name("x"), State::default());
                    done.wait();
                    claim.is_ok()
                })
            })
            .collect();
        // Somebody who looks all the time is never taken for a machine.
        start.wait();
        for _ in 0..50 {
            runtime.list().unwrap();
        }
        done.wait();
        assert_eq!(claimers.into_iter().map(|c| c.join().unwrap()).filter(|won| *won).count(), 1);
    });
}

#[test]
fn a_machine_without_a_name_takes_the_first_free_number() {
    let (_dir, runtime) = runtime();
    let first = runtime.claim_numbered(State::default()).unwrap();
    let second = runtime.claim_numbered(State::default()).unwrap();
    assert_eq!((first.name().as_str(), second.name().as_str()), ("vm1", "vm2"));
    first.end(0, "");
    assert_eq!(runtime.claim_numbered(State::default()).unwrap().name().as_str(), "vm1");
}

#[test]
fn a_machine_in_the_foreground_leaves_nothing_and_a_detached_one_its_log_and_last_state() {
    let (_dir, runtime) = runtime();
    let front = runtime.claim(&name("front"), State::default()).unwrap();
    let back = runtime.claim(&name("back"), detached()).unwrap();
    fs::write(back.file(CONSOLE_LOG), "hello").unwrap();
    fs::write(back.file(CONTROL_SOCKET), "").unwrap();
    assert_eq!(names(&runtime), ["back", "front"]);
    front.end(0, "");
    back.end(7, "the guest ended with status 7");
    let left = runtime.list().unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!((left[0].condition(), left[0].is_alive()), (Condition::Ended, false));
    let exit = left[0].state().unwrap().exit.clone().unwrap();
    assert_eq!((exit.status, exit.reason.as_str()), (7, "the guest ended with status 7"));
    assert_eq!(fs::read_to_string(left[0].file(CONSOLE_LOG)).unwrap(), "hello");
    assert!(!left[0].file(CONTROL_SOCKET).exists());
    assert!(matches!(runtime.find_alive(&name("back")), Err(RuntimeError::NotRunning(_))));
    assert!(matches!(runtime.find(&name("front")), Err(RuntimeError::Unknown(_))));
    // The next machine of that name begins with an empty folder.
    let again = runtime.claim(&name("back"), detached()).unwrap();
    assert!(!again.file(CONSOLE_LOG).exists() && again.state().exit.is_none());
}

#[test]
fn a_machine_that_did_not_get_to_run_leaves_nothing() {
    let (_dir, runtime) = runtime();
    drop(runtime.claim(&name("a"), detached()).unwrap());
    assert!(names(&runtime).is_empty());
    assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 1, "the outer lock alone");
}

#[test]
fn what_a_killed_machine_left_is_tidied_up_by_whoever_looks_next() {
    let (_dir, runtime) = runtime();
    killed(runtime.claim(&name("front"), State::default()).unwrap());
    let back = runtime.claim(&name("back"), detached()).unwrap();
    fs::write(back.file(CONSOLE_LOG), "last words").unwrap();
    fs::write(back.file(VSOCK_SOCKET), "").unwrap();
    killed(back);
    let left = runtime.list().unwrap();
    assert_eq!(left.len(), 1);
    let exit = left[0].state().unwrap().exit.clone().unwrap();
    assert_eq!(exit.status, 137);
    assert!(exit.reason.contains("killed"), "{}", exit.reason);
    assert!(left[0].file(CONSOLE_LOG).exists() && !left[0].file(VSOCK_SOCKET).exists());
    assert!(!runtime.path().join("front").exists());
    // A claim needs no tidying beforehand.
    killed(runtime.claim(&name("front"), State::default()).unwrap());
    runtime.claim(&name("front"), State::default()).unwrap();
}

#[test]
fn a_dead_machines_process_is_never_looked_up() {
    let (_dir, runtime) = runtime();
    let claim = runtime.claim(&name("a"), detached()).unwrap();
    let entry = runtime.find_alive(&name("a")).unwrap();
    let process = entry.process().unwrap();
    assert_eq!(process.pid(), std::process::id());
    assert!(!process.wait(Duration::ZERO));
    // Its number is still a living process's: ours.
    killed(claim);
    assert!(matches!(entry.process(), Err(RuntimeError::NotRunning(_))));
}

#[test]
fn the_machines_that_ended_first_are_forgotten() {
    let (_dir, runtime) = runtime();
    for n in 0..ENDED_MAX + 5 {
        runtime.claim(&name(&format!("old{n}")), detached()).unwrap().end(0, "");
    }
    let _living = runtime.claim(&name("new"), detached()).unwrap();
    assert_eq!(names(&runtime).len(), ENDED_MAX + 1);
}

/// Changes what the state of a machine that has ended says of the time.
fn ended_at(runtime: &Runtime, machine: &str, at: u64) {
    let dir = runtime.path().join(machine);
    let mut state = State::read(&dir).unwrap();
    state.exit.as_mut().unwrap().at = at;
    state.write(&dir).unwrap();
}

#[test]
fn machines_that_ended_before_the_clock_was_set_back_are_forgotten_first() {
    let (_dir, runtime) = runtime();
    let end = |machine: &str| runtime.claim(&name(machine), detached()).unwrap().end(0, "");
    for n in 0..ENDED_MAX {
        end(&format!("old{n}"));
        ended_at(&runtime, &format!("old{n}"), u64::MAX - n as u64);
    }
    end("last");
    let _living = runtime.claim(&name("new"), detached()).unwrap();
    let left = names(&runtime);
    assert!(left.len() == ENDED_MAX + 1 && left.contains(&"last".to_owned()), "{left:?}");
}

#[test]
fn an_age_is_told_by_a_clock_that_nobody_sets() {
    let (_dir, runtime) = runtime();
    let mut claim = runtime.claim(&name("a"), detached()).unwrap();
    let age = || runtime.find(&name("a")).unwrap().age();
    for set in [0, u64::MAX] {
        claim.update(|state| state.started_at = set).unwrap();
        assert!(age().is_some_and(|age| age < Duration::from_secs(600)), "{:?}", age());
    }
    claim.update(|state| state.started_monotonic = Some(u64::MAX)).unwrap();
    assert_eq!(age(), Some(Duration::ZERO));
    claim.update(|state| state.started_monotonic = None).unwrap();
    assert_eq!(age(), None, "a machine of an older version");
    claim.end(0, "");
    assert_eq!(age(), None);
}

#[test]
fn an_end_that_was_asked_for_is_a_stop() {
    let (_dir, runtime) = runtime();
    runtime.claim(&name("a"), detached()).unwrap().end_stopped(0, "the guest powered off");
    assert_eq!(runtime.find(&name("a")).unwrap().condition(), Condition::Stopped);
    runtime.claim(&name("a"), detached()).unwrap().end(0, "the guest powered off");
    assert_eq!(runtime.find(&name("a")).unwrap().condition(), Condition::Ended);
}

#[test]
fn a_removal_that_was_interrupted_is_finished_by_whoever_looks_next() {
    let (_dir, runtime) = runtime();
    let half = runtime.path().join(".gone-4711");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("lock"), "").unwrap();
    assert!(names(&runtime).is_empty() && !half.exists());
}

#[test]
fn machines_that_come_and_go_do_not_disturb_those_who_look() {
    let (_dir, runtime) = runtime();
    let stay = runtime.claim(&name("stay"), State::default()).unwrap();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|n| {
                let runtime = &runtime;
                scope.spawn(move || {
                    for round in 0..60 {
                        let state = if n == 0 { detached() } else { State::default() };
                        let claim = runtime.claim(&name(&format!("churn{n}")), state).unwrap();
                        match round % 3 {
                            0 => drop(claim),
                            1 => claim.end(0, "done"),
                            _ => killed(claim),
                        }
                    }
                })
            })
            .collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            let list = runtime.list().unwrap();
            assert!(list.iter().any(|entry| entry.name() == stay.name() && entry.is_alive()));
            assert!(list.iter().all(|entry| entry.condition() != Condition::Unreadable));
        }
    });
}

#[test]
fn a_folder_that_is_not_ours_alone_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("pontoon");
    let refusal = || Runtime::at(&base).unwrap_err();
    symlink(dir.path(), &base).unwrap();
    assert!(matches!(refusal(), RuntimeError::NotAFolder(_)));
    fs::remove_file(&base).unwrap();
    fs::write(&base, "").unwrap();
    assert!(matches!(refusal(), RuntimeError::NotAFolder(_)));
    fs::remove_file(&base).unwrap();
    fs::create_dir(&base).unwrap();
    fs::set_permissions(&base, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(refusal(), RuntimeError::Mode { mode: 0o755, .. }));
    fs::set_permissions(&base, fs::Permissions::from_mode(0o700)).unwrap();
    Runtime::at(&base).unwrap();
    if std::os::unix::fs::chown(&base, Some(12345), None).is_ok() {
        assert!(matches!(refusal(), RuntimeError::Owner { owner: 12345, .. }));
    }
    let nowhere = Runtime::at(dir.path().join("no/such/folder")).unwrap_err();
    assert!(
        matches!(nowhere, RuntimeError::Unusable { .. }) && nowhere.to_string().contains("XDG_RUNTIME_DIR")
    );
}

#[test]
fn a_path_that_no_socket_can_have_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::at(dir.path().join("a".repeat(80))).unwrap();
    let refused = runtime.claim(&name("web"), State::default()).unwrap_err();
    assert!(matches!(refused, RuntimeError::PathTooLong { max: 107, .. }));
    assert!(!runtime.path().join("web").exists());
}

#[test]
fn what_is_no_machine_is_neither_listed_nor_removed() {
    let (_dir, runtime) = runtime();
    fs::create_dir(runtime.path().join("notes")).unwrap();
    fs::write(runtime.path().join("notes/text"), "mine").unwrap();
    fs::write(runtime.path().join("file"), "").unwrap();
    fs::create_dir(runtime.path().join("not_a_name")).unwrap();
    assert!(names(&runtime).is_empty());
    assert!(runtime.path().join("notes/text").exists());
}

/// A living machine whose state reads `text`.
fn reading(text: &[u8]) -> Condition {
    let (_dir, runtime) = runtime();
    let claim = runtime.claim(&name("a"), State::default()).unwrap();
    fs::write(claim.file("state.json"), text).unwrap();
    let list = runtime.list().unwrap();
    assert!(list[0].is_alive());
    list[0].condition()
}

#[test]
fn a_state_of_another_version_is_read_as_far_as_it_goes() {
    assert_eq!(reading(br#"{"schema":1,"state":"running","name":"a","new":[1,{}]}"#), Condition::Running);
    assert_eq!(reading(br#"{"schema":1,"state":"hibernating"}"#), Condition::Running);
    assert_eq!(reading(b"{}"), Condition::Starting);
    assert_eq!(reading(br#"{"schema":2,"state":"running"}"#), Condition::Unreadable);
}

#[test]
fn a_state_that_is_cut_wrong_or_huge_is_one_unreadable_machine() {
    let cases: [&[u8]; 6] =
        [b"", b"{", br#"{"schema":1,"pid":-1}"#, br#"{"cpus":256}"#, b"[1,[]]", br#"{"name":"\ud800"}"#];
    for text in cases {
        assert_eq!(reading(text), Condition::Unreadable, "{}", String::from_utf8_lossy(text));
    }
    assert_eq!(reading(&vec![b' '; 1 << 20]), Condition::Unreadable);
    assert_eq!(reading("[".repeat(60_000).as_bytes()), Condition::Unreadable);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_state_makes_the_reader_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
        reading(&text);
    }

    #[test]
    fn a_state_with_any_byte_changed_is_read_or_refused(at in 0usize..400, byte: u8) {
        let state = State { name: "a".into(), image: Some("debian".into()), pid: 7, ..detached() };
        let mut text = serde_json::to_vec(&state).unwrap();
        let at = at % text.len();
        text[at] = byte;
        reading(&text);
    }

    #[test]
    fn names_are_file_names(text in ".{0,70}") {
        if let Ok(name) = text.parse::<MachineName>() {
            prop_assert_eq!(name.as_str(), &text);
            prop_assert!(!text.contains(['/', '.', '\0']) && !text.is_empty());
        }
    }
}
