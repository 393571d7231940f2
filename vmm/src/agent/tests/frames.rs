//! The wire format: what one side writes the other reads, and nothing else is taken.

use std::ffi::{CStr, CString};

use proptest::collection::vec;
use proptest::prelude::*;

use crate::agent::wire::{
    self, Encoder, Entry, EntryKind, Exec, Exit, Failure, HEAD, Kind, MAX_FRAME, MAX_REQUEST, Put, Refused,
    head, parse,
};

#[test]
fn a_frame_is_taken_when_it_is_whole_and_refused_when_it_is_too_long() {
    let bytes = [&head(Kind::Stdout, 3)[..], b"abc", b"rest"].concat();
    for cut in 0..8 {
        assert_eq!(parse(&bytes[..cut], MAX_FRAME), Ok(None));
    }
    assert_eq!(parse(&bytes, MAX_FRAME), Ok(Some((Kind::Stdout, &b"abc"[..], 8))));
    assert_eq!(parse(&bytes, 2), Err(Refused::Length(Kind::Stdout, 3)));
    assert_eq!(parse(&[0; HEAD], MAX_FRAME), Err(Refused::Kind(0)));
}

#[test]
fn requests_at_their_limits() {
    let mut room = vec![0; MAX_REQUEST];
    let many = vec![&b""[..]; wire::MAX_STRINGS + 1];
    let none: [&[u8]; 0] = [];
    let encode = |room: &mut [u8], count: usize| {
        Exec::encode(room, None, [b"", b""], many[..count].iter().copied(), none.iter().copied())
    };
    assert!(encode(&mut room, wire::MAX_STRINGS).is_ok());
    assert!(encode(&mut room, wire::MAX_STRINGS + 1).is_err());
    assert!(encode(&mut room, 0).is_err(), "no program");
    assert!(encode(&mut room[..10], 1).is_err(), "no room");
    assert!(Put::encode(&mut room, b"", b"x").is_err());
    assert!(Put::encode(&mut room, b"/x", b"a/b").is_err());
    assert!(Put::encode(&mut room, &[b'x'; 4096], b"a").is_err());
    assert!(Put::encode(&mut room, &[b'x'; 4095], b"").is_ok());
}

#[test]
fn statuses_are_codes_and_signals() {
    for exit in [Exit::Code(0), Exit::Code(255), Exit::Signal(1), Exit::Signal(64)] {
        assert_eq!(Exit::decode(&exit.encode()), Ok(exit));
    }
    for bad in [&[][..], &[0], &[1, 0], &[1, 65], &[2, 0], &[0, 0, 0]] {
        assert!(Exit::decode(bad).is_err());
    }
}

#[test]
fn entries_have_names_of_one_component_and_targets_where_they_belong() {
    let mut room = [0; 8192];
    let mut check = |entry: Entry<'_>, root: bool| {
        let length = entry.encode(&mut room).unwrap();
        Entry::decode(&room[..length], root).map(|_| ()).is_ok()
    };
    let file = Entry { kind: EntryKind::File, mode: 0, modified: (0, 0), size: 0, name: c"n", target: c"" };
    let link = Entry { kind: EntryKind::Link, target: c"t", ..file };
    assert!(check(file, false) && check(link, false));
    assert!(!check(file, true) && check(Entry { name: c"", ..file }, true));
    assert!(!check(Entry { name: c"", ..link }, true), "a tree is no link");
    assert!(!check(Entry { target: c"", ..link }, false) && !check(Entry { target: c"t", ..file }, false));
    assert!(!check(Entry { modified: (0, 1_000_000_000), ..file }, false));
    let (longest, longer) = (CString::new("n".repeat(255)).unwrap(), CString::new("n".repeat(256)).unwrap());
    assert!(check(Entry { name: &longest, ..file }, false) && !check(Entry { name: &longer, ..file }, false));
    let longer = CString::new("t".repeat(4096)).unwrap();
    assert!(!check(Entry { target: &longer, ..link }, false));
}

