//! The listener: a process per connection.

use core::ffi::CStr;

use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open, unlink};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

use crate::link::{Broken, Link, wait};
use crate::wire::{self, Exec, Kind, MAX_REQUEST, Put};
use crate::{copy, exec, power, sys};

pub use crate::sys::exit;

/// The most requests at a time.
pub const MAX_REQUESTS: usize = 128;
/// Connections that wait for the listener.
const BACKLOG: i32 = 64;
/// The CID of the host (VMADDR_CID_HOST of linux/vm_sockets.h).
const HOST: u32 = 2;

/// Where the agent listens.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// On [`wire::PORT`] of the machine's vsock device, for the host.
    Vsock,
    /// On a Unix socket, for tests: whoever can connect may ask, and the machine is not powered off.
    Unix(&'a CStr),
}

/// Statuses of the agent itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// It was used wrongly.
    Usage = 2,
    /// It can't listen: no vsock device, or somebody else does.
    NotListening = 3,
    /// The kernel takes no part any more.
    Broken = 4,
}

/// Listens and serves, for good; returns why it can't.
pub fn serve(place: Place<'_>) -> Status {
    // What it starts has these three; without them a pipe could become standard output.
    if keep_standard_streams().is_err() {
        return Status::Broken;
    }
    sys::ignore_sigpipe();
    let _ = rustix::process::setsid();
    let listener = match place {
        Place::Vsock => sys::listen_vsock(wire::PORT, BACKLOG),
        Place::Unix(path) => listen_unix(path),
    };
    let Ok(listener) = listener else { return Status::NotListening };
    if matches!(place, Place::Unix(_)) {
        // Whoever starts it for a test need not guess when.
        sys::say(b"listening\n");
    }
    let mut requests = Requests { slots: [const { None }; MAX_REQUESTS] };
    loop {
        requests.wait(&listener);
        requests.reap();
        match sys::accept(&listener) {
            // Turned away unread.
            Ok((connection, cid)) if matches!(place, Place::Vsock) && cid != Some(HOST) => drop(connection),
            Ok((connection, _)) if requests.is_full() => turn_away(connection),
            Ok((connection, _)) => match sys::fork() {
                Ok(Some(pid)) => requests.add(pid),
                Ok(None) => {
                    // Not the request's: an agent that is started anew must be able to listen.
                    drop((listener, requests));
                    let _ = answer(connection, place);
                    sys::exit(0)
                }
                // The host sees a closed connection.
                Err(_) => {}
            },
            Err(Errno::BADF | Errno::INVAL | Errno::NOTSOCK) => return Status::Broken,
            // Nobody there, a connection that has gone again, or want of memory or descriptors.
            Err(_) => {}
        }
    }
}

fn keep_standard_streams() -> Result<(), Errno> {
    loop {
        let null = open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        if rustix::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        // One of the three was closed: this takes its place, for good.
        let _ = rustix::fd::IntoRawFd::into_raw_fd(null);
    }
}

fn listen_unix(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let _ = unlink(path);
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Tells the host that there are too many requests. A new connection has room for that; the listener waits for nobody.
fn turn_away(connection: OwnedFd) {
    let mut link = Link::new(connection);
    link.queue(Kind::Failed, b"\0\0the agent serves 128 requests already; try again when one has ended");
    let _ = link.try_flush();
}

/// Reads one request and carries it out.
fn answer(connection: OwnedFd, place: Place<'_>) -> Result<(), Broken> {
    let mut link = Link::new(connection);
    let mut room = [0; MAX_REQUEST];
    let (kind, payload) = link.request(&mut room)?;
    match kind {
        Kind::Exec => exec::run(&mut link, &Exec::decode(payload)?),
        Kind::Put => copy::put(&mut link, &Put::decode(payload)?),
        Kind::Get => copy::get(&mut link, wire::decode_get(payload)?),
        Kind::PowerOff => {
            let outcome = match place {
                Place::Vsock => power::power_off(),
                Place::Unix(_) => Err(("power off: this agent was started for a test", None)),
            };
            match outcome {
                Ok(()) => link.say(Kind::Done, &[]),
                Err((doing, errno)) => link.fail(errno, doing.as_bytes()),
            }
        }
        Kind::Ping => link.say(Kind::Pong, env!("CARGO_PKG_VERSION").as_bytes()),
        _ => Err(Broken::Nonsense),
    }
}

/// A process that serves one request.
struct Request {
    /// Readable when it has ended.
    ended: OwnedFd,
}

/// The requests that are under way.
struct Requests {
    slots: [Option<Request>; MAX_REQUESTS],
}

impl Requests {
    fn is_full(&self) -> bool {
        self.slots.iter().all(Option::is_some)
    }

    fn add(&mut self, pid: Pid) {
        // There is a free slot, or the connection would have been turned away.
        let Some(free) = self.slots.iter_mut().find(|slot| slot.is_none()) else { return };
        *free = pidfd_open(pid, PidfdFlags::empty()).ok().map(|ended| Request { ended });
    }

    /// Waits for a connection or the end of a request.
    fn wait(&self, listener: &OwnedFd) {
        let nobody = || PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::empty());
        let mut fds: [PollFd<'_>; MAX_REQUESTS + 1] = core::array::from_fn(|_| nobody());
        fds[0] = PollFd::new(listener, PollFlags::IN);
        let mut places = fds.iter_mut().skip(1);
        for request in self.slots.iter().flatten() {
            if let Some(place) = places.next() {
                *place = PollFd::new(&request.ended, PollFlags::IN);
            }
        }
        wait(&mut fds, None);
    }

    /// Reaps the requests that have ended.
    fn reap(&mut self) {
        for slot in &mut self.slots {
            let has_ended = slot.as_ref().is_some_and(|request| {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                !matches!(waitid(WaitId::PidFd(request.ended.as_fd()), options), Ok(None) | Err(Errno::INTR))
            });
            if has_ended {
                *slot = None;
            }
        }
    }
}
