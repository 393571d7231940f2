//! Agents that lie: each dialogue is what the other side sends, and what the client makes of it.

use std::ffi::CStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use proptest::prelude::*;

use super::text;
use crate::agent::wire::{Entry, EntryKind, Kind, MAX_FRAME, WINDOW, head};
use crate::agent::{AgentError, Client, Command};

/// One frame.
fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
    [&head(kind, payload.len()), payload].concat()
}

/// A client whose agent sends this, however often it is asked, and then closes. A client that hangs up early is fine.
fn liar(bytes: Vec<u8>) -> Client {
    Client::with(move || {
        let (ours, theirs) = UnixStream::pair()?;
        let bytes = bytes.clone();
        thread::spawn(move || {
            let _ = (&theirs).write_all(&bytes);
            let _ = theirs.shutdown(std::net::Shutdown::Write);
            // What the client says is read, so that the close does not overtake anything.
            let _ = std::io::copy(&mut &theirs, &mut std::io::sink());
        });
        Ok(OwnedFd::from(ours))
    })
}

/// What comes of running a command there, its output limited to 100,000 bytes.
fn outcome(frames: &[Vec<u8>]) -> Result<super::super::Output, AgentError> {
    liar([&[1], &frames.concat()[..]].concat()).output(&Command::new("x"), 100_000)
}

