use super::*;
use crate::virtio::testing::{Buf, INDIRECT, NEXT, WRITE, write_desc};
use net::{DropReason, GsoType, VnetFlags};

#[test]
fn a_frame_leaves_and_its_buffers_come_back() {
    for mut lab in Lab::both(0) {
        let sent = frame(1, 60);
        let head = lab.offer_frame(DATA, VnetHdr::default(), &sent);
        assert!(lab.guest.kick(TX), "an idle NIC wants to be told");
        lab.guest.run();
        assert_eq!(lab.script.take_sent(), [(VnetHdr::default(), sent)]);
        assert_eq!(lab.guest.used(TX), [(head, 0)]);
        assert_eq!(lab.guest.line.take(), 1);
        let totals = lab.monitor.totals();
        assert_eq!((totals.tx_frames, totals.tx_bytes, totals.kicks, totals.interrupts), (1, 60, 1, 1));
    }
}

#[test]
fn header_and_frame_may_be_split_anywhere() {
    let mut lab = Lab::started(0);
    let sent = frame(2, 100);
    let mut bytes = VnetHdr::default().to_bytes().to_vec();
    bytes.extend(&sent);
    for cuts in [[12, 26], [5, 12], [11, 13], [1, 2], [40, 111]] {
        let mut bufs = Vec::new();
        for (n, (from, to)) in (0..).zip([(0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], 112)]) {
            let addr = DATA + n * 0x1000;
            lab.guest.fill(addr, &bytes[from..to]);
            bufs.push(out(addr, to - from));
        }
        bufs.insert(1, out(DATA, 0));
        lab.guest.add(TX, &bufs);
        lab.guest.kick_and_run(TX);
        assert_eq!(lab.script.take_sent(), [(VnetHdr::default(), sent.clone())], "{cuts:?}");
    }
}

#[test]
fn a_buffer_may_cross_from_one_memory_region_into_the_next() {
    let mut lab = Lab::started(0);
    let sent = frame(3, 1500);
    lab.offer_frame(SEAM - 700, VnetHdr::default(), &sent);
    lab.guest.kick_and_run(TX);
    assert_eq!(lab.script.take_sent(), [(VnetHdr::default(), sent)]);
}

#[test]
fn a_chain_may_be_an_indirect_table() {
    let mut lab = Lab::started(F_INDIRECT_DESC);
    let sent = frame(4, 200);
    lab.guest.fill(DATA, &VnetHdr::default().to_bytes());
    lab.guest.fill(DATA + 0x100, &sent);
    let table = DATA + 0x1000;
    write_desc(&lab.guest.mem, table, Buf { flags: NEXT, ..out(DATA, 12) }, 1);
    write_desc(&lab.guest.mem, table + 16, out(DATA + 0x100, 200), 0);
    let head = lab.guest.add(TX, &[Buf { addr: table, len: 32, flags: INDIRECT }]);
    lab.guest.kick_and_run(TX);
    assert_eq!(lab.script.take_sent(), [(VnetHdr::default(), sent)]);
    assert_eq!(lab.guest.used(TX), [(head, 0)]);
}

#[test]
fn a_super_segment_crosses_as_one_frame() {
    let mut lab = Lab::started(F_CSUM | F_HOST_TSO4);
    let hdr = VnetHdr {
        flags: VnetFlags::NEEDS_CSUM,
        gso_type: GsoType::Tcp4,
        hdr_len: 54,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
        ..VnetHdr::default()
    };
    let sent = frame(5, MAX_FRAME);
    lab.offer_frame(DATA, hdr, &sent);
    lab.guest.kick_and_run(TX);
    assert_eq!(lab.script.take_sent(), [(hdr, sent)]);
}

