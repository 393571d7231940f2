//! Dialogues with a driver whose memory is a file, as a machine's is: what is given back is gone from the file.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;
use crate::virtio::testing::{Buf, DATA, Driver, MEMORY_END, SEAM, into, out};

const MIB: u64 = 1 << 20;

struct Guest {
    driver: Driver,
    handle: BalloonHandle,
    file: File,
}

impl Guest {
    /// Two regions of 8 MiB in one file, the second from an odd place on.
    fn new() -> Self {
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
        file.set_len(2 * SEAM + 3 * PAGE).unwrap();
        let part = |start| Some(FileOffset::new(file.try_clone().unwrap(), start));
        let ranges = [
            (GuestAddress(0), SEAM as usize, part(0)),
            (GuestAddress(SEAM), (MEMORY_END - SEAM) as usize, part(SEAM + 3 * PAGE)),
        ];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let (balloon, worker) = Balloon::new().unwrap();
        let handle = balloon.handle();
        let mut driver = Driver::with_memory(balloon, worker, Arc::new(memory));
        driver.start(F_DEFLATE_ON_OOM | F_PAGE_REPORTING);
        Self { driver, handle, file }
    }

    fn fill(&self, at: u64, len: u64) {
        self.driver.fill(at, &vec![0x55; len as usize]);
    }

    /// Bytes of the file that take memory.
    fn resident(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }

    fn reports(&mut self, bufs: &[Buf]) {
        let head = self.driver.add(2, bufs);
        self.driver.kick_and_run(2);
        assert_eq!(self.driver.used(2), [(head, 0)]);
    }

    /// A chain of page numbers.
    fn numbers(&mut self, queue: usize, numbers: &[u32]) -> u16 {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.driver.fill(0x8_0000, &bytes);
        self.driver.add(queue, &[out(0x8_0000, bytes.len())])
    }
}

#[test]
fn reported_memory_is_gone_from_the_host_and_reads_as_zeros() {
    let mut guest = Guest::new();
    guest.fill(2 * MIB, 4 * MIB);
    let before = guest.resident();
    guest.reports(&[into(2 * MIB, MIB as usize), into(4 * MIB, MIB as usize)]);
    assert_eq!(before - guest.resident(), 2 * MIB);
    assert_eq!(guest.driver.bytes(2 * MIB, 1), [0]);
    assert_eq!(guest.driver.bytes(3 * MIB, 1), [0x55], "what was not reported stays");
    assert_eq!(guest.driver.bytes(5 * MIB, 1), [0x55]);
    assert_eq!(guest.handle.totals().reported_bytes, 2 * MIB);
}

#[test]
fn a_report_across_regions_gives_back_both_parts() {
    let mut guest = Guest::new();
    guest.fill(SEAM - MIB, 2 * MIB);
    let before = guest.resident();
    guest.reports(&[into(SEAM - PAGE, 3 * PAGE as usize)]);
    assert_eq!(before - guest.resident(), 3 * PAGE);
    for (page, byte) in [(-2, 0x55), (-1, 0), (0, 0), (1, 0), (2, 0x55)] {
        let at = SEAM.wrapping_add_signed(page * PAGE.cast_signed());
        assert_eq!(guest.driver.bytes(at, 1), [byte], "page {page}");
        assert_eq!(guest.driver.bytes(at + PAGE - 1, 1), [byte], "the end of page {page}");
    }
}

#[test]
fn of_memory_that_is_no_whole_pages_the_whole_pages_are_given_back() {
    let mut guest = Guest::new();
    guest.fill(2 * MIB, 4 * PAGE);
    guest.reports(&[into(2 * MIB + 1, 3 * PAGE as usize), into(2 * MIB + 100, 50)]);
    for (page, byte) in [(0, 0x55), (1, 0), (2, 0), (3, 0x55)] {
        assert_eq!(guest.driver.bytes(2 * MIB + page * PAGE, 1), [byte], "page {page}");
    }
}

