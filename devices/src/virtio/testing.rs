//! A driver for tests: registers, rings and memory from the guest's side, with the worker in the same thread.
//!
//! It behaves as the spec asks of a driver — above all, it kicks a queue only if the device asked for it — so a
//! lost wake-up shows as a frame that never moves. [`Driver::run`] is the I/O thread until it would sleep.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::mmio::MmioTransport;
use super::{F_EVENT_IDX, F_VERSION_1, Memory, VirtioDevice};
use crate::bus::BusDevice;
use crate::irq::testing::CountingLine;

/// Guest memory is two regions that meet here.
pub(crate) const SEAM: u64 = 8 << 20;
/// Guest memory ends here.
pub(crate) const MEMORY_END: u64 = 16 << 20;
/// Where tests put their buffers.
pub(crate) const DATA: u64 = 1 << 20;

pub(crate) const STATUS: u64 = 0x70;
pub(crate) const ACKNOWLEDGE: u32 = 1;
pub(crate) const DRIVER: u32 = 2;
pub(crate) const DRIVER_OK: u32 = 4;
pub(crate) const FEATURES_OK: u32 = 8;
pub(crate) const NEEDS_RESET: u32 = 64;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Rounds after which an I/O thread that never sleeps counts as spinning.
const SPIN: usize = 10_000;

