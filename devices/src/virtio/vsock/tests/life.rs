//! The device's life: the socket's file, drivers that come and go.

use super::*;
use crate::virtio::testing::SEAM;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

fn bind(path: &Path) -> Result<(Vsock, VsockWorker), VsockError> {
    Vsock::new(GUEST_CID, path)
}

#[test]
fn the_guest_reads_its_address() {
    let mut lab = Lab::new();
    assert_eq!((lab.guest.get(0x100), lab.guest.get(0x104), lab.guest.get(0x108)), (3, 0, 0));
    assert_eq!(lab.guest.get(0x08), 19);
    assert_eq!(lab.guest.offered() & 3, F_STREAM);
}

#[test]
fn addresses_that_mean_something_else_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        let refused = Vsock::new(cid, &dir.path().join("v")).err();
        assert!(matches!(refused, Some(VsockError::Cid(found)) if found == cid));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_file_is_the_owners_alone_and_goes_with_the_worker() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let (vsock, worker) = bind(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(vsock);
    assert!(path.exists());
    drop(worker);
    assert!(!path.exists());
}

#[test]
fn a_dead_machines_file_is_replaced_and_a_living_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let _alive = bind(&path).unwrap();
    let refused = bind(&path).err().unwrap();
    assert!(matches!(&refused, VsockError::InUse(found) if *found == path));
    assert!(refused.to_string().contains("choose another path"), "{refused}");
    UnixStream::connect(&path).unwrap();
}

#[test]
fn what_is_not_a_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    fs::write(&path, "precious").unwrap();
    assert!(matches!(bind(&path), Err(VsockError::NotASocket(_))));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    assert!(matches!(bind(&link), Err(VsockError::NotASocket(_))));
}

#[test]
fn a_path_that_cannot_be_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(MAX_PATH));
    let refused = bind(&long).err().unwrap();
    assert!(matches!(refused, VsockError::PathTooLong { len, .. } if len > MAX_PATH));
    assert!(refused.to_string().contains("107"), "{refused}");
    let nowhere = bind(&dir.path().join("no/folder")).err().unwrap();
    assert!(matches!(nowhere, VsockError::Listen { .. }), "{nowhere}");
    // The longest path that can be is one that works.
    let room = MAX_PATH - dir.path().as_os_str().len() - 1;
    let path = dir.path().join("y".repeat(room));
    let _device = bind(&path).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_file_that_another_put_in_its_place_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let (_vsock, worker) = bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    let before = fs::metadata(&path).unwrap().ino();
    drop(worker);
    assert_eq!(fs::metadata(&path).unwrap().ino(), before);
}

#[test]
fn a_port_whose_path_is_too_long_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("y".repeat(MAX_PATH - dir.path().as_os_str().len() - 2));
    let (vsock, worker) = bind(&path).unwrap();
    let monitor = vsock.monitor();
    let mut guest = Driver::new(vsock, worker);
    guest.start(0);
    let header = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        dst_port: 1234,
        kind: STREAM,
        op: Op::Request as u16,
        ..Header::default()
    };
    guest.fill(OUTGOING, &header.to_bytes());
    guest.add(TX, &[out(OUTGOING, HEADER_LEN)]);
    guest.kick_and_run(TX);
    assert_eq!(monitor.totals().refused(Refusal::PathTooLong), 1);
}

/// In a process of its own, since descriptors are the whole process's.
#[test]
fn without_descriptors_both_sides_are_refused_and_nothing_spins() {
    const CHILD: &str = "PONTOON_TEST_WITHOUT_DESCRIPTORS";
    if std::env::var_os(CHILD).is_none() {
        let name = "virtio::vsock::tests::life::without_descriptors_both_sides_are_refused_and_nothing_spins";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
        return;
    }
    let mut lab = Lab::new();
    let _server = lab.server(7);
    lab.connected(52);
    let few = rustix::process::Rlimit { current: Some(100), maximum: Some(100) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, few).unwrap();
    let mut late = UnixStream::connect(lab.path()).unwrap();
    late.set_nonblocking(true).unwrap();
    let hoard: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
    assert!(!hoard.is_empty() && hoard.len() < 100);
    // Fails if it spins.
    lab.guest.run();
    assert!(is_at_end(&mut late));
    lab.send(Key { host: 7, guest: 1 }, Op::Request);
    assert_eq!(*lab.ops().last().unwrap(), Op::Rst);
    assert_eq!(lab.refused(Refusal::NoResources), 2);
    drop(hoard);
    lab.connected(53);
}