#[test]
fn more_than_a_turns_bytes_take_more_turns_and_one_answer() {
    let mut guest = Guest::new();
    guest.fill(2 * MIB, MIB);
    // The same memory over and over: 20 MiB in all.
    let bufs = [into(2 * MIB, 5 * MIB as usize); 4];
    let head = guest.driver.add(2, &bufs);
    guest.driver.kick(2);
    guest.driver.run_once();
    assert_eq!(guest.driver.used(2), [], "a turn is bounded");
    assert_eq!(guest.handle.totals().reported_bytes, TURN_BYTES);
    guest.driver.run();
    assert_eq!(guest.driver.used(2), [(head, 0)]);
    assert_eq!(guest.handle.totals().reported_bytes, 20 * MIB);
}

#[test]
fn a_reset_in_the_middle_of_a_chain_forgets_the_rest() {
    let mut guest = Guest::new();
    guest.driver.add(2, &[into(2 * MIB, 5 * MIB as usize); 4]);
    guest.driver.kick(2);
    guest.driver.run_once();
    guest.driver.start(F_PAGE_REPORTING);
    assert_eq!(guest.handle.totals().reported_bytes, TURN_BYTES);
    guest.reports(&[into(2 * MIB, MIB as usize)]);
}

#[test]
fn the_reporting_queue_may_have_the_specs_number() {
    let mut guest = Guest::new();
    // Only queues 0, 1 and 4 are set up.
    let d = &mut guest.driver;
    assert!(d.negotiate(crate::virtio::F_VERSION_1 | F_PAGE_REPORTING));
    for index in [0_usize, 1, 4] {
        let base = 0x1_0000 * (index as u64 + 1);
        d.describe_queue(index, QUEUE_SIZE.into(), base, base + 0x4000, base + 0x8000);
        assert!(d.make_ready());
    }
    d.put(0x70, 15);
    d.run();
    guest.fill(2 * MIB, MIB);
    let before = guest.resident();
    guest.driver.add(4, &[into(2 * MIB, MIB as usize)]);
    guest.driver.kick_and_run(4);
    assert_eq!(guest.driver.used(4).len(), 1);
    assert_eq!(before - guest.resident(), MIB);
}

#[test]
fn inflated_pages_are_gone_and_deflated_ones_come_back_by_a_touch() {
    let mut guest = Guest::new();
    guest.fill(2 * MIB, MIB);
    guest.fill(SEAM + MIB, MIB);
    // Where the page numbers will be.
    guest.fill(0x8_0000, PAGE);
    let before = guest.resident();
    let low = (2 * MIB / PAGE) as u32;
    let high = ((SEAM + MIB) / PAGE) as u32;
    let head = guest.numbers(INFLATE, &[low, low + 1, low + 2, high + 9, low + 7]);
    guest.driver.kick_and_run(INFLATE);
    assert_eq!(guest.driver.used(INFLATE), [(head, 0)]);
    assert_eq!(before - guest.resident(), 5 * PAGE);
    assert_eq!(guest.driver.bytes((u64::from(high) + 9) * PAGE, 1), [0]);
    assert_eq!(guest.driver.bytes((u64::from(high) + 8) * PAGE, 1), [0x55]);
    assert_eq!(guest.handle.totals().inflated_bytes, 5 * PAGE);
    let head = guest.numbers(DEFLATE, &[low, low + 1]);
    guest.driver.kick_and_run(DEFLATE);
    assert_eq!(guest.driver.used(DEFLATE), [(head, 0)]);
    guest.fill(2 * MIB, PAGE);
    assert_eq!(guest.driver.bytes(2 * MIB, 1), [0x55]);
}

#[test]
fn page_numbers_outside_of_memory_are_counted_and_ignored() {
    let mut guest = Guest::new();
    let end = (MEMORY_END / PAGE) as u32;
    guest.numbers(INFLATE, &[end, u32::MAX, end - 1]);
    guest.driver.kick_and_run(INFLATE);
    assert_eq!(guest.driver.used(INFLATE).len(), 1);
    let totals = guest.handle.totals();
    assert_eq!((totals.refused, totals.inflated_bytes), (2, PAGE));
    guest.driver.assert_healthy();
}

#[test]
fn of_a_chain_of_too_many_numbers_the_first_count() {
    let mut guest = Guest::new();
    let many = vec![(2 * MIB / PAGE) as u32; MAX_NUMBERS + 5];
    guest.numbers(INFLATE, &many);
    guest.driver.kick(INFLATE);
    guest.driver.run_once();
    assert_eq!(guest.driver.used(INFLATE), [], "a turn is bounded in pages, too");
    guest.driver.run();
    assert_eq!(guest.driver.used(INFLATE).len(), 1);
    let totals = guest.handle.totals();
    assert_eq!((totals.refused, totals.inflated_bytes), (1, MAX_NUMBERS as u64 * PAGE));
}

