//! The parts of init that are pure, compiled here as they are there: modalias patterns, depmod's indexes, the request.
//!
//! What init does as PID 1 is proved by a machine, in `boot.rs`.

#![allow(dead_code, reason = "the files belong to init, which uses all of them")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[path = "../init/src/modules/index.rs"]
mod index;
#[path = "../init/src/request.rs"]
mod request;

/// The one type that the request takes from init's console.
mod console {
    /// See `init/src/console.rs`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) enum Mode {
        /// A terminal.
        #[default]
        Terminal,
        /// Eight clean bits.
        Bytes,
    }
}

use console::Mode;
use guest_images::initrd::{self, Console};
use index::{Index, glob};
use proptest::prelude::*;
use request::{Options, Request};

fn matches(pattern: &str, text: &str) -> bool {
    glob(pattern.as_bytes(), text.as_bytes())
}

#[test]
fn real_modaliases_meet_their_patterns() {
    assert!(matches("virtio:d00000001v*", "virtio:d00000001v00001AF4"));
    assert!(!matches("virtio:d00000001v*", "virtio:d00000010v00001AF4"));
    assert!(matches("acpi*:LNRO0005:*", "acpi:LNRO0005:"));
    assert!(matches(
        "pci:v00001AF4d*sv*sd*bc*sc*i*",
        "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00"
    ));
    assert!(matches("usb:v05ACp021[A-F]d*", "usb:v05ACp021Cd0100"));
    assert!(!matches("usb:v05ACp021[A-F]d*", "usb:v05ACp0219d0100"));
}

#[test]
fn brackets_are_those_of_the_shell() {
    assert!(matches("[!a]", "b") && !matches("[!a]", "a") && matches("[^a]", "b"));
    assert!(matches("[]]", "]") && matches("[a-]", "-") && matches("[--0]", "."));
    assert!(matches("[a", "[a") && !matches("[a", "a"), "an unclosed bracket is itself");
    assert!(!matches("[z-a]", "m"), "a range in the wrong order is empty");
    assert!(!matches("", "a") && matches("", "") && matches("***", ""));
}

/// The definition, by trying every split: exponential, fit for short texts only.
fn slow_glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', rest @ ..] => (0..=text.len()).any(|at| slow_glob(rest, &text[at..])),
        [b'?', rest @ ..] => !text.is_empty() && slow_glob(rest, &text[1..]),
        [byte, rest @ ..] => text.first() == Some(byte) && slow_glob(rest, &text[1..]),
    }
}

proptest! {
    #[test]
    fn glob_is_what_its_definition_says(pattern in "[ab*?]{0,8}", text in "[ab]{0,8}") {
        prop_assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), slow_glob(pattern.as_bytes(), text.as_bytes()));
    }

    #[test]
    fn text_without_magic_matches_itself_only(text in "[a-z0-9:,.-]{1,20}", other in "[a-z0-9:,.-]{1,20}") {
        prop_assert!(matches(&text, &text));
        prop_assert_eq!(matches(&text, &other), text == other);
        let starred = format!("*{text}*");
        let around = format!("{other}{text}{other}");
        prop_assert!(matches(&starred, &around));
    }

    #[test]
    fn any_pattern_ends(pattern in proptest::collection::vec(any::<u8>(), 0..60), text in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = glob(&pattern, &text);
    }

    #[test]
    fn request_arrives_as_it_was_sent(
        argv in proptest::collection::vec("[^\0]{0,20}", 0..6),
        env in proptest::collection::vec(("[^\0=]{1,9}", "[^\0]{0,20}"), 0..4),
        bytes: bool,
    ) {
        // A single empty argument is the one thing that looks like none; there is no program of that name.
        prop_assume!(argv != [""]);
        let console = if bytes { Console::Bytes } else { Console::Terminal };
        let sent = initrd::Request { argv: argv.clone(), env: env.clone(), hostname: Some("vm1".to_owned()), console };
        let received = Request::read(unpack(&sent).path());
        prop_assert_eq!(received.argv, argv.iter().map(std::ffi::OsString::from).collect::<Vec<_>>());
        prop_assert_eq!(received.env, env.iter().map(|(name, value)| (name.into(), value.into())).collect::<Vec<_>>());
        prop_assert_eq!(received.hostname.as_deref(), Some("vm1"));
        prop_assert_eq!(received.console, if bytes { Mode::Bytes } else { Mode::Terminal });
    }
}

/// The request's files, as the kernel would put them below `/pontoon`.
fn unpack(request: &initrd::Request) -> tempfile::TempDir {
    let archive = request.to_archive().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut at = 0;
    loop {
        let field = |index: usize| {
            let text = std::str::from_utf8(&archive[at + 6 + index * 8..][..8]).unwrap();
            usize::from_str_radix(text, 16).unwrap()
        };
        let (size, name_len) = (field(6), field(11));
        let name = std::str::from_utf8(&archive[at + 110..][..name_len - 1]).unwrap();
        at = (at + 110 + name_len).next_multiple_of(4);
        if name == "TRAILER!!!" {
            return dir;
        }
        if let Some(name) = name.strip_prefix("pontoon/") {
            std::fs::write(dir.path().join(name), &archive[at..at + size]).unwrap();
        }
        at = (at + size).next_multiple_of(4);
    }
}

#[test]
fn boot_without_a_request_is_a_shell_on_a_terminal() {
    assert_eq!(Request::read(std::path::Path::new("/nonexistent")), Request::default());
    assert_eq!(Request::read(unpack(&initrd::Request::default()).path()), Request::default());
}

#[test]
fn options_are_found_among_the_kernels_words() {
    let options = Options::parse(
        "console=ttyS0 quiet pontoon.modules=overlay,,tun pontoon.dhcp=off pontoon.x=y -- z\n",
    );
    assert_eq!(options, Options { modules: vec!["overlay".to_owned(), "tun".to_owned()], dhcp: false });
    assert_eq!(Options::parse(""), Options { modules: vec![], dhcp: true });
    assert!(Options::parse("pontoon.dhcp=off pontoon.dhcp=on").dhcp, "later words win");
}

#[test]
fn indexes_lead_from_modalias_to_files() {
    let dep = "kernel/virtio.ko:\nkernel/net/virtio_net.ko.xz: kernel/net-failover.ko kernel/virtio.ko\n\
               kernel/net-failover.ko:\n# comment\n";
    let alias = "# Aliases extracted from modules\nalias virtio:d00000001v* virtio_net\nalias acpi*:LNRO0005:* virtio-mmio\n\
                 alias fs-overlay overlay\nalias a b c\n";
    let index = Index::parse(dep, alias);
    let net = index.module("virtio_net").unwrap();
    assert_eq!(net.file, "kernel/net/virtio_net.ko.xz");
    assert_eq!(net.needs, ["net_failover", "virtio"]);
    let names = |modalias| index.matching(modalias).collect::<Vec<_>>();
    assert_eq!(names("virtio:d00000001v00000000"), ["virtio_net"]);
    assert_eq!(names("acpi:LNRO0005:"), ["virtio_mmio"]);
    assert_eq!(names("fs-overlay"), ["overlay"]);
    assert_eq!(names("pci:v0000"), [""; 0]);
}