fn protocol_error(frames: &[Vec<u8>]) -> String {
    match outcome(frames) {
        Err(AgentError::Protocol(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_version_is_said_so() {
    let error = liar(vec![9]).ping().unwrap_err();
    assert!(matches!(error, AgentError::Version { theirs: 9 }), "{error}");
    assert!(error.to_string().contains("build the image again"), "{error}");
}

#[test]
fn frames_that_are_none_end_the_connection() {
    assert_eq!(protocol_error(&[vec![200, 0, 0, 0, 0]]), "a frame of unknown kind 200");
    let huge = [&[Kind::Stdout as u8][..], &u32::MAX.to_le_bytes()].concat();
    assert_eq!(protocol_error(&[huge]), "a Stdout frame that claims 4294967295 bytes");
    let started = || frame(Kind::Started, &[]);
    let above = vec![0; MAX_FRAME + 1];
    assert!(protocol_error(&[started(), frame(Kind::Stdout, &above)]).contains("claims 32769"));
    assert!(protocol_error(&[started(), frame(Kind::Exit, &[7, 7])]).contains("no status"));
    assert!(protocol_error(&[started(), frame(Kind::Window, &[16, 0, 0, 0, 0])]).contains("absurd"));
    assert!(
        protocol_error(&[started(), frame(Kind::Window, &[17, 1, 0, 0, 0])]).contains("a window of Stdout")
    );
}

#[test]
fn frames_out_of_turn_end_the_connection() {
    let started = || frame(Kind::Started, &[]);
    assert!(protocol_error(&[frame(Kind::Exit, &[0, 0])]).contains("Exit in answer to Exec"));
    assert!(protocol_error(&[frame(Kind::Stdout, b"x")]).contains("Stdout in answer to Exec"));
    assert!(protocol_error(&[started(), started()]).contains("Started while a command runs"));
    assert!(protocol_error(&[started(), frame(Kind::Entry, b"")]).contains("Entry while a command runs"));
    let after_the_end = [started(), frame(Kind::Stderr, b""), frame(Kind::Stderr, b"x")];
    assert_eq!(protocol_error(&after_the_end), "Stderr after its end");
}

#[test]
fn an_agent_that_never_tells_the_status_is_noticed_when_it_goes() {
    assert!(matches!(outcome(&[]), Err(AgentError::Ended)));
    assert!(matches!(outcome(&[frame(Kind::Started, &[])]), Err(AgentError::Ended)));
    let half = frame(Kind::Exit, &[0, 0])[..6].to_vec();
    assert!(matches!(outcome(&[frame(Kind::Started, &[]), half]), Err(AgentError::Ended)));
}

#[test]
fn endless_output_meets_the_limit_or_the_window() {
    let mut frames = vec![frame(Kind::Started, &[])];
    frames.extend((0..100).map(|_| frame(Kind::Stdout, &[b'x'; 5000])));
    assert!(matches!(outcome(&frames), Err(AgentError::OutputLimit { limit: 100_000 })));
    // Into a pipe that nobody reads: the pipe's 64 KiB may be taken, the window is held, what is beyond it is refused.
    let mut frames = vec![vec![1], frame(Kind::Started, &[])];
    let count = (WINDOW + (64 << 10)) / 1000 + 2;
    frames.extend((0..count).map(|_| frame(Kind::Stdout, &[b'x'; 1000])));
    let process = liar(frames.concat()).exec(&Command::new("x")).unwrap();
    let error = process.wait().unwrap_err();
    assert!(error.to_string().contains("more Stdout than its window"), "{error}");
}

#[test]
fn messages_can_not_command_the_users_terminal() {
    let failed = [&[0, 0][..], b"\x1b]0;owned\x07 \xff\n"].concat();
    let error = liar([&[1][..], &frame(Kind::Failed, &failed)].concat()).ping().unwrap_err();
    assert_eq!(error.to_string(), "in the machine: ?]0;owned? \u{fffd}?");
    let version = liar([&[1][..], &frame(Kind::Pong, b"1\r\n")].concat()).ping().unwrap();
    assert_eq!(version, "1??");
}

/// A member of a tree.
fn entry(kind: EntryKind, name: &CStr, target: &CStr) -> Vec<u8> {
    let mut room = vec![0; MAX_FRAME];
    let entry = Entry { kind, mode: 0o7777, modified: (1, 0), size: 0, name, target };
    let length = entry.encode(&mut room).unwrap();
    frame(Kind::Entry, &room[..length])
}

fn file(name: &CStr, content: &[u8]) -> Vec<u8> {
    [entry(EntryKind::File, name, c""), frame(Kind::Content, content), frame(Kind::Content, &[])].concat()
}

fn folder(name: &CStr, members: &[Vec<u8>]) -> Vec<u8> {
    [entry(EntryKind::Folder, name, c""), members.concat(), frame(Kind::Up, &[])].concat()
}

/// What comes of getting this into `dir`/destination.
fn get(frames: &[Vec<u8>], dir: &Path) -> Result<crate::agent::Copied, AgentError> {
    let client = liar([&[1][..], &frames.concat(), &frame(Kind::End, &[])].concat());
    client.get("/x/.", dir.join("destination"), 1000)
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in [c"..", c".", c"", c"a/b", c"/etc/x", c"../x"] {
        let error = get(&[folder(c"", &[file(name, b"evil")])], dir.path()).unwrap_err();
        assert!(
            matches!(&error, AgentError::Protocol(text) if text.contains("a name that is none")),
            "{error}"
        );
        let error = get(&[folder(c"", &[folder(name, &[])])], dir.path()).unwrap_err();
        assert!(matches!(error, AgentError::Protocol(_)), "{error}");
    }
    let error = get(&[file(c"../escaped", b"evil")], dir.path()).unwrap_err();
    assert!(matches!(error, AgentError::Protocol(_)), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the destination, and nothing else");
}

#[test]
fn links_that_came_are_never_followed() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("outside")).unwrap();
    fs::write(dir.path().join("outside/file"), "untouched").unwrap();
    // A link to a folder, then a folder of its name with a file in it.
    let evil = folder(
        c"",
        &[entry(EntryKind::Link, c"trap", c"../outside"), folder(c"trap", &[file(c"file", b"evil")])],
    );
    let error = get(&[evil], dir.path()).unwrap_err();
    assert!(error.to_string().contains("open the folder"), "{error}");
    // A link to a file, then a file of its name; a dangling one likewise.
    let evil = folder(
        c"",
        &[
            entry(EntryKind::Link, c"trap", c"../outside/file"),
            file(c"trap", b"evil"),
            entry(EntryKind::Link, c"new", c"../outside/new"),
            file(c"new", b"evil"),
        ],
    );
    get(&[evil], dir.path()).unwrap();
    assert_eq!(fs::read(dir.path().join("outside/file")).unwrap(), b"untouched");
    assert!(!dir.path().join("outside/new").exists());
    assert_eq!(fs::read(dir.path().join("destination/trap")).unwrap(), b"evil");
    // Nor is the destination replaced by a link.
    let error = get(&[entry(EntryKind::Link, c"", c"/etc")], dir.path()).unwrap_err();
    assert!(matches!(error, AgentError::Protocol(_)), "{error}");
}

#[test]
fn no_special_bits_come_out_of_a_machine() {
    let dir = tempfile::tempdir().unwrap();
    get(&[folder(c"", &[file(c"suid", b"x"), folder(c"sticky", &[])])], dir.path()).unwrap();
    let mode = |name: &str| fs::metadata(dir.path().join("destination").join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("suid"), mode("sticky"), mode("")), (0o777, 0o777, 0o777));
}

#[test]
fn trees_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |frames: &[Vec<u8>]| {
        let _ = fs::remove_file(dir.path().join("destination"));
        let _ = fs::remove_dir_all(dir.path().join("destination"));
        match get(frames, dir.path()) {
            Err(AgentError::Protocol(text)) => text,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(&[frame(Kind::Up, &[])]).contains("no place in a tree"));
    assert!(refused(&[frame(Kind::Content, b"x")]).contains("no place in a tree"));
    assert!(refused(&[folder(c"", &[]), frame(Kind::Up, &[])]).contains("had ended"));
    assert!(refused(&[folder(c"", &[frame(Kind::Content, b"x")])]).contains("no place in a tree"));
    assert!(
        refused(&[entry(EntryKind::File, c"", c""), frame(Kind::Up, &[])]).contains("no place in a file")
    );
    let bottomless = vec![entry(EntryKind::Folder, c"d", c""); 200].concat();
    assert!(refused(&[entry(EntryKind::Folder, c"", c""), bottomless]).contains("too deep"));
    let endless = [entry(EntryKind::File, c"", c""), frame(Kind::Content, &[0; 600]).repeat(9)].concat();
    fs::remove_dir_all(dir.path().join("destination")).unwrap();
    let error = get(&[endless], dir.path()).unwrap_err();
    assert!(error.to_string().contains("larger than the limit"), "{error}");
}

#[test]
fn left_out_names_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let many = vec![entry(EntryKind::Skipped, c"s", c"because"); 5000];
    let copied = get(&[folder(c"", &many)], dir.path()).unwrap();
    assert_eq!((copied.left_out, copied.left_out_names.len()), (5000, 100));
}

/// What a client makes of a vsock socket that answers this to `CONNECT`.
fn greeted(answer: &'static [u8]) -> Result<String, AgentError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        stream.write_all(answer).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
        line
    });
    let answer = Client::vsock(&path).ping();
    assert_eq!(server.join().unwrap(), "CONNECT 1024\n");
    answer
}

