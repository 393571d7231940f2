//! What each request does, and what is refused.

use std::fs;

use super::*;
use crate::disk::SECTOR;
use crate::virtio::testing::MEMORY_END;

/// The same with io_uring and with the thread.
fn both(mode: DiskMode, test: impl Fn(&mut Guest, &tempfile::NamedTempFile)) {
    for uring in [true, false] {
        let image = image(64);
        let mut guest = Guest::new(open(&image, mode), uring);
        test(&mut guest, &image);
        guest.driver.assert_healthy();
    }
}

#[test]
fn the_configuration_tells_capacity_and_limits() {
    both(DiskMode::ReadWrite, |guest, _| {
        assert_eq!(guest.driver.get(0x8), 2);
        let words: Vec<u32> = (0..15).map(|word| guest.driver.get(0x100 + 4 * word)).collect();
        assert_eq!((words[0], words[1]), (64, 0), "capacity");
        assert_eq!(words[3], 254, "seg_max");
        assert_eq!(words[5], 512, "blk_size");
        assert_eq!(words[6], 8 << 16 | 3, "topology");
        assert_eq!(words[9..14], [1 << 22, 16, 8, 1 << 18, 16], "discard, write zeroes");
        assert_eq!(words[14], 1, "may unmap");
    });
}

#[test]
fn what_is_written_is_in_the_file_and_reads_back() {
    both(DiskMode::ReadWrite, |guest, image| {
        let bytes: Vec<u8> = (0..4096_u32).map(|n| (n % 251) as u8).collect();
        assert_eq!(guest.write(8, &bytes), OK);
        assert_eq!(fs::read(image.path()).unwrap()[8 * 512..][..4096], bytes);
        assert_eq!(guest.read(8, 4096), Ok(bytes));
        assert_eq!(guest.read(63, 512).unwrap()[..2], [64, 0]);
        let totals = guest.monitor.totals();
        assert_eq!((totals.writes, totals.written_bytes), (1, 4096));
        assert_eq!((totals.reads, totals.read_bytes), (2, 4608));
    });
}

#[test]
fn the_parts_of_a_request_may_be_split_anywhere() {
    both(DiskMode::ReadWrite, |guest, _| {
        // The header in three, the data in three of which one spans both regions, the status behind data.
        guest.driver.fill(DATA, &[&IN.to_le_bytes()[..], &[0; 4], &5_u64.to_le_bytes()].concat());
        let seam = crate::virtio::testing::SEAM;
        let bufs = [
            out(DATA, 3),
            out(DATA + 3, 10),
            out(DATA + 13, 3),
            into(DATA + 0x1000, 100),
            into(seam - 400, 800),
            into(DATA + 0x2000, 124 + 1),
        ];
        let head = guest.driver.add(0, &bufs);
        guest.driver.kick(0);
        assert_eq!(guest.driver.run_until_used(0, 1), [(head, 1025)]);
        assert_eq!(guest.driver.bytes(DATA + 0x1000, 2), [6, 0]);
        assert_eq!(guest.driver.bytes(seam - 400 + 412, 2), [7, 0], "the second sector");
        assert_eq!(guest.driver.bytes(DATA + 0x2000 + 124, 1), [OK]);
    });
}

#[test]
fn requests_beyond_the_disk_or_between_sectors_are_io_errors() {
    both(DiskMode::ReadWrite, |guest, image| {
        let before = fs::read(image.path()).unwrap();
        assert_eq!(guest.read(64, 512), Err(IOERR));
        assert_eq!(guest.read(63, 1024), Err(IOERR));
        assert_eq!(guest.read(u64::MAX, 512), Err(IOERR));
        assert_eq!(guest.read(u64::MAX / 512, 512), Err(IOERR));
        assert_eq!(guest.read(0, 511), Err(IOERR));
        assert_eq!(guest.write(63, &[7; 1024]), IOERR);
        assert_eq!(guest.write(0, &[7; 513]), IOERR);
        assert_eq!(fs::read(image.path()).unwrap(), before);
        assert_eq!(guest.monitor.totals().refused, 7);
    });
}

