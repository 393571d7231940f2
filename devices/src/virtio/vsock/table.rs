//! The connections of a device, and what waits to be told to the guest.
//!
//! At most [`MAX_CONNECTIONS`], of any state; beyond that a client is hung up on. The guest gets RST [`KEPT_FOR_HOST`] earlier.
//! Connections of which nothing is left but the guest's last word make room first.
//!
//! A connection that has something for the guest stands in `ready`, once, and takes its turns one packet at a time.
//! RSTs for connections that do not exist (any more) wait in `resets`, before everything else. A packet of the guest
//! causes at most one, and the device takes no more packets while [`RESETS`] wait; events of the host cause at
//! most one for each connection that the guest knows, and the guest learns of no new one while an RST waits. So the
//! list is bounded.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;

use event_manager::EventSet;
use vm_memory::VolatileSlice;

use super::connection::{After, Connection, Key};
use super::counters::{Refusal, VsockCounters};
use super::credit::BUF_ALLOC;
use super::host::{Listener, Unreachable};
use super::packet::{Header, Op, STREAM};

/// Most connections at a time, of any state.
pub const MAX_CONNECTIONS: usize = 256;
/// Of these, so many are for clients of the host: a guest can't lock it out.
pub const KEPT_FOR_HOST: usize = 32;
/// RSTs that wait for a receive buffer before the guest's packets are left in their ring.
pub const RESETS: usize = 256;
/// The host's CID (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;
/// Where the host's ports of its own connections begin; a connection that the guest asks for may have any.
pub const FIRST_HOST_PORT: u32 = 1 << 30;

/// An RST that waits.
#[derive(Clone, Copy, Debug)]
struct Reset {
    src_cid: u64,
    key: Key,
    kind: u16,
}

/// See the module's documentation.
pub(super) struct Table {
    cid: u64,
    slots: Vec<Option<Box<Connection>>>,
    open: usize,
    by_key: HashMap<Key, u16>,
    ready: VecDeque<u16>,
    resets: VecDeque<Reset>,
    /// Connections whose polling may have to change.
    touched: Vec<u16>,
    /// Connections that are over, to be taken out of the event loop.
    over: Vec<Connection>,
    next_port: u32,
}

impl Table {
    pub(super) fn new(cid: u64) -> Self {
        Self {
            cid,
            slots: Vec::new(),
            open: 0,
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            touched: Vec::new(),
            over: Vec::new(),
            next_port: FIRST_HOST_PORT,
        }
    }

    /// Connections now.
    pub(super) fn open(&self) -> usize {
        self.open
    }

