use super::*;
use crate::virtio::testing::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn the_port_learns_the_guests_offloads_at_every_start() {
    let mut lab = Lab::new(Offloads::CSUM | Offloads::TSO4);
    lab.guest.start(0);
    assert_eq!(lab.script.guest_offloads(), [Offloads::empty()]);
    lab.guest.start(F_GUEST_CSUM | F_GUEST_TSO4);
    assert_eq!(lab.script.guest_offloads(), [Offloads::empty(), Offloads::CSUM | Offloads::TSO4]);
}

#[test]
fn a_port_that_refuses_the_offloads_fails_the_device() {
    let mut lab = Lab::new(Offloads::all());
    lab.script.refuse_offloads();
    assert!(lab.guest.negotiate(F_VERSION_1));
    for index in 0..3 {
        let (desc, avail, used) =
            (lab.guest.queues[index].desc, lab.guest.queues[index].avail, lab.guest.queues[index].used);
        lab.guest.describe_queue(index, 16, desc, avail, used);
        assert!(lab.guest.make_ready());
    }
    lab.guest.put(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    lab.guest.run();
    lab.guest.assert_broken();
}

#[test]
fn a_nic_without_its_queues_does_not_start() {
    let mut lab = Lab::new(Offloads::empty());
    assert!(lab.guest.negotiate(F_VERSION_1));
    lab.guest.put(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    lab.guest.assert_broken();
}

#[test]
fn segmentation_without_checksums_gets_no_features_ok() {
    let mut lab = Lab::new(Offloads::all());
    assert!(!lab.guest.negotiate(F_VERSION_1 | F_HOST_TSO4));
    assert!(lab.guest.negotiate(F_VERSION_1 | F_HOST_TSO4 | F_CSUM));
}

#[test]
fn buffers_that_are_there_before_driver_ok_are_served() {
    let mut lab = Lab::new(Offloads::empty());
    lab.guest.start(0);
    // A new start, this time with rings that were filled before DRIVER_OK and never kicked.
    assert!(lab.guest.negotiate(F_VERSION_1));
    for index in 0..3 {
        let (desc, avail, used) =
            (lab.guest.queues[index].desc, lab.guest.queues[index].avail, lab.guest.queues[index].used);
        lab.guest.describe_queue(index, lab.guest.queues[index].size.into(), desc, avail, used);
        assert!(lab.guest.make_ready());
    }
    let head = lab.post(DATA, 1526);
    lab.offer_frame(DATA + 0x1000, VnetHdr::default(), &frame(1, 60));
    lab.script.deliver(&frame(2, 60));
    lab.guest.put(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    lab.guest.run();
    assert_eq!(lab.script.take_sent().len(), 1);
    assert_eq!(lab.guest.used(RX), [(head, 72)]);
}

#[test]
fn without_a_driver_the_port_is_left_alone() {
    let mut lab = Lab::new(Offloads::empty());
    lab.script.deliver(&frame(1, 60));
    lab.guest.run();
    lab.guest.start(0);
    lab.post(DATA, 1526);
    lab.guest.kick_and_run(RX);
    assert_eq!(lab.guest.used(RX).len(), 1, "what came before the driver is still there");
    lab.guest.put(STATUS, 0);
    lab.guest.run();
    lab.script.deliver(&frame(1, 60));
    assert_eq!(lab.guest.run_once(), 0);
}

#[test]
fn a_port_that_hangs_up_is_left_alone_until_the_next_driver() {
    let mut lab = Lab::started(0);
    lab.post(DATA, 1526);
    lab.guest.kick_and_run(RX);
    lab.script.hang_up();
    let turns = |lab: &mut Lab| (0..100).take_while(|_| lab.guest.run_once() > 0).count();
    assert_eq!(turns(&mut lab), 16, "asked some times, then no more");
    lab.guest.start(0);
    lab.post(DATA, 1526);
    lab.guest.put(STATUS, 0);
    lab.guest.run();
    assert!(lab.guest.negotiate(F_VERSION_1));
    for queue in [RX, TX] {
        let ring = &lab.guest.queues[queue];
        let (size, desc, avail, used) = (ring.size.into(), ring.desc, ring.avail, ring.used);
        lab.guest.describe_queue(queue, size, desc, avail, used);
        assert!(lab.guest.make_ready());
    }
    lab.guest.put(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert!(turns(&mut lab) >= 16, "the new driver's port is asked again");
}

#[test]
fn a_frame_that_waits_for_the_port_is_gone_after_a_reset() {
    let mut lab = Lab::started(0);
    lab.script.fill();
    lab.offer_frame(DATA, VnetHdr::default(), &frame(1, 60));
    lab.guest.kick_and_run(TX);
    lab.guest.start(0);
    lab.script.make_room();
    lab.guest.run();
    assert!(lab.script.take_sent().is_empty());
    lab.offer_frame(DATA, VnetHdr::default(), &frame(2, 60));
    lab.guest.kick_and_run(TX);
    assert_eq!(lab.script.take_sent(), [(VnetHdr::default(), frame(2, 60))]);
}

#[test]
fn the_link_is_the_ports() {
    let mut lab = Lab::started(0);
    let mut status = [0; 2];
    let mut read = |lab: &mut Lab| {
        crate::bus::BusDevice::read(&mut lab.guest.transport, 0x106, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(read(&mut lab), 1);
    let generation = lab.guest.get(0xfc);
    lab.script.set_link(false);
    lab.script.deliver(&frame(1, 60));
    lab.guest.run();
    assert_eq!(read(&mut lab), 0);
    assert_eq!(lab.guest.get(0x60) & 2, 2);
    assert_ne!(lab.guest.get(0xfc), generation);
}

/// Frames flow both ways on an I/O thread while the driver resets again and again. After each reset the whole of
/// guest memory is poisoned: nothing may write to it, and the used rings of the next start must be the device's only.
#[test]
fn reset_under_load_leaves_guest_memory_alone() {
    let (port, script) = ScriptedPort::new(Offloads::all()).unwrap();
    let (nic, worker) = Net::new(MAC, Box::new(port)).unwrap();
    let mut guest = Driver::new(nic, Rest);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        scope.spawn(|| {
            let mut events = event_manager::EventManager::<NetWorker>::new().unwrap();
            event_manager::SubscriberOps::add_subscriber(&mut events, worker);
            while !stop.load(Ordering::SeqCst) {
                events.run_with_timeout(1).unwrap();
            }
        });
        for round in 0..200u64 {
            start_without_io(&mut guest, F_MRG_RXBUF | if round % 2 == 0 { F_EVENT_IDX } else { 0 });
            for n in 0..100 {
                guest.add(RX, &[into(DATA + 0x1000 * n, 1526)]);
                guest.add(TX, &[out(DATA + 0x10_0000 + 0x1000 * n, 1526)]);
                script.deliver(&frame(n as u8, 60));
                script.reply(&frame(n as u8, 1000));
                guest.put(0x50, RX as u32);
                guest.put(0x50, TX as u32);
            }
            guest.put(STATUS, 0);
            assert_eq!(guest.get(STATUS), 0);
            let (at, len) = (GuestAddress(0x1_0000), 0x30_0000);
            let poison = vec![0xa5; len];
            guest.mem.write_slice(&poison, at).unwrap();
            std::thread::yield_now();
            let mut seen = vec![0; len];
            guest.mem.read_slice(&mut seen, at).unwrap();
            assert!(seen == poison, "guest memory was written to after reset, in round {round}");
            script.take_sent();
        }
    });
}

/// Ends the I/O thread, also when an assertion fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// No I/O in the driver's own thread.
struct Rest;

impl event_manager::MutEventSubscriber for Rest {
    fn process(&mut self, _: event_manager::Events, _: &mut event_manager::EventOps) {}
    fn init(&mut self, _: &mut event_manager::EventOps) {}
}

fn start_without_io(guest: &mut Driver, features: u64) {
    // The driver's own event loop has nothing to do, so its `run` returns at once.
    guest.start(features);
}