#[test]
fn what_was_not_negotiated_is_refused_and_returned() {
    let mut lab = Lab::started(0);
    let csum =
        VnetHdr { flags: VnetFlags::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let gso = VnetHdr { gso_type: GsoType::Tcp4, gso_size: 1460, ..csum };
    for hdr in [csum, gso] {
        let head = lab.offer_frame(DATA, hdr, &frame(6, 100));
        lab.guest.kick_and_run(TX);
        assert_eq!(lab.guest.used(TX), [(head, 0)]);
    }
    assert!(lab.script.take_sent().is_empty());
    assert_eq!(lab.monitor.totals().tx_bad_header, 2);
    lab.guest.assert_healthy();
}

#[test]
fn a_frame_of_impossible_length_is_refused_and_returned() {
    let mut lab = Lab::started(0);
    for len in [0, 13, MAX_FRAME + 1, 1 << 20] {
        let head = lab.offer_frame(DATA, VnetHdr::default(), &frame(7, len));
        lab.guest.kick_and_run(TX);
        assert_eq!(lab.guest.used(TX), [(head, 0)], "{len}");
    }
    let head = lab.guest.add(TX, &[out(DATA, 3)]);
    lab.guest.kick_and_run(TX);
    assert_eq!(lab.guest.used(TX), [(head, 0)]);
    assert!(lab.script.take_sent().is_empty());
    assert_eq!(lab.monitor.totals().tx_bad_length, 5);
    lab.guest.assert_healthy();
}

#[test]
fn a_dropped_frame_is_the_ports_to_explain() {
    let mut lab = Lab::started(0);
    lab.script.drop_sends(Some(DropReason::Policy));
    let head = lab.offer_frame(DATA, VnetHdr::default(), &frame(8, 60));
    lab.guest.kick_and_run(TX);
    assert_eq!(lab.guest.used(TX), [(head, 0)]);
    assert_eq!(lab.monitor.totals().tx_dropped, 1);
    assert_eq!(lab.monitor.port().dropped(DropReason::Policy), 1);
}

#[test]
fn a_full_port_gets_the_same_frame_again() {
    for mut lab in Lab::both(0) {
        lab.script.fill();
        for seed in 0..3 {
            lab.offer_frame(DATA + 0x1000 * u64::from(seed), VnetHdr::default(), &frame(seed, 60));
        }
        lab.guest.kick_and_run(TX);
        assert!(lab.guest.used(TX).is_empty(), "the guest's buffers stay with the NIC");
        // Another kick does not disturb the order.
        lab.offer_frame(DATA + 0x3000, VnetHdr::default(), &frame(3, 60));
        lab.guest.kick_and_run(TX);
        assert!(lab.script.take_sent().is_empty());
        lab.script.make_room();
        lab.guest.run();
        let sent: Vec<_> = lab.script.take_sent().into_iter().map(|(_, frame)| frame).collect();
        assert_eq!(sent, [0, 1, 2, 3].map(|seed| frame(seed, 60)));
        assert_eq!(lab.guest.used(TX).len(), 4);
        // Nothing is left to do for a writable port.
        assert_eq!(lab.guest.run_once(), 0);
    }
}

#[test]
fn a_batch_beyond_the_budget_goes_on_without_a_kick() {
    for mut lab in Lab::both(0) {
        for n in 0..200 {
            lab.offer_frame(DATA + 0x1000 * n, VnetHdr::default(), &frame(n as u8, 60));
        }
        lab.guest.kick(TX);
        lab.guest.run_once();
        assert_eq!(lab.script.take_sent().len(), TX_BUDGET);
        lab.guest.run();
        assert_eq!(lab.script.take_sent().len(), 200 - TX_BUDGET);
        assert_eq!(lab.guest.used(TX).len(), 200);
    }
}

#[test]
fn frames_flow_through_many_laps_of_the_ring_without_a_lost_kick() {
    for mut lab in Lab::both(0) {
        for round in 0..2000u32 {
            for n in 0..round % 5 {
                lab.offer_frame(DATA + 0x1000 * u64::from(n), VnetHdr::default(), &frame(n as u8, 60));
            }
            lab.guest.kick_and_run(TX);
            assert_eq!(lab.script.take_sent().len() as u32, round % 5, "round {round}");
            assert_eq!(lab.guest.used(TX).len() as u32, round % 5);
        }
    }
}

#[test]
fn one_interrupt_is_enough_for_a_batch_and_none_when_unwanted() {
    for mut lab in Lab::both(0) {
        for n in 0..10 {
            lab.offer_frame(DATA + 0x1000 * n, VnetHdr::default(), &frame(n as u8, 60));
        }
        lab.guest.kick_and_run(TX);
        assert_eq!(lab.guest.line.take(), 1);
        if lab.guest.event_idx {
            // The driver has not looked at the used ring, so its event index lies behind: no more interrupts.
            lab.offer_frame(DATA, VnetHdr::default(), &frame(0, 60));
            lab.guest.kick_and_run(TX);
            assert_eq!(lab.guest.line.take(), 0);
        } else {
            // VRING_AVAIL_F_NO_INTERRUPT
            let avail = lab.guest.queues[TX].avail;
            lab.guest.fill(avail, &[1, 0]);
            lab.offer_frame(DATA, VnetHdr::default(), &frame(0, 60));
            lab.guest.kick_and_run(TX);
            assert_eq!(lab.guest.line.take(), 0);
        }
        assert_eq!(lab.guest.used(TX).len(), 11);
    }
}

#[test]
fn a_chain_that_loops_breaks_the_queue_and_asks_for_reset() {
    for mut lab in Lab::both(0) {
        lab.guest.queues[TX].write_desc(&lab.guest.mem, 0, Buf { flags: NEXT, ..out(DATA, 16) }, 1);
        lab.guest.queues[TX].write_desc(&lab.guest.mem, 1, Buf { flags: NEXT, ..out(DATA, 16) }, 0);
        lab.guest.offer(TX, 0);
        lab.guest.kick_and_run(TX);
        lab.guest.assert_broken();
        assert_eq!(lab.monitor.totals().broken, 1);
        assert!(lab.guest.used(TX).is_empty());
        // It stays where it is until it is reset, and works again after that.
        lab.offer_frame(DATA, VnetHdr::default(), &frame(1, 60));
        lab.guest.kick_and_run(TX);
        assert!(lab.script.take_sent().is_empty());
        lab.guest.start(0);
        lab.guest.assert_healthy();
        lab.offer_frame(DATA, VnetHdr::default(), &frame(1, 60));
        lab.guest.kick_and_run(TX);
        assert_eq!(lab.script.take_sent().len(), 1);
    }
}

/// Makes a chain available.
type Offer<'a> = &'a dyn Fn(&mut Lab) -> u16;

#[test]
fn every_kind_of_broken_chain_breaks_the_queue() {
    let outside = MEMORY_END - 8;
    let cases: [(&str, Offer<'_>); 8] = [
        ("a writable buffer", &|lab| lab.guest.add(TX, &[into(DATA, 100)])),
        ("a writable buffer after good ones", &|lab| lab.guest.add(TX, &[out(DATA, 100), into(DATA, 100)])),
        ("a buffer that leaves memory", &|lab| lab.guest.add(TX, &[out(outside, 100)])),
        ("a buffer at the end of the world", &|lab| lab.guest.add(TX, &[out(u64::MAX - 4, 100)])),
        ("a head that is no descriptor", &|lab| lab.guest.offer(TX, QUEUE_SIZE)),
        ("a next that is no descriptor", &|lab| {
            lab.guest.queues[TX].write_desc(&lab.guest.mem, 0, Buf { flags: NEXT, ..out(DATA, 16) }, 4000);
            lab.guest.offer(TX, 0)
        }),
        ("an indirect table outside memory", &|lab| {
            lab.guest.add(TX, &[Buf { addr: outside, len: 32, flags: INDIRECT }])
        }),
        ("an indirect table within an indirect table", &|lab| {
            write_desc(&lab.guest.mem, DATA, Buf { addr: DATA, len: 16, flags: INDIRECT }, 0);
            lab.guest.add(TX, &[Buf { addr: DATA, len: 16, flags: INDIRECT | WRITE }])
        }),
    ];
    for (what, act) in cases {
        let mut lab = Lab::started(F_INDIRECT_DESC);
        act(&mut lab);
        lab.guest.kick_and_run(TX);
        assert_eq!(lab.guest.get(STATUS) & NEEDS_RESET, NEEDS_RESET, "{what}");
        assert!(lab.script.take_sent().is_empty(), "{what}");
    }
}

#[test]
fn a_chain_of_too_many_descriptors_breaks_the_queue() {
    let mut lab = Lab::started(F_INDIRECT_DESC);
    let count = crate::virtio::MAX_DESCRIPTORS as u64 + 1;
    for n in 0..count {
        let last = n + 1 == count;
        let flags = if last { 0 } else { NEXT };
        write_desc(&lab.guest.mem, DATA + 16 * n, Buf { flags, ..out(DATA, 0) }, n as u16 + 1);
    }
    lab.guest.add(TX, &[Buf { addr: DATA, len: 16 * count as u32, flags: INDIRECT }]);
    lab.guest.kick_and_run(TX);
    lab.guest.assert_broken();
}

#[test]
fn an_available_index_that_jumps_breaks_the_queue() {
    let mut lab = Lab::started(0);
    let avail = lab.guest.queues[TX].avail;
    lab.guest.fill(avail + 2, &(QUEUE_SIZE + 1).to_le_bytes());
    lab.guest.put(0x50, TX as u32);
    lab.guest.run();
    lab.guest.assert_broken();
}