/// A string as C has it.
fn string() -> impl Strategy<Value = Vec<u8>> {
    vec(1..=255_u8, 0..20)
}

proptest! {
    #[test]
    fn an_exec_arrives_as_it_was_sent(
        terminal: Option<(u16, u16)>,
        cwd in string(),
        user in string(),
        argv in vec(string(), 1..6),
        env in vec(("[a-z]{1,5}", string()), 0..6),
    ) {
        let env: Vec<Vec<u8>> = env.iter().map(|(name, value)| [name.as_bytes(), b"=", value].concat()).collect();
        let mut room = vec![0; MAX_REQUEST];
        let length = Exec::encode(
            &mut room,
            terminal,
            [&cwd, &user],
            argv.iter().map(Vec::as_slice),
            env.iter().map(Vec::as_slice),
        ).unwrap();
        let exec = Exec::decode(&room[..length]).unwrap();
        prop_assert_eq!(exec.terminal, terminal);
        prop_assert_eq!(exec.cwd.to_bytes(), cwd);
        prop_assert_eq!(exec.user.to_bytes(), user);
        prop_assert_eq!(exec.argv.map(CStr::to_bytes).collect::<Vec<_>>(), argv);
        prop_assert_eq!(exec.env.map(CStr::to_bytes).collect::<Vec<_>>(), env);
        // Every cut, and every appended byte, is noticed.
        for cut in 0..length {
            prop_assert!(Exec::decode(&room[..cut]).is_err());
        }
        prop_assert!(Exec::decode(&room[..=length]).is_err());
    }

    #[test]
    fn an_entry_arrives_as_it_was_sent(
        mode: u32, seconds: i64, nanoseconds in 0..1_000_000_000_u32, size: u64,
        name in "[^\0/]{3,50}", target in "[^\0]{1,50}", link: bool,
    ) {
        let (name, target) = (CString::new(name).unwrap(), CString::new(target).unwrap());
        let (kind, target) = if link { (EntryKind::Link, target) } else { (EntryKind::File, CString::default()) };
        let sent = Entry { kind, mode, modified: (seconds, nanoseconds), size, name: &name, target: &target };
        let mut room = [0; 1024];
        let length = sent.encode(&mut room).unwrap();
        prop_assert_eq!(Entry::decode(&room[..length], false), Ok(sent));
    }

    #[test]
    fn any_bytes_are_taken_or_refused(bytes in vec(any::<u8>(), 0..300), root: bool) {
        let _ = parse(&bytes, MAX_FRAME);
        let _ = Exec::decode(&bytes).map(|exec| exec.argv.count() + exec.env.map(CStr::count_bytes).sum::<usize>());
        let _ = Put::decode(&bytes);
        let _ = wire::decode_get(&bytes);
        let _ = wire::decode_window(&bytes);
        let _ = Failure::decode(Kind::Failed, &bytes);
        if let Ok(entry) = Entry::decode(&bytes, root) {
            prop_assert!(root == entry.name.is_empty() && !entry.name.to_bytes().contains(&b'/'));
            let mut room = [0; 1024];
            let length = entry.encode(&mut room).unwrap();
            prop_assert_eq!(&room[..length], &bytes[..]);
        }
    }

    #[test]
    fn an_encoder_never_writes_beyond_its_buffer(strings in vec(vec(any::<u8>(), 0..20), 0..10), size in 0..100_usize) {
        let mut room = vec![0; size];
        let mut encoder = Encoder::new(&mut room);
        strings.iter().for_each(|string| { encoder.string(string); });
        let whole: usize = strings.iter().map(|string| string.len() + 1).sum();
        let fits = whole <= size && !strings.iter().any(|string| string.contains(&0));
        prop_assert_eq!(encoder.finish(Kind::Exec).ok(), fits.then_some(whole));
    }
}
