//! What the device counts and refuses, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::once::Tally;

/// Why a packet or a client was refused. Each is counted every time and logged once.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use std::sync::Arc;
/// # use devices::virtio::{Activation, F_VERSION_1, Interrupt, Memory, VirtioDevice};
/// # use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
/// # use virtio_queue::{Queue, QueueT};
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::io::{Read, Write};
/// use std::os::unix::net::UnixStream;
///
/// use devices::virtio::vsock::{GUEST_CID, Refusal, Vsock};
///
/// # let folder = tempfile::tempdir()?;
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// let path = folder.path().join("vsock.sock");
/// let (mut vsock, worker) = Vsock::new(GUEST_CID, &path)?;
/// let monitor = vsock.monitor();
/// # let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// # events.add_subscriber(Box::new(worker));
/// # let interrupt = Interrupt::new(Arc::new(Quiet));
/// # let empty = || {
/// #     let mut queue = Queue::new(16).expect("a power of two");
/// #     queue.set_avail_ring_address(Some(0x1000), None);
/// #     queue.set_ready(true);
/// #     queue
/// # };
/// # let queues = vec![empty(), empty(), empty()];
/// # vsock.activate(Activation { memory, queues, features: F_VERSION_1, interrupt })?;
/// let mut client = UnixStream::connect(&path)?;
/// client.write_all(b"GET / HTTP/1.0\n")?; // where CONNECT <port> is expected
/// while events.run_with_timeout(0)? > 0 {}
/// assert_eq!(monitor.totals().refused(Refusal::BadLine), 1);
/// assert_eq!(client.read(&mut [0])?, 0, "the connection is closed");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// A packet of the guest without a whole header.
    ShortPacket,
    /// A packet whose payload is longer than its chain.
    BadLength,
    /// A packet that does not come from the guest's CID.
    WrongSource,
    /// A packet for a CID other than the host's.
    WrongDestination,
    /// A packet that is not of a stream.
    BadType,
    /// An operation that does not exist.
    BadOperation,
    /// A packet of a connection that does not exist.
    NoConnection,
    /// A packet that its connection's state does not allow.
    OutOfState,
    /// Data beyond the credit.
    OverCredit,
    /// A connection, from either side, beyond [`super::MAX_CONNECTIONS`].
    TableFull,
    /// A connection of the guest that nobody on the host accepts: everyday life.
    NobodyListens,
    /// A port whose socket's path is too long.
    PathTooLong,
    /// The host had no descriptor or no memory for a connection.
    NoResources,
    /// A client whose first line is not `CONNECT <port>`.
    BadLine,
    /// A client that asked for a port on which the guest does not listen: everyday life.
    GuestRefused,
}

const REFUSALS: usize = Refusal::GuestRefused as usize + 1;

impl Refusal {
    /// All of them.
    pub const ALL: [Self; REFUSALS] = [
        Self::ShortPacket,
        Self::BadLength,
        Self::WrongSource,
        Self::WrongDestination,
        Self::BadType,
        Self::BadOperation,
        Self::NoConnection,
        Self::OutOfState,
        Self::OverCredit,
        Self::TableFull,
        Self::NobodyListens,
        Self::PathTooLong,
        Self::NoResources,
        Self::BadLine,
        Self::GuestRefused,
    ];

    /// For a log.
    fn text(self) -> &'static str {
        match self {
            Self::ShortPacket => "a packet without a whole header",
            Self::BadLength => "a packet whose payload is longer than its buffers",
            Self::WrongSource => "a packet that does not come from the guest's CID",
            Self::WrongDestination => "a packet for a CID other than 2",
            Self::BadType => "a packet that is not of a stream",
            Self::BadOperation => "an operation that does not exist",
            Self::NoConnection => "a packet of no connection",
            Self::OutOfState => "a packet that its connection's state does not allow",
            Self::OverCredit => "data beyond the credit",
            Self::TableFull => "a connection beyond the limit; close some",
            Self::NobodyListens => "a connection to a port that nobody on the host serves",
            Self::PathTooLong => {
                "a connection to a port whose socket's path is too long; choose a shorter folder"
            }
            Self::NoResources => "a connection for which the host has no descriptor (ulimit -n) or no memory",
            Self::BadLine => "a client whose first line is not 'CONNECT <port>'",
            Self::GuestRefused => "a client that asked for a port on which the guest does not listen",
        }
    }

    /// Refused in ordinary use, so not worth a warning.
    fn is_ordinary(self) -> bool {
        matches!(self, Self::NobodyListens | Self::GuestRefused | Self::NoConnection)
    }
}

