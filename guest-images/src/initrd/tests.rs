//! What is carried, and what is refused before a machine is started for it. That init reads it back is proved by
//! `tests/init.rs`, and by a machine in `tests/boot.rs`.

use super::*;

fn with_argv(argv: &[&str]) -> Request {
    Request { argv: argv.iter().map(|&text| text.to_owned()).collect(), ..Request::default() }
}

#[test]
fn archive_stands_aligned_behind_the_initrd() {
    for len in 0..9 {
        let initrd = vec![0xAA; len];
        let both = with_request(&initrd, &with_argv(&["true"])).unwrap();
        let at = len.next_multiple_of(4);
        assert_eq!(&both[..len], &initrd);
        assert!(both[len..at].iter().all(|&byte| byte == 0));
        assert_eq!(&both[at..at + 6], b"070701");
    }
}

#[test]
fn default_request_carries_no_file() {
    let archive = Request::default().to_archive().unwrap();
    let text = String::from_utf8_lossy(&archive);
    assert!(text.contains("pontoon\0") && !text.contains("pontoon/"), "{text}");
}

#[test]
fn what_execve_would_refuse_is_refused_here() {
    assert_eq!(with_argv(&["a\0b"]).to_archive(), Err(Error::Nul("a\0b".to_owned())));
    let long = "x".repeat(STRING_MAX);
    assert_eq!(with_argv(&[&long]).to_archive(), Err(Error::StringTooLong(STRING_MAX)));
    let fitting = "x".repeat(STRING_MAX - 2);
    assert!(with_argv(&[&fitting]).to_archive().is_ok());
    let many = vec![fitting.as_str(); 9];
    assert!(matches!(with_argv(&many).to_archive(), Err(Error::TooLong(_))));
}

#[test]
fn variables_need_names() {
    let with_env = |name: &str, value: &str| Request {
        env: vec![(name.to_owned(), value.to_owned())],
        ..Request::default()
    };
    for name in ["", "a=b"] {
        assert_eq!(with_env(name, "").to_archive(), Err(Error::VariableName(name.to_owned())));
    }
    assert!(with_env("a", "=").to_archive().is_ok());
    let half = "x".repeat(STRING_MAX / 2);
    assert_eq!(with_env(&half, &half).to_archive(), Err(Error::StringTooLong(STRING_MAX + 2)));
}

#[test]
fn host_names_are_checked() {
    let named = |name: &str| Request { hostname: Some(name.to_owned()), ..Request::default() }.to_archive();
    for name in ["vm1", "a", "vm-1.example", &"x".repeat(63)] {
        assert!(named(name).is_ok(), "{name}");
    }
    for name in ["", "-vm", "vm-", "vm.", "a b", "a/b", "ü", "a\n", &"x".repeat(64)] {
        assert_eq!(named(name), Err(Error::Hostname(name.to_owned())));
    }
}
