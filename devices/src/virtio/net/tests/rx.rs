use super::super::counters::Turn;
use super::super::rx::{RxScratch, RxTurn};
use super::*;
use crate::virtio::Ring;
use net::{DropReason, Lent, RxRing};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_frame_arrives_in_the_first_posted_buffer() {
    for mut lab in Lab::both(0) {
        let head = lab.post(DATA, 1526);
        lab.guest.kick_and_run(RX);
        let got = frame(1, 60);
        lab.script.deliver(&got);
        lab.guest.run();
        assert_eq!(lab.guest.used(RX), [(head, 72)]);
        assert_eq!(lab.header(DATA, 60), VnetHdr { num_buffers: 1, ..VnetHdr::default() });
        assert_eq!(lab.guest.bytes(DATA + 12, 60), got);
        assert_eq!(lab.guest.line.take(), 1);
        let totals = lab.monitor.totals();
        assert_eq!((totals.rx_frames, totals.rx_bytes), (1, 60));
    }
}

#[test]
fn a_frame_larger_than_one_buffer_spans_two_with_mrg_rxbuf() {
    for mut lab in Lab::both(F_MRG_RXBUF) {
        let heads = [lab.post(DATA, 100), lab.post(DATA + 0x1000, 100), lab.post(DATA + 0x2000, 100)];
        lab.guest.kick_and_run(RX);
        let got = frame(2, 150);
        lab.script.deliver(&got);
        lab.guest.run();
        assert_eq!(lab.guest.used(RX), [(heads[0], 100), (heads[1], 62)]);
        assert_eq!(lab.header(DATA, 150).num_buffers, 2);
        assert_eq!(lab.guest.bytes(DATA + 12, 88), got[..88]);
        assert_eq!(lab.guest.bytes(DATA + 0x1000, 62), got[88..]);
        // The third is still there for the next frame.
        lab.script.deliver(&frame(3, 60));
        lab.guest.run();
        assert_eq!(lab.guest.used(RX), [(heads[2], 72)]);
    }
}

#[test]
fn a_frame_that_fills_its_buffers_to_the_byte_takes_no_more() {
    let mut lab = Lab::started(F_MRG_RXBUF);
    let heads = [lab.post(DATA, 100), lab.post(DATA + 0x1000, 100), lab.post(DATA + 0x2000, 100)];
    lab.guest.kick_and_run(RX);
    lab.script.deliver(&frame(4, 188));
    lab.guest.run();
    assert_eq!(lab.guest.used(RX), [(heads[0], 100), (heads[1], 100)]);
    assert_eq!(lab.header(DATA, 188).num_buffers, 2);
}

#[test]
fn a_chain_of_several_descriptors_and_a_split_header_work() {
    let mut lab = Lab::started(F_MRG_RXBUF);
    let bufs = [into(DATA, 5), into(DATA + 0x100, 10), into(DATA + 0x200, 0), into(DATA + 0x300, 500)];
    let head = lab.guest.add(RX, &bufs);
    let second = lab.guest.add(RX, &[into(DATA + 0x1000, 12), into(DATA + 0x1100, 100)]);
    lab.guest.kick_and_run(RX);
    let got = [frame(5, 100), frame(6, 70)];
    for frame in &got {
        lab.script.deliver(frame);
    }
    // The port can't tell a frame's length beforehand, so the first loan covers both chains.
    lab.script.lend_more(2000);
    lab.guest.run();
    assert_eq!(lab.guest.used(RX), [(head, 112), (second, 82)]);
    let header = [lab.guest.bytes(DATA, 5), lab.guest.bytes(DATA + 0x100, 7)].concat();
    assert_eq!(header, VnetHdr { num_buffers: 1, ..VnetHdr::default() }.to_bytes());
    let first = [lab.guest.bytes(DATA + 0x107, 3), lab.guest.bytes(DATA + 0x300, 97)].concat();
    assert_eq!(first, got[0]);
    assert_eq!(lab.header(DATA + 0x1000, 70).num_buffers, 1);
    assert_eq!(lab.guest.bytes(DATA + 0x1100, 70), got[1]);
}

#[test]
fn a_64_kib_frame_spans_as_many_buffers_as_it_needs() {
    let mut lab = Lab::started(F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4);
    for n in 0..60 {
        lab.post(DATA + 0x1000 * n, 1536);
    }
    lab.guest.kick_and_run(RX);
    let got = frame(7, MAX_FRAME);
    lab.script.deliver(&got);
    lab.guest.run();
    let used = lab.guest.used(RX);
    let count = (MAX_FRAME + 12).div_ceil(1536);
    assert_eq!(used.len(), count);
    assert_eq!(usize::from(lab.header(DATA, MAX_FRAME).num_buffers), count);
    let mut bytes = Vec::new();
    for (n, (_, len)) in (0..).zip(used) {
        bytes.extend(lab.guest.bytes(DATA + 0x1000 * n, len as usize));
    }
    assert_eq!(bytes[12..], got);
}