#[test]
fn unknown_requests_are_unsupported() {
    both(DiskMode::ReadWrite, |guest, _| {
        for kind in [2, 3, 5, 14, 15, 1 << 31, u32::MAX] {
            assert_eq!(guest.ask(kind, 0, &[]), (UNSUPP, 1), "{kind}");
        }
    });
}

#[test]
fn the_id_is_the_machines_name_of_the_disk() {
    both(DiskMode::ReadWrite, |guest, _| {
        guest.driver.fill(data(0), &[0xaa; 24]);
        assert_eq!(guest.ask(GET_ID, 0, &[into(data(0), 20)]), (OK, 21));
        assert_eq!(guest.driver.bytes(data(0), 21), *b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xaa");
        assert_eq!(guest.ask(GET_ID, 0, &[into(data(0), 3)]), (OK, 4));
    });
}

#[test]
fn a_read_only_disk_refuses_everything_that_writes() {
    both(DiskMode::ReadOnly, |guest, image| {
        let before = fs::read(image.path()).unwrap();
        let offered = guest.driver.offered();
        assert_ne!(offered & 1 << 5, 0, "RO");
        assert_eq!(offered & (1 << 9 | 1 << 13 | 1 << 14), 0, "FLUSH, DISCARD, WRITE_ZEROES");
        assert_eq!(guest.write(0, &[7; 512]), IOERR);
        assert_eq!(guest.trim(DISCARD, &[(0, 8, 0)]), IOERR);
        assert_eq!(guest.trim(ZEROES, &[(0, 8, 0)]), IOERR);
        assert_eq!(guest.read(1, 512).unwrap()[..2], [2, 0]);
        assert_eq!(fs::read(image.path()).unwrap(), before);
    });
}

#[test]
fn zeroed_sectors_read_as_zeros_and_their_neighbours_do_not() {
    both(DiskMode::ReadWrite, |guest, _| {
        assert_eq!(guest.trim(ZEROES, &[(1, 3, 0), (8, 8, 1), (20, 0, 0)]), OK);
        let all = guest.read(0, 64 * 512).unwrap();
        let zeroed = |sector: usize| all[sector * 512..][..512].iter().all(|byte| *byte == 0);
        let expected: Vec<usize> = (1..4).chain(8..16).collect();
        assert_eq!((0..64).filter(|sector| zeroed(*sector)).collect::<Vec<_>>(), expected);
    });
}

#[test]
fn a_discard_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    both(DiskMode::ReadWrite, |guest, image| {
        guest.driver.fill(data(0), &[7; 0x8000]);
        assert_eq!(guest.ask(OUT, 0, &[out(data(0), 0x8000)]).0, OK);
        assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
        let before = image.as_file().metadata().unwrap().blocks();
        assert_eq!(guest.trim(DISCARD, &[(8, 16, 0), (40, 8, 0)]), OK);
        let freed = before - image.as_file().metadata().unwrap().blocks();
        assert_eq!(freed, 24, "sectors, on a file system with blocks of 4 KiB");
        assert_eq!(guest.read(0, 512), Ok(vec![7; 512]));
        assert_eq!(guest.monitor.totals().trims, 1);
    });
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    both(DiskMode::ReadWrite, |guest, image| {
        let before = fs::read(image.path()).unwrap();
        assert_eq!(guest.trim(DISCARD, &[]), IOERR);
        assert_eq!(guest.trim(DISCARD, &[(60, 5, 0)]), IOERR);
        assert_eq!(guest.trim(DISCARD, &[(u64::MAX, 1, 0)]), IOERR);
        assert_eq!(guest.trim(DISCARD, &[(0, 8, 0), (0, u32::MAX, 0)]), IOERR);
        assert_eq!(guest.trim(DISCARD, &[(0, 8, 1)]), UNSUPP, "unmap means nothing to a discard");
        assert_eq!(guest.trim(ZEROES, &[(0, 8, 2)]), UNSUPP, "an unknown flag");
        assert_eq!(guest.trim(ZEROES, &[(0, 1, 0); 17]), IOERR, "one more than announced");
        assert_eq!(guest.ask(ZEROES, 0, &[out(data(0), 15)]), (IOERR, 1));
        assert_eq!(fs::read(image.path()).unwrap(), before);
    });
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let image = image(64);
    let mut guest = Guest::new(open(&image, DiskMode::ReadWrite), true);
    guest.driver.start(0);
    assert_eq!(guest.trim(DISCARD, &[(0, 8, 0)]), UNSUPP);
    assert_eq!(guest.trim(ZEROES, &[(0, 8, 0)]), UNSUPP);
}

