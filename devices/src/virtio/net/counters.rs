//! What a NIC counts, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Totals of a NIC since the machine was made; each field is a count of its own and none waits for another.
#[derive(Debug, Default)]
pub(super) struct NetCounters {
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    kicks: AtomicU64,
    interrupts: AtomicU64,
    tx_dropped: AtomicU64,
    tx_bad_length: AtomicU64,
    tx_bad_header: AtomicU64,
    rx_too_small: AtomicU64,
    broken: AtomicU64,
}

/// The values of a NIC's counters at one moment.
///
/// ```
/// use devices::virtio::net::NetTotals;
///
/// // Two looks at a NIC's `NetMonitor::totals`.
/// let before = NetTotals { rx_frames: 1_000, interrupts: 100, ..NetTotals::default() };
/// let now = NetTotals { rx_frames: 4_200, interrupts: 150, ..before };
/// let (frames, interrupts) = (now.rx_frames - before.rx_frames, now.interrupts - before.interrupts);
/// assert_eq!(frames / interrupts, 64, "frames that an interrupt tells of");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetTotals {
    /// Frames that the port took from the guest.
    pub tx_frames: u64,
    /// Their bytes, without `virtio_net_hdr`.
    pub tx_bytes: u64,
    /// Frames passed to the guest.
    pub rx_frames: u64,
    /// Their bytes, without `virtio_net_hdr`.
    pub rx_bytes: u64,
    /// Wake-ups by the guest's driver, of any queue.
    pub kicks: u64,
    /// Interrupts for used buffers.
    pub interrupts: u64,
    /// Frames that the port dropped; it knows why.
    pub tx_dropped: u64,
    /// Frames from the guest that are too short or too long.
    pub tx_bad_length: u64,
    /// Frames from the guest whose `virtio_net_hdr` means nothing or uses what was not negotiated.
    pub tx_bad_header: u64,
    /// Frames for which the guest's receive buffers are too small.
    pub rx_too_small: u64,
    /// How often a broken queue or a failed port stopped the device until its next reset.
    pub broken: u64,
}

impl NetCounters {
    /// The totals now.
    pub(super) fn totals(&self) -> NetTotals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetTotals {
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            kicks: get(&self.kicks),
            interrupts: get(&self.interrupts),
            tx_dropped: get(&self.tx_dropped),
            tx_bad_length: get(&self.tx_bad_length),
            tx_bad_header: get(&self.tx_bad_header),
            rx_too_small: get(&self.rx_too_small),
            broken: get(&self.broken),
        }
    }

    pub(super) fn kicked(&self) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn interrupted(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a stop; true for the first.
    pub(super) fn stopped(&self) -> bool {
        self.broken.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// Adds what happened in a turn.
    pub(super) fn add(&self, turn: &Turn) {
        let add = |counter: &AtomicU64, n: u64| {
            if n > 0 {
                counter.fetch_add(n, Ordering::Relaxed);
            }
        };
        add(&self.tx_frames, turn.tx_frames);
        add(&self.tx_bytes, turn.tx_bytes);
        add(&self.rx_frames, turn.rx_frames);
        add(&self.rx_bytes, turn.rx_bytes);
        add(&self.tx_dropped, turn.tx_dropped);
        add(&self.tx_bad_length, turn.tx_bad_length);
        add(&self.tx_bad_header, turn.tx_bad_header);
        add(&self.rx_too_small, turn.rx_too_small);
    }
}

/// What happened in one turn, counted without atomics.
#[derive(Debug, Default)]
pub(super) struct Turn {
    tx_frames: u64,
    tx_bytes: u64,
    rx_frames: u64,
    rx_bytes: u64,
    pub(super) tx_dropped: u64,
    pub(super) tx_bad_length: u64,
    pub(super) tx_bad_header: u64,
    pub(super) rx_too_small: u64,
}

impl Turn {
    pub(super) fn sent(&mut self, bytes: usize) {
        self.tx_frames += 1;
        self.tx_bytes += bytes as u64;
    }

    pub(super) fn received(&mut self, bytes: usize) {
        self.rx_frames += 1;
        self.rx_bytes += bytes as u64;
    }
}
