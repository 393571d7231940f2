//! The archive's bytes against hand-made ones, against a reader written for the test, and against cpio(1).

use super::*;
use proptest::prelude::*;

/// One entry as the test's reader sees it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    name: Vec<u8>,
    mode: u32,
    data: Vec<u8>,
    rdev: (u32, u32),
}

/// Reads an archive as the kernel's unpacker does; panics where that would give up.
fn read(archive: &[u8]) -> Vec<Seen> {
    let mut seen = Vec::new();
    let mut at = 0;
    loop {
        assert_eq!(&archive[at..at + 6], b"070701", "magic at {at}");
        let field = |index: usize| {
            let text = std::str::from_utf8(&archive[at + 6 + index * 8..][..8]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name = &archive[at + HEADER_LEN..][..name_size];
        assert_eq!(name.last(), Some(&0), "the name ends in NUL");
        let name = name[..name_size - 1].to_vec();
        let entry = (field(1), (field(9), field(10)));
        at = (at + HEADER_LEN + name_size).next_multiple_of(4);
        let data = archive[at..at + size].to_vec();
        at = (at + size).next_multiple_of(4);
        if name == b"TRAILER!!!" {
            assert!(archive[at..].iter().all(|&byte| byte == 0), "only padding after the trailer");
            return seen;
        }
        seen.push(Seen { name, mode: entry.0, data, rdev: entry.1 });
    }
}

#[test]
fn one_file_is_these_bytes() {
    let mut tree = Tree::new();
    tree.file("a", 0o644, *b"hi\n").unwrap();
    let mut golden = Vec::new();
    golden.extend_from_slice(b"070701000000010000");
    golden.extend_from_slice(b"81A4"); // S_IFREG | 0644
    golden.extend_from_slice(b"0000000000000000000000010000000000000003");
    golden.extend_from_slice(b"000000000000000000000000000000000000000200000000a\0");
    golden.extend_from_slice(b"hi\n\0");
    golden.extend_from_slice(b"07070100000000000000000000000000000000000000010000000000000000");
    golden.extend_from_slice(b"000000000000000000000000000000000000000B00000000TRAILER!!!\0");
    golden.extend_from_slice(&[0; 3]);
    golden.resize(512, 0);
    assert_eq!(tree.to_bytes(), golden, "{}", String::from_utf8_lossy(&tree.to_bytes()));
}

#[test]
fn parents_come_first_and_exist() {
    let mut tree = Tree::new();
    tree.file("usr/bin/tool", 0o755, *b"x").unwrap();
    tree.symlink("bin", "usr/bin").unwrap();
    tree.char_device("/dev/console", 0o600, 5, 1).unwrap();
    let seen = read(&tree.to_bytes());
    let names: Vec<_> = seen.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect();
    assert_eq!(names, ["bin", "dev", "dev/console", "usr", "usr/bin", "usr/bin/tool"]);
    assert_eq!(seen[2], Seen { name: b"dev/console".into(), mode: 0o020_600, data: vec![], rdev: (5, 1) });
    assert_eq!(seen[0], Seen { name: b"bin".into(), mode: 0o120_777, data: b"usr/bin".into(), rdev: (0, 0) });
}

#[test]
fn paths_that_could_escape_are_refused() {
    for path in ["", "/", "..", "a/../b", "./a", "TRAILER!!!", "a\0b"] {
        assert!(matches!(Tree::new().file(path, 0o644, *b""), Err(Error::Path(_))), "{path:?}");
    }
    assert!(matches!(Tree::new().dir("x/".repeat(2049), 0o755), Err(Error::Path(_))));
    assert!(matches!(Tree::new().symlink("a", ""), Err(Error::Path(_))));
}

#[test]
fn two_things_at_one_path_are_refused() {
    let mut tree = Tree::new();
    tree.file("a", 0o644, *b"1").unwrap();
    assert!(matches!(tree.file("a", 0o644, *b"2"), Err(Error::Twice(_))));
    assert!(matches!(tree.file("a/b", 0o644, *b"2"), Err(Error::Twice(_))));
    tree.file("/a", 0o644, *b"1").expect("the same thing twice is one thing");
    tree.dir("d", 0o755).unwrap().dir("d", 0o700).expect("a directory may be named again");
    assert_eq!(read(&tree.to_bytes())[1].mode, 0o040_700);
}

#[test]
fn host_directory_lands_behind_links_that_the_tree_has() {
    let host = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(host.path().join("lib/x")).unwrap();
    std::fs::write(host.path().join("lib/x/libc.so"), b"elf").unwrap();
    std::os::unix::fs::symlink("libc.so", host.path().join("lib/x/libc.so.6")).unwrap();
    let mut tree = Tree::new();
    tree.symlink("lib", "usr/lib").unwrap();
    tree.host_dir(host.path(), "").unwrap();
    let seen = read(&tree.to_bytes());
    let names: Vec<_> = seen.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect();
    assert_eq!(names, ["lib", "usr", "usr/lib", "usr/lib/x", "usr/lib/x/libc.so", "usr/lib/x/libc.so.6"]);
}

#[test]
fn the_archiver_of_the_host_reads_it_back() {
    let mut tree = Tree::new();
    tree.file("etc/motd", 0o644, *b"hello").unwrap().symlink("init", "sbin/init").unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.cpio"), tree.to_bytes()).unwrap();
    let archive = std::fs::File::open(dir.path().join("a.cpio")).unwrap();
    let Ok(output) = std::process::Command::new("cpio").args(["-it", "--quiet"]).stdin(archive).output()
    else {
        crate::skip::skip("cpio is not installed");
        return;
    };
    assert_eq!(String::from_utf8_lossy(&output.stdout), "etc\netc/motd\ninit\n");
}

proptest! {
    /// Whatever is put in comes out, sorted, whatever the order of insertion.
    #[test]
    fn files_survive_the_round_trip(
        files in proptest::collection::btree_map("[a-z]{1,9}(/[a-z]{1,9}x){0,2}", proptest::collection::vec(any::<u8>(), 0..40), 0..12),
        mode in 0_u32..0o7777,
    ) {
        let (mut forwards, mut backwards) = (Tree::new(), Tree::new());
        let mut kept = Vec::new();
        for (path, data) in &files {
            if forwards.file(path, mode, data.clone()).is_ok() {
                kept.push((path.clone().into_bytes(), data.clone()));
            }
        }
        for (path, data) in kept.iter().rev() {
            let path = String::from_utf8_lossy(path).into_owned();
            backwards.file(path, mode, data.clone()).expect("it fitted in the other order");
        }
        kept.sort();
        let bytes = forwards.to_bytes();
        prop_assert_eq!(bytes.len() % 512, 0);
        prop_assert_eq!(&bytes, &backwards.to_bytes());
        let seen: Vec<_> = read(&bytes).into_iter().filter(|entry| entry.mode & S_IFREG != 0).collect();
        prop_assert!(seen.iter().all(|entry| entry.mode == S_IFREG | mode));
        let seen: Vec<_> = seen.into_iter().map(|entry| (entry.name, entry.data)).collect();
        prop_assert_eq!(seen, kept);
    }
}
