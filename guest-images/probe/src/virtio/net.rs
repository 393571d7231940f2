//! The NIC: virtio-net (virtio 1.3 §5.1) as a smoltcp device.
//!
//! Two queues, receive 0 and transmit 1. Receive buffers are all posted at the start and again as soon as a
//! frame was read; a frame that spans several of them (MRG_RXBUF) is joined in one scratch buffer. Each
//! transmit slot holds a header and a frame of up to 64 KiB; slots come back when the next frame needs one.
//!
//! While the stack polls, receive interrupts are off. [`Nic::wait`] turns them on, looks once more and
//! sleeps, so an idle guest uses no CPU. Doorbells are rung per batch.
//!
//! Every received frame passes [`Observer`] before smoltcp sees it, and its TCP/UDP checksum is verified
//! unless the device vouches for it: a NIC that delivers wrong checksums is found out even with offloads.

use super::offload::{self, HEADER};
use super::queue::Queue;
use super::sys::{Dma, Window};
use super::{NETWORK, Refused, Transport, feature, register, status};
use crate::cpu::Cpu;
use crate::nic::{Facts, Nic};
use crate::observe::Observer;
use alloc::vec::Vec;
use core::num::{NonZeroU16, NonZeroUsize};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const ETHERNET: usize = 14;
/// The longest frame: 64 KiB of IP packet behind its Ethernet header.
const FRAME_MAX: usize = 65535 + ETHERNET;
/// Transmit slots; 128 of 68 KiB each hold twice a 4 MiB window.
const TRANSMIT_SLOTS: u16 = 128;
const TRANSMIT_SLOT: usize = (HEADER + FRAME_MAX).next_multiple_of(4096);
/// Receive buffers when they can't be merged and must hold a 64 KiB frame each.
const WHOLE_SLOTS: u16 = 64;
/// Frames that are queued before the doorbell is rung in the middle of a batch.
const BATCH: u16 = 16;
/// How long to sleep at most while the transmit ring is full, in microseconds.
const FULL_RING_SLEEP: u64 = 10_000;

/// What the command line may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Feature bits that are not accepted.
    pub without: u64,
    /// Size of a mergeable receive buffer in bytes, header included.
    pub receive_buffer: usize,
    /// IP MTU, instead of the device's.
    pub mtu: Option<u16>,
    /// Whether to read and acknowledge InterruptStatus after each sleep (§4.2.3.3). Two exits per wake-up
    /// that edge-triggered lines don't need, so it is off unless asked for.
    pub acknowledge: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { without: 0, receive_buffer: 4096, mtu: None, acknowledge: false }
    }
}

/// The network card.
#[derive(Debug)]
pub struct VirtioNet<C> {
    pub(super) cpu: C,
    pub(super) transport: Transport,
    pub(super) rx: Receive,
    pub(super) tx: Transmit,
    /// Registers of the machine's other devices, for the abuse of registers.
    pub(super) others: Vec<Window>,
    settings: Settings,
    facts: Facts,
    observer: Observer,
}

#[derive(Debug)]
pub(super) struct Receive {
    pub(super) queue: Queue,
    buffers: Dma,
    each: usize,
    joined: Vec<u8>,
    /// The buffer that was lent last; it is posted again before the next frame is taken.
    lent: Option<u16>,
    reposted: u16,
}

#[derive(Debug)]
pub(super) struct Transmit {
    pub(super) queue: Queue,
    slots: Dma,
    free: Vec<u16>,
    unannounced: u16,
    checksum_offload: bool,
    transport: Transport,
    frames: u64,
}

/// Where a received frame lies.
enum Place {
    Buffer(u16, usize),
    Joined,
}

