//! What a NIC is plugged into: one machine's view of the switch.
//!
//! A port knows the switch and its own number; queue, counters and bell are in the switch, under its mutex. Enters and
//! leaves: see [`FramePort`]. When the port is dropped, its number and its stations are free, and another port leads.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use super::Shared;
use super::sys::Gather;
use super::table::Side;
use crate::port::{Counters, FramePort, Offloads, Received, RxRing, Sent, TxFrame};

/// A port of a [`Switch`](super::Switch). Dropping it unplugs it.
///
/// ```
/// use net::FramePort;
/// use net::switch::Switch;
///
/// let switch = Switch::new();
/// let (first, second) = (switch.plug(None)?, switch.plug(None)?);
/// assert_eq!((first.number(), second.number()), (0, 1));
/// assert_eq!(second.mtu(), 1500, "bytes of an IP packet; with an uplink, the uplink's");
/// drop(first);
/// assert_eq!(switch.plug(None)?.number(), 0, "the lowest that is free");
/// # Ok::<(), net::switch::PlugError>(())
/// ```
pub struct SwitchPort {
    pub(super) shared: Arc<Shared>,
    pub(super) id: usize,
    pub(super) gather: Arc<Gather>,
}

impl SwitchPort {
    /// The number under which [`Switch::stations`](super::Switch::stations) lists what is behind this port.
    pub fn number(&self) -> usize {
        self.id
    }
}

impl fmt::Debug for SwitchPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SwitchPort").field("number", &self.id).finish_non_exhaustive()
    }
}

impl AsFd for SwitchPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.gather).as_fd()
    }
}

impl FramePort for SwitchPort {
    fn offloads(&self) -> Offloads {
        self.shared.offloads
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        if !self.shared.offloads.contains(guest) {
            let text = format!("the switch offers {:?}, not {guest:?}", self.shared.offloads);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut state = self.shared.lock();
        if let Some(port) = state.port(self.id) {
            port.granted = guest;
            // What waits was prepared for the driver that is gone.
            port.queue.clear();
            port.bytes = 0;
        }
        Ok(())
    }

    fn mtu(&self) -> u16 {
        self.shared.mtu
    }

    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let mut state = self.shared.lock();
        let sent = state.send(self.id, frame, Instant::now());
        if let Some(port) = state.port(self.id) {
            match sent {
                Sent::Taken => {
                    port.counters.tx_frames += 1;
                    port.counters.tx_bytes += frame.len() as u64;
                }
                Sent::Dropped(reason) => {
                    port.counters.drop_frame(reason, || format!("from switch port {}", self.id));
                }
                Sent::Full => {}
            }
        }
        sent
    }

    fn recv(&mut self, ring: &mut dyn RxRing) -> Received {
        self.shared.lock().recv(self.id, ring)
    }

    fn link_up(&self) -> bool {
        self.shared.lock().uplink.as_ref().is_none_or(|uplink| uplink.link_up())
    }

    fn counters(&self) -> Counters {
        self.shared.lock().port(self.id).map(|port| port.counters.clone()).unwrap_or_default()
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.table.unplug(Side::Port(self.id));
        let led = state.leader == Some(self.id);
        if led {
            state.lead(None);
        }
        state.ports[self.id] = None;
        if led {
            state.elect();
            if state.leader.is_none() {
                // Everybody is stalled: whoever wakes first takes the lead.
                let first = state.ports.iter().position(Option::is_some);
                state.lead(first);
            }
        }
    }
}
