//! What the inner epoll reports: which socket of which module, and what it is ready for.
//!
//! Sockets are registered edge-triggered, once, for everything: no `epoll_ctl` per change of interest. Whoever
//! owns a socket remembers in its own state that it is ready until it met `EAGAIN`.

/// The module that a socket belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Owner {
    /// The one timerfd.
    Timer,
    /// A TCP flow.
    Tcp,
    /// A published TCP port.
    TcpListener,
    /// A UDP flow.
    Udp,
    /// A published UDP port.
    UdpListener,
    /// A ping socket.
    Icmp,
    /// A socket of the DNS forwarder, or a guest's TCP stream to it.
    Dns,
    /// The bell of the handles.
    Bell,
}

/// Names a socket in an event: slots are used again, so an event of a closed socket is told by its generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    /// Who is told.
    pub(crate) owner: Owner,
    /// The owner's own number for it.
    pub(crate) slot: u32,
    /// The owner's count of how often the slot was used, modulo 2^24.
    pub(crate) generation: u32,
}

impl Token {
    pub(crate) fn to_bits(self) -> u64 {
        let owner = self.owner as u64;
        owner << 56 | u64::from(self.generation & 0xff_ffff) << 32 | u64::from(self.slot)
    }

    pub(crate) fn from_bits(bits: u64) -> Option<Self> {
        let owner = match bits >> 56 {
            0 => Owner::Timer,
            1 => Owner::Tcp,
            2 => Owner::TcpListener,
            3 => Owner::Udp,
            4 => Owner::UdpListener,
            5 => Owner::Icmp,
            6 => Owner::Dns,
            7 => Owner::Bell,
            _ => return None,
        };
        let generation = (bits >> 32) as u32 & 0xff_ffff;
        Some(Self { owner, slot: bits as u32, generation })
    }
}

bitflags::bitflags! {
    /// What a socket is ready for.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Events: u8 {
        /// Something to read, or a connection to accept.
        const READ = 1;
        /// Room to write; a connect has ended.
        const WRITE = 2;
        /// The other side will send no more (`EPOLLRDHUP`).
        const READ_CLOSED = 4;
        /// Both directions are closed (`EPOLLHUP`).
        const CLOSED = 8;
        /// An error is pending (`SO_ERROR`, `MSG_ERRQUEUE`).
        const ERROR = 16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_kernel() {
        for owner in [
            Owner::Timer,
            Owner::Tcp,
            Owner::TcpListener,
            Owner::Udp,
            Owner::UdpListener,
            Owner::Icmp,
            Owner::Dns,
            Owner::Bell,
        ] {
            let token = Token { owner, slot: u32::MAX, generation: 0xab_cdef };
            assert_eq!(Token::from_bits(token.to_bits()), Some(token));
        }
        assert_eq!(Token::from_bits(u64::MAX), None);
    }
}
