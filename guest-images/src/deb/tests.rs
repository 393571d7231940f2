//! Requests against a cache made by hand, apt's answers against the parser, and one request of the real
//! archive where there is one.

use super::*;
use crate::Silent;

const LINE: &str = "'http://deb.debian.org/debian/pool/main/b/busybox/busybox-static_1.35.0-4%2bdeb12u1%2bb1_amd64.deb' busybox-static_1%3a1.35.0-4+deb12u1+b1_amd64.deb 928188 SHA256:3d3fdbe91d4660c873e14b092c213fe81c1da6362daa236eb25d0171eb108744";

#[test]
fn a_line_of_uris_names_the_package() {
    let wanted = apt::wanted(LINE).unwrap();
    assert_eq!(wanted.name, "busybox-static");
    assert_eq!(wanted.version, "1:1.35.0-4+deb12u1+b1");
    assert_eq!(wanted.file, "busybox-static_1%3a1.35.0-4+deb12u1+b1_amd64.deb");
    assert_eq!(wanted.size, 928_188);
}

#[test]
fn a_line_that_cannot_be_trusted_is_refused() {
    assert_eq!(apt::wanted(&LINE.replace("SHA256:3d", "MD5Sum:3d")), None, "no SHA-256");
    assert_eq!(apt::wanted(&LINE.replace("SHA256:3d", "SHA256:zz")), None, "no hexadecimal");
    assert_eq!(apt::wanted(&LINE.replace(" busybox", " ../busybox")), None, "a path");
    assert_eq!(apt::wanted(&LINE.replace("_amd64.deb ", "_i386.deb ")), None, "another architecture");
    assert_eq!(apt::wanted(&LINE.replace(" 928188 ", " many ")), None, "no size");
    assert_eq!(apt::wanted("'"), None);
}

#[test]
fn progress_is_read_from_the_status_line() {
    assert_eq!(apt::download_status("dlstatus:2:12.6863:Retrieving file 2 of 2"), Some(1268));
    assert_eq!(apt::download_status("dlstatus:2:7:Retrieving"), Some(700));
    assert_eq!(apt::download_status("dlstatus:2:100.0000:Retrieving"), Some(10_000));
    assert_eq!(apt::download_status("dlstatus:2:999999999999999999:x"), None);
    assert_eq!(apt::download_status("pmstatus:x:1.0:y"), None);
}

#[test]
fn an_unreachable_archive_is_told_from_other_failures() {
    let offline = "E: Failed to fetch http://x  Temporary failure resolving 'deb.debian.org'\nE: Some index files failed";
    assert!(matches!(apt::failure("x", offline), Error::Unreachable { .. }));
    let unsigned = "E: The repository 'http://x bookworm InRelease' is not signed.";
    let Error::Apt { said, .. } = apt::failure("x", unsigned) else { panic!("a wrong kind of error") };
    assert_eq!(said, unsigned);
}

#[test]
fn the_hosts_mirrors_are_kept_and_others_are_not() {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let host = lines(
        "https://packages.example.org/apt cloud-sdk-bookworm main\nhttp://mirror.lan/debian/ bookworm main\n\
         http://mirror.lan/security bookworm-security main",
    );
    let mirrors = config::Mirrors::of_host(&host);
    assert_eq!(mirrors.main, "http://mirror.lan/debian");
    assert_eq!(mirrors.security, "http://mirror.lan/security");
    let list = mirrors.sources_list(Suite::Trixie);
    assert!(
        list.lines().all(|line| line.contains("signed-by=/usr/share/keyrings/debian-archive-keyring.gpg"))
    );
    assert!(list.contains("http://mirror.lan/security trixie-security main"), "{list}");
    let ubuntu = lines("http://archive.ubuntu.com/ubuntu noble main\nhttp://x noble-security main");
    assert_eq!(config::Mirrors::of_host(&ubuntu).main, "http://deb.debian.org/debian");
}

#[test]
fn the_hosts_suite_is_read_from_os_release() {
    let debian = "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nVERSION_CODENAME=trixie\nID=debian\n";
    assert_eq!(Suite::in_os_release(debian), Some(Suite::Trixie));
    assert_eq!(Suite::in_os_release("ID=ubuntu\nVERSION_CODENAME=noble\n"), None);
    assert!(matches!("sid".parse::<Suite>(), Err(Error::UnknownSuite(_))));
}

#[test]
fn lists_that_are_older_than_the_clock_is_are_renewed() {
    let cache = tempfile::tempdir().unwrap();
    let archive = Archive::open(cache.path(), Suite::Bookworm).unwrap();
    assert_eq!(archive.lists_age(), None);
    let stamp = fs::File::create(apt::stamp(&archive.dir)).unwrap();
    assert!(archive.lists_age().unwrap() < LISTS_AGE);
    stamp.set_modified(SystemTime::now() + Duration::from_secs(365 * 86_400)).unwrap();
    assert!(archive.lists_age().unwrap() > LISTS_AGE);
}