#[test]
fn the_target_is_in_the_configuration_and_a_change_is_announced() {
    let mut guest = Guest::new();
    guest.handle.set_target(3 * MIB);
    assert_eq!(guest.driver.get(0x60) & 2, 2, "a configuration interrupt");
    assert_eq!((guest.driver.get(0x100), guest.handle.target()), (768, 3 * MIB));
    guest.driver.put(0x104, 700);
    assert_eq!((guest.driver.get(0x104), guest.handle.actual()), (700, 700 * PAGE));
    guest.driver.put(0x100, 1);
    assert_eq!(guest.driver.get(0x100), 768, "the target is not the driver's");
    guest.driver.put(0x70, 0);
    assert_eq!(guest.handle.actual(), 0);
    guest.handle.set_target(u64::MAX);
    assert_eq!(guest.driver.get(0x100), u32::MAX);
}

#[test]
fn a_buffer_of_the_wrong_direction_breaks_the_queue_until_reset() {
    for (queue, buf) in [(2, out(DATA, 4096)), (INFLATE, into(DATA, 64)), (DEFLATE, into(DATA, 64))] {
        let mut guest = Guest::new();
        guest.driver.add(queue, &[buf]);
        guest.driver.kick_and_run(queue);
        guest.driver.assert_broken();
        assert_eq!(guest.handle.totals().broken, 1);
        guest.driver.start(F_PAGE_REPORTING);
        guest.reports(&[into(2 * MIB, MIB as usize)]);
    }
}

#[test]
fn without_reporting_its_queue_is_left_alone() {
    let mut guest = Guest::new();
    guest.driver.start(F_DEFLATE_ON_OOM);
    guest.fill(2 * MIB, MIB);
    guest.driver.add(2, &[into(2 * MIB, MIB as usize)]);
    guest.driver.put(0x50, 2);
    guest.driver.run();
    assert_eq!(guest.driver.used(2), []);
    assert_eq!(guest.driver.bytes(2 * MIB, 1), [0x55]);
}

#[test]
fn memory_without_a_file_stays() {
    let (balloon, worker) = Balloon::new().unwrap();
    let mut driver = Driver::new(balloon, worker);
    driver.start(F_PAGE_REPORTING);
    driver.fill(2 * MIB, &[7; 4096]);
    driver.add(2, &[into(2 * MIB, 4096)]);
    driver.kick_and_run(2);
    assert_eq!(driver.used(2).len(), 1);
    assert_eq!(driver.bytes(2 * MIB, 1), [7]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Exactly the whole pages that a guest names are gone.
    #[test]
    fn nothing_but_what_was_named_is_given_back(
        reports in prop::collection::vec((2 * MIB..16 * MIB, 1_u32..40_000), 1..6),
        numbers in prop::collection::vec(512_u32..4200, 0..40),
    ) {
        let mut guest = Guest::new();
        guest.fill(2 * MIB, 14 * MIB);
        let mut gone = vec![false; (16 * MIB / PAGE) as usize];
        let mut bufs = Vec::new();
        for (at, len) in reports {
            let len = u64::from(len).min(16 * MIB - at);
            bufs.push(into(at, len as usize));
            // Split at the seam, which is at a page.
            for page in at.div_ceil(PAGE)..(at + len) / PAGE {
                gone[page as usize] = true;
            }
        }
        guest.reports(&bufs);
        guest.numbers(INFLATE, &numbers);
        if !numbers.is_empty() {
            guest.driver.kick_and_run(INFLATE);
        }
        for number in numbers {
            if let Some(page) = gone.get_mut(number as usize) {
                *page = true;
            }
        }
        for (page, gone) in gone.iter().enumerate().skip(512) {
            let expected = if *gone { 0 } else { 0x55 };
            let at = page as u64 * PAGE;
            prop_assert_eq!(guest.driver.bytes(at, 1), [expected], "page {}", page);
            prop_assert_eq!(guest.driver.bytes(at + PAGE - 1, 1), [expected], "end of page {}", page);
        }
        prop_assert!(guest.driver.mem.num_regions() == 2);
    }
}
