//! [`Switch`]: an Ethernet switch inside the process, whose ports are what NICs plug into.
//!
//! ```text
//!   NIC of vm1 ── SwitchPort ─┐            learns stations, floods what it does not know
//!   NIC of vm2 ── SwitchPort ─┼─ Switch ── uplink: any FramePort, such as the NAT
//!   NIC of vm3 ── SwitchPort ─┘
//! ```
//!
//! With the NAT as the uplink, the machines of one program see each other and share one way out (`vmm::network::Network`).
//!
//! **Frames between ports** are copied once into the receiver's queue and once into its guest's buffers. A queue holds
//! [`QUEUE_FRAMES`] frames and [`QUEUE_BYTES`] bytes; what does not fit is a drop with a counter, as on any switch:
//! a machine that does not read must not stop the others.
//!
//! **Frames to the uplink** are lent on, not copied. **Frames from the uplink** go straight into the guest's buffers
//! while there is one port; with more they are copied through a buffer of ours, since a guest may read its posted
//! buffers at any time and must not see what is for another (`switch/fan.rs`).
//!
//! **Offloads.** Every port offers what the uplink does (everything, without one), and the uplink is told
//! to send anything it can. A guest that agreed to less gets frames cut and completed ([`crate::segment`]).
//!
//! **Who drains the uplink.** Each port drains it after its own sends, as the contract of [`FramePort`] asks, so an answer
//! made on the spot needs no other thread. For what comes by itself, one port is the *leader*: the uplink's fd is part of
//! the leader's. A leader whose guest has no buffers hands over, since its caller stops polling then; so one
//! machine that is stuck does not cut off the rest.
//!
//! **Threads.** Ports may live on different threads, one per machine. One mutex guards the switch; it is held for a table
//! lookup and a copy (64 KiB at most, some 10 microseconds), for one `send` of the uplink, or for one `recv` of it, which
//! that port bounds by its own budget. Machines that saturate a shared network therefore contend, as they would
//! for the one NAT behind it; a machine with a network of its own needs no switch.
//!
//! **Refused.** A frame whose source address that is a group's, or that was pinned to another port ([`Switch::plug`] with the guest's
//! address, the gateway's with [`Switch::with_uplink`]); a super-segment that is malformed; more than [`MAX_PORTS`] ports.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vm_memory::VolatileSlice;

mod fan;
mod port;
mod sys;
mod table;

use fan::{Direct, Fan};
pub use port::SwitchPort;
use sys::{Bell, Gather};
pub use table::{AGEING, MAX_LEARNED};
use table::{Side, Table, To};

use crate::mac::MacAddr;
use crate::port::{
    Counters, DropReason, ETHERNET_LEN, FramePort, MAX_FRAME, Offloads, Received, RxRing, Sent, TxFrame,
};
use crate::segment::Parked;
use crate::vnet::{GsoType, VnetFlags, VnetHdr};

/// Most ports of a switch.
pub const MAX_PORTS: usize = 256;
/// Most frames that wait for one port.
pub const QUEUE_FRAMES: usize = 512;
/// Most bytes that wait for one port: sixteen super-segments.
pub const QUEUE_BYTES: usize = 1 << 20;
/// Most frames from the queue per `recv`.
const FRAMES_PER_TURN: usize = 256;
/// The MTU of a switch without an uplink.
const DEFAULT_MTU: u16 = 1500;

/// Why a port can't be had.
///
/// ```
/// use net::MacAddr;
/// use net::switch::{PlugError, Switch};
///
/// let switch = Switch::new();
/// let mac = MacAddr::for_name("network", "vm1");
/// let _vm1 = switch.plug(Some(mac))?;
/// let error = switch.plug(Some(mac)).unwrap_err();
/// assert!(matches!(error, PlugError::InUse(address) if address == mac));
/// assert!(error.to_string().contains("--mac"), "the text says what to do");
/// // A group's address is nobody's own.
/// assert!(matches!(switch.plug(Some(MacAddr::BROADCAST)), Err(PlugError::InUse(_))));
/// # Ok::<(), PlugError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The address is another port's.
    #[error("the address {0} is in use on this network; give this machine another name or --mac")]
    InUse(MacAddr),
    /// There are [`MAX_PORTS`] ports.
    #[error("this network has {MAX_PORTS} machines, which is its limit; make another network for more")]
    Full,
    /// No descriptors for it.
    #[error("could not make a port of the virtual switch: {0}; raise the limit of open files (ulimit -n)")]
    Io(#[from] io::Error),
}