#[test]
fn no_receive_buffer_stops_polling_until_a_kick() {
    for mut lab in Lab::both(F_MRG_RXBUF) {
        lab.script.deliver(&frame(8, 60));
        lab.guest.run();
        assert_eq!(lab.guest.run_once(), 0, "the port is readable, and nobody looks");
        assert_eq!(lab.script.pending(), 1);
        let head = lab.post(DATA, 1526);
        assert!(lab.guest.kick(RX), "a starved NIC wants to be told");
        lab.guest.run();
        assert_eq!(lab.guest.used(RX), [(head, 72)]);
        lab.script.deliver(&frame(9, 60));
        let head = lab.post(DATA, 1526);
        lab.guest.kick_and_run(RX);
        assert_eq!(lab.guest.used(RX), [(head, 72)], "the port is polled again");
    }
}

#[test]
fn a_frame_waits_for_the_rest_of_its_buffers() {
    for mut lab in Lab::both(F_MRG_RXBUF) {
        let first = lab.post(DATA, 100);
        lab.guest.kick_and_run(RX);
        lab.script.deliver(&frame(10, 300));
        lab.guest.run();
        assert!(lab.guest.used(RX).is_empty(), "half a frame is none");
        let second = lab.post(DATA + 0x1000, 100);
        assert!(lab.guest.kick(RX), "one more buffer than it has seen");
        lab.guest.run();
        assert!(lab.guest.used(RX).is_empty());
        let rest = [lab.post(DATA + 0x2000, 100), lab.post(DATA + 0x3000, 100)];
        assert!(lab.guest.kick(RX));
        lab.guest.run();
        assert_eq!(lab.guest.used(RX), [(first, 100), (second, 100), (rest[0], 100), (rest[1], 12)]);
    }
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_the_buffer_kept() {
    for (features, posts) in [(0, 3), (F_MRG_RXBUF, usize::from(QUEUE_SIZE))] {
        let mut lab = Lab::started(features);
        for n in 0..posts as u64 {
            lab.post(DATA + 0x100 * n, 100);
        }
        lab.guest.kick_and_run(RX);
        let too_big = 100 * posts.max(10);
        lab.script.deliver(&frame(11, too_big));
        lab.script.deliver(&frame(12, 60));
        lab.guest.run();
        assert_eq!(lab.guest.used(RX), [(0, 72)]);
        assert_eq!(lab.guest.bytes(DATA + 12, 60), frame(12, 60));
        assert_eq!(lab.monitor.totals().rx_too_small, 1);
        assert_eq!(lab.monitor.port().dropped(DropReason::RxBufferTooSmall), 1);
    }
}

#[test]
fn what_a_send_causes_on_the_spot_is_received_without_the_fd() {
    for mut lab in Lab::both(0) {
        let head = lab.post(DATA, 1526);
        lab.guest.kick_and_run(RX);
        lab.script.reply(&frame(13, 60));
        lab.offer_frame(DATA + 0x1000, VnetHdr::default(), &frame(14, 60));
        lab.guest.kick_and_run(TX);
        assert_eq!(lab.guest.used(RX), [(head, 72)]);
        assert_eq!(lab.guest.bytes(DATA + 12, 60), frame(13, 60));
    }
}

#[test]
fn a_port_with_a_budget_is_asked_again() {
    let mut lab = Lab::started(0);
    lab.script.set_budget(3);
    for n in 0..10 {
        lab.post(DATA + 0x1000 * n, 1526);
    }
    lab.guest.kick_and_run(RX);
    for n in 0..10 {
        lab.script.deliver(&frame(n, 60));
    }
    lab.guest.run();
    assert_eq!(lab.guest.used(RX).len(), 10);
}

#[test]
fn a_batch_of_frames_costs_one_interrupt() {
    for mut lab in Lab::both(F_MRG_RXBUF) {
        for n in 0..40 {
            lab.post(DATA + 0x1000 * n, 1526);
            lab.script.deliver(&frame(n as u8, 60));
        }
        lab.guest.kick_and_run(RX);
        assert_eq!(lab.guest.line.take(), 1);
        let used = lab.guest.used(RX);
        assert_eq!(used.iter().map(|(head, _)| *head).collect::<Vec<_>>(), (0..40).collect::<Vec<_>>());
        for n in 0..40 {
            assert_eq!(lab.guest.bytes(DATA + 0x1000 * n + 12, 60), frame(n as u8, 60), "frame {n}");
        }
    }
}

#[test]
fn frames_flow_through_many_laps_of_the_ring() {
    for mut lab in Lab::both(F_MRG_RXBUF) {
        lab.script.lend_more(4000);
        let mut seed = 0u8;
        for round in 0..2000u64 {
            lab.post(DATA + 0x1000 * (round % 16), 200);
            lab.post(DATA + 0x1_0000 + 0x1000 * (round % 16), 200);
            lab.guest.kick(RX);
            seed = seed.wrapping_add(1);
            lab.script.deliver(&frame(seed, 60 + (round % 240) as usize));
            lab.guest.run();
            let used = lab.guest.used(RX);
            assert!(!used.is_empty(), "round {round}: a wake-up was lost");
            if used.len() == 1 {
                lab.script.deliver(&frame(seed, 60));
                lab.guest.run();
                assert_eq!(lab.guest.used(RX).len(), 1);
            }
        }
    }
}

#[test]
fn bad_receive_buffers_break_the_queue() {
    for bufs in [vec![out(DATA, 1526)], vec![into(MEMORY_END - 8, 1526)], vec![into(DATA, 11)]] {
        let mut lab = Lab::started(F_MRG_RXBUF);
        lab.guest.add(RX, &bufs);
        lab.guest.kick_and_run(RX);
        lab.script.deliver(&frame(15, 60));
        lab.guest.run();
        lab.guest.assert_broken();
        assert_eq!(lab.guest.run_once(), 0, "a broken NIC does not poll its port");
    }
}

/// The receive ring of a guest that has posted `count` buffers of 100 bytes, without a worker.
fn bare_ring(lab: &mut Lab, count: u64) -> Ring {
    let vring = &lab.guest.queues[RX];
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(vring.desc as u32), None);
    queue.set_avail_ring_address(Some(vring.avail as u32), None);
    queue.set_used_ring_address(Some(vring.used as u32), None);
    queue.set_ready(true);
    for n in 0..count {
        lab.post(DATA + 0x1000 * n, 100);
    }
    Ring::new(queue).unwrap()
}

