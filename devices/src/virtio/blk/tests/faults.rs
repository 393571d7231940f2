//! A host that fails, is slow, or takes the image away; and resets in the middle of it.

use std::sync::mpsc;
use std::thread;

use super::*;
use crate::disk::MAX_IN_FLIGHT;
use crate::virtio::testing::STATUS;

#[test]
fn an_error_of_the_host_is_the_guests_and_the_disk_goes_on() {
    let image = image(64);
    for (errno, kind) in [(libc::EIO, IN), (libc::ENOSPC, OUT), (libc::EIO, FLUSH)] {
        let storage = Scripted::new(image.as_file(), [Fault::Errno(errno)]);
        let mut guest = Guest::new(storage.disk(), true);
        let middle = match kind {
            IN => vec![into(data(0), 512)],
            OUT => vec![out(data(0), 512)],
            _ => vec![],
        };
        assert_eq!(guest.ask(kind, 0, &middle).0, IOERR);
        assert_eq!(guest.ask(kind, 0, &middle).0, OK);
        assert_eq!(guest.monitor.totals().failed, 1);
        guest.driver.assert_healthy();
    }
}

#[test]
fn a_discard_that_fails_fails_the_request() {
    let image = image(64);
    let storage = Scripted::new(image.as_file(), [Fault::Short(0), Fault::Errno(libc::EIO)]);
    let mut guest = Guest::new(storage.disk(), true);
    assert_eq!(guest.trim(DISCARD, &[(0, 8, 0), (8, 8, 0), (16, 8, 0)]), IOERR);
    assert_eq!(*storage.calls.lock().unwrap(), ["discard", "discard"]);
}

#[test]
fn short_and_interrupted_transfers_go_on_to_their_end() {
    let image = image(64);
    let stumble = || [Fault::Short(100), Fault::Errno(libc::EINTR), Fault::Short(1), Fault::Short(3000)];
    let storage = Scripted::new(image.as_file(), stumble());
    let mut guest = Guest::new(storage.disk(), true);
    let bytes: Vec<u8> = (0..8192_u32).map(|n| (n % 249) as u8).collect();
    guest.driver.fill(data(0), &bytes);
    let pieces = [out(data(0), 4000), out(data(0) + 4000, 1), out(data(0) + 4001, 4191)];
    assert_eq!(guest.ask(OUT, 16, &pieces), (OK, 1));
    storage.faults.lock().unwrap().extend(stumble());
    assert_eq!(guest.read(16, 8192), Ok(bytes));
    assert_eq!(storage.calls.lock().unwrap().len(), 10);
}

#[test]
fn a_transfer_that_gets_nowhere_is_an_error() {
    let image = image(64);
    for kind in [IN, OUT] {
        let storage = Scripted::new(image.as_file(), [Fault::Short(100), Fault::Short(0)]);
        let mut guest = Guest::new(storage.disk(), true);
        let middle = if kind == IN { into(data(0), 512) } else { out(data(0), 512) };
        assert_eq!(guest.ask(kind, 0, &[middle]).0, IOERR);
    }
}

#[test]
fn an_image_that_was_truncated_gives_errors_not_zeros() {
    for mode in [DiskMode::ReadOnly, DiskMode::ReadWrite, DiskMode::Overlay] {
        for uring in [true, false] {
            let image = image(64);
            let mut guest = Guest::new(open(&image, mode), uring);
            image.as_file().set_len(10 * 512 + 100).unwrap();
            assert_eq!(guest.read(9, 512).unwrap()[..2], [10, 0]);
            assert_eq!(guest.read(10, 512), Err(IOERR), "{mode:?} {uring}: half of it is there");
            assert_eq!(guest.read(32, 8 * 512), Err(IOERR), "{mode:?} {uring}");
            if mode == DiskMode::Overlay {
                assert_eq!(guest.write(33, &[7; 512]), IOERR, "its neighbours can't be copied");
                assert_eq!(guest.write(40, &[7; 4096]), OK, "a whole cluster needs none");
            }
            guest.driver.assert_healthy();
        }
    }
}

/// A guest with a read that waits for the gate of its storage.
fn stuck() -> (Guest, Arc<Scripted>, tempfile::NamedTempFile) {
    let image = image(64);
    let storage = Scripted::new(image.as_file(), []);
    storage.set_gate(false);
    let mut guest = Guest::new(storage.disk(), true);
    guest.driver.fill(data(0), &[0xaa; 512]);
    guest.add(0, IN, 5, &[into(data(0), 512)]);
    guest.driver.kick_and_run(0);
    assert_eq!(guest.driver.used(0), []);
    (guest, storage, image)
}