    /// Something waits for a receive buffer.
    pub(super) fn has_work(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// No more packets of the guest can be taken.
    pub(super) fn is_full_of_resets(&self) -> bool {
        self.resets.len() >= RESETS
    }

    pub(super) fn get_mut(&mut self, slot: u16) -> Option<&mut Connection> {
        self.slots.get_mut(usize::from(slot))?.as_deref_mut()
    }

    /// The next connection whose polling may have to change.
    pub(super) fn pop_touched(&mut self) -> Option<u16> {
        let slot = self.touched.pop()?;
        if let Some(connection) = self.get_mut(slot) {
            connection.touched = false;
        }
        Some(slot)
    }

    /// The next connection that is over.
    pub(super) fn pop_over(&mut self) -> Option<Connection> {
        self.over.pop()
    }

    /// Forgets everything: the guest has a new driver, or none.
    pub(super) fn clear(&mut self) {
        for slot in 0..self.slots.len() {
            self.free(slot as u16);
        }
        self.resets.clear();
    }

    /// A slot for one more connection where there may be `limit` of them.
    fn find_room(&mut self, limit: usize) -> Result<usize, Refusal> {
        if self.open < limit {
            return Ok(self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
                self.slots.push(None);
                self.slots.len() - 1
            }));
        }
        let is_closing = |slot: &Option<Box<Connection>>| slot.as_ref().is_some_and(|it| it.is_closing());
        let closing = self.slots.iter().position(is_closing).ok_or(Refusal::TableFull)?;
        self.free(closing as u16);
        Ok(closing)
    }

    /// Puts the connection into a slot that [`Self::find_room`] found.
    fn insert(&mut self, slot: usize, connection: Connection) -> u16 {
        self.slots[slot] = Some(Box::new(connection));
        self.open += 1;
        slot as u16
    }

    /// Ends a connection.
    fn free(&mut self, slot: u16) {
        let Some(connection) = self.slots.get_mut(usize::from(slot)).and_then(Option::take) else { return };
        self.open -= 1;
        self.forget_key(slot, connection.key);
        if connection.queued {
            self.ready.retain(|waiting| *waiting != slot);
        }
        self.over.push(*connection);
    }

    /// The key no longer leads to the connection.
    fn forget_key(&mut self, slot: u16, key: Key) {
        if self.by_key.get(&key) == Some(&slot) {
            self.by_key.remove(&key);
        }
    }

    /// The connection has changed: it may have something for the guest, or want to be polled for something else.
    fn update(&mut self, slot: u16) {
        let Some(connection) = self.slots.get_mut(usize::from(slot)).and_then(Option::as_deref_mut) else {
            return;
        };
        if !connection.touched {
            connection.touched = true;
            self.touched.push(slot);
        }
        if !connection.queued && connection.has_work() {
            connection.queued = true;
            self.ready.push_back(slot);
            debug_assert!(self.ready.len() <= self.open, "each stands there once, and only while it lives");
        }
    }

    // From the host.

    /// A client has connected.
    pub(super) fn client(&mut self, socket: OwnedFd, counters: &VsockCounters) {
        match self.find_room(MAX_CONNECTIONS) {
            Ok(room) => {
                let slot = self.insert(room, Connection::client(socket));
                // Its line may have come with it.
                self.host_event(slot, EventSet::IN, counters);
            }
            Err(why) => counters.refuse(why),
        }
    }

    /// A connection's socket is ready for something.
    pub(super) fn host_event(&mut self, slot: u16, set: EventSet, counters: &VsockCounters) {
        if let Some(connection) = self.get_mut(slot) {
            let after = connection.host_event(set);
            self.apply(slot, after, counters);
        }
    }

    /// The event loop refused a connection: it can't go on.
    pub(super) fn abort(&mut self, slot: u16, counters: &VsockCounters) {
        self.apply(slot, After::Refuse(Refusal::NoResources), counters);
    }

    /// A free port of the host towards the guest's `port`.
    fn new_key(&mut self, port: u32) -> Key {
        loop {
            let key = Key { host: self.next_port, guest: port };
            self.next_port =
                if self.next_port == u32::MAX - 1 { FIRST_HOST_PORT } else { self.next_port + 1 };
            // Far fewer are taken than there are.
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    fn apply(&mut self, slot: u16, after: After, counters: &VsockCounters) {
        let Some(connection) = self.get_mut(slot) else { return };
        let (key, known) = (connection.key, connection.is_known());
        let lingers = match after {
            After::Keep => return self.update(slot),
            After::Wants(port) => {
                let key = self.new_key(port);
                self.by_key.insert(key, slot);
                if let Some(connection) = self.get_mut(slot) {
                    connection.request(key);
                }
                return self.update(slot);
            }
            After::Gone | After::Reset => connection.linger(),
            After::Free => false,
            After::Refuse(why) => {
                counters.refuse(why);
                false
            }
        };
        let told = matches!(after, After::Gone | After::Free | After::Refuse(Refusal::GuestRefused));
        if known && !told {
            self.resets.push_back(Reset { src_cid: HOST_CID, key, kind: STREAM });
        }
        if lingers {
            self.forget_key(slot, key);
            self.update(slot);
        } else {
            self.free(slot);
        }
    }

    // From the guest.

    /// A packet of the guest. Its payload is `pieces[start..]`, as long as the header says; `None` when its chain is
    /// too short for it.
    pub(super) fn guest_packet(
        &mut self,
        header: &Header,
        payload: Option<(&mut [VolatileSlice<'_>], usize)>,
        listener: &Listener,
        counters: &VsockCounters,
    ) {
        let key = Key { host: header.dst_port, guest: header.src_port };
        let (op, (pieces, start)) = match self.check(header, payload) {
            Ok(checked) => checked,
            Err(why) => {
                let ours = header.src_cid == self.cid && header.dst_cid == HOST_CID && header.kind == STREAM;
                return self.reject(header, key, ours, why, counters);
            }
        };
        match (self.by_key.get(&key).copied(), op) {
            (Some(slot), Op::Request) if self.get_mut(slot).is_some_and(|it| it.is_closing()) => {
                // The guest has forgotten the old one.
                self.free(slot);
                self.guest_request(header, key, listener, counters);
            }
            (Some(slot), _) => {
                let Some(connection) = self.get_mut(slot) else { return };
                let after = connection.packet(op, header, pieces, start);
                match (op, after) {
                    (Op::Rw, After::Keep) => counters.received(header.len),
                    (Op::Response, After::Keep) => counters.opened(),
                    _ => {}
                }
                self.apply(slot, after, counters);
            }
            (None, Op::Request) => self.guest_request(header, key, listener, counters),
            // A word about what is over anyway.
            (None, Op::Rst) => {}
            (None, _) => self.reject(header, key, false, Refusal::NoConnection, counters),
        }
    }

    /// The operation and the payload of a packet that makes sense.
    fn check<'p, 'm>(
        &self,
        header: &Header,
        payload: Option<(&'p mut [VolatileSlice<'m>], usize)>,
    ) -> Result<(Op, (&'p mut [VolatileSlice<'m>], usize)), Refusal> {
        if header.src_cid != self.cid {
            return Err(Refusal::WrongSource);
        }
        if header.dst_cid != HOST_CID {
            return Err(Refusal::WrongDestination);
        }
        if header.kind != STREAM {
            return Err(Refusal::BadType);
        }
        let op = Op::parse(header.op).ok_or(Refusal::BadOperation)?;
        Ok((op, payload.ok_or(Refusal::BadLength)?))
    }

    /// Answers a packet that is refused by RST, and ends the connection that it belongs to, if it is `ours`.
    fn reject(&mut self, header: &Header, key: Key, ours: bool, why: Refusal, counters: &VsockCounters) {
        if let Some(slot) = self.by_key.get(&key).copied().filter(|_| ours)
            && self.get_mut(slot).is_some_and(|it| it.is_known())
        {
            return self.apply(slot, After::Refuse(why), counters);
        }
        counters.refuse(why);
        // Nobody answers RST with RST, or they never end.
        if header.op != Op::Rst as u16 {
            self.resets.push_back(Reset { src_cid: header.dst_cid, key, kind: header.kind });
        }
    }

    fn guest_request(&mut self, header: &Header, key: Key, listener: &Listener, counters: &VsockCounters) {
        let connect = || {
            listener.connect(header.dst_port).map_err(|why| match why {
                Unreachable::Refused => Refusal::NobodyListens,
                Unreachable::PathTooLong => Refusal::PathTooLong,
                Unreachable::NoResources => Refusal::NoResources,
            })
        };
        let room = self.find_room(MAX_CONNECTIONS - KEPT_FOR_HOST);
        match room.and_then(|room| connect().map(|socket| (room, socket))) {
            Ok((room, socket)) => {
                let slot = self.insert(room, Connection::accepted(socket, key, header));
                self.by_key.insert(key, slot);
                counters.opened();
                self.update(slot);
            }
            Err(why) => self.reject(header, key, false, why, counters),
        }
    }

    // To the guest.

    /// The next packet for the guest. Its payload has been put into `room`, which holds `bytes` > 0 bytes.
    pub(super) fn next_packet(&mut self, room: &[VolatileSlice<'_>], bytes: usize) -> Option<Header> {
        if let Some(Reset { src_cid, key, kind }) = self.resets.pop_front() {
            let (src_port, dst_port) = (key.host, key.guest);
            let op = Op::Rst as u16;
            return Some(Header {
                src_cid,
                dst_cid: self.cid,
                src_port,
                dst_port,
                kind,
                op,
                ..Header::default()
            });
        }
        while let Some(slot) = self.ready.pop_front() {
            let Some(connection) = self.get_mut(slot) else { continue };
            connection.queued = false;
            let (key, packet) = (connection.key, connection.produce(room, bytes));
            self.update(slot);
            if let Some(packet) = packet {
                return Some(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.cid,
                    src_port: key.host,
                    dst_port: key.guest,
                    len: packet.len,
                    kind: STREAM,
                    op: packet.op as u16,
                    flags: packet.flags,
                    buf_alloc: BUF_ALLOC,
                    fwd_cnt: packet.fwd_cnt,
                });
            }
        }
        None
    }
}
