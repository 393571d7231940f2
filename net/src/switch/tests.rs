use proptest::prelude::*;

use super::sys::readable;
use super::*;
use crate::port::Lent;
use crate::testing::{Script, ScriptedPort};

const GATEWAY: MacAddr = mac(0xfe);

const fn mac(n: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, n])
}

/// A frame from `src` to `dst` with `len` bytes of payload that `src` marks.
fn frame(dst: MacAddr, src: MacAddr, len: usize) -> Vec<u8> {
    [&dst.0[..], &src.0, &[0x88, 0xb5], &vec![src.0[5]; len]].concat()
}

/// Buffers of 2 KiB, mergeable.
struct Ring {
    buffers: Vec<VolatileSlice<'static>>,
    free: usize,
    got: Vec<(VnetHdr, Vec<u8>)>,
}

impl RxRing for Ring {
    fn lend(&mut self, min: usize, max: usize) -> Lent<'_> {
        let n = self.free.min(max.div_ceil(2048).max(1));
        if n * 2048 < min { Lent::Empty } else { Lent::Buffers(&self.buffers[..n]) }
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        self.free -= len.div_ceil(2048);
        self.got.push((hdr, gather(&self.buffers, len)));
    }
}

struct Vm {
    port: SwitchPort,
    ring: Ring,
    mac: MacAddr,
}

impl Vm {
    fn new(switch: &Switch, n: u8, granted: Offloads) -> Self {
        Self::at(switch.plug(Some(mac(n))).unwrap(), n, granted)
    }

    /// Guest memory stays on the thread that made it.
    fn at(mut port: SwitchPort, n: u8, granted: Offloads) -> Self {
        let memory: &'static mut [u8] = vec![0; 64 * 2048].leak();
        let buffers: Vec<_> = memory.chunks_mut(2048).map(VolatileSlice::from).collect();
        port.set_offloads(granted).unwrap();
        Self { port, ring: Ring { free: buffers.len(), buffers, got: Vec::new() }, mac: mac(n) }
    }

    fn send_raw(&mut self, hdr: VnetHdr, mut bytes: Vec<u8>) -> Sent {
        self.port.send(&TxFrame { hdr, parts: &[VolatileSlice::from(bytes.as_mut_slice())] })
    }

    fn send(&mut self, to: MacAddr, len: usize) -> Sent {
        let bytes = frame(to, self.mac, len);
        self.send_raw(VnetHdr::default(), bytes)
    }

    /// What one turn brings, with a ring that is refilled first.
    fn recv(&mut self) -> Vec<Vec<u8>> {
        self.ring.free = self.ring.buffers.len();
        while self.port.recv(&mut self.ring) != Received::Drained {
            self.ring.free = self.ring.buffers.len();
        }
        std::mem::take(&mut self.ring.got).into_iter().map(|(_, bytes)| bytes).collect()
    }
}

fn with_uplink() -> (Switch, Script) {
    let (port, script) = ScriptedPort::new(Offloads::all()).unwrap();
    (Switch::with_uplink(Box::new(port), Some(GATEWAY)).unwrap(), script)
}

#[test]
fn neighbours_talk_and_the_third_does_not_hear() {
    let switch = Switch::new();
    let [mut a, mut b, mut c] = [1, 2, 3].map(|n| Vm::new(&switch, n, Offloads::all()));
    assert_eq!(a.send(b.mac, 100), Sent::Taken);
    assert!(readable(&b.port) && !readable(&c.port) && !readable(&a.port));
    assert_eq!(b.recv(), [frame(b.mac, a.mac, 100)]);
    assert!(!readable(&b.port));
    assert_eq!((a.recv().len(), c.recv().len()), (0, 0));
    assert_eq!((a.port.counters().tx_frames, b.port.counters().rx_frames), (1, 1));
}

#[test]
fn a_broadcast_reaches_all_but_its_sender() {
    let (switch, uplink) = with_uplink();
    let [mut a, mut b, mut c] = [1, 2, 3].map(|n| Vm::new(&switch, n, Offloads::all()));
    assert_eq!(a.send(MacAddr::BROADCAST, 50), Sent::Taken);
    let sent = frame(MacAddr::BROADCAST, a.mac, 50);
    assert_eq!((a.recv().len(), b.recv(), c.recv()), (0, vec![sent.clone()], vec![sent.clone()]));
    assert_eq!(uplink.take_sent(), [(VnetHdr::default(), sent)]);
}

#[test]
fn the_uplinks_frames_reach_whom_they_are_for() {
    let (switch, uplink) = with_uplink();
    let [mut a, mut b] = [1, 2].map(|n| Vm::new(&switch, n, Offloads::all()));
    uplink.deliver(&frame(b.mac, GATEWAY, 10));
    uplink.deliver(&frame(a.mac, GATEWAY, 20));
    assert!(readable(&a.port), "the leader's fd announces the uplink");
    assert_eq!(a.recv(), [frame(a.mac, GATEWAY, 20)]);
    assert!(readable(&b.port));
    assert_eq!(b.recv(), [frame(b.mac, GATEWAY, 10)]);
    assert!(!readable(&a.port) && !readable(&b.port));
}