#[test]
fn the_vsock_handshake_is_firecrackers() {
    let pong = b"OK 1073741824\n\x01\x35\x05\0\0\x000.1.0";
    assert_eq!(greeted(pong).unwrap(), "0.1.0");
    let error = greeted(b"").unwrap_err();
    assert!(matches!(error, AgentError::Missing { port: 1024 }), "{error}");
    assert!(error.to_string().contains("pontoon image build debian"), "{error}");
    assert!(matches!(greeted(b"NO\n"), Err(AgentError::Protocol(_))));
    assert!(matches!(greeted(b"OK 1"), Err(AgentError::Protocol(_))));
    assert!(matches!(greeted(&[b'O'; 100]), Err(AgentError::Protocol(_))));
    let error = Client::vsock("/no/such/socket").ping().unwrap_err();
    assert!(text(error.to_string().as_bytes()).contains("pontoon ps"), "{error}");
}

/// Frames of a tree in any order, with names of which some lead elsewhere.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just(c"a"), Just(c"b"), Just(c".."), Just(c"trap"), Just(c"../x")];
    let target = prop_oneof![Just(c"../outside"), Just(c".."), Just(c"a"), Just(c"/")];
    prop_oneof![
        name.clone().prop_map(|name| file(name, b"content")),
        name.clone().prop_map(|name| entry(EntryKind::Folder, name, c"")),
        (name, target).prop_map(|(name, target)| entry(EntryKind::Link, name, target)),
        Just(frame(Kind::Up, &[])),
        Just(frame(Kind::Content, b"stray")),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_tree_writes_outside_of_its_destination(frames in proptest::collection::vec(any_frame(), 0..30)) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        symlink("destination", dir.path().join("alias")).unwrap();
        let mut all = vec![entry(EntryKind::Folder, c"", c"")];
        all.extend(frames);
        let _ = get(&all, dir.path());
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        prop_assert_eq!(names, ["alias", "destination", "outside"]);
        prop_assert_eq!(fs::read_dir(dir.path().join("outside")).unwrap().count(), 0);
    }

    #[test]
    fn no_bytes_make_the_client_panic_or_wait(bytes in proptest::collection::vec(any::<u8>(), 0..400), greets: bool) {
        let mut bytes = bytes;
        if greets {
            bytes.splice(0..0, [1].into_iter().chain(frame(Kind::Started, &[])));
        }
        let client = liar(bytes);
        let _ = client.output(&Command::new("x"), 1000);
        let _ = client.ping();
    }
}
