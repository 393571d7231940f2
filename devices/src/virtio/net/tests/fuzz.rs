//! Hostile drivers: whatever is in the rings, the NIC neither panics nor spins, and a reset cures it.

use super::*;
use crate::virtio::testing::{Buf, Driver};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

/// Addresses, lengths and flags that reach somewhere: near buffers, rings, edges, or anywhere.
fn descriptor() -> impl Strategy<Value = (Buf, u16)> {
    let addr = prop_oneof![
        6 => (0u64..64).prop_map(|n| DATA + n * 0x100),
        1 => Just(SEAM - 20),
        1 => Just(MEMORY_END - 20),
        1 => 0u64..0x4_0000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![6 => 0u32..3000, 2 => 0u32..16, 1 => Just(70_000u32), 1 => any::<u32>()];
    let flags = prop_oneof![
        3 => Just(0u16), 3 => Just(1u16), 3 => Just(2u16), 3 => Just(3u16), 1 => Just(4u16), 1 => any::<u16>()
    ];
    let next = prop_oneof![8 => 0u16..16, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| (Buf { addr, len, flags }, next))
}

#[derive(Clone, Debug)]
enum Act {
    Describe(usize, u16, (Buf, u16)),
    Offer(usize, u16),
    AvailIndex(usize, u16),
    Kick(usize),
    Deliver(usize),
    Bytes(u64, Vec<u8>),
    Fill,
    MakeRoom,
    Run,
}

fn act() -> impl Strategy<Value = Act> {
    let queue = 0usize..3;
    prop_oneof![
        6 => (queue.clone(), 0u16..16, descriptor()).prop_map(|(q, at, d)| Act::Describe(q, at, d)),
        6 => (queue.clone(), prop_oneof![8 => 0u16..16, 1 => any::<u16>()]).prop_map(|(q, head)| Act::Offer(q, head)),
        1 => (queue.clone(), any::<u16>()).prop_map(|(q, idx)| Act::AvailIndex(q, idx)),
        4 => queue.prop_map(Act::Kick),
        4 => prop_oneof![14usize..200, 1400usize..1600, Just(MAX_FRAME)].prop_map(Act::Deliver),
        2 => (0u64..64, prop::collection::vec(any::<u8>(), 1..32)).prop_map(|(n, b)| Act::Bytes(DATA + n * 0x100, b)),
        1 => Just(Act::Fill),
        1 => Just(Act::MakeRoom),
        4 => Just(Act::Run),
    ]
}

fn perform(lab: &mut Lab, act: Act) {
    match act {
        Act::Describe(queue, at, (buf, next)) => {
            lab.guest.queues[queue].write_desc(&lab.guest.mem, at, buf, next);
        }
        Act::Offer(queue, head) => {
            lab.guest.offer(queue, head);
        }
        Act::AvailIndex(queue, idx) => {
            let addr = GuestAddress(lab.guest.queues[queue].avail + 2);
            lab.guest.mem.write_obj(idx, addr).unwrap();
        }
        Act::Kick(queue) => lab.guest.put(0x50, queue as u32),
        Act::Deliver(len) => lab.script.deliver(&frame(1, len)),
        Act::Bytes(addr, bytes) => lab.guest.fill(addr, &bytes),
        Act::Fill => lab.script.fill(),
        Act::MakeRoom => lab.script.make_room(),
        Act::Run => lab.guest.run(),
    }
}

/// The NIC works as if nothing had happened.
fn assert_cured(guest: &mut Driver, script: &Script) {
    script.make_room();
    guest.start(F_MRG_RXBUF);
    script.take_sent();
    guest.fill(DATA, &[0; 12]);
    guest.add(TX, &[out(DATA, 72)]);
    guest.kick_and_run(TX);
    assert_eq!(script.take_sent().len(), 1);
    assert_eq!(guest.used(TX).len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_rings_are_survived_and_a_reset_cures(
        event_idx in any::<bool>(),
        mergeable in any::<bool>(),
        indirect in any::<bool>(),
        lend_more in prop_oneof![Just(0usize), Just(2000), Just(70_000)],
        acts in prop::collection::vec(act(), 0..80),
    ) {
        let pick = |on: bool, feature: u64| if on { feature } else { 0 };
        let features = pick(event_idx, F_EVENT_IDX)
            | pick(mergeable, F_MRG_RXBUF)
            | pick(indirect, F_INDIRECT_DESC);
        let mut lab = Lab::started(features);
        lab.script.lend_more(lend_more);
        for act in acts {
            perform(&mut lab, act);
        }
        lab.guest.run();
        assert_cured(&mut lab.guest, &lab.script);
    }
}
