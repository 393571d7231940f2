//! The socket device (virtio 1.3 §5.10): streams between the guest's vsock ports and Unix sockets of the host.
//!
//! ```text
//!   guest (CID 3)                     this module                              host
//!   txq ── packets ──> queues: transmit ─> table ─> connection ── sendmsg ──> a client of PATH, or the
//!   rxq <─ packets ─── queues: receive  <─ table <─ connection <─ recvmsg ─── server at PATH_<port>
//!   eventq              (never used: a guest is not moved to another host)
//! ```
//!
//! **Who connects to whom** is Firecracker's convention. A program on the host connects to the Unix socket `PATH`, writes
//! `CONNECT <port>\n` and reads `OK <host port>\n` when the guest has accepted; then it is a stream. When nobody in the
//! guest listens, or the line is not such a line, the connection is closed. A program in the guest that connects to CID 2,
//! port *P*, reaches the Unix socket `PATH_<P>`, or is refused.
//!
//! [`Vsock`] goes into a transport, [`VsockWorker`] into the event manager; see [`crate::virtio`] for how the two share.
//! The worker alone has the connections; a reset takes the queues away, and the worker forgets the connections in its next
//! turn.
//!
//! **Bytes are not copied** on the way to the guest, and on the way to the host only when the host's socket is full.
//!
//! **Limits.** [`MAX_CONNECTIONS`] at a time, [`KEPT_FOR_HOST`] of them out of the guest's reach; [`BUF_ALLOC`] bytes kept for the host per connection, which is what the guest
//! has credit for; nothing is kept for the guest: what it does not take stays in the host's socket. [`MAX_LINE`] bytes of a
//! client's first line. A turn takes [`TX_BUDGET`] and gives [`RX_BUDGET`] packets.
//!
//! **Refused** by RST, counted by [`Refusal`] and logged once: packets for other CIDs than the host's, of other types
//! than streams, for connections that don't exist, that their connection's state does not allow, or beyond the credit.
//! A broken chain, or a receive buffer without room for a byte of payload, breaks the queue.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{ActivateError, Activation, Doorbell, Ring, VirtioDevice, read_config_space};

mod connection;
mod counters;
mod credit;
mod error;
mod host;
mod packet;
mod queues;
mod sys;
mod table;
#[cfg(test)]
mod tests;
mod worker;

pub use counters::{Refusal, VsockTotals};
pub use credit::BUF_ALLOC;
pub use error::{MAX_PATH, VsockError};
pub use host::MAX_LINE;
pub use queues::{RX_BUDGET, TX_BUDGET};
pub use table::{FIRST_HOST_PORT, HOST_CID, KEPT_FOR_HOST, MAX_CONNECTIONS, RESETS};
pub use worker::VsockWorker;

use counters::VsockCounters;
use host::Listener;
use worker::Active;

/// The CID of a guest that need not have another: each machine has its own device, so they don't clash.
pub const GUEST_CID: u64 = 3;
/// Descriptors of the receive and the transmit queue.
pub const QUEUE_SIZE: u16 = 256;
/// Descriptors of the event queue.
pub const EVENT_QUEUE_SIZE: u16 = 16;
/// `VIRTIO_VSOCK_F_STREAM`.
pub const F_STREAM: u64 = 1;

/// Queue indices (§5.10.2).
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE];

/// What the two halves share.
struct Shared {
    active: Mutex<Option<Active>>,
    doorbell: Doorbell,
    counters: VsockCounters,
    cid: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The transport's half of the device. See the module's documentation.
///
/// ```
/// use std::os::unix::fs::PermissionsExt;
///
/// use devices::virtio::VirtioDevice;
/// use devices::virtio::vsock::{GUEST_CID, Vsock};
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("vsock.sock");
/// let (vsock, worker) = Vsock::new(GUEST_CID, &path)?;
/// let mut cid = [0; 8];
/// vsock.read_config(0, &mut cid);
/// assert_eq!(u64::from_le_bytes(cid), 3);
/// assert_eq!(path.metadata()?.permissions().mode() & 0o777, 0o600);
/// # drop(worker);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Vsock(Arc<Shared>);

/// A view of a device for whoever reports on it.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use devices::virtio::Memory;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::sync::Arc;
///
/// use devices::virtio::mmio::MmioTransport;
/// use devices::virtio::vsock::{GUEST_CID, Refusal, Vsock};
///
/// # let folder = tempfile::tempdir()?;
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// let path = folder.path().join("vsock.sock");
/// let (vsock, worker) = Vsock::new(GUEST_CID, &path)?;
/// let monitor = vsock.monitor();
/// let registers = MmioTransport::new(Box::new(vsock), memory, Arc::new(Quiet));
/// // The device is the transport's now; what it counts is still in view.
/// let totals = monitor.totals();
/// assert!(Refusal::ALL.into_iter().all(|why| totals.refused(why) == 0), "nobody was refused yet");
/// # drop((registers, worker));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct VsockMonitor(Arc<Shared>);

impl VsockMonitor {
    /// What the device has counted.
    pub fn totals(&self) -> VsockTotals {
        self.0.counters.totals()
    }
}

impl Vsock {
    /// A device for the guest with address `cid` ([`GUEST_CID`] if in doubt), listening on the Unix socket `path`: the
    /// half for the transport, and the half for the event manager of the I/O thread. The socket's file has mode 0600,
    /// takes the place of a dead machine's, and goes with the worker.
    ///
    /// # Errors
    /// [`VsockError`]: a CID that can't be, or a path at which no socket can be made.
    pub fn new(cid: u64, path: &Path) -> Result<(Self, VsockWorker), VsockError> {
        if cid <= HOST_CID || cid >= u64::from(u32::MAX) {
            return Err(VsockError::Cid(cid));
        }
        let listener = Listener::bind(path)?;
        let shared = Arc::new(Shared {
            active: Mutex::new(None),
            doorbell: Doorbell::new()?,
            counters: VsockCounters::default(),
            cid,
        });
        let worker = VsockWorker::new(Arc::clone(&shared), listener);
        Ok((Self(shared), worker))
    }

    /// A view of the counters that outlives the device's move into its transport.
    pub fn monitor(&self) -> VsockMonitor {
        VsockMonitor(Arc::clone(&self.0))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn doorbell(&self) -> &Doorbell {
        &self.0.doorbell
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.0.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut rings = queues.into_iter().map(Ring::new);
        let mut next = || rings.next().flatten();
        let (rx, tx) = (next(), next());
        *self.0.lock() = Some(Active {
            memory,
            interrupt,
            rx: rx.ok_or(ActivateError::QueueMissing(RX))?,
            tx: tx.ok_or(ActivateError::QueueMissing(TX))?,
            fresh: true,
            starved: false,
            tx_left: false,
        });
        self.0.doorbell.ring();
        Ok(())
    }

    fn reset(&mut self) {
        *self.0.lock() = None;
        // Lets the worker forget the connections.
        self.0.doorbell.ring();
    }
}
