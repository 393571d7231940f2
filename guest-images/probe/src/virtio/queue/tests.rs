use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

/// The device's side of the same memory.
struct Device<'a> {
    queue: &'a Queue,
    seen: u16,
    used: u16,
}

impl Device<'_> {
    fn cell(&self, part: usize, offset: usize) -> usize {
        (self.queue.addresses()[part] - self.queue.addresses()[0]) as usize + offset
    }

    /// Everything that was made available since the last call.
    fn take(&mut self) -> Vec<u16> {
        let ring = &self.queue.ring;
        let end = ring.u16(self.cell(1, 2)).load(Ordering::Acquire);
        let size = self.queue.size();
        let ids = (0..end.wrapping_sub(self.seen)).map(|n| {
            let entry = usize::from(self.seen.wrapping_add(n) % size);
            ring.u16(self.cell(1, 4 + 2 * entry)).load(Ordering::Relaxed)
        });
        let ids = ids.collect();
        self.seen = end;
        ids
    }

    fn give_back(&mut self, id: u32, len: u32) {
        let entry = 4 + 8 * usize::from(self.used % self.queue.size());
        self.queue.ring.u32(self.cell(2, entry)).store(id, Ordering::Relaxed);
        self.queue.ring.u32(self.cell(2, entry + 4)).store(len, Ordering::Relaxed);
        self.used = self.used.wrapping_add(1);
        self.queue.ring.u16(self.cell(2, 2)).store(self.used, Ordering::Release);
    }

    fn set_avail_event(&self, index: u16) {
        let at = self.cell(2, 4 + 8 * usize::from(self.queue.size()));
        self.queue.ring.u16(at).store(index, Ordering::Relaxed);
    }

    fn used_event(&self) -> u16 {
        self.queue.ring.u16(self.cell(1, 4 + 2 * usize::from(self.queue.size()))).load(Ordering::Relaxed)
    }
}

/// A device over the queue, at the given place of both rings.
fn device(queue: &Queue, seen: u16, used: u16) -> Device<'_> {
    Device { queue, seen, used }
}

#[test]
fn a_posted_buffer_comes_back_with_its_length() {
    let mut queue = Queue::new(8, true);
    queue.post(5, 0x1000, 64, true);
    let mut other = device(&queue, 0, 0);
    assert_eq!(other.take(), [5]);
    other.give_back(5, 17);
    assert_eq!(queue.take(), Some((5, 17)));
    assert_eq!(queue.take(), None);
}

#[test]
fn an_id_that_is_not_outstanding_is_refused_and_counted() {
    let mut queue = Queue::new(8, false);
    queue.post(1, 0x1000, 64, true);
    let mut other = device(&queue, 0, 0);
    other.give_back(3, 0);
    other.give_back(u32::MAX, 0);
    other.give_back(1, 9);
    assert_eq!(queue.take(), Some((1, 9)));
    assert_eq!(queue.refused(), 2);
}

#[test]
fn the_doorbell_is_rung_only_when_the_device_asked_for_that_index() {
    let mut queue = Queue::new(8, true);
    device(&queue, 0, 0).set_avail_event(1);
    queue.post(0, 0x1000, 1, false);
    assert!(!queue.wants_notification(), "index 0 was posted, the device waits for 1");
    queue.post(1, 0x1000, 1, false);
    assert!(queue.wants_notification());
    assert!(!queue.wants_notification(), "nothing was posted since");
}

#[test]
fn interrupts_are_asked_for_at_the_next_used_index() {
    let mut queue = Queue::new(8, true);
    queue.post(0, 0x1000, 1, true);
    assert!(!queue.set_interrupts(true));
    assert_eq!(device(&queue, 0, 0).used_event(), 0);
    device(&queue, 0, 0).give_back(0, 1);
    assert!(queue.set_interrupts(true), "something is used: sleeping now would miss it");
}

#[test]
fn a_cleared_queue_starts_over() {
    let mut queue = Queue::new(4, true);
    queue.post(2, 0x1000, 1, true);
    queue.clear();
    queue.post(2, 0x1000, 1, true);
    assert_eq!(device(&queue, 0, 0).take(), [2]);
}

proptest! {
    /// Any interleaving of posts and returns, over several wraps of the ring and of the 16-bit index.
    #[test]
    fn buffers_are_neither_lost_nor_doubled(steps in proptest::collection::vec(any::<(bool, u8)>(), 1..2000), start: u16) {
        let mut queue = Queue::new(8, true);
        (queue.avail, queue.used, queue.notified) = (start, start, start);
        for part in [1, 2] {
            let at = (queue.addresses()[part] - queue.addresses()[0]) as usize;
            queue.ring.u16(at + 2).store(start, Ordering::Relaxed);
        }
        let (mut ours, mut theirs, mut seen, mut used) = ((0..8).collect::<VecDeque<u16>>(), Vec::new(), start, start);
        for (post, choice) in steps {
            if post {
                if let Some(id) = ours.pop_front() {
                    queue.post(id, u64::from(id) << 12, 64, true);
                }
                continue;
            }
            let mut other = device(&queue, seen, used);
            theirs.extend(other.take());
            if !theirs.is_empty() {
                let id = theirs.swap_remove(usize::from(choice) % theirs.len());
                other.give_back(u32::from(id), u32::from(choice));
                (seen, used) = (other.seen, other.used);
                prop_assert_eq!(queue.take(), Some((id, u32::from(choice))));
                ours.push_back(id);
            } else {
                seen = other.seen;
            }
        }
        prop_assert_eq!(queue.refused(), 0);
    }
}
