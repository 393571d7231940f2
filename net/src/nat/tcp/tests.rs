//! TCP as dialogues between a guest and a host that the test plays: no sockets, no clock.
//!
//! Sequence numbers are relative to the initial ones: `ACK 1+5 ack 6` is five bytes from the first on, everything
//! before the guest's sixth acknowledged. PSH is not shown.

mod any;
mod bench;
mod close;
mod open;
mod options;
mod published;
mod transfer;
