use super::*;
use crate::virtio::testing::{
    ACKNOWLEDGE as ACK, DATA, DRIVER as DRV, Driver, MEMORY_END, STATUS, Vring, memory,
};
use event_manager::{EventOps, Events, MutEventSubscriber};
use proptest::prelude::*;
use std::sync::Mutex;

use crate::irq::testing::CountingLine;
use crate::virtio::ActivateError;

const ODD: u64 = 1;
const NEEDS_ODD: u64 = 2;

/// What happened to the device.
#[derive(Default)]
struct Log {
    activations: Vec<(u64, Vec<(u16, bool)>)>,
    resets: u32,
    config: Vec<(u64, Vec<u8>)>,
    refuse: bool,
    interrupt: Option<Arc<Interrupt>>,
}

struct Probe {
    log: Arc<Mutex<Log>>,
    doorbell: Doorbell,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        ODD | NEEDS_ODD
    }
    fn accepts(&self, accepted: u64) -> bool {
        accepted & NEEDS_ODD == 0 || accepted & ODD != 0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config_space(&[1, 2, 3, 4, 5], offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.log.lock().unwrap().config.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut log = self.log.lock().unwrap();
        let queues = activation.queues.iter().map(|q| (q.size(), q.ready())).collect();
        log.activations.push((activation.features, queues));
        log.interrupt = Some(activation.interrupt);
        if log.refuse { Err(ActivateError::QueueMissing(1)) } else { Ok(()) }
    }
    fn reset(&mut self) {
        self.log.lock().unwrap().resets += 1;
    }
}

struct Idle;

impl MutEventSubscriber for Idle {
    fn process(&mut self, _: Events, _: &mut EventOps) {}
    fn init(&mut self, _: &mut EventOps) {}
}

fn probe() -> (Probe, Arc<Mutex<Log>>) {
    let log = Arc::<Mutex<Log>>::default();
    (Probe { log: Arc::clone(&log), doorbell: Doorbell::new().unwrap() }, log)
}

fn driver() -> (Driver, Arc<Mutex<Log>>) {
    let (probe, log) = probe();
    (Driver::new(probe, Idle), log)
}

const FULL: u32 = ACK | DRV | FEATURES_OK | DRIVER_OK;

#[test]
fn the_device_introduces_itself() {
    let (mut guest, _) = driver();
    let ids = [0x0, 0x4, 0x8].map(|at| guest.get(at));
    assert_eq!(ids, [0x7472_6976, 2, 42]);
    assert_eq!(guest.offered(), ODD | NEEDS_ODD | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC);
    guest.put(0x14, 2);
    assert_eq!(guest.get(0x10), 0, "no feature beyond bit 63");
    let mut sizes = [0; 3];
    for (index, size) in (0..).zip(&mut sizes) {
        guest.put(0x30, index);
        *size = guest.get(0x34);
    }
    assert_eq!(sizes, [256, 64, 0], "a queue that does not exist has size 0");
    assert_eq!(guest.get(0xb0), u32::MAX, "no shared memory");
}

#[test]
fn a_driver_in_order_is_activated_with_what_it_chose() {
    let (mut guest, log) = driver();
    guest.start(ODD | F_EVENT_IDX);
    assert_eq!(guest.get(STATUS), FULL);
    let features = ODD | F_EVENT_IDX | F_VERSION_1;
    assert_eq!(log.lock().unwrap().activations, [(features, vec![(256, true), (64, true)])]);
}

#[test]
fn every_step_of_the_handshake_needs_the_one_before() {
    let (mut guest, log) = driver();
    for (from, to) in [
        (0, DRV),
        (0, FEATURES_OK),
        (ACK, ACK | FEATURES_OK),
        (ACK, ACK | DRV | FEATURES_OK),
        (ACK | DRV, ACK | DRV | DRIVER_OK),
        (ACK | DRV, ACK),
        (ACK, ACK | 16),
    ] {
        guest.put(STATUS, 0);
        if from != 0 {
            guest.put(STATUS, from);
        }
        let before = guest.transport.refused(Refusal::Status);
        guest.put(STATUS, to);
        assert_eq!(guest.get(STATUS), from, "{from:#x} -> {to:#x}");
        assert_eq!(guest.transport.refused(Refusal::Status), before + 1);
    }
    // FEATURES_OK and DRIVER_OK can't come in one write: the driver must have read the device's answer.
    guest.put(STATUS, 0);
    guest.put(STATUS, ACK | DRV);
    guest.put(STATUS, FULL);
    assert_eq!(guest.get(STATUS), ACK | DRV);
    assert!(log.lock().unwrap().activations.is_empty());
}