#[test]
fn the_only_machine_is_served_in_its_own_buffers() {
    let (switch, uplink) = with_uplink();
    let mut a = Vm::new(&switch, 1, Offloads::all());
    uplink.deliver(&frame(a.mac, GATEWAY, 20));
    // Whoever copies would take the frame now; who lends on leaves it where it is.
    a.ring.free = 0;
    assert_eq!(a.port.recv(&mut a.ring), Received::RingFull);
    assert_eq!(uplink.pending(), 1);
    assert_eq!(a.recv(), [frame(a.mac, GATEWAY, 20)]);
    assert_eq!(a.port.counters().rx_frames, 1);
}

#[test]
fn an_answer_on_the_spot_needs_no_fd_and_no_leader() {
    let (switch, uplink) = with_uplink();
    let [_leader, mut b] = [1, 2].map(|n| Vm::new(&switch, n, Offloads::all()));
    uplink.reply(&frame(b.mac, GATEWAY, 30));
    assert_eq!(b.send(GATEWAY, 30), Sent::Taken);
    assert_eq!(b.recv(), [frame(b.mac, GATEWAY, 30)]);
}

#[test]
fn a_stuck_leader_hands_over() {
    let (switch, uplink) = with_uplink();
    let [mut a, mut b] = [1, 2].map(|n| Vm::new(&switch, n, Offloads::all()));
    assert_eq!(b.recv().len(), 0);
    assert_eq!(b.send(a.mac, 10), Sent::Taken);
    a.ring.free = 0;
    assert_eq!(a.port.recv(&mut a.ring), Received::RingFull);
    // Nobody polls a's port now.
    uplink.deliver(&frame(b.mac, GATEWAY, 40));
    assert!(readable(&b.port));
    assert_eq!(b.recv(), [frame(b.mac, GATEWAY, 40)]);
    assert_eq!(a.recv().len(), 1);
}

#[test]
fn the_lead_outlives_the_leader() {
    let (switch, uplink) = with_uplink();
    let [a, mut b] = [1, 2].map(|n| Vm::new(&switch, n, Offloads::all()));
    drop(a);
    assert_eq!(b.recv().len(), 0);
    uplink.deliver(&frame(b.mac, GATEWAY, 40));
    assert!(readable(&b.port));
    assert_eq!(b.recv().len(), 1);
    let a = Vm::new(&switch, 1, Offloads::all());
    assert_eq!(a.port.number(), 0);
}

#[test]
fn a_machine_that_does_not_read_loses_its_own_frames_only() {
    let (switch, uplink) = with_uplink();
    let [mut a, mut b] = [1, 2].map(|n| Vm::new(&switch, n, Offloads::all()));
    b.ring.free = 0;
    assert_eq!(a.send(b.mac, 10), Sent::Taken);
    assert_eq!(b.port.recv(&mut b.ring), Received::RingFull);
    let taken = (0..2 * QUEUE_FRAMES).filter(|_| a.send(b.mac, 10) == Sent::Taken).count();
    assert_eq!(taken, QUEUE_FRAMES - 1);
    assert_eq!(a.port.counters().dropped(DropReason::QueueFull), (2 * QUEUE_FRAMES - taken) as u64);
    uplink.deliver(&frame(b.mac, GATEWAY, 10));
    uplink.deliver(&frame(a.mac, GATEWAY, 10));
    assert_eq!(a.recv(), [frame(a.mac, GATEWAY, 10)]);
    assert_eq!(b.port.counters().dropped(DropReason::QueueFull), 1);
    assert_eq!(b.recv().len(), QUEUE_FRAMES);
}

#[test]
fn a_machine_that_reads_makes_the_uplink_wait() {
    let (switch, uplink) = with_uplink();
    let [mut a, mut b] = [1, 2].map(|n| Vm::new(&switch, n, Offloads::all()));
    for _ in 0..QUEUE_FRAMES + 100 {
        uplink.deliver(&frame(b.mac, GATEWAY, 10));
    }
    assert_eq!(a.recv().len(), 0);
    assert_eq!(uplink.pending(), 100);
    assert!(readable(&b.port) && !readable(&a.port), "the lead went to whom it is for");
    assert_eq!(b.recv().len(), QUEUE_FRAMES + 100);
    assert_eq!(b.port.counters().drops().count(), 0);
}