#[test]
fn a_chain_that_cannot_be_answered_breaks_the_queue() {
    let header_too_short = [out(DATA, 15), into(DATA + STATUS_AT, 1)];
    let no_status = [out(DATA, 16)];
    let outside = [out(DATA, 16), into(MEMORY_END - 100, 512), into(DATA + STATUS_AT, 1)];
    let backwards = [into(DATA + STATUS_AT, 1), out(DATA, 16)];
    for chain in [&header_too_short[..], &no_status, &outside, &backwards] {
        let image = image(64);
        let mut guest = Guest::new(open(&image, DiskMode::ReadWrite), true);
        guest.driver.add(0, chain);
        guest.driver.kick_and_run(0);
        guest.driver.assert_broken();
        guest.driver.start(0);
        assert_eq!(guest.read(3, 512).unwrap()[..2], [4, 0], "a reset mends it");
        assert_eq!(guest.monitor.totals().broken, 1);
    }
}

#[test]
fn more_requests_than_a_turn_begins_are_all_served() {
    both(DiskMode::ReadWrite, |guest, _| {
        for slot in 0..80 {
            guest.add(slot, IN, slot % 64, &[into(data(slot), 512)]);
        }
        guest.driver.kick(0);
        assert_eq!(guest.driver.run_until_used(0, 80).len(), 80);
        for slot in 0..80 {
            assert_eq!(
                (guest.status(slot), guest.driver.bytes(data(slot), 1)[0]),
                (OK, (slot % 64) as u8 + 1)
            );
        }
    });
}

#[test]
fn a_flush_is_passed_on_and_writes_need_none_of_their_own() {
    let image = image(64);
    let storage = Scripted::new(image.as_file(), []);
    let mut guest = Guest::new(storage.disk(), true);
    assert_eq!(guest.write(0, &[7; 512]), OK);
    assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(*storage.calls.lock().unwrap(), ["write", "flush"]);
    assert_eq!(guest.monitor.totals().flushes, 1);
}

#[test]
fn without_the_flush_feature_every_write_is_durable() {
    let image = image(64);
    let storage = Scripted::new(image.as_file(), []);
    let mut guest = Guest::new(storage.disk(), true);
    guest.driver.start(ALL & !F_FLUSH);
    assert_eq!(guest.write(0, &[7; 512]), OK);
    assert_eq!(guest.trim(DISCARD, &[(0, 8, 0)]), OK);
    assert_eq!(guest.trim(ZEROES, &[(0, 8, 0)]), OK);
    assert_eq!(*storage.calls.lock().unwrap(), ["durable write", "discard", "flush", "zero", "flush"]);
    // And by io_uring nothing goes wrong with the flag.
    let mut guest = Guest::new(open(&image, DiskMode::ReadWrite), true);
    guest.driver.start(ALL & !F_FLUSH);
    assert_eq!(guest.write(4, &[9; 512]), OK);
    assert_eq!(guest.read(4, 512), Ok(vec![9; 512]));
}

#[test]
fn an_overlay_keeps_what_is_written_and_the_base_does_not() {
    both(DiskMode::Overlay, |guest, image| {
        let before = fs::read(image.path()).unwrap();
        assert_eq!(guest.write(9, &[7; 512]), OK);
        assert_eq!(guest.trim(ZEROES, &[(2, 1, 0)]), OK);
        assert_eq!(guest.trim(DISCARD, &[(32, 8, 0)]), OK);
        assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
        let mut expected = before.clone();
        expected[9 * 512..10 * 512].fill(7);
        expected[2 * 512..3 * 512].fill(0);
        expected[32 * 512..40 * 512].fill(0);
        assert_eq!(guest.read(0, 64 * 512), Ok(expected));
        assert_eq!(fs::read(image.path()).unwrap(), before);
        assert_eq!(SECTOR * 64, before.len() as u64);
    });
}
