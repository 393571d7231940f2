//! The host's side: the listening Unix socket, and what a client says on it first.
//!
//! A client connects to `PATH` and writes `CONNECT <port>\n`. [`Greeting`] reads that line: at most [`MAX_LINE`] bytes,
//! in any number of pieces, not a byte beyond the line's end, so that what the client writes behind it is the
//! connection's first data. A connection that the guest asks for goes to the Unix socket `PATH_<port>`.
//!
//! The socket's file has mode 0600 from its first moment. A file that nobody listens on (its machine died) is
//! replaced; one that somebody listens on is an error. The file goes when the [`Listener`] is dropped, unless
//! somebody has put another in its place.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::error::{MAX_PATH, VsockError};

/// Longest first line of a client, its end included: `CONNECT 4294967295` with a few blanks.
pub const MAX_LINE: usize = 32;
/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// A listening Unix socket with its file.
pub(super) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
    /// Given up for a moment to refuse a client when the process has no descriptor left.
    reserve: Option<OwnedFd>,
}

/// What came of asking for a client.
pub(super) enum Accepted {
    Client(OwnedFd),
    /// One was there and had to be turned away for want of descriptors.
    Refused,
    /// Nobody waits.
    Nobody,
    /// The host fails in a way that does not pass: don't poll.
    Broken(io::Error),
}

/// Why a connection of the guest did not reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreachable {
    /// Nobody listens, or the listener's queue is full.
    Refused,
    /// The path with the port is too long for a Unix socket.
    PathTooLong,
    /// No descriptor, no memory.
    NoResources,
}

fn unix_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

fn reserve() -> Option<OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

