//! Trees there and back.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use super::Agent;
use crate::agent::AgentError;

const NO_LIMIT: u64 = u64::MAX;

/// Everything about a tree that a copy keeps: path, mode, time, content or target.
fn listing(root: &Path) -> Vec<String> {
    fn walk(path: &Path, name: &str, into: &mut Vec<String>) {
        let meta = fs::symlink_metadata(path).unwrap();
        let what = if meta.is_symlink() {
            format!("link to {:?}", fs::read_link(path).unwrap())
        } else if meta.is_dir() {
            "folder".to_owned()
        } else {
            format!("file {:x?}", fs::read(path).unwrap())
        };
        into.push(format!("{name} {:o} {}.{} {what}", meta.mode(), meta.mtime(), meta.mtime_nsec()));
        if meta.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                let entry = entry.unwrap();
                walk(&entry.path(), &format!("{name}/{:?}", entry.file_name()), into);
            }
        }
    }
    let mut lines = Vec::new();
    walk(root, "", &mut lines);
    lines.sort();
    lines
}

/// A folder of everything that is awkward; its lines.
fn awkward_tree(root: &Path) -> Vec<String> {
    fs::create_dir(root).unwrap();
    let longest = "n".repeat(255);
    let names: [&[u8]; 9] = [
        b"-rf",
        b"new\nline",
        b"\xff\xfe not text",
        b" ",
        b"...",
        b"\x1b[31mred",
        b"*",
        "\u{2603}".as_bytes(),
        longest.as_bytes(),
    ];
    for (at, name) in names.into_iter().enumerate() {
        fs::write(root.join(OsStr::from_bytes(name)), vec![at as u8; at * 10_000]).unwrap();
    }
    fs::write(root.join("large"), [7; 200_001]).unwrap();
    fs::set_permissions(root.join("large"), Permissions::from_mode(0o751)).unwrap();
    fs::create_dir_all(root.join("a/b/c/empty")).unwrap();
    fs::write(root.join("a/b/inner"), "inner").unwrap();
    symlink("b/inner", root.join("a/good")).unwrap();
    symlink("/no/such/place", root.join("a/dangling")).unwrap();
    symlink("..", root.join("a/up")).unwrap();
    let long = format!("/{}", "t/".repeat(1000));
    symlink(long, root.join("a/long")).unwrap();
    fs::set_permissions(root.join("a/b/inner"), Permissions::from_mode(0o400)).unwrap();
    fs::set_permissions(root.join("a/b/c"), Permissions::from_mode(0o500)).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::new(987_654_321, 123_456_789);
    fs::File::open(root.join("a/b")).unwrap().set_modified(old).unwrap();
    listing(root)
}

#[test]
fn a_tree_goes_there_and_back_unchanged() {
    let agent = Agent::start();
    let before = awkward_tree(&agent.path("tree"));
    let there = agent.client.put(agent.path("tree"), agent.path("there")).unwrap();
    assert_eq!(listing(&agent.path("there")), before);
    assert_eq!((there.files, there.folders, there.links, there.left_out), (11, 5, 4, 0));
    let back = agent.client.get(agent.path("there"), agent.path("back"), NO_LIMIT).unwrap();
    assert_eq!(listing(&agent.path("back")), before);
    assert_eq!(back, there);
    // Again over itself: what is there is replaced.
    agent.client.put(agent.path("tree"), agent.path("there")).map(drop).unwrap();
    assert_eq!(listing(&agent.path("there/tree")), before);
    agent.client.put(agent.path("tree/."), agent.path("there")).map(drop).unwrap();
    fs::remove_dir_all(agent.path("there/tree")).unwrap();
    let same = |lines: Vec<String>| lines.into_iter().skip(1).collect::<Vec<_>>();
    assert_eq!(same(listing(&agent.path("there"))), same(before));
}

#[test]
fn a_file_goes_into_a_folder_or_takes_a_name() {
    let agent = Agent::start();
    let file = agent.path("file");
    fs::write(&file, "content").unwrap();
    fs::create_dir(agent.path("folder")).unwrap();
    agent.client.put(&file, agent.path("folder")).unwrap();
    agent.client.put(&file, agent.path("folder/renamed")).unwrap();
    assert_eq!(fs::read(agent.path("folder/file")).unwrap(), b"content");
    assert_eq!(fs::read(agent.path("folder/renamed")).unwrap(), b"content");
    fs::create_dir(agent.path("out")).unwrap();
    agent.client.get(agent.path("folder/file"), agent.path("out"), NO_LIMIT).unwrap();
    agent.client.get(agent.path("folder/file"), agent.path("out/renamed"), NO_LIMIT).unwrap();
    assert_eq!(fs::read(agent.path("out/file")).unwrap(), b"content");
    assert_eq!(fs::read(agent.path("out/renamed")).unwrap(), b"content");
    // A link that the user names is what it leads to.
    symlink("file", agent.path("link")).unwrap();
    agent.client.get(agent.path("link"), agent.path("out/of-link"), NO_LIMIT).unwrap();
    assert!(fs::symlink_metadata(agent.path("out/of-link")).unwrap().is_file());
}

