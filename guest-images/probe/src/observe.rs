//! What smoltcp doesn't tell: TTLs of replies, ICMP errors and RSTs, taken from the received frames.
//!
//! Enters: each frame and its time. Leaves: the last [`KEEP`] of each kind of event, oldest first. A frame
//! that doesn't parse leaves no trace. Nothing here is trusted for anything but reports and failure reasons.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use smoltcp::wire::Ipv4Address;

/// How many events of a kind are kept.
pub const KEEP: usize = 64;

/// An echo reply, or the first fragment of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EchoReply {
    /// Who answered.
    pub from: Ipv4Address,
    /// Identifier.
    pub ident: u16,
    /// Sequence number.
    pub seq: u16,
    /// TTL as received.
    pub ttl: u8,
    /// When, in microseconds.
    pub at: u64,
}

/// An ICMP error about a packet of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpError {
    /// Who complains.
    pub from: Ipv4Address,
    /// ICMP type: 3 unreachable, 11 time exceeded, ...
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// Next-hop MTU of a "fragmentation needed" (3/4).
    pub mtu: u16,
    /// Destination of the packet that caused it.
    pub destination: Ipv4Address,
    /// Protocol of that packet.
    pub protocol: u8,
    /// Its first four transport bytes as two numbers: ports, or type/code and checksum.
    pub ports: (u16, u16),
    /// Bytes 4-7 of its transport header: for an echo request, identifier and sequence number.
    pub more: (u16, u16),
    /// When, in microseconds.
    pub at: u64,
}

/// A TCP segment with RST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reset {
    /// Who sent it.
    pub from: (Ipv4Address, u16),
    /// Our port.
    pub to: u16,
}

/// The recorded events.
#[derive(Debug, Default)]
pub struct Observer {
    /// Echo replies.
    pub replies: VecDeque<EchoReply>,
    /// ICMP errors.
    pub errors: VecDeque<IcmpError>,
    /// RSTs.
    pub resets: VecDeque<Reset>,
    /// ARP replies: address and hardware address.
    pub neighbours: VecDeque<(Ipv4Address, [u8; 6])>,
    /// Payloads of UDP datagrams to port 68 that fit one frame: what DHCP servers say.
    pub dhcp: VecDeque<Vec<u8>>,
}

fn keep<T>(events: &mut VecDeque<T>, event: T) {
    if events.len() == KEEP {
        events.pop_front();
    }
    events.push_back(event);
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Address> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Address::from(octets))
}

/// An IPv4 header's length and the payload behind it.
fn payload(ip: &[u8]) -> Option<&[u8]> {
    let header = usize::from(ip.first()? & 15) * 4;
    (ip[0] >> 4 == 4 && header >= 20).then_some(())?;
    ip.get(header..)
}

impl Observer {
    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Looks at a received frame.
    pub fn frame(&mut self, at: u64, frame: &[u8]) {
        let _ = self.parse(at, frame);
    }

    fn parse(&mut self, at: u64, frame: &[u8]) -> Option<()> {
        let ip = frame.get(14..)?;
        match word(frame, 12)? {
            0x0800 => self.ipv4(at, ip),
            0x0806 if word(ip, 6)? == 2 => {
                let hardware = ip.get(8..14)?.try_into().ok()?;
                keep(&mut self.neighbours, (address(ip, 14)?, hardware));
                Some(())
            }
            _ => None,
        }
    }

    fn ipv4(&mut self, at: u64, ip: &[u8]) -> Option<()> {
        let (body, from, ttl) = (payload(ip)?, address(ip, 12)?, *ip.get(8)?);
        if word(ip, 6)? & 0x1fff != 0 {
            return None;
        }
        match ip[9] {
            1 if *body.first()? == 0 => {
                keep(
                    &mut self.replies,
                    EchoReply { from, ident: word(body, 4)?, seq: word(body, 6)?, ttl, at },
                );
            }
            1 if matches!(body[0], 3 | 4 | 5 | 11 | 12) => {
                let inner = body.get(8..)?;
                let transport = payload(inner)?;
                let error = IcmpError {
                    from,
                    kind: body[0],
                    code: body[1],
                    mtu: word(body, 6)?,
                    destination: address(inner, 16)?,
                    protocol: inner[9],
                    ports: (word(transport, 0)?, word(transport, 2)?),
                    more: (word(transport, 4)?, word(transport, 6)?),
                    at,
                };
                keep(&mut self.errors, error);
            }
            6 if body.get(13)? & 4 != 0 => {
                keep(&mut self.resets, Reset { from: (from, word(body, 0)?), to: word(body, 2)? });
            }
            17 if word(body, 2)? == 68 => {
                let len = usize::from(word(body, 4)?);
                keep(&mut self.dhcp, body.get(8..len)?.to_vec());
            }
            _ => {}
        }
        Some(())
    }

    /// The first ICMP error about a packet of this protocol to this destination that `mine` accepts.
    pub fn error(
        &self,
        protocol: u8,
        destination: Ipv4Address,
        mine: impl Fn(&IcmpError) -> bool,
    ) -> Option<IcmpError> {
        let about = |e: &&IcmpError| e.protocol == protocol && e.destination == destination && mine(e);
        self.errors.iter().find(about).copied()
    }
}

#[cfg(test)]
mod tests;