/// A station on the switch, for listings.
///
/// ```
/// use net::switch::{Station, Switch};
/// use net::{FramePort, MacAddr, TxFrame, VnetHdr};
///
/// let switch = Switch::new();
/// let mut port = switch.plug(Some(MacAddr([2; 6])))?;
/// // A machine behind the guest speaks: it is learned, the guest itself was announced.
/// let mut bytes = [[0xff; 6], [6; 6], [0; 6]].concat();
/// let _ = port.send(&TxFrame { hdr: VnetHdr::default(), parts: &[bytes.as_mut_slice().into()] });
/// let station = |octet, pinned| Station { mac: MacAddr([octet; 6]), port: Some(port.number()), pinned };
/// assert_eq!(switch.stations(), [station(2, true), station(6, false)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Station {
    /// Its address.
    pub mac: MacAddr,
    /// The number of its port; `None` is the uplink.
    pub port: Option<usize>,
    /// It was announced, not learned.
    pub pinned: bool,
}

/// A switch; clones are handles to the same one. It lives as long as a handle or a port does.
///
/// ```
/// use net::MacAddr;
/// use net::switch::{PlugError, Switch};
///
/// let switch = Switch::new();
/// let mac = MacAddr::for_name("network", "vm1");
/// let port = switch.plug(Some(mac))?;
/// assert!(matches!(switch.plug(Some(mac)), Err(PlugError::InUse(_))));
/// drop(port); // the machine has ended
/// switch.plug(Some(mac))?;
/// # Ok::<(), PlugError>(())
/// ```
#[derive(Clone)]
pub struct Switch(Arc<Shared>);

struct Shared {
    offloads: Offloads,
    mtu: u16,
    state: Mutex<State>,
}

/// What the mutex guards.
struct State {
    table: Table,
    ports: Vec<Option<Port>>,
    /// Out of its place only while it is being drained.
    uplink: Option<Box<dyn FramePort>>,
    /// The port whose fd contains the uplink's.
    leader: Option<usize>,
    /// The port that is draining the uplink: it looks into its queue afterwards and needs no bell for that.
    draining: Option<usize>,
    /// What came from the uplink and was for nobody.
    from_uplink: Counters,
    /// Takes what the uplink sends when there are several ports; [`MAX_FRAME`] bytes once it is needed.
    buffer: Vec<u8>,
}

/// The inner half of a [`SwitchPort`].
struct Port {
    granted: Offloads,
    queue: VecDeque<Parked>,
    bytes: usize,
    /// Rings while the queue has something, or the uplink should be looked at.
    bell: Bell,
    rung: bool,
    gather: Arc<Gather>,
    /// The caller has stopped polling until its guest posts buffers.
    stalled: bool,
    counters: Counters,
}

impl Default for Switch {
    fn default() -> Self {
        Self::build(None, Table::default(), Offloads::all(), DEFAULT_MTU)
    }
}

impl Switch {
    /// A switch without a way out.
    pub fn new() -> Self {
        Self::default()
    }

    /// A switch whose frames to everywhere else go through `uplink`. If the address of what is there is given
    /// (the NAT's gateway), no port may claim it.
    ///
    /// # Errors
    /// When the uplink refuses to send what it says it can.
    pub fn with_uplink(mut uplink: Box<dyn FramePort>, gateway: Option<MacAddr>) -> io::Result<Self> {
        let (offloads, mtu) = (uplink.offloads(), uplink.mtu());
        uplink.set_offloads(offloads)?;
        let mut table = Table::default();
        if let Some(mac) = gateway {
            table.pin(mac, Side::Uplink);
        }
        Ok(Self::build(Some(uplink), table, offloads, mtu))
    }

