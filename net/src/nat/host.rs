//! What the NAT asks of the host: the only door to sockets.
//!
//! [`StreamHost`] is what TCP needs; datagram protocols need [`DatagramHost`]; [`Machine`] adds the events and the
//! clock that turn them into a network. The real host is [`SysHost`](super::sys::SysHost); tests play one of their own
//! and so need neither sockets nor clocks.
//! Nothing here blocks. An error is the host's own `io::Error` with its errno, because what the guest is told
//! depends on it.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::poller::{Events, Token};
use super::udp::DatagramHost;

/// A socket of the host. It is open until [`StreamHost::close`]; the number is used again afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SockId(pub(crate) u32);

/// How a socket goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    /// What was sent is still delivered.
    Graceful,
    /// With a RST (`SO_LINGER` 0).
    Reset,
}

/// The send buffer of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SendSpace {
    /// Bytes that a send is likely to take now.
    pub(crate) free: u32,
    /// Bytes of the whole buffer.
    pub(crate) size: u32,
    /// Whether there is so much room that [`StreamHost::want_write`] would report it at once.
    pub(crate) writable: bool,
}

/// Streams: TCP sockets, and one end of a socketpair for what is served in this process.
pub(crate) trait StreamHost {
    /// Starts to connect. The outcome is an event with `WRITE` or `ERROR` for `token`, and then
    /// [`Self::connected`].
    ///
    /// # Errors
    /// What the host knows at once: no route, no permission, no more file descriptors.
    fn connect(&mut self, to: SocketAddrV4, token: Token) -> io::Result<SockId>;

    /// Makes a stream to a service of this process: ours, registered for `token`, and the service's, which it
    /// registers itself.
    ///
    /// # Errors
    /// No more file descriptors.
    fn stream_pair(&mut self, token: Token) -> io::Result<(SockId, SockId)>;

    /// Takes over a connected Unix stream of this host, registered for `token`.
    ///
    /// # Errors
    /// What is no Unix stream; no memory.
    fn adopt_stream(&mut self, stream: OwnedFd, token: Token) -> io::Result<SockId> {
        let _ = (stream, token);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// How a connect ended.
    ///
    /// # Errors
    /// Why it failed (`SO_ERROR`).
    fn connected(&mut self, sock: SockId) -> io::Result<()>;

    /// Listens on an address.
    ///
    /// # Errors
    /// As `bind` and `listen` do.
    fn listen(&mut self, at: SocketAddrV4, token: Token) -> io::Result<SockId>;

    /// Where a listener listens or a UDP socket is bound, once the host has chosen a port.
    ///
    /// # Errors
    /// As `getsockname` does.
    fn local_addr(&mut self, sock: SockId) -> io::Result<SocketAddrV4>;

    /// Accepts a connection; it sends no event before [`Self::watch`].
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn accept(&mut self, listener: SockId) -> io::Result<(SockId, SocketAddrV4)>;

    /// Registers a socket's events for `token`.
    ///
    /// # Errors
    /// No memory, or more watches than the user may have.
    fn watch(&mut self, sock: SockId, token: Token) -> io::Result<()>;

    /// Asks for a `WRITE` event when the send buffer has room, which is at once if it has some now.
    fn want_write(&mut self, sock: SockId, token: Token);

    /// Sends, and says how many bytes were taken.
    ///
    /// # Errors
    /// `WouldBlock` when none was; otherwise the stream is dead.
    fn send(&mut self, sock: SockId, parts: &mut dyn Iterator<Item = VolatileSlice<'_>>)
    -> io::Result<usize>;

    /// Copies what has been received, from `offset` bytes behind what was discarded, into the pieces behind their
    /// first `skip` bytes, at most `max` bytes; nothing is taken out of the stream. 0 means the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing behind `offset`; `ResourceBusy` when so much is in flight that the host can't
    /// look behind it; otherwise the stream is dead.
    fn peek(
        &mut self,
        sock: SockId,
        offset: u32,
        parts: &[VolatileSlice<'_>],
        skip: usize,
        max: usize,
    ) -> io::Result<usize>;

    /// Takes `len` received bytes, all of which have been peeked, out of the stream.
    fn discard(&mut self, sock: SockId, len: u32);

    /// The send buffer.
    fn send_space(&mut self, sock: SockId) -> SendSpace;

    /// Sends a FIN behind what was sent.
    fn shutdown_write(&mut self, sock: SockId);

    /// Closes a socket.
    fn close(&mut self, sock: SockId, how: Close);
}

/// The whole host.
pub(crate) trait Host: StreamHost + DatagramHost {}

impl<T: StreamHost + DatagramHost> Host for T {}

/// A host with its events and its clock: what the whole NAT runs on. Its descriptor is readable while [`Self::poll`]
/// has something to report.
pub(crate) trait Machine: Host + AsFd + Send {
    /// The time. It never goes back.
    fn now(&self) -> Instant;

    /// Collects the events that have happened, each once: a level that stays is not reported again. Says whether there
    /// may be more.
    fn poll(&mut self, into: &mut Vec<(Token, Events)>) -> bool;

    /// Sets the one timer: an event of [`Owner::Timer`](super::poller::Owner::Timer) comes when `after` has passed. An
    /// earlier setting is forgotten.
    fn set_timer(&mut self, after: Duration);

    /// From now on an event of [`Owner::Bell`](super::poller::Owner::Bell) comes whenever this eventfd is written.
    ///
    /// # Errors
    /// No memory, or more watches than the user may have.
    fn watch_bell(&mut self, bell: OwnedFd) -> io::Result<()> {
        let _ = bell;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// How many sockets are open.
    fn open_sockets(&self) -> usize;
}
