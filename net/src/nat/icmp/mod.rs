//! ICMP between guests and the host's sockets.

pub(crate) mod error;

use std::time::Instant;

use super::cx::Cx;
use super::ipv4::Ipv4In;
use super::poller::{Events, Token};
use crate::{DropReason, Received, RxRing};

/// All ICMP flows.
#[derive(Debug, Default)]
pub(crate) struct Icmp {}

impl Icmp {
    pub(crate) fn input(&mut self, cx: &mut Cx<'_>, packet: &Ipv4In<'_>) {
        cx.drop(DropReason::NoFlow, || format!("ICMP from {}", packet.src));
    }

    pub(crate) fn ready(&mut self, _cx: &mut Cx<'_>, _token: Token, _events: Events) {}

    pub(crate) fn emit(&mut self, _cx: &mut Cx<'_>, _ring: &mut dyn RxRing) -> Received {
        Received::Drained
    }

    pub(crate) fn expire(&mut self, _cx: &mut Cx<'_>) {}

    pub(crate) fn deadline(&self) -> Option<Instant> {
        None
    }
}