/// Totals of a device since the machine was made; each field is a count of its own and none waits for another.
#[derive(Debug, Default)]
pub(super) struct VsockCounters {
    opened: AtomicU64,
    open: AtomicU64,
    to_guest: AtomicU64,
    from_guest: AtomicU64,
    refused: [Tally; REFUSALS],
    broken: Tally,
}

/// The values of a device's counters at one moment.
///
/// ```
/// # struct Quiet;
/// # impl devices::IrqLine for Quiet { fn raise(&self) {} }
/// # use std::sync::Arc;
/// # use devices::virtio::{Activation, F_VERSION_1, Interrupt, Memory, VirtioDevice};
/// # use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
/// # use virtio_queue::{Queue, QueueT};
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use std::os::unix::net::UnixStream;
///
/// use devices::virtio::vsock::{GUEST_CID, Vsock};
///
/// # let folder = tempfile::tempdir()?;
/// # let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
/// let path = folder.path().join("vsock.sock");
/// let (mut vsock, worker) = Vsock::new(GUEST_CID, &path)?;
/// let monitor = vsock.monitor();
/// # let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
/// # events.add_subscriber(Box::new(worker));
/// # let interrupt = Interrupt::new(Arc::new(Quiet));
/// # let empty = || {
/// #     let mut queue = Queue::new(16).expect("a power of two");
/// #     queue.set_avail_ring_address(Some(0x1000), None);
/// #     queue.set_ready(true);
/// #     queue
/// # };
/// # let queues = vec![empty(), empty(), empty()];
/// # vsock.activate(Activation { memory, queues, features: F_VERSION_1, interrupt })?;
/// let client = UnixStream::connect(&path)?;
/// while events.run_with_timeout(0)? > 0 {}
/// let totals = monitor.totals();
/// assert_eq!((totals.open, totals.opened), (1, 0), "it has not said yet what it wants");
/// # drop(client);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VsockTotals {
    /// Connections that both sides agreed to.
    pub opened: u64,
    /// Connections now, of any state, clients that have not said what they want included.
    pub open: u64,
    /// Bytes passed to the guest.
    pub to_guest: u64,
    /// Bytes taken from the guest.
    pub from_guest: u64,
    /// How often a broken queue stopped the device until its next reset.
    pub broken: u64,
    refused: [u64; REFUSALS],
}

impl VsockTotals {
    /// How many were refused for this reason.
    pub fn refused(&self, why: Refusal) -> u64 {
        self.refused[why as usize]
    }
}

impl VsockCounters {
    pub(super) fn totals(&self) -> VsockTotals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VsockTotals {
            opened: get(&self.opened),
            open: get(&self.open),
            to_guest: get(&self.to_guest),
            from_guest: get(&self.from_guest),
            broken: self.broken.get(),
            refused: std::array::from_fn(|at| self.refused[at].get()),
        }
    }

    pub(super) fn refuse(&self, why: Refusal) {
        let first = self.refused[why as usize].first();
        if why.is_ordinary() {
            tracing::debug!(what = why.text(), "vsock: refused");
        } else if first {
            tracing::warn!(what = why.text(), "vsock: refused; this is said once");
        }
    }

    pub(super) fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_open(&self, connections: usize) {
        self.open.store(connections as u64, Ordering::Relaxed);
    }

    pub(super) fn received(&self, bytes: u32) {
        self.from_guest.fetch_add(bytes.into(), Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: u32) {
        self.to_guest.fetch_add(bytes.into(), Ordering::Relaxed);
    }

    /// Counts a stop; true for the first.
    pub(super) fn stopped(&self) -> bool {
        self.broken.first()
    }
}