/// Looks at the used index between commits, where the driver could look at any time.
#[test]
fn a_frames_buffers_become_visible_together() {
    let mut lab = Lab::new(Offloads::all());
    let mut ring = bare_ring(&mut lab, 100);
    let mem = lab.guest.mem.clone();
    let used_index = GuestAddress(lab.guest.queues[RX].used + 2);
    let (mut scratch, mut counts) = (RxScratch::default(), Turn::default());
    let mut turn = RxTurn::new(&mem, &mut ring, true, &mut scratch, &mut counts);
    let mut seen = Vec::new();
    for _ in 0..30 {
        assert!(matches!(turn.lend(288, 400), Lent::Buffers(_)));
        turn.commit(VnetHdr::default(), 288);
        seen.push(mem.read_obj::<u16>(used_index).unwrap());
    }
    // Only after a number of whole frames, and at the end of the turn.
    seen.dedup();
    assert_eq!(seen, [0, 48]);
    turn.finish(&mut scratch).unwrap();
    assert_eq!(mem.read_obj::<u16>(used_index).unwrap(), 90);
    assert_eq!(ring.position(), 90, "what was lent and not used is available again");
}

#[test]
fn a_loan_ends_where_the_port_asked_and_the_next_has_the_rest() {
    let mut lab = Lab::new(Offloads::all());
    let mut ring = bare_ring(&mut lab, 10);
    let mem = lab.guest.mem.clone();
    let (mut scratch, mut counts) = (RxScratch::default(), Turn::default());
    let mut turn = RxTurn::new(&mem, &mut ring, true, &mut scratch, &mut counts);
    for max in [50, 300, 150, 88, 89, 1, 300] {
        let Lent::Buffers(pieces) = turn.lend(1, max) else { panic!("nothing lent") };
        assert_eq!(pieces.iter().map(|piece| piece.len()).sum::<usize>(), max);
    }
    // A commit after a loan that was cut short leaves the next buffer whole.
    assert!(matches!(turn.lend(1, 30), Lent::Buffers(_)));
    turn.commit(VnetHdr::default(), 30);
    assert!(matches!(turn.lend(188, 188), Lent::Buffers(_)));
    turn.commit(VnetHdr::default(), 188);
    turn.finish(&mut scratch).unwrap();
    assert_eq!(lab.guest.used(RX), [(0, 42), (1, 100), (2, 100)]);
}

#[test]
fn arming_tells_of_what_was_added_meanwhile() {
    let mut lab = Lab::new(Offloads::all());
    let mut ring = bare_ring(&mut lab, 2);
    let mem = lab.guest.mem.clone();
    assert!(!ring.arm(&mem, 2).unwrap(), "both have been seen");
    lab.post(DATA, 100);
    assert!(ring.arm(&mem, 2).unwrap(), "the third was added before anybody asked for a kick");
    assert!(!ring.arm(&mem, 3).unwrap());
}