    fn build(uplink: Option<Box<dyn FramePort>>, table: Table, offloads: Offloads, mtu: u16) -> Self {
        let (from_uplink, buffer) = (Counters::default(), Vec::new());
        let state =
            State { table, ports: Vec::new(), uplink, leader: None, draining: None, from_uplink, buffer };
        Self(Arc::new(Shared { offloads, mtu, state: Mutex::new(state) }))
    }

    /// Makes a port. If the guest's address is given, no other port may use it.
    ///
    /// # Errors
    /// See [`PlugError`].
    pub fn plug(&self, mac: Option<MacAddr>) -> Result<SwitchPort, PlugError> {
        let gather = Arc::new(Gather::new()?);
        let bell = Bell::new()?;
        gather.add(bell.as_fd())?;
        let mut state = self.0.lock();
        let id = state.ports.iter().position(Option::is_none).unwrap_or(state.ports.len());
        if id == MAX_PORTS {
            return Err(PlugError::Full);
        }
        if let Some(mac) = mac
            && (mac.is_group() || !state.table.pin(mac, Side::Port(id)))
        {
            return Err(PlugError::InUse(mac));
        }
        let port = Port {
            granted: Offloads::empty(),
            queue: VecDeque::new(),
            bytes: 0,
            bell,
            rung: false,
            gather: Arc::clone(&gather),
            stalled: false,
            counters: Counters::default(),
        };
        if id == state.ports.len() {
            state.ports.push(Some(port));
        } else {
            state.ports[id] = Some(port);
        }
        if state.leader.is_none() {
            state.lead(Some(id));
        }
        drop(state);
        Ok(SwitchPort { shared: Arc::clone(&self.0), id, gather })
    }

    /// The stations that the switch knows, by address.
    pub fn stations(&self) -> Vec<Station> {
        let state = self.0.lock();
        let port = |side| if let Side::Port(id) = side { Some(id) } else { None };
        let all = state.table.stations(Instant::now());
        let mut all: Vec<_> =
            all.map(|(mac, side, pinned)| Station { mac, port: port(side), pinned }).collect();
        all.sort_by_key(|station| station.mac);
        all
    }

    /// The counters of the uplink, if there is one.
    pub fn uplink_counters(&self) -> Option<Counters> {
        self.0.lock().uplink.as_ref().map(|uplink| uplink.counters())
    }

