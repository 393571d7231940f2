//! The states of a flow: RFC 9293 §3.3.2 as seen from the gateway towards the guest, and one in front of it.
//!
//! ```text
//!   guest opens:  Dialing ──Dialed──> SynReceived ──Acked──┐
//!   world opens:  SynSent ──────────────Acked──────────────┴─> Established
//!
//!   guest closes first:  Established ─GuestFin─> CloseWait ─FinSent─> LastAck ─FinAcked─> Closed
//!   world closes first:  Established ─FinSent─> FinWait1 ─FinAcked─> FinWait2 ─GuestFin─> TimeWait
//!   both at once:        FinWait1 ─GuestFin─> Closing ─FinAcked─> TimeWait
//! ```
//!
//! `TimeWait` lasts until the ACK of the guest's FIN is in its ring, no longer. The 2·MSL of RFC 9293 §3.6.1 guard
//! against segments that wander about in a network; between a guest's ring and us none does. The guest, or the
//! host's socket, keeps its own TIME-WAIT.

/// Where a flow stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The guest sent a SYN; the host is connecting. The guest has heard nothing.
    Dialing,
    /// The world has accepted; our SYN-ACK waits for the guest's ACK.
    SynReceived,
    /// A client connected to a published port; our SYN waits for the guest's answer.
    SynSent,
    /// Both directions are open.
    Established,
    /// The guest's FIN was passed on; the world may still send.
    CloseWait,
    /// As `CloseWait`, and the world's end was sent to the guest as our FIN.
    LastAck,
    /// The world's end was sent as our FIN; the guest may still send.
    FinWait1,
    /// The guest acknowledged our FIN; it may still send.
    FinWait2,
    /// Both FINs crossed.
    Closing,
    /// All is said; the guest must still get our last ACK.
    TimeWait,
    /// Over; the flow is about to leave the table.
    Closed,
}

/// What moves a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The host's connect succeeded.
    Dialed,
    /// The guest acknowledged our SYN.
    Acked,
    /// The guest's FIN came in order, behind all its data.
    GuestFin,
    /// Our FIN was sent.
    FinSent,
    /// Our FIN was acknowledged.
    FinAcked,
}

impl State {
    /// The only transition function. An event that means nothing in a state leaves it: a FIN sent again, say.
    pub(super) fn on(self, event: Event) -> Self {
        match (self, event) {
            (Self::Dialing, Event::Dialed) => Self::SynReceived,
            (Self::SynReceived | Self::SynSent, Event::Acked) => Self::Established,
            (Self::Established, Event::GuestFin) => Self::CloseWait,
            (Self::Established, Event::FinSent) => Self::FinWait1,
            (Self::CloseWait, Event::FinSent) => Self::LastAck,
            (Self::FinWait1, Event::FinAcked) => Self::FinWait2,
            (Self::FinWait1, Event::GuestFin) => Self::Closing,
            (Self::FinWait2, Event::GuestFin) | (Self::Closing, Event::FinAcked) => Self::TimeWait,
            (Self::LastAck, Event::FinAcked) => Self::Closed,
            (state, _) => state,
        }
    }

    /// Both SYNs are acknowledged.
    pub(super) fn is_synchronized(self) -> bool {
        !matches!(self, Self::Dialing | Self::SynReceived | Self::SynSent | Self::Closed)
    }

    /// The guest has not sent its FIN.
    pub(super) fn guest_may_send(self) -> bool {
        matches!(self, Self::Established | Self::FinWait1 | Self::FinWait2)
    }

    /// Data or our FIN may have to be sent, for the first time or again.
    pub(super) fn world_may_send(self) -> bool {
        matches!(self, Self::Established | Self::CloseWait | Self::FinWait1 | Self::Closing | Self::LastAck)
    }

    /// For people: as in RFC 9293.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dialing => "DIALING",
            Self::SynReceived => "SYN-RECEIVED",
            Self::SynSent => "SYN-SENT",
            Self::Established => "ESTABLISHED",
            Self::CloseWait => "CLOSE-WAIT",
            Self::LastAck => "LAST-ACK",
            Self::FinWait1 => "FIN-WAIT-1",
            Self::FinWait2 => "FIN-WAIT-2",
            Self::Closing => "CLOSING",
            Self::TimeWait => "TIME-WAIT",
            Self::Closed => "CLOSED",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(from: State, events: &[Event]) -> State {
        events.iter().fold(from, |state, event| state.on(*event))
    }

    #[test]
    fn every_way_to_close_ends() {
        use Event::{FinAcked, FinSent, GuestFin};
        assert_eq!(run(State::Established, &[GuestFin, FinSent, FinAcked]), State::Closed);
        assert_eq!(run(State::Established, &[FinSent, FinAcked, GuestFin]), State::TimeWait);
        assert_eq!(run(State::Established, &[FinSent, GuestFin, FinAcked]), State::TimeWait);
    }

    #[test]
    fn nothing_is_open_before_both_syns_are_acknowledged() {
        assert_eq!(run(State::Dialing, &[Event::Acked, Event::GuestFin]), State::Dialing);
        assert_eq!(run(State::Dialing, &[Event::Dialed, Event::Acked]), State::Established);
        assert_eq!(run(State::SynSent, &[Event::Dialed, Event::Acked]), State::Established);
    }
}