#[test]
fn a_request_that_waits_does_not_hold_the_io_thread() {
    let (mut guest, storage, _image) = stuck();
    // The device answers what needs no disk, while the disk hangs.
    guest.add(1, GET_ID, 0, &[into(data(1), 20)]);
    guest.driver.kick(0);
    assert_eq!(guest.driver.run_until_used(0, 1).len(), 1);
    assert_eq!((guest.status(1), guest.status(0)), (OK, 0xff));
    storage.set_gate(true);
    assert_eq!(guest.driver.run_until_used(0, 1).len(), 1);
    assert_eq!((guest.status(0), guest.driver.bytes(data(0), 1)[0]), (OK, 6));
}

#[test]
fn a_reset_waits_for_what_is_in_flight_and_nothing_touches_memory_afterwards() {
    let (mut guest, storage, _image) = stuck();
    let (begin, began) = mpsc::channel();
    let opener = thread::spawn({
        let storage = Arc::clone(&storage);
        move || {
            began.recv().unwrap();
            storage.set_gate(true);
        }
    });
    begin.send(()).unwrap();
    // Without the gate this would wait for ever; when it returns, the read has been done.
    guest.driver.put(STATUS, 0);
    assert_eq!(guest.driver.bytes(data(0), 2), [6, 0], "the transfer was over before the reset was");
    opener.join().unwrap();
    guest.driver.fill(data(0), &[0xbb; 512]);
    guest.driver.run();
    assert_eq!(guest.driver.bytes(data(0), 512), [0xbb; 512]);
    assert_eq!(guest.status(0), 0xff, "nobody answers what was reset");
    guest.driver.start(ALL);
    assert_eq!(guest.read(7, 512).unwrap()[..2], [8, 0]);
}

#[test]
fn a_reset_with_io_uring_in_flight_leaves_a_disk_that_works() {
    let image = image(64);
    let mut guest = Guest::new(open(&image, DiskMode::ReadWrite), true);
    for round in 0..20_u64 {
        for slot in 0..40 {
            let kind = if slot % 3 == 0 { OUT } else { IN };
            let middle = if kind == OUT { out(data(slot), 4096) } else { into(data(slot), 4096) };
            guest.add(slot, kind, (round + slot) % 56, &[middle]);
        }
        guest.add(40, FLUSH, 0, &[]);
        guest.driver.kick(0);
        guest.driver.run_once();
        guest.driver.start(ALL);
        guest.driver.fill(data(0), &[round as u8; 512]);
        assert_eq!(guest.write(60, &[round as u8; 512]), OK);
        assert_eq!(guest.read(60, 512), Ok(vec![round as u8; 512]));
    }
}

#[test]
fn a_driver_that_reuses_its_descriptors_gets_no_more_than_so_many_in_flight() {
    let (mut guest, storage, _image) = stuck();
    // The same chain again and again: its head is in the ring already, and the device has taken it.
    let mut offered = 1;
    while offered < 2 * MAX_IN_FLIGHT {
        guest.driver.offer(0, 0);
        guest.driver.put(0x50, 0);
        guest.driver.run();
        offered += 1;
    }
    assert_eq!(guest.driver.used(0), []);
    guest.driver.assert_healthy();
    let in_flight = guest.monitor.0.lock().engine.as_ref().map(crate::disk::Engine::in_flight);
    assert_eq!(in_flight, Some(MAX_IN_FLIGHT), "the others wait in the ring");
    storage.set_gate(true);
    assert_eq!(guest.driver.run_until_used(0, offered).len(), offered);
    assert_eq!(storage.calls.lock().unwrap().len(), offered);
}

#[test]
fn a_queue_that_breaks_with_requests_in_flight_answers_none_of_them() {
    let (mut guest, storage, _image) = stuck();
    guest.driver.add(0, &[out(DATA, 3)]);
    guest.driver.kick_and_run(0);
    guest.driver.assert_broken();
    storage.set_gate(true);
    guest.driver.put(STATUS, 0);
    assert_eq!(guest.driver.used(0), []);
    guest.driver.start(ALL);
    assert_eq!(guest.read(7, 512).unwrap()[..2], [8, 0]);
}

#[test]
fn the_end_of_the_machine_waits_for_the_disk_and_frees_the_image() {
    let image = image(64);
    for uring in [true, false] {
        let mut guest = Guest::new(open(&image, DiskMode::ReadWrite), uring);
        guest.add(0, OUT, 0, &[out(data(0), 4096)]);
        guest.add(1, FLUSH, 0, &[]);
        guest.driver.kick(0);
        guest.driver.run_once();
        assert!(Disk::open(image.path(), DiskMode::ReadWrite).is_err(), "it is locked");
        drop(guest);
        // The lock is gone with the last descriptor.
        drop(open(&image, DiskMode::ReadWrite));
    }
}