/// A cache in which the request for `hello` was answered before.
fn remembering(cache: &Path) -> (Archive, PathBuf) {
    let archive = Archive::open(cache, Suite::Bookworm).unwrap();
    let file = archive.dir.join("archives/hello_1_all.deb");
    fs::write(&file, b"deb").unwrap();
    let package = Wanted {
        name: "hello".into(),
        version: "1".into(),
        file: "hello_1_all.deb".into(),
        sha256: sha256_of(&file).unwrap(),
        size: 3,
    };
    let set = archive.set_path(&["hello"], Dependencies::Ignored);
    let names = vec!["hello".to_owned()];
    archive
        .remember(&set, &Remembered { names, dependencies: Dependencies::Ignored, packages: vec![package] })
        .unwrap();
    (archive, file)
}

#[test]
fn an_answered_request_needs_neither_apt_nor_network() {
    let cache = tempfile::tempdir().unwrap();
    let (archive, file) = remembering(cache.path());
    let debs = archive.fetch(&["hello"], Dependencies::Ignored, Freshness::Remembered, &mut Silent).unwrap();
    assert_eq!(debs.len(), 1);
    assert_eq!((debs[0].name.as_str(), &debs[0].path), ("hello", &file));
    assert!(!archive.dir.join("apt.conf").exists(), "apt was not even configured");
}

#[test]
fn a_damaged_package_is_not_taken_for_whole() {
    let cache = tempfile::tempdir().unwrap();
    let (archive, file) = remembering(cache.path());
    let set = archive.set_path(&["hello"], Dependencies::Ignored);
    fs::write(&file, b"dab").unwrap();
    assert_eq!(archive.remembered(&set, &["hello"], Dependencies::Ignored), None);
    fs::remove_file(&file).unwrap();
    assert_eq!(archive.remembered(&set, &["hello"], Dependencies::Ignored), None);
}

#[test]
fn a_damaged_memory_is_ignored() {
    let cache = tempfile::tempdir().unwrap();
    let (archive, _) = remembering(cache.path());
    let set = archive.set_path(&["hello"], Dependencies::Ignored);
    assert_eq!(archive.remembered(&set, &["other"], Dependencies::Ignored), None, "another request");
    fs::write(&set, b"{\"names\":").unwrap();
    assert_eq!(archive.remembered(&set, &["hello"], Dependencies::Ignored), None);
}

#[test]
fn a_second_request_waits_for_the_first() {
    let cache = tempfile::tempdir().unwrap();
    let (archive, _) = remembering(cache.path());
    let held = archive.lock().unwrap();
    let other = File::open(archive.dir.join("lock")).unwrap();
    assert!(other.try_lock().is_err(), "it is held");
    drop(held);
    other.try_lock().expect("it went with the first request");
}

#[test]
fn a_broken_package_says_which() {
    let cache = tempfile::tempdir().unwrap();
    let (archive, _) = remembering(cache.path());
    let debs = archive.fetch(&["hello"], Dependencies::Ignored, Freshness::Remembered, &mut Silent).unwrap();
    match debs[0].unpack(&cache.path().join("root")) {
        Err(Error::MissingProgram { .. }) => crate::skip::skip("dpkg-deb is not installed"),
        Err(Error::Package { name, .. }) => assert_eq!(name, "hello"),
        other => panic!("{other:?}"),
    }
}

/// Whether the error only says that this host or network has no archive; says so on stderr.
fn skipped(error: &Error) -> bool {
    let skip = matches!(
        error,
        Error::Unreachable { .. } | Error::MissingProgram { .. } | Error::MissingKeyring { .. }
    );
    if skip {
        crate::skip::skip(error);
    }
    skip
}

#[test]
fn the_archive_answers_and_the_answer_is_remembered() {
    let cache = tempfile::tempdir().unwrap();
    let archive = Archive::open(cache.path(), Suite::of_host()).unwrap();
    let fetch = || archive.fetch(&["libmnl0"], Dependencies::Included, Freshness::Remembered, &mut Silent);
    let debs = match fetch() {
        Err(error) if skipped(&error) => return,
        answer => answer.unwrap(),
    };
    let names: Vec<_> = debs.iter().map(|deb| deb.name.as_str()).collect();
    assert!(names.contains(&"libmnl0") && names.contains(&"libc6"), "{names:?}");
    let root = cache.path().join("root");
    unpack_all(&debs, &root).unwrap();
    assert!(root.join("lib64/ld-linux-x86-64.so.2").exists(), "a program could run in it");
    assert!(root.join("usr/lib/x86_64-linux-gnu/libmnl.so.0").exists());

    // Without any list, only memory can answer.
    fs::remove_dir_all(archive.dir.join("lists")).unwrap();
    fs::remove_file(apt::stamp(&archive.dir)).unwrap();
    assert_eq!(fetch().unwrap(), debs);
    assert!(!apt::stamp(&archive.dir).exists());

    let unknown =
        archive.fetch(&["no-such-package"], Dependencies::Ignored, Freshness::Remembered, &mut Silent);
    assert!(
        matches!(&unknown, Err(Error::Apt { said, .. }) if said.contains("no-such-package")),
        "{unknown:?}"
    );
}