impl<C: Cpu> VirtioNet<C> {
    /// Brings up the NIC behind a register window; `Ok(None)` if another kind of device is there.
    pub fn new(window: Window, cpu: C, settings: Settings) -> Result<Option<Self>, Refused> {
        let (transport, kind) = Transport::identify(window)?;
        if kind != NETWORK {
            return Ok(None);
        }
        let features = transport
            .negotiate(feature::KNOWN.iter().map(|(_, bit)| bit).sum::<u64>() & !settings.without)?;
        let event_idx = features & feature::EVENT_IDX != 0;
        let facts = Facts::default();
        let mut nic = Self {
            cpu,
            transport,
            rx: Receive::new(transport.queue_limit(RECEIVE)?, features, &settings),
            tx: Transmit::new(transport.queue_limit(TRANSMIT)?, event_idx, transport),
            others: Vec::new(),
            settings,
            facts,
            observer: Observer::default(),
        };
        nic.go_live(features);
        Ok(Some(nic))
    }

    /// Tells which registers the machine's other devices have.
    pub fn set_others(&mut self, others: Vec<Window>) {
        self.others = others;
    }

    /// Resets the device and brings it up again with the same settings; buffers in flight are lost.
    pub fn restart(&mut self) -> Result<(), Refused> {
        let wanted = feature::KNOWN.iter().map(|(_, bit)| bit).sum::<u64>() & !self.settings.without;
        let features = self.transport.negotiate(wanted)?;
        self.transport.queue_limit(RECEIVE)?;
        self.transport.queue_limit(TRANSMIT)?;
        self.rx.clear();
        self.tx.clear();
        self.go_live(features);
        Ok(())
    }

    fn go_live(&mut self, features: u64) {
        self.transport.enable_queue(RECEIVE, &self.rx.queue);
        self.transport.enable_queue(TRANSMIT, &self.tx.queue);
        self.read_facts(features);
        self.tx.checksum_offload = features & feature::CSUM != 0;
        self.transport.add_status(status::DRIVER_OK);
        self.rx.queue.set_interrupts(false);
        self.tx.queue.set_interrupts(false);
        for id in 0..self.rx.queue.size() {
            self.rx.post(id);
        }
        if self.rx.queue.wants_notification() {
            self.transport.notify(RECEIVE);
        }
    }

    fn read_facts(&mut self, features: u64) {
        let config = |offset, width| self.transport.registers().read(register::CONFIG + offset, width);
        let mut mac = [0x02, 0, 0, 0, 0, 0x01];
        if features & feature::MAC != 0 {
            for (offset, byte) in (0..).zip(&mut mac) {
                *byte = config(offset, 1) as u8;
            }
        }
        let offered_mtu = if features & feature::MTU != 0 { config(10, 2) as u16 } else { 1500 };
        self.facts = Facts {
            mac,
            features,
            mtu: self.settings.mtu.unwrap_or(offered_mtu),
            link_up: features & feature::STATUS == 0 || config(6, 2) & 1 != 0,
            queue_sizes: [self.rx.queue.size(), self.tx.queue.size()],
            ..self.facts
        };
    }

    fn has(&self, bit: u64) -> bool {
        self.facts.features & bit != 0
    }

    /// Finds the next frame whose checksum is right.
    fn next_frame(&mut self) -> Option<Place> {
        loop {
            let (place, header) = self.rx.take(self.facts.features, &mut self.facts)?;
            let flags = header[0];
            if self.rx.reposted >= self.rx.queue.size() / 4 {
                self.announce_receive();
            }
            let frame = self.rx.frame(&place);
            let partial = flags & offload::NEEDS_CSUM != 0;
            self.facts.bad_partial += u64::from(partial && !offload::partial_is_right(&header, frame));
            if offload::verify(flags, frame) {
                self.observer.frame(self.cpu.now(), frame);
                return Some(place);
            }
            self.facts.bad_checksums += 1;
        }
    }

    fn announce_receive(&mut self) {
        self.rx.reposted = 0;
        if self.rx.queue.wants_notification() {
            self.transport.notify(RECEIVE);
        }
    }
}

impl Receive {
    fn new(limit: u16, features: u64, settings: &Settings) -> Self {
        let merge = features & feature::MRG_RXBUF != 0;
        let long = features & feature::GUEST_TSO4 != 0;
        // Without merging every buffer must hold the longest frame (§5.1.6.3.1).
        let (size, each) = match (merge, long) {
            (true, _) => (limit.min(256), settings.receive_buffer.clamp(HEADER + ETHERNET, 65536)),
            (false, true) => (limit.min(WHOLE_SLOTS), TRANSMIT_SLOT),
            (false, false) => (limit.min(256), 16384),
        };
        Self {
            queue: Queue::new(size, features & feature::EVENT_IDX != 0),
            buffers: Dma::new(usize::from(size) * each),
            each,
            joined: Vec::new(),
            lent: None,
            reposted: 0,
        }
    }

