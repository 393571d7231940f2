//! [`Cx`]: what every module of the NAT works with for the duration of one call.
//!
//! The modules own their flows and nothing else; whatever they share is lent to them here. The shape of a module:
//!
//! - `input(&mut self, cx, &Ipv4In)`: a packet from a guest; refusals are counted in `cx.counters`.
//! - `ready(&mut self, cx, token, events)`: a socket of the module is ready.
//! - `emit(&mut self, cx, ring) -> Received`: passes what is due to the guest, at most `cx.budget` frames.
//! - `expire(&mut self, cx)`: looks at every flow whose time has come; `deadline()` says when that is next.

use std::net::Ipv4Addr;
use std::time::Instant;

use super::config::NatConfig;
use super::host::{Host, SockId};
use super::icmp::error::Budget;
use super::neighbours::Neighbours;
use super::outbox::Outbox;
use crate::{Counters, DropReason, Offloads};

/// What a module may use during a call.
pub(crate) struct Cx<'a> {
    /// The time of this turn.
    pub(crate) now: Instant,
    pub(crate) config: &'a NatConfig,
    /// What the guest accepts in `recv`.
    pub(crate) guest: Offloads,
    pub(crate) neighbours: &'a mut Neighbours,
    /// Small frames for the guests.
    pub(crate) outbox: &'a mut Outbox,
    pub(crate) counters: &'a mut Counters,
    pub(crate) host: &'a mut dyn Host,
    /// Streams that a guest opened to a service of the gateway.
    pub(crate) streams: &'a mut Vec<ServiceStream>,
    /// Frames that may still be emitted in this turn.
    pub(crate) budget: &'a mut usize,
    /// The rate of the gateway's own ICMP errors.
    pub(crate) icmp_errors: &'a mut Budget,
}

/// A guest's TCP connection to a service of the gateway; the service reads requests from its end of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ServiceStream {
    /// Who asked.
    pub(crate) guest: Ipv4Addr,
    /// The port at the gateway: 53.
    pub(crate) port: u16,
    /// The service's end, to be watched and closed by it.
    pub(crate) sock: SockId,
}

impl Cx<'_> {
    /// Queues a frame for a guest; counts it when the queue is full.
    pub(crate) fn post(&mut self, frame: Vec<u8>) {
        if let Err(reason) = self.outbox.push(frame) {
            self.drop(reason, || "answers of the gateway wait for receive buffers".to_owned());
        }
    }

    /// Counts a refusal.
    pub(crate) fn drop(&mut self, reason: DropReason, detail: impl FnOnce() -> String) {
        self.counters.drop_frame(reason, detail);
    }

    /// Counts a frame that was passed to the guest.
    pub(crate) fn emitted(&mut self, len: usize) {
        self.counters.rx_frames += 1;
        self.counters.rx_bytes += len as u64;
        *self.budget = self.budget.saturating_sub(1);
    }
}