pub(crate) fn memory() -> Memory {
    let ranges = [(GuestAddress(0), SEAM as usize), (GuestAddress(SEAM), (MEMORY_END - SEAM) as usize)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buf {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
}

/// A buffer that the device reads.
pub(crate) fn out(addr: u64, len: usize) -> Buf {
    Buf { addr, len: len as u32, flags: 0 }
}

/// A buffer that the device writes.
pub(crate) fn into(addr: u64, len: usize) -> Buf {
    Buf { addr, len: len as u32, flags: WRITE }
}

/// The driver's side of one queue.
pub(crate) struct Vring {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    next_desc: u16,
    avail_idx: u16,
    kicked_idx: u16,
    used_seen: u16,
}

impl Vring {
    fn new(index: u64, size: u16) -> Self {
        let base = 0x1_0000 * (index + 1);
        let (desc, avail, used) = (base, base + 0x4000, base + 0x8000);
        Self { size, desc, avail, used, next_desc: 0, avail_idx: 0, kicked_idx: 0, used_seen: 0 }
    }

    pub(crate) fn write_desc(&self, mem: &GuestMemoryMmap, index: u16, buf: Buf, next: u16) {
        let at = self.desc + 16 * u64::from(index % self.size);
        write_desc(mem, at, buf, next);
    }
}

pub(crate) fn write_desc(mem: &GuestMemoryMmap, at: u64, buf: Buf, next: u16) {
    mem.write_obj(buf.addr, GuestAddress(at)).unwrap();
    mem.write_obj(buf.len, GuestAddress(at + 8)).unwrap();
    mem.write_obj(buf.flags, GuestAddress(at + 12)).unwrap();
    mem.write_obj(next, GuestAddress(at + 14)).unwrap();
}

pub(crate) struct Driver {
    pub(crate) mem: Memory,
    pub(crate) transport: MmioTransport,
    pub(crate) line: Arc<CountingLine>,
    pub(crate) queues: Vec<Vring>,
    pub(crate) event_idx: bool,
    events: EventManager<Box<dyn MutEventSubscriber>>,
}

impl Driver {
    pub(crate) fn new(
        device: impl VirtioDevice + 'static,
        worker: impl MutEventSubscriber + 'static,
    ) -> Self {
        Self::with_memory(device, worker, memory())
    }

    /// The same with memory of the test's own, up to [`MEMORY_END`].
    pub(crate) fn with_memory(
        device: impl VirtioDevice + 'static,
        worker: impl MutEventSubscriber + 'static,
        mem: Memory,
    ) -> Self {
        let line = CountingLine::new();
        let queues = (0..).zip(device.queue_sizes()).map(|(i, size)| Vring::new(i, *size)).collect();
        let transport = MmioTransport::new(Box::new(device), Arc::clone(&mem), line.clone());
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        events.add_subscriber(Box::new(worker));
        Self { mem, transport, line, queues, event_idx: false, events }
    }

    pub(crate) fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn put(&mut self, offset: u64, value: u32) {
        assert_eq!(self.transport.write(offset, &value.to_le_bytes()), None);
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.put(0x14, 0);
        let low = self.get(0x10);
        self.put(0x14, 1);
        u64::from(self.get(0x10)) << 32 | u64::from(low)
    }

    /// As far as FEATURES_OK; whether the device agreed.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        self.put(STATUS, 0);
        self.put(STATUS, ACKNOWLEDGE);
        self.put(STATUS, ACKNOWLEDGE | DRIVER);
        self.put(0x24, 0);
        self.put(0x20, features as u32);
        self.put(0x24, 1);
        self.put(0x20, (features >> 32) as u32);
        self.put(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.event_idx = features & F_EVENT_IDX != 0;
        self.get(STATUS) & FEATURES_OK != 0
    }

    /// Writes a queue's size and addresses, without making it ready.
    pub(crate) fn describe_queue(&mut self, index: usize, size: u32, desc: u64, avail: u64, used: u64) {
        self.put(0x30, index as u32);
        self.put(0x38, size);
        for (offset, addr) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
            self.put(offset, addr as u32);
            self.put(offset + 4, (addr >> 32) as u32);
        }
    }

    /// Makes the described queue ready; whether it is.
    pub(crate) fn make_ready(&mut self) -> bool {
        self.put(0x44, 1);
        self.get(0x44) == 1
    }

    /// The whole handshake with these features (and VERSION_1), all queues empty, and the first wake-up done.
    pub(crate) fn start(&mut self, features: u64) {
        assert!(self.negotiate(features | F_VERSION_1));
        for index in 0..self.queues.len() {
            // A size of 0: no such queue.
            if self.queues[index].size == 0 {
                continue;
            }
            let fresh = Vring::new(index as u64, self.queues[index].size);
            self.mem.write_slice(&[0; 0xc000], GuestAddress(fresh.desc)).unwrap();
            self.describe_queue(index, fresh.size.into(), fresh.desc, fresh.avail, fresh.used);
            assert!(self.make_ready());
            self.queues[index] = fresh;
        }
        self.put(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.run();
        self.line.take();
    }

    /// The I/O thread until it would sleep.
    pub(crate) fn run(&mut self) {
        for _ in 0..SPIN {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the I/O thread spins");
    }

    /// The I/O thread until `chains` of a queue came back, for devices that wait for the host. What came back.
    pub(crate) fn run_until_used(&mut self, queue: usize, chains: usize) -> Vec<(u16, u32)> {
        let mut used = self.used(queue);
        let mut idle = 0;
        while used.len() < chains {
            // Patience, not a measure: a device that answers is never waited for that long. io_uring interrupts a wait.
            if self.events.run_with_timeout(3_000).unwrap() == 0 {
                idle += 1;
                assert!(idle < 20, "{} of {chains} chains came back", used.len());
            }
            used.extend(self.used(queue));
        }
        used
    }

    /// One round of the I/O thread.
    pub(crate) fn run_once(&mut self) -> usize {
        self.events.run_with_timeout(0).unwrap()
    }

    /// Makes a chain available, without telling the device. Its head.
    pub(crate) fn add(&mut self, queue: usize, bufs: &[Buf]) -> u16 {
        let head = self.queues[queue].next_desc;
        for (n, buf) in (0..).zip(bufs) {
            let ring = &mut self.queues[queue];
            let next = (ring.next_desc + 1) % ring.size;
            let last = n + 1 == bufs.len();
            let flags = if last { buf.flags } else { buf.flags | NEXT };
            ring.write_desc(&self.mem, ring.next_desc, Buf { flags, ..*buf }, next);
            ring.next_desc = next;
        }
        self.offer(queue, head)
    }

    /// Puts `head` into the available ring.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) -> u16 {
        let ring = &mut self.queues[queue];
        let slot = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        self.mem.store(ring.avail_idx, GuestAddress(ring.avail + 2), Ordering::Release).unwrap();
        head
    }

    /// Tells the device about what was added, if it asked to be told. Whether it was.
    pub(crate) fn kick(&mut self, queue: usize) -> bool {
        fence(Ordering::SeqCst);
        let ring = &mut self.queues[queue];
        let (old, new) = (std::mem::replace(&mut ring.kicked_idx, ring.avail_idx), ring.avail_idx);
        let wanted = if self.event_idx {
            let at = ring.used + 4 + 8 * u64::from(ring.size);
            let event: u16 = self.mem.load(GuestAddress(at), Ordering::SeqCst).unwrap();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags: u16 = self.mem.load(GuestAddress(ring.used), Ordering::SeqCst).unwrap();
            flags & 1 == 0 && old != new
        };
        if wanted {
            self.put(0x50, queue as u32);
        }
        wanted
    }

    /// Kicks if asked to, and lets the device work until it sleeps.
    pub(crate) fn kick_and_run(&mut self, queue: usize) {
        self.kick(queue);
        self.run();
    }

    /// Chains that came back since the last look: head and bytes written. Asks for an interrupt for the next.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let ring = &mut self.queues[queue];
        let idx: u16 = self.mem.load(GuestAddress(ring.used + 2), Ordering::Acquire).unwrap();
        let mut all = Vec::new();
        while ring.used_seen != idx {
            let at = ring.used + 4 + 8 * u64::from(ring.used_seen % ring.size);
            let head: u32 = self.mem.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
            all.push((head as u16, len));
            ring.used_seen = ring.used_seen.wrapping_add(1);
        }
        let event = ring.avail + 4 + 2 * u64::from(ring.size);
        self.mem.store(ring.used_seen, GuestAddress(event), Ordering::SeqCst).unwrap();
        all
    }

    pub(crate) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub(crate) fn fill(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// The device gave up: DEVICE_NEEDS_RESET, announced by a configuration interrupt.
    pub(crate) fn assert_broken(&mut self) {
        assert_eq!(self.get(STATUS) & NEEDS_RESET, NEEDS_RESET, "DEVICE_NEEDS_RESET is not set");
        assert_eq!(self.get(0x60) & 2, 2, "no configuration interrupt");
        assert!(self.line.take() > 0);
    }

    pub(crate) fn assert_healthy(&mut self) {
        assert_eq!(self.get(STATUS) & NEEDS_RESET, 0, "DEVICE_NEEDS_RESET is set");
    }
}