    fn clear(&mut self) {
        self.queue.clear();
        self.lent = None;
        self.reposted = 0;
    }

    fn post(&mut self, id: u16) {
        let address = self.buffers.address(usize::from(id) * self.each);
        self.queue.post(id, address, self.each as u32, true);
        self.reposted += 1;
    }

    /// Takes the next frame off the ring, joining its buffers; also returns its header.
    fn take(&mut self, features: u64, facts: &mut Facts) -> Option<(Place, [u8; HEADER])> {
        if let Some(id) = self.lent.take() {
            self.post(id);
        }
        let (id, len) = self.queue.take()?;
        let len = (len as usize).min(self.each);
        if len < HEADER {
            facts.short_frames += 1;
            self.post(id);
            return self.take(features, facts);
        }
        let mut header = [0; HEADER];
        header.copy_from_slice(self.buffers.bytes(usize::from(id) * self.each, HEADER));
        let merge = features & feature::MRG_RXBUF != 0;
        let count = if merge { u16::from_le_bytes([header[10], header[11]]) } else { 1 };
        facts.received += 1;
        facts.received_long += u64::from(header[1] != offload::GSO_NONE);
        if count <= 1 {
            self.lent = Some(id);
            return Some((Place::Buffer(id, len), header));
        }
        self.join(id, len, count, facts);
        Some((Place::Joined, header))
    }

    fn join(&mut self, first: u16, len: usize, count: u16, facts: &mut Facts) {
        self.joined.clear();
        self.joined
            .extend_from_slice(self.buffers.bytes(usize::from(first) * self.each + HEADER, len - HEADER));
        self.post(first);
        for _ in 1..count {
            // All buffers of a frame are used at once (§5.1.6.4); a missing one is the device's defect.
            let Some((id, len)) = self.queue.take() else {
                facts.short_frames += 1;
                return;
            };
            let len = (len as usize).min(self.each);
            if self.joined.len() + len <= FRAME_MAX {
                self.joined.extend_from_slice(self.buffers.bytes(usize::from(id) * self.each, len));
            }
            self.post(id);
        }
    }

    fn frame(&self, place: &Place) -> &[u8] {
        match place {
            Place::Buffer(id, len) => self.buffers.bytes(usize::from(*id) * self.each + HEADER, len - HEADER),
            Place::Joined => &self.joined,
        }
    }
}

impl Transmit {
    fn new(limit: u16, event_idx: bool, transport: Transport) -> Self {
        let size = limit.min(TRANSMIT_SLOTS);
        Self {
            queue: Queue::new(size, event_idx),
            slots: Dma::new(usize::from(size) * TRANSMIT_SLOT),
            free: (0..size).rev().collect(),
            unannounced: 0,
            checksum_offload: false,
            transport,
            frames: 0,
        }
    }

    fn clear(&mut self) {
        self.queue.clear();
        self.free = (0..self.queue.size()).rev().collect();
        self.unannounced = 0;
    }

    /// Whether a slot is free, after taking back what the device is done with if none was.
    fn ready(&mut self) -> bool {
        if self.free.is_empty() {
            while let Some((id, _)) = self.queue.take() {
                self.free.push(id);
            }
        }
        !self.free.is_empty()
    }

    /// Queues a frame of `len` bytes that `write` fills; `header` decides over the virtio_net_hdr.
    fn send<R>(
        &mut self,
        len: usize,
        write: impl FnOnce(&mut [u8]) -> R,
        header: impl FnOnce(&mut [u8]) -> [u8; HEADER],
    ) -> R {
        let id = self.free.pop().expect("tokens are made only while a slot is free");
        let at = usize::from(id) * TRANSMIT_SLOT;
        let frame = self.slots.bytes_mut(at + HEADER, len.min(FRAME_MAX));
        let result = write(frame);
        let header = header(frame);
        self.slots.bytes_mut(at, HEADER).copy_from_slice(&header);
        self.queue.post(id, self.slots.address(at), (HEADER + len) as u32, false);
        self.frames += 1;
        self.unannounced += 1;
        if self.unannounced >= BATCH {
            self.announce();
        }
        result
    }