#[test]
fn features_that_were_not_offered_do_not_become_ok() {
    let (mut guest, _) = driver();
    assert!(!guest.negotiate(F_VERSION_1 | 1 << 40), "not offered");
    assert!(!guest.negotiate(ODD), "a legacy driver");
    assert!(!guest.negotiate(F_VERSION_1 | NEEDS_ODD), "a feature without the one that it needs");
    assert_eq!(guest.transport.refused(Refusal::Features), 3);
    assert!(guest.negotiate(F_VERSION_1 | NEEDS_ODD | ODD));
    guest.put(0x24, 0);
    guest.put(0x20, 0xff);
    assert_eq!(guest.transport.refused(Refusal::Order), 1, "features are closed now");
}

#[test]
fn failed_can_always_be_set() {
    let (mut guest, _) = driver();
    guest.put(STATUS, FAILED);
    assert_eq!(guest.get(STATUS), FAILED);
}

#[test]
fn a_queue_whose_parts_do_not_hold_is_not_ready() {
    let (mut guest, _) = driver();
    assert!(guest.negotiate(F_VERSION_1));
    let (desc, avail, used) = (DATA, DATA + 0x10000, DATA + 0x20000);
    for (size, d, a, u) in [
        (0, desc, avail, used),
        (3, desc, avail, used),
        (512, desc, avail, used),
        (0x1_0000 + 16, desc, avail, used),
        (16, desc + 8, avail, used),
        (16, desc, avail + 1, used),
        (16, desc, avail, used + 2),
        (16, MEMORY_END - 16 * 16 + 16, avail, used),
        (16, desc, MEMORY_END - 2, used),
        (16, desc, avail, MEMORY_END),
        (16, 1 << 60, avail, used),
        (16, desc, u64::MAX - 1, used),
    ] {
        guest.describe_queue(0, size, d, a, u);
        assert!(!guest.make_ready(), "{size} {d:#x} {a:#x} {u:#x}");
    }
    assert_eq!(guest.transport.refused(Refusal::QueueSetup), 12);
    guest.describe_queue(0, 16, MEMORY_END - 16 * 16, avail, used);
    assert!(guest.make_ready());
    guest.put(0x38, 32);
    assert_eq!(guest.transport.refused(Refusal::Order), 1, "a ready queue keeps its size");
    guest.describe_queue(2, 16, desc, avail, used);
    assert!(!guest.make_ready());
    assert!(guest.transport.refused(Refusal::QueueIndex) > 0, "there is no queue 2");
}

#[test]
fn queues_are_set_up_between_features_ok_and_driver_ok_only() {
    let (mut guest, _) = driver();
    guest.put(STATUS, ACK | DRV);
    guest.describe_queue(0, 16, DATA, DATA + 0x1000, DATA + 0x2000);
    assert!(!guest.make_ready());
    assert_eq!(guest.transport.refused(Refusal::Order), 8);
    guest.start(0);
    guest.describe_queue(0, 16, DATA, DATA + 0x1000, DATA + 0x2000);
    assert_eq!(guest.transport.refused(Refusal::Order), 15);
}

#[test]
fn a_device_that_can_not_start_needs_a_reset() {
    let (mut guest, log) = driver();
    log.lock().unwrap().refuse = true;
    assert!(guest.negotiate(F_VERSION_1));
    guest.put(STATUS, FULL);
    guest.assert_broken();
    assert_eq!(guest.get(STATUS), FULL | NEEDS_RESET);
    guest.put(STATUS, 0);
    assert_eq!((guest.get(STATUS), guest.get(0x60)), (0, 0));
}

#[test]
fn reset_forgets_everything_but_the_generation() {
    let (mut guest, log) = driver();
    guest.start(ODD);
    let interrupt = log.lock().unwrap().interrupt.take().unwrap();
    interrupt.used();
    interrupt.config_changed();
    assert_eq!((guest.get(0x60), guest.get(0xfc)), (3, 1));
    guest.put(STATUS, 0);
    assert_eq!((guest.get(STATUS), guest.get(0x60), guest.get(0xfc)), (0, 0, 1));
    guest.put(0x30, 0);
    assert_eq!(guest.get(0x44), 0);
    assert!(log.lock().unwrap().resets >= 1);
    guest.start(0);
    assert_eq!(log.lock().unwrap().activations.len(), 2);
}