impl Listener {
    /// Listens on `path`.
    pub(super) fn bind(path: &Path) -> Result<Self, VsockError> {
        // The process may change its working directory before it connects to PATH_<port>, or removes the file.
        let absolute =
            std::path::absolute(path).map_err(|source| VsockError::Listen { path: path.into(), source })?;
        let path = absolute.as_path();
        let len = path.as_os_str().len();
        if len > MAX_PATH {
            return Err(VsockError::PathTooLong { path: path.into(), len });
        }
        let failed = |source: Errno| VsockError::Listen { path: path.into(), source: source.into() };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = unix_socket()?;
        // Linux gives the file the mode of the socket: it is never open to others, whatever the umask.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path, &address)?;
                rustix::net::bind(&socket, &address).map_err(failed)?;
            }
            other => other.map_err(failed)?,
        }
        let file = identity(path);
        rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
        Ok(Self { socket, path: path.into(), file: file.unwrap_or_default(), reserve: None })
    }

    /// Takes the next client, without waiting.
    pub(super) fn accept(&mut self) -> Accepted {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // Not before somebody comes: most machines' sockets are never used.
        self.reserve = self.reserve.take().or_else(reserve);
        loop {
            return match rustix::net::accept_with(&self.socket, flags) {
                Ok(client) => Accepted::Client(client),
                Err(Errno::AGAIN) => Accepted::Nobody,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) if self.reserve.is_some() => {
                    self.reserve = None;
                    let refused = rustix::net::accept_with(&self.socket, flags);
                    let outcome = match &refused {
                        Ok(_) => Accepted::Refused,
                        Err(Errno::AGAIN) => Accepted::Nobody,
                        Err(error) => Accepted::Broken((*error).into()),
                    };
                    drop(refused);
                    self.reserve = reserve();
                    outcome
                }
                Err(error) => Accepted::Broken(error.into()),
            };
        }
    }

    /// Connects to the socket that stands for the host's port `port`.
    pub(super) fn connect(&self, port: u32) -> Result<OwnedFd, Unreachable> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        if path.len() > MAX_PATH {
            return Err(Unreachable::PathTooLong);
        }
        let address = SocketAddrUnix::new(&path).map_err(|_| Unreachable::PathTooLong)?;
        let socket = unix_socket().map_err(|_| Unreachable::NoResources)?;
        // Unix sockets connect at once or not at all.
        rustix::net::connect(&socket, &address).map_err(|_| Unreachable::Refused)?;
        Ok(socket)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path) == Some(self.file) {
            // It may have gone in between, which is what we want.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at `path`.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Removes a socket's file that nobody listens on.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), VsockError> {
    let failed = |source| VsockError::Listen { path: path.into(), source };
    let is_socket = match fs::symlink_metadata(path) {
        Ok(file) => file.file_type().is_socket(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !is_socket {
        return Err(VsockError::NotASocket(path.into()));
    }
    match rustix::net::connect(unix_socket()?, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        // AGAIN: its queue is full.
        Ok(()) | Err(Errno::AGAIN) => Err(VsockError::InUse(path.into())),
        Err(error) => Err(failed(error.into())),
    }
}

/// A client's first line, as far as it has come.
#[derive(Debug, Default)]
pub(super) struct Greeting {
    line: [u8; MAX_LINE],
    len: usize,
}

/// What a client has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeted {
    /// Not all of it.
    More,
    /// The guest's port that it wants.
    Port(u32),
    /// Something else.
    Bad,
    /// Nothing, and it is gone.
    Gone,
}

impl Greeting {
    /// Reads what has come of the line, and nothing behind it.
    pub(super) fn read(&mut self, socket: BorrowedFd<'_>) -> Greeted {
        loop {
            let room = &mut self.line[self.len..];
            let come = match rustix::net::recv(socket, &mut *room, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return if self.len == 0 { Greeted::Gone } else { Greeted::Bad },
                Ok((_, come)) => come,
                Err(Errno::AGAIN) => return Greeted::More,
                Err(Errno::INTR) => continue,
                Err(_) => return Greeted::Gone,
            };
            let end = room[..come].iter().position(|byte| *byte == b'\n');
            let take = end.map_or(come, |at| at + 1);
            match rustix::net::recv(socket, &mut room[..take], RecvFlags::DONTWAIT) {
                Ok((_, taken)) if taken == take => {}
                _ => return Greeted::Gone,
            }
            self.len += take;
            if end.is_some() {
                return parse_line(&self.line[..self.len]).map_or(Greeted::Bad, Greeted::Port);
            }
            if self.len == MAX_LINE {
                return Greeted::Bad;
            }
        }
    }
}

/// The port of `CONNECT <port>\n`.
fn parse_line(line: &[u8]) -> Option<u32> {
    let text = str::from_utf8(line).ok()?;
    let mut words = text.split_ascii_whitespace();
    let (verb, port) = (words.next()?, words.next()?);
    let plain = port.bytes().all(|byte| byte.is_ascii_digit());
    // The highest number means "any port" to a guest.
    let port = port.parse().ok().filter(|port| plain && *port != u32::MAX);
    port.filter(|_| verb.eq_ignore_ascii_case("CONNECT") && words.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_a_port_may_be_asked_for() {
        for (line, port) in [
            ("CONNECT 52\n", Some(52)),
            ("connect 52\n", Some(52)),
            ("CONNECT 52\r\n", Some(52)),
            ("CONNECT 4294967294\n", Some(u32::MAX - 1)),
            ("CONNECT 4294967295\n", None),
            ("CONNECT 4294967296\n", None),
            ("CONNECT\n", None),
            ("CONNECT \n", None),
            ("CONNECT +5\n", None),
            ("CONNECT -5\n", None),
            ("CONNECT 5 6\n", None),
            ("CONNECT5\n", None),
            ("HELLO 5\n", None),
            ("\n", None),
            ("CONNECT 5\u{fc}\n", None),
        ] {
            assert_eq!(parse_line(line.as_bytes()), port, "{line:?}");
        }
    }

    #[test]
    fn a_relative_path_is_the_same_after_a_change_of_folder() {
        let dir = tempfile::tempdir().unwrap();
        let up = "../".repeat(std::env::current_dir().unwrap().components().count() - 1);
        let relative = format!("{up}{}", dir.path().strip_prefix("/").unwrap().join("v").display());
        let listener = Listener::bind(Path::new(&relative)).unwrap();
        assert!(listener.path.is_absolute());
        UnixStream::connect(dir.path().join("v")).unwrap();
        drop(listener);
        assert!(!dir.path().join("v").exists());
    }

    #[test]
    fn what_follows_the_line_is_left_alone() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        client.write_all(b"CONNECT 7\nthe first data\n").unwrap();
        assert_eq!(Greeting::default().read(server.as_fd()), Greeted::Port(7));
        drop(client);
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "the first data\n");
    }

    #[test]
    fn a_line_without_end_is_bad_at_its_limit() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&[b'C'; MAX_LINE - 1]).unwrap();
        let mut greeting = Greeting::default();
        assert_eq!(greeting.read(server.as_fd()), Greeted::More);
        client.write_all(b"C").unwrap();
        assert_eq!(greeting.read(server.as_fd()), Greeted::Bad);
    }

    #[test]
    fn a_client_that_goes_silently_is_no_error() {
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(Greeting::default().read(server.as_fd()), Greeted::Gone);
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(b"CONN").unwrap();
        drop(client);
        assert_eq!(Greeting::default().read(server.as_fd()), Greeted::Bad);
    }

    proptest! {
        #[test]
        fn a_line_may_come_in_any_pieces(port in 0..u32::MAX, cuts in prop::collection::vec(1usize..6, 0..20)) {
            let line = format!("CONNECT {port}\nrest");
            let (mut client, server) = UnixStream::pair().unwrap();
            let (mut greeting, mut at, mut found) = (Greeting::default(), 0, None);
            for cut in cuts.into_iter().chain([line.len()]) {
                let end = (at + cut).min(line.len());
                client.write_all(&line.as_bytes()[at..end]).unwrap();
                at = end;
                match greeting.read(server.as_fd()) {
                    Greeted::More => {}
                    other => {
                        found = Some(other);
                        break;
                    }
                }
            }
            prop_assert_eq!(found, Some(Greeted::Port(port)));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(&bytes).unwrap();
            let mut greeting = Greeting::default();
            greeting.read(server.as_fd());
            prop_assert!(greeting.len <= MAX_LINE);
        }
    }
}