    fn announce(&mut self) {
        self.unannounced = 0;
        if self.queue.wants_notification() {
            self.transport.notify(TRANSMIT);
        }
    }
}

impl<C: Cpu> Nic for VirtioNet<C> {
    fn now(&self) -> Instant {
        Instant::from_micros(self.cpu.now().cast_signed())
    }

    fn flush(&mut self) {
        self.announce_receive();
        self.tx.announce();
    }

    fn wait(&mut self, until: Instant) {
        self.flush();
        let seen = self.cpu.interrupts();
        let full = !self.tx.ready();
        if self.rx.queue.set_interrupts(true) || (full && self.tx.queue.set_interrupts(true)) {
            return;
        }
        let (now, mut until) = (self.cpu.now(), until.total_micros().max(0).cast_unsigned());
        if full {
            until = now + FULL_RING_SLEEP;
        }
        if until > now {
            self.cpu.sleep(seen, until);
        }
        self.rx.queue.set_interrupts(false);
        self.tx.queue.set_interrupts(false);
        if self.settings.acknowledge {
            let pending = self.transport.registers().get(register::INTERRUPT_STATUS);
            self.transport.registers().set(register::INTERRUPT_ACK, pending);
        }
    }

    fn facts(&self) -> Facts {
        Facts {
            sent: self.tx.frames,
            refused_ids: self.rx.queue.refused() + self.tx.queue.refused(),
            needs_reset: self.transport.registers().get(register::STATUS) & status::NEEDS_RESET != 0,
            ..self.facts
        }
    }

    fn observer(&mut self) -> &mut Observer {
        &mut self.observer
    }

    fn send_raw(&mut self, header: [u8; HEADER], frame: &[u8]) -> bool {
        if !self.tx.ready() {
            self.wait(self.now());
            if !self.tx.ready() {
                return false;
            }
        }
        self.tx.send(
            frame.len().min(FRAME_MAX),
            |slot| slot.copy_from_slice(&frame[..slot.len()]),
            |_| header,
        );
        true
    }

    fn cpu(&self) -> Option<&dyn Cpu> {
        Some(&self.cpu)
    }

    fn abuse(&mut self, abuse: super::abuse::Abuse) -> Option<Result<super::abuse::Damage, Refused>> {
        Some(super::abuse::run(self, abuse))
    }
}

/// A received frame, lent to smoltcp.
#[derive(Debug)]
pub struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// The right to send one frame.
#[derive(Debug)]
pub struct Slot<'a> {
    tx: &'a mut Transmit,
    segment_size: Option<NonZeroU16>,
}

impl TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let size = self.segment_size.map(NonZeroU16::get);
        let offload = self.tx.checksum_offload;
        self.tx.send(len, f, |frame| if offload { offload::fill(frame, size) } else { [0; HEADER] })
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment_size = meta.segmentation_offload_size;
    }
}

impl<C: Cpu> Device for VirtioNet<C> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Slot<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Slot<'_>)> {
        if !self.tx.ready() {
            return None;
        }
        let place = self.next_frame()?;
        Some((Received(self.rx.frame(&place)), Slot { tx: &mut self.tx, segment_size: None }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Slot<'_>> {
        self.tx.ready().then_some(Slot { tx: &mut self.tx, segment_size: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = usize::from(self.facts.mtu) + ETHERNET;
        // What comes in is verified above. UDP is summed by smoltcp even if the device could, because it
        // fragments after summing; `offload::fill` undoes it for whole datagrams.
        caps.checksum.tcp = if self.has(feature::CSUM) { Checksum::None } else { Checksum::Tx };
        caps.checksum.udp = Checksum::Tx;
        if self.has(feature::CSUM) && self.has(feature::HOST_TSO4) {
            caps.segmentation.tcpv4 = NonZeroUsize::new(FRAME_MAX);
        }
        caps
    }
}