#[test]
fn stopping_one_queue_of_a_live_device_stops_it_all() {
    let (mut guest, log) = driver();
    guest.start(0);
    let before = log.lock().unwrap().resets;
    guest.put(0x30, 1);
    guest.put(0x44, 0);
    assert_eq!(guest.get(0x44), 0);
    assert_eq!(log.lock().unwrap().resets, before + 1);
    guest.assert_broken();
}

#[test]
fn interrupts_stand_until_they_are_acknowledged() {
    let (mut guest, log) = driver();
    guest.start(0);
    let interrupt = log.lock().unwrap().interrupt.take().unwrap();
    interrupt.used();
    interrupt.used();
    assert_eq!(guest.line.take(), 2, "each is an edge of its own");
    assert_eq!(guest.get(0x60), 1);
    interrupt.config_changed();
    guest.put(0x64, 1);
    assert_eq!(guest.get(0x60), 2);
    guest.put(0x64, u32::MAX);
    assert_eq!(guest.get(0x60), 0);
}

#[test]
fn a_notification_through_the_register_writes_the_doorbell() {
    let (mut guest, _) = driver();
    guest.put(0x50, 1);
    assert_eq!(guest.transport.refused(Refusal::Order), 1, "not before DRIVER_OK");
    guest.start(0);
    guest.put(0x50, 1);
    guest.put(0x50, 2);
    assert_eq!(guest.transport.refused(Refusal::QueueIndex), 1);
    let bell = guest.transport.doorbell();
    assert_eq!(bell.eventfd().read().unwrap(), 1, "once, for the queue that there is");
}

#[test]
fn registers_are_four_bytes_wide_and_the_configuration_any_width() {
    let (mut guest, log) = driver();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (2, 4), (0xfe, 4), (0x100, 3)] {
        let mut data = vec![0; len];
        guest.transport.read(offset, &mut data);
        assert_eq!(data, vec![0xff; len]);
        assert_eq!(guest.transport.write(offset, &data), None);
    }
    assert_eq!(guest.transport.refused(Refusal::Width), 12);
    let mut two = [0; 2];
    guest.transport.read(0x103, &mut two);
    assert_eq!(two, [4, 5]);
    let mut eight = [9; 8];
    guest.transport.read(0x104, &mut eight);
    assert_eq!(eight, [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.transport.write(0x101, &[7]), None);
    assert!(log.lock().unwrap().config.is_empty(), "no driver yet");
    guest.put(STATUS, ACK | DRV);
    assert_eq!(guest.transport.write(0x101, &[7]), None);
    assert_eq!(log.lock().unwrap().config, [(1, vec![7])]);
}

/// Accesses that reach somewhere: mostly real registers and plausible values.
fn access() -> impl Strategy<Value = (bool, u64, Vec<u8>)> {
    let registers = (0u64..0x44).prop_map(|n| n * 4);
    let offset = prop_oneof![8 => registers, 2 => 0u64..MMIO_LEN - 8];
    let word = prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 2, 3, 0xb, 0xf, 0x40, 0x80, 16, 64, 256, 1 << 20]),
        1 => any::<u32>(),
    ];
    let bytes = prop_oneof![
        8 => word.prop_map(|w| w.to_le_bytes().to_vec()),
        2 => prop::collection::vec(any::<u8>(), 1..9),
    ];
    (any::<bool>(), offset, bytes)
}

proptest! {
    #[test]
    fn any_accesses_are_survived_and_activation_is_earned(
        accesses in prop::collection::vec(access(), 0..200)
    ) {
        let (probe, log) = probe();
        let mut transport = MmioTransport::new(Box::new(probe), memory(), CountingLine::new());
        for (write, offset, mut bytes) in accesses {
            if write {
                prop_assert_eq!(transport.write(offset, &bytes), None);
            } else {
                transport.read(offset, &mut bytes);
            }
            prop_assert!(!transport.has(DRIVER_OK) || transport.has(ACK | DRV | FEATURES_OK));
            prop_assert!(!transport.has(FEATURES_OK) || transport.accepted & F_VERSION_1 != 0);
        }
        let log = log.lock().unwrap();
        for (features, queues) in &log.activations {
            prop_assert_eq!(features & !transport.offered, 0);
            prop_assert!(queues.iter().all(|(size, ready)| !ready || size.is_power_of_two()));
        }
    }
}

#[test]
fn ring_addresses_of_the_mock_are_apart() {
    // Guards the other tests: two queues of the mock never share memory.
    let (guest, _) = driver();
    let spans: Vec<_> = guest.queues.iter().map(|Vring { desc, .. }| *desc..*desc + 0x1_0000).collect();
    assert!(spans[0].end <= spans[1].start && spans[1].end <= DATA);
}