#[test]
fn a_stolen_address_is_refused() {
    let (switch, uplink) = with_uplink();
    let [mut a, b] = [1, 2].map(|n| Vm::new(&switch, n, Offloads::all()));
    for stolen in [b.mac, GATEWAY, MacAddr::BROADCAST] {
        let sent = a.send_raw(VnetHdr::default(), frame(GATEWAY, stolen, 10));
        assert_eq!(sent, Sent::Dropped(DropReason::BadSource));
    }
    assert!(matches!(switch.plug(Some(b.mac)), Err(PlugError::InUse(_))));
    uplink.deliver(&frame(a.mac, b.mac, 10));
    assert_eq!(a.recv().len(), 0);
    assert_eq!(switch.refused_from_uplink().dropped(DropReason::BadSource), 1);
    assert_eq!(switch.stations().len(), 3);
}

/// A TCP/IPv4 super-segment with `payload` bytes.
fn super_segment(dst: MacAddr, src: MacAddr, payload: usize) -> (VnetHdr, Vec<u8>) {
    let mut bytes = [&dst.0[..], &src.0, &[8, 0, 0x45, 0]].concat();
    bytes.extend_from_slice(&((payload + 40) as u16).to_be_bytes());
    bytes.extend_from_slice(&[0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 0, 81]);
    bytes.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    bytes.resize(54 + payload, 7);
    let hdr = VnetHdr {
        flags: VnetFlags::NEEDS_CSUM,
        gso_type: GsoType::Tcp4,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
        ..VnetHdr::default()
    };
    (hdr, bytes)
}

#[test]
fn each_guest_gets_what_it_agreed_to() {
    let (switch, uplink) = with_uplink();
    let mut a = Vm::new(&switch, 1, Offloads::all());
    let mut plain = Vm::new(&switch, 2, Offloads::empty());
    let mut able = Vm::new(&switch, 3, Offloads::CSUM | Offloads::TSO4);
    let (hdr, bytes) = super_segment(able.mac, a.mac, 4000);
    assert_eq!(a.send_raw(hdr, bytes.clone()), Sent::Taken);
    assert_eq!(able.port.recv(&mut able.ring), Received::Drained);
    assert_eq!(able.ring.got, [(hdr, bytes)]);
    let (hdr, bytes) = super_segment(plain.mac, a.mac, 4000);
    assert_eq!(a.send_raw(hdr, bytes.clone()), Sent::Taken);
    uplink.deliver_with(hdr, &super_segment(plain.mac, GATEWAY, 4000).1);
    let pieces = plain.recv();
    assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [1514, 1514, 1134, 1514, 1514, 1134]);
    let broken = VnetHdr { gso_type: GsoType::Tcp6, ..hdr };
    assert_eq!(a.send_raw(broken, bytes), Sent::Dropped(DropReason::BadVnetHdr));
}

#[test]
fn ports_on_two_threads_lose_nothing() {
    let switch = Switch::new();
    let [a, b] = [1, 2].map(|n| switch.plug(Some(mac(n))).unwrap());
    // Choosing offloads empties a port's queue: nobody may send before both have.
    let start = std::sync::Barrier::new(2);
    // Each answers what it gets, until it has got 2,000 frames.
    let play = |port, me, peer, first| {
        let mut vm = Vm::at(port, me, Offloads::all());
        start.wait();
        let mut seen = 0;
        if first {
            assert_eq!(vm.send(peer, 60), Sent::Taken);
        }
        while seen < 2000 {
            let got = vm.recv().len();
            seen += got;
            for _ in 0..got {
                // The peer may have had enough, and be gone; then this floods to nobody.
                let _ = vm.send(peer, 60);
            }
            std::thread::yield_now();
        }
        vm.port.counters().rx_frames
    };
    std::thread::scope(|scope| {
        let one = scope.spawn(|| play(a, 1, mac(2), true));
        let two = scope.spawn(|| play(b, 2, mac(1), false));
        assert_eq!((one.join().unwrap(), two.join().unwrap()), (2000, 2000));
    });
}

proptest! {
    #[test]
    fn every_frame_taken_for_a_neighbour_arrives_there(
        steps in proptest::collection::vec((0usize..3, 0usize..3, 1usize..3000, any::<bool>()), 1..80),
    ) {
        let switch = Switch::new();
        let mut vms = [1, 2, 3].map(|n| Vm::new(&switch, n, Offloads::all()));
        let (mut expected, mut got) = ([0usize; 3], [0usize; 3]);
        for (from, to, len, drain) in steps {
            let dst = vms[to].mac;
            let sent = vms[from].send(dst, len);
            prop_assert_eq!(sent == Sent::Taken, from != to);
            if sent == Sent::Taken {
                expected[to] += 1;
            }
            if drain {
                for bytes in vms[to].recv() {
                    prop_assert_eq!(&bytes[..6], &dst.0);
                    got[to] += 1;
                }
            }
        }
        for (at, vm) in vms.iter_mut().enumerate() {
            got[at] += vm.recv().len();
        }
        prop_assert_eq!(got, expected);
    }
}