#[test]
fn files_without_a_length_and_streams_are_copied_to_their_end() {
    let agent = Agent::start();
    agent.client.get(Path::new("/proc/version"), agent.path("version"), NO_LIMIT).unwrap();
    assert!(fs::read_to_string(agent.path("version")).unwrap().starts_with("Linux"));
    let (read, mut write) = std::io::pipe().unwrap();
    let writer = std::thread::spawn(move || write.write_all(&[5; 300_000]).unwrap());
    agent.client.put_stream(read.as_fd(), &agent.path("stream"), 0o640).unwrap();
    writer.join().unwrap();
    assert_eq!(fs::read(agent.path("stream")).unwrap(), [5; 300_000]);
    assert_eq!(fs::metadata(agent.path("stream")).unwrap().mode() & 0o7777, 0o640);
    let mut file = tempfile::tempfile().unwrap();
    agent.client.get_stream(&agent.path("stream"), file.as_fd(), NO_LIMIT).unwrap();
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 300_000);
    let error = agent.client.get_stream(agent.dir.path(), file.as_fd(), NO_LIMIT).unwrap_err();
    assert!(error.to_string().contains("it is a folder"), "{error}");
}

#[test]
fn what_is_there_is_replaced_and_never_written_through() {
    let agent = Agent::start();
    fs::create_dir_all(agent.path("tree/sub")).unwrap();
    fs::write(agent.path("tree/name"), "new").unwrap();
    fs::create_dir_all(agent.path("there")).unwrap();
    fs::write(agent.path("victim"), "untouched").unwrap();
    symlink(agent.path("victim"), agent.path("there/name")).unwrap();
    for into_the_machine in [true, false] {
        if into_the_machine {
            agent.client.put(agent.path("tree/."), agent.path("there")).unwrap();
        } else {
            agent.client.get(agent.path("tree/."), agent.path("there"), NO_LIMIT).unwrap();
        }
        assert_eq!(fs::read(agent.path("victim")).unwrap(), b"untouched");
        assert_eq!(fs::read(agent.path("there/name")).unwrap(), b"new");
        fs::remove_file(agent.path("there/name")).unwrap();
        symlink(agent.path("victim"), agent.path("there/name")).unwrap();
    }
    // A folder that is a link here is not entered.
    fs::remove_dir(agent.path("there/sub")).unwrap();
    symlink(agent.dir.path(), agent.path("there/sub")).unwrap();
    let error = agent.client.get(agent.path("tree/."), agent.path("there"), NO_LIMIT).unwrap_err();
    assert!(matches!(error, AgentError::Local { .. }), "{error}");
    assert!(error.to_string().contains("there/sub"), "{error}");
}

#[test]
fn what_can_not_be_carried_is_named() {
    let agent = Agent::start();
    fs::create_dir(agent.path("tree")).unwrap();
    fs::write(agent.path("tree/kept"), "kept").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(agent.path("tree/socket")).unwrap();
    for copied in [
        agent.client.get(agent.path("tree"), agent.path("got"), NO_LIMIT).unwrap(),
        agent.client.put(agent.path("tree"), agent.path("put")).unwrap(),
    ] {
        assert_eq!((copied.files, copied.left_out), (1, 1));
        assert_eq!(copied.left_out_names, [("socket".to_owned(), "it is a socket".to_owned())]);
    }
    assert!(agent.path("got/kept").exists() && agent.path("put/kept").exists());
    let error = agent.client.get(Path::new("/dev/null"), agent.path("null"), NO_LIMIT).unwrap_err();
    assert!(error.to_string().contains("/dev/null: it is neither a file nor a folder"), "{error}");
}

#[test]
fn errors_name_the_side_and_the_path() {
    let agent = Agent::start();
    let error = agent.client.get(Path::new("/no/such"), agent.path("x"), NO_LIMIT).unwrap_err();
    assert!(error.to_string().starts_with("in the machine: find /no/such: No such file"), "{error}");
    let error = agent.client.put(Path::new("/no/such"), agent.path("x")).unwrap_err();
    assert!(error.to_string().starts_with("could not find /no/such: No such file"), "{error}");
    fs::write(agent.path("file"), vec![0; 10_000_000]).unwrap();
    let error = agent.client.put(agent.path("file"), Path::new("/no/such/place")).unwrap_err();
    assert!(error.to_string().starts_with("in the machine: make /no/such/place: No such file"), "{error}");
    // Midway: the agent says so while the host still sends.
    let error = agent.client.put(agent.path("file"), Path::new("/dev/full")).unwrap_err();
    assert!(error.to_string().starts_with("in the machine: write /dev/full: No space left"), "{error}");
    let error = agent.client.get(agent.path("file"), Path::new("/dev/full"), NO_LIMIT).unwrap_err();
    assert!(error.to_string().starts_with("could not write /dev/full: No space left"), "{error}");
    let error = agent.client.get(agent.path("file"), agent.path("limited"), 9_999_999).unwrap_err();
    assert!(error.to_string().contains("larger than the limit"), "{error}");
}

#[test]
fn folders_are_carried_as_deep_as_the_limit_and_no_deeper() {
    let agent = Agent::start();
    let deep = |levels: usize| agent.path("deep").join("d/".repeat(levels));
    fs::create_dir_all(deep(127)).unwrap();
    agent.client.put(agent.path("deep"), agent.path("there")).unwrap();
    agent.client.get(agent.path("there"), agent.path("back"), NO_LIMIT).unwrap();
    assert!(agent.path("back").join("d/".repeat(127)).is_dir());
    fs::create_dir_all(deep(128)).unwrap();
    let error = agent.client.put(agent.path("deep"), agent.path("again")).unwrap_err();
    assert!(error.to_string().contains("more than 128 folders"), "{error}");
    let error = agent.client.get(agent.path("deep"), agent.path("once-more"), NO_LIMIT).unwrap_err();
    assert!(error.to_string().contains("more than 128 folders"), "{error}");
}
