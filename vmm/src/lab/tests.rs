//! The pure parts of the lab.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::archive::destination;
use super::modules::depends;
use super::qemu::escape_commas;
use super::wire::{Exit, Header, Job, Kind, MAX_PAYLOAD, parse_frame, write_frame};

fn strings() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6)
}

prop_compose! {
    fn jobs()(
        argv in strings(),
        env in strings(),
        cwd in prop::collection::vec(any::<u8>(), 0..40),
        uid in any::<u32>(),
        terminal in any::<Option<(u16, u16)>>(),
        now in any::<u64>(),
        fetch in strings(),
    ) -> Job {
        Job { argv, env, cwd, uid, terminal, now, fetch }
    }
}

proptest! {
    #[test]
    fn a_job_survives_the_port(job in jobs()) {
        prop_assert_eq!(Job::decode(&job.encode()).unwrap(), job);
    }

    #[test]
    fn a_cut_job_is_refused(job in jobs(), keep in 0.0..1.0) {
        let bytes = job.encode();
        let keep = (bytes.len() as f64 * keep) as usize;
        prop_assert!(Job::decode(&bytes[..keep]).is_err());
    }

    #[test]
    fn a_job_of_noise_is_refused_or_read_but_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Job::decode(&bytes);
        let _ = Header::read(&mut bytes.as_slice());
        let _ = parse_frame(&bytes);
    }

    #[test]
    fn frames_are_found_in_a_stream(payload in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..305) {
        let mut stream = Vec::new();
        write_frame(&mut stream, Kind::Stdout, &payload).unwrap();
        write_frame(&mut stream, Kind::Exit, &Exit { status: 7, oom_kills: 0 }.encode()).unwrap();
        let (kind, found, length) = parse_frame(&stream).unwrap().unwrap();
        prop_assert_eq!((kind, found), (Kind::Stdout, payload.as_slice()));
        let (kind, found, _) = parse_frame(&stream[length..]).unwrap().unwrap();
        prop_assert_eq!((kind, Exit::decode(found).unwrap().status), (Kind::Exit, 7));
        let cut = cut.min(length - 1);
        prop_assert!(parse_frame(&stream[..cut]).unwrap().is_none());
    }

    #[test]
    fn a_header_survives_the_disk(mode in any::<u32>(), size in any::<u64>(), path in prop::collection::vec(any::<u8>(), 0..60)) {
        let header = Header { kind: super::wire::EntryKind::File, mode, size, path };
        let mut bytes = Vec::new();
        header.write(&mut bytes).unwrap();
        prop_assert_eq!(Header::read(&mut bytes.as_slice()).unwrap(), header);
    }
}

#[test]
fn a_frame_beyond_the_limit_is_neither_written_nor_believed() {
    assert!(write_frame(&mut Vec::new(), Kind::Stdin, &vec![0; MAX_PAYLOAD + 1]).is_err());
    assert!(parse_frame(&[Kind::Stdin as u8, 0xff, 0xff, 0xff, 0xff]).is_err());
    assert!(parse_frame(&[99, 0, 0, 0, 0]).is_err());
}

#[test]
fn a_fetched_path_stays_below_its_destination() {
    let destinations = [PathBuf::from("/out/a"), PathBuf::from("/out/b")];
    assert_eq!(destination(b"1/x/y", &destinations).unwrap(), Path::new("/out/b/x/y"));
    assert_eq!(destination(b"0", &destinations).unwrap(), Path::new("/out/a"));
    for bad in ["2", "", "/0", "../0", "0/../x", "0/x/../../y", "zero"] {
        assert!(destination(bad.as_bytes(), &destinations).is_err(), "{bad}");
    }
}

#[test]
fn a_fetched_path_does_not_follow_links() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
    let destinations = [dir.path().to_owned()];
    assert!(destination(b"0/link/passwd", &destinations).is_err());
    assert!(destination(b"0/link", &destinations).is_ok());
}

#[test]
fn module_dependencies_are_read_from_modinfo() {
    let module = b"\x7fELF..\0license=GPL\0depends=virtio_ring,virtio,net-failover\0vermagic=6.1\0";
    assert_eq!(depends(module), ["virtio_ring", "virtio", "net_failover"]);
    assert_eq!(depends(b"\0depends=\0name=x\0"), [""; 0]);
    assert_eq!(depends(b"no such string"), [""; 0]);
}

#[test]
fn commas_in_paths_are_doubled_for_the_emulator() {
    assert_eq!(escape_commas(Path::new("/a,b/c")), OsString::from("/a,,b/c"));
}