#[test]
fn clients_that_come_before_the_driver_are_served_when_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (vsock, worker) = bind(&dir.path().join("v")).unwrap();
    let mut guest = Driver::new(vsock, worker);
    let mut early = UnixStream::connect(dir.path().join("v")).unwrap();
    early.write_all(b"CONNECT 1024\n").unwrap();
    guest.run();
    guest.start(F_EVENT_IDX);
    guest.add(RX, &[into(BUFFERS, BUFFER)]);
    guest.kick_and_run(RX);
    assert_eq!(guest.used(RX).len(), 1);
    let header = Header::parse(guest.bytes(BUFFERS, HEADER_LEN).try_into().unwrap());
    assert_eq!((header.op, header.dst_port), (Op::Request as u16, 1024));
}

#[test]
fn a_reset_closes_all_and_a_new_driver_begins_anew() {
    let mut lab = Lab::new();
    let (mut client, key) = lab.connected(52);
    let mut stranger = lab.stranger();
    lab.guest.put(crate::virtio::testing::STATUS, 0);
    lab.guest.run();
    assert!(is_at_end(&mut client) && is_at_end(&mut stranger));
    assert_eq!(lab.totals().open, 0);
    lab.guest.start(F_EVENT_IDX);
    lab.posted.clear();
    lab.post(8);
    lab.send_data(key, b"who?");
    assert_eq!(lab.ops(), [Op::Rst]);
    lab.connected(52);
}

#[test]
fn a_new_driver_that_comes_at_once_does_not_inherit_connections() {
    let mut lab = Lab::new();
    let (mut client, _) = lab.connected(52);
    client.write_all(b"for the old one").unwrap();
    // Reset and activation without a turn of the worker in between; `start` then runs it.
    lab.guest.start(F_EVENT_IDX);
    lab.posted.clear();
    lab.post(8);
    assert_eq!(lab.ops(), []);
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    assert_eq!(lab.totals().open, 0);
}

#[test]
fn a_broken_queue_stops_the_device_until_reset() {
    for queue in [RX, TX] {
        let mut lab = Lab::starved(0);
        let mut client = lab.stranger();
        client.write_all(b"CONNECT 1\n").unwrap();
        lab.guest.run();
        // Of the wrong direction.
        let buf = if queue == RX { out(BUFFERS, BUFFER) } else { into(BUFFERS, BUFFER) };
        lab.guest.add(queue, &[buf]);
        lab.guest.kick_and_run(queue);
        lab.guest.assert_broken();
        assert_eq!((lab.totals().broken, lab.totals().open), (1, 0));
        assert!(is_at_end(&mut client));
        lab.guest.start(0);
        lab.posted.clear();
        lab.post(8);
        lab.connected(52);
    }
}

#[test]
fn a_receive_buffer_without_room_for_payload_breaks_the_queue() {
    let mut lab = Lab::starved(0);
    let mut client = lab.stranger();
    client.write_all(b"CONNECT 1\n").unwrap();
    lab.post_of(HEADER_LEN);
    lab.guest.kick_and_run(RX);
    lab.guest.assert_broken();
}

#[test]
fn buffers_may_cross_memory_regions() {
    let mut lab = Lab::starved(0);
    lab.post(1);
    let mut client = lab.stranger();
    client.write_all(b"CONNECT 1\n").unwrap();
    lab.guest.run();
    lab.fetch(false);
    let key = Key { host: lab.inbox.pop().unwrap().0.src_port, guest: 1 };
    lab.send(key, Op::Response);
    read(&mut client);
    client.write_all(b"0123456789").unwrap();
    let addr = SEAM - HEADER_LEN as u64 - 4;
    lab.guest.add(RX, &[into(addr, 4096)]);
    lab.guest.kick_and_run(RX);
    assert_eq!(lab.guest.used(RX)[0].1 as usize, HEADER_LEN + 10);
    assert_eq!(lab.guest.bytes(SEAM - 4, 10), b"0123456789");
    // And on the way out, across the header as well.
    let addr = SEAM - 20;
    lab.guest.fill(addr, &Header { len: 3, ..lab.header(key, Op::Rw) }.to_bytes());
    lab.guest.fill(addr + HEADER_LEN as u64, b"abc");
    lab.guest.add(TX, &[out(addr, HEADER_LEN + 3)]);
    lab.guest.kick_and_run(TX);
    assert_eq!(read(&mut client), b"abc");
}