    /// What came from the uplink and was refused before it reached a port.
    pub fn refused_from_uplink(&self) -> Counters {
        self.0.lock().from_uplink.clone()
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.lock();
        let ports = state.ports.iter().flatten().count();
        f.debug_struct("Switch").field("ports", &ports).field("uplink", &state.uplink.is_some()).finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked in here belongs to another machine, and has left nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn port(&mut self, id: usize) -> Option<&mut Port> {
        self.ports.get_mut(id)?.as_mut()
    }

    /// Makes `id` the port whose fd contains the uplink's.
    fn lead(&mut self, id: Option<usize>) {
        let Some(uplink) = &self.uplink else { return };
        if self.leader == id {
            return;
        }
        if let Some(Some(old)) = self.leader.and_then(|old| self.ports.get(old)) {
            // It fails only if the uplink has closed its descriptor, and then there is nothing to remove.
            let _ = old.gather.remove(uplink.as_fd());
        }
        self.leader = None;
        let Some(Some(new)) = id.and_then(|id| self.ports.get_mut(id)) else { return };
        if let Err(error) = new.gather.add(uplink.as_fd()) {
            tracing::error!(%error, "the virtual switch can't watch its uplink");
        }
        self.leader = id;
        // What the uplink holds back since somebody's ring was full, its fd does not announce.
        new.ring();
    }

    /// The caller of `id` will not poll until its guest posts buffers.
    fn stall(&mut self, id: usize) {
        if let Some(port) = self.port(id) {
            port.stalled = true;
        }
        match self.leader {
            Some(leader) if leader != id => {
                if let Some(leader) = self.port(leader) {
                    leader.ring();
                }
            }
            _ => self.elect(),
        }
    }

    /// Gives the lead to a port that is polled, if there is one.
    fn elect(&mut self) {
        let awake = self.ports.iter().position(|port| port.as_ref().is_some_and(|port| !port.stalled));
        if awake.is_some() {
            self.lead(awake);
        }
    }

    /// Puts a frame into the queue of port `id`, cut and completed as its guest needs it.
    fn enqueue(&mut self, id: usize, hdr: VnetHdr, frame: Vec<u8>) -> Result<(), DropReason> {
        let announced = self.draining == Some(id);
        let Some(port) = self.port(id) else { return Err(DropReason::NotForUs) };
        if port.queue.len() >= QUEUE_FRAMES || port.bytes + frame.len() > QUEUE_BYTES {
            return Err(DropReason::QueueFull);
        }
        let parked = Parked::new(hdr, frame, port.granted).map_err(|_| DropReason::BadVnetHdr)?;
        port.bytes += parked.len();
        port.queue.push_back(parked);
        if !announced {
            port.ring();
        }
        Ok(())
    }

    /// Queues a frame for every port but `but`. What does not fit is counted there: the sender has no part in it.
    fn flood(&mut self, but: Option<usize>, hdr: VnetHdr, frame: &[u8]) {
        for id in (0..self.ports.len()).filter(|id| Some(*id) != but) {
            if self.ports[id].is_some()
                && let Err(reason) = self.enqueue(id, hdr, frame.to_vec())
            {
                self.count(id, reason);
            }
        }
    }

    fn count(&mut self, id: usize, reason: DropReason) {
        if let Some(port) = self.port(id) {
            port.counters.drop_frame(reason, || format!("switch port {id}"));
        }
    }

    /// Lends a frame on to the uplink.
    fn send_up(&mut self, frame: &TxFrame<'_>) -> Sent {
        match self.uplink.as_mut().map(|uplink| uplink.send(frame)) {
            None => Sent::Dropped(DropReason::NotForUs),
            // Our fd can't say when the uplink has room again.
            Some(Sent::Full) => Sent::Dropped(DropReason::QueueFull),
            Some(sent) => sent,
        }
    }

    fn send(&mut self, id: usize, frame: &TxFrame<'_>, now: Instant) -> Sent {
        let mut header = [0; ETHERNET_LEN];
        if frame.copy_out(0, &mut header) < ETHERNET_LEN {
            return Sent::Dropped(DropReason::Malformed);
        }
        if frame.hdr.gso_type == GsoType::Udp {
            return Sent::Dropped(DropReason::BadVnetHdr);
        }
        let (dst, src) = addresses(&header);
        if !self.table.learn(src, Side::Port(id), now) {
            return Sent::Dropped(DropReason::BadSource);
        }
        // One guest's word that a checksum is valid is not passed on to another.
        let hdr = VnetHdr { flags: frame.hdr.flags & VnetFlags::NEEDS_CSUM, num_buffers: 0, ..frame.hdr };
        match self.table.lookup(dst, Side::Port(id), now) {
            To::Nobody => Sent::Dropped(DropReason::NotForUs),
            To::One(Side::Uplink) => self.send_up(&TxFrame { hdr, ..*frame }),
            To::One(Side::Port(to)) => match self.enqueue(to, hdr, gather(frame.parts, frame.len())) {
                Ok(()) => Sent::Taken,
                Err(reason) => Sent::Dropped(reason),
            },
            To::All => {
                if self.ports.iter().flatten().count() > 1 {
                    self.flood(Some(id), hdr, &gather(frame.parts, frame.len()));
                }
                match self.send_up(&TxFrame { hdr, ..*frame }) {
                    // The other ports have it.
                    Sent::Dropped(DropReason::NotForUs) | Sent::Full => Sent::Taken,
                    sent => sent,
                }
            }
        }
    }

    /// Passes the queue of port `id` to its ring; `None` when the queue is empty then.
    fn deliver(&mut self, id: usize, ring: &mut dyn RxRing) -> Option<Received> {
        let port = self.port(id)?;
        for _ in 0..FRAMES_PER_TURN {
            let parked = port.queue.front_mut()?;
            if !parked.deliver(ring, &mut port.counters) {
                return Some(Received::RingFull);
            }
            port.bytes = port.bytes.saturating_sub(parked.len());
            port.queue.pop_front();
        }
        port.ring();
        Some(Received::Again)
    }

    fn recv(&mut self, id: usize, ring: &mut dyn RxRing) -> Received {
        if let Some(port) = self.port(id) {
            port.stalled = false;
            port.silence();
        }
        let leader_stalled =
            self.leader.and_then(|leader| self.port(leader)).is_none_or(|leader| leader.stalled);
        if leader_stalled {
            self.lead(Some(id));
            if let Some(port) = self.port(id) {
                port.silence();
            }
        }
        let received = match self.deliver(id, ring) {
            Some(stopped) => stopped,
            None => self.drain_uplink(id, ring),
        };
        match received {
            Received::RingFull => self.stall(id),
            // The uplink's fd is readable, but it may not be part of ours.
            Received::Again => {
                if let Some(port) = self.port(id) {
                    port.ring();
                }
            }
            Received::Drained => {}
        }
        received
    }
}

impl State {
    /// Passes on what the uplink has, to port `id` and to others.
    fn drain_uplink(&mut self, id: usize, ring: &mut dyn RxRing) -> Received {
        let Some(mut uplink) = self.uplink.take() else { return Received::Drained };
        let granted = self.port(id).map_or(Offloads::empty(), |port| port.granted);
        let alone = self.ports.iter().flatten().count() == 1;
        if alone && granted.contains(uplink.offloads()) {
            let counters = self.port(id).map(|port| std::mem::take(&mut port.counters)).unwrap_or_default();
            let mut direct = Direct { ring, counters };
            let received = uplink.recv(&mut direct);
            let counters = direct.counters;
            self.uplink = Some(uplink);
            if let Some(port) = self.port(id) {
                port.counters = counters;
            }
            return received;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(MAX_FRAME, 0);
        let room = [VolatileSlice::from(buffer.as_mut_slice())];
        self.draining = Some(id);
        let mut fan = Fan { state: self, room: &room, now: Instant::now(), waits_for: None };
        let from_uplink = uplink.recv(&mut fan);
        let waits_for = fan.waits_for;
        self.buffer = buffer;
        self.draining = None;
        self.uplink = Some(uplink);
        // What was for this port is in its queue.
        if let Some(stopped) = self.deliver(id, ring) {
            return stopped;
        }
        match (from_uplink, waits_for) {
            // The fan's room is our own: the uplink was made to wait, for this port's queue, which is empty now, or
            // for another's, whose turn it is to drain the uplink.
            (Received::RingFull, Some(other)) if other != id => {
                self.lead(Some(other));
                if let Some(other) = self.port(other) {
                    other.ring();
                }
                Received::Drained
            }
            (Received::RingFull, _) => Received::Again,
            (received, _) => received,
        }
    }
}

impl Port {
    fn ring(&mut self) {
        if !self.rung {
            self.rung = true;
            self.bell.ring();
        }
    }

    fn silence(&mut self) {
        if self.rung {
            self.rung = false;
            self.bell.silence();
        }
    }
}

/// Destination and source of an Ethernet frame.
fn addresses(header: &[u8; ETHERNET_LEN]) -> (MacAddr, MacAddr) {
    let mac = |at: usize| MacAddr(std::array::from_fn(|i| header[at + i]));
    (mac(0), mac(6))
}

/// Copies the first `len` bytes of lent memory.
fn gather(parts: &[VolatileSlice<'_>], len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let n = TxFrame { hdr: VnetHdr::default(), parts }.copy_out(0, &mut bytes);
    bytes.truncate(n);
    bytes
}

#[cfg(test)]
mod tests;
