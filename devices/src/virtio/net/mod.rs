//! The network interface (virtio 1.3 §5.1): one receive, one transmit and one control queue over a
//! [`net::FramePort`].
//!
//! ```text
//!   guest's driver                 this module                             the port
//!   receiveq  ── buffers ──>  rx: RxTurn (lends)  <── recv(&mut dyn RxRing) ──  TAP, NAT, switch
//!   transmitq ── chains  ──>  tx: transmit        ── send(&TxFrame) ──────────>
//!   controlq  ── commands ─>  ctrl: serve         ── set_offloads ────────────>
//! ```
//!
//! [`Net`] goes into a transport, [`NetWorker`] into the event manager; see [`crate::virtio`] for how the two share.
//! Frames stay where they are: the port gets pieces of guest memory, once per frame, without an allocation.
//!
//! **Back-pressure.** A port that is full keeps the frame in the transmit ring; a guest without buffers keeps the
//! frames in the port. Neither spins and nothing is dropped here for want of room.
//!
//! **Fairness.** A turn sends at most [`TX_BUDGET`] frames and receives as many as the port's own budget allows.
//!
//! **Refusals** are counted in [`NetTotals`]; the first that stops the device is logged.

use std::io;
use std::sync::{Arc, Mutex};

use net::{FramePort, MacAddr};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::{ActivateError, Activation, Doorbell, Ring, VirtioDevice};

mod config;
mod counters;
mod ctrl;
mod rx;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

pub use counters::NetTotals;
pub use ctrl::CTRL_BUDGET;
pub use rx::MAX_PIECES;
pub use tx::TX_BUDGET;
pub use worker::NetWorker;

use config::ConfigSpace;
use counters::NetCounters;
use worker::{Active, Path};

/// Descriptors of the receive and the transmit queue.
pub const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
pub const CTRL_QUEUE_SIZE: u16 = 64;

/// Queue indices (§5.1.2).
const RX: usize = 0;
const TX: usize = 1;
#[cfg(test)]
const CTRL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE, QUEUE_SIZE, CTRL_QUEUE_SIZE];

/// What the two halves share.
struct Shared {
    path: Mutex<Path>,
    config: ConfigSpace,
    doorbell: Doorbell,
    counters: NetCounters,
}

/// The transport's half of a NIC. See the module's documentation.
///
/// ```
/// use devices::virtio::VirtioDevice;
/// use devices::virtio::net::Net;
/// use net::MacAddr;
/// use net::switch::Switch;
///
/// let mac = MacAddr::for_name("network", "vm1");
/// let port = Switch::new().plug(Some(mac))?;
/// let (nic, worker) = Net::new(mac, Box::new(port))?;
/// let mut space = [0; 8];
/// nic.read_config(0, &mut space);
/// assert_eq!(space[..6], mac.0);
/// assert_eq!(space[6] & 1, 1, "the link is up");
/// # drop(worker);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Net {
    shared: Arc<Shared>,
    offered: u64,
}

/// A view of a NIC for whoever reports on it.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use std::sync::Arc;
/// # use devices::virtio::{Activation, F_VERSION_1, Interrupt, Memory, VirtioDevice};
/// # use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
/// # use net::MacAddr;
/// # use net::switch::Switch;
/// # use virtio_queue::{Queue, QueueT};
/// # use vm_memory::GuestMemoryMmap;
/// use devices::virtio::net::Net;
/// use vm_memory::{Bytes, GuestAddress};
///
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// # let ring = |at: u32| {
/// #     let mut queue = Queue::new(16).expect("a power of two");
/// #     queue.set_desc_table_address(Some(at), None);
/// #     queue.set_avail_ring_address(Some(at + 0x1000), None);
/// #     queue.set_used_ring_address(Some(at + 0x2000), None);
/// #     queue.set_ready(true);
/// #     queue
/// # };
/// # let mac = MacAddr::for_name("network", "vm1");
/// # let port = Switch::new().plug(Some(mac))?;
/// let (mut nic, worker) = Net::new(mac, Box::new(port))?;
/// let monitor = nic.monitor();
/// # let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// # events.add_subscriber(Box::new(worker));
/// # let interrupt = Interrupt::new(Arc::new(Quiet));
/// # let queues = vec![ring(0x4000), ring(0), Queue::new(16)?];
/// # nic.activate(Activation { memory: memory.clone(), queues, features: F_VERSION_1, interrupt })?;
/// // The guest sends 60 bytes to everybody, behind a virtio_net_hdr of 12 zeros.
/// memory.write_obj([0xff_u8; 6], GuestAddress(0x8000 + 12))?;
/// memory.write_obj(mac.0, GuestAddress(0x8000 + 18))?;
/// memory.write_obj([0x8000_u64, 12 + 60], GuestAddress(0))?;
/// memory.write_obj([0_u16, 1, 0], GuestAddress(0x1000))?;
/// events.run_with_timeout(0)?;
/// // Both sides of the seam agree.
/// assert_eq!((monitor.totals().tx_frames, monitor.port().tx_frames), (1, 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct NetMonitor(Arc<Shared>);

impl NetMonitor {
    /// What the NIC has counted.
    pub fn totals(&self) -> NetTotals {
        self.0.counters.totals()
    }

    /// What the port has counted. Waits for at most one turn of the worker.
    pub fn port(&self) -> net::Counters {
        self.0.lock().port.counters()
    }
}

impl Net {
    /// A NIC with the address `mac`, plugged into `port`: the half for the transport, and the half for the event
    /// manager of the I/O thread.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new(mac: MacAddr, port: Box<dyn FramePort>) -> io::Result<(Self, NetWorker)> {
        let offered = config::offered(port.offloads());
        let shared = Arc::new(Shared {
            config: ConfigSpace::new(mac, port.mtu(), port.link_up()),
            path: Mutex::new(Path { port, active: None }),
            doorbell: Doorbell::new()?,
            counters: NetCounters::default(),
        });
        let worker = NetWorker::new(Arc::clone(&shared));
        Ok((Self { shared, offered }, worker))
    }

    /// A view of the counters that outlives the NIC's move into its transport.
    pub fn monitor(&self) -> NetMonitor {
        NetMonitor(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn accepts(&self, accepted: u64) -> bool {
        config::consistent(accepted)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn doorbell(&self) -> &Doorbell {
        &self.shared.doorbell
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config.read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let mut rings = queues.into_iter().map(Ring::new);
        let mut next = || rings.next().flatten();
        let (rx, tx, ctrl) = (next(), next(), next());
        let active = Active {
            memory,
            interrupt,
            features,
            rx: rx.ok_or(ActivateError::QueueMissing(RX))?,
            tx: tx.ok_or(ActivateError::QueueMissing(TX))?,
            ctrl,
            started: false,
            starved: false,
            port_full: false,
            unfinished: false,
        };
        self.shared.lock().active = Some(active);
        // The port may be told its offloads on the worker's thread only.
        self.shared.doorbell.ring();
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.lock().active = None;
        // Lets the worker stop polling the port.
        self.shared.doorbell.ring();
    }
}
