//! What the host and the agent in the guest say to each other.
//!
//! This one file is compiled into both: into the agent, and into the VMM as `agent::wire`. It needs neither std nor an
//! allocator, and every length in it is checked against a limit before anything is done with it.
//!
//! **A connection is one request.** Each side's first byte is its [`VERSION`]; what follows are frames: a kind (1 byte), a
//! payload length (4 bytes, little-endian) and the payload. The agent says nothing before it has the whole request, so a
//! host may read the answer of a vsock proxy byte by byte.
//!
//! | limit | value | of |
//! |---|---|---|
//! | [`MAX_REQUEST`] | 256 KiB | the payload of a connection's first frame: argv and environment together |
//! | [`MAX_FRAME`] | 32 KiB | the payload of every other frame |
//! | [`MAX_STRINGS`] | 8192 | arguments, and variables |
//! | [`WINDOW`] | 128 KiB | bytes of one stream that are under way and not yet taken |
//! | [`MAX_NAME`], [`MAX_TARGET`] | 255, 4095 | bytes of a file's name, of a link's target |
//! | [`MAX_DEPTH`] | 128 | folders within folders |
//!
//! ```text
//! Exec      host  -> Exec, then Stdin*, Resize*, Signal*, Window(stdout|stderr)*, Closed(stdout|stderr)
//!           agent -> Started, then Stdout*, Stderr*, Window(stdin)*, Closed(stdin), and Exit
//!                 or NotStarted
//! Put       host  -> Put, TREE                        agent -> Done
//! Get       host  -> Get                              agent -> TREE
//! PowerOff  host  -> PowerOff                         agent -> Done
//! Ping      host  -> Ping                             agent -> Pong
//!
//! TREE      = Entry(file) Content* Content(empty) End      the one entry has no name: the receiver knows where it belongs
//!           | Entry(folder) MEMBER* Up End
//! MEMBER    = Entry(file) Content* Content(empty) | Entry(folder) MEMBER* Up | Entry(link) | Entry(skipped)
//! ```
//!
//! Instead of any of its frames the agent may say `Failed`, after which nothing follows. A `Stdin`, `Stdout`, `Stderr` or
//! `Content` frame without bytes is the end of that stream; `Closed` says that a stream's reader has gone, so that its writer
//! may learn it. `Window` gives back what has been taken: per stream, at most [`WINDOW`] bytes are under way, so that `Signal`
//! and `Resize` never queue behind a command that does not read, nor `Stderr` behind an output that nobody reads.
//!
//! A tree has no paths in it: an entry's name is one component, `Up` leaves a folder. So a receiver never resolves a
//! path, and no name leads out of where it writes.
//!
//! Names, arguments and variables are bytes without NUL; nothing here assumes UTF-8.

use core::ffi::CStr;
use core::fmt;

/// The version of all this: each side's first byte.
pub const VERSION: u8 = 1;
/// The vsock port that the agent listens on.
pub const PORT: u32 = 1024;
/// Bytes in front of a payload.
pub const HEAD: usize = 5;
/// The longest payload of a connection's first frame, in bytes.
pub const MAX_REQUEST: usize = 256 << 10;
/// The longest payload of any other frame, in bytes.
pub const MAX_FRAME: usize = 32 << 10;
/// Bytes of one stream that may be on their way and not yet taken.
pub const WINDOW: usize = 128 << 10;
/// The most arguments, and the most variables.
pub const MAX_STRINGS: usize = 8192;
/// The longest name of a file, in bytes (Linux's NAME_MAX).
pub const MAX_NAME: usize = 255;
/// The longest target of a link, in bytes (Linux's PATH_MAX without the NUL).
pub const MAX_TARGET: usize = 4095;
/// The most folders within each other.
pub const MAX_DEPTH: usize = 128;

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// host: run a command, see [`Exec`].
    Exec = 1,
    /// host: take a tree, see [`Put`].
    Put = 2,
    /// host: send the tree at this path (one string).
    Get = 3,
    /// host: shut the machine down in order.
    PowerOff = 4,
    /// host: say who you are.
    Ping = 5,
    /// host: bytes for the command's standard input.
    Stdin = 16,
    /// agent: bytes that the command wrote to its standard output.
    Stdout = 17,
    /// agent: bytes that the command wrote to its standard error.
    Stderr = 18,
    /// both: so many more bytes (u32) of a stream (u8, its frames' kind) may be sent.
    Window = 19,
    /// both: nobody reads this stream (u8) any more.
    Closed = 20,
    /// host: the terminal now has so many rows and columns (two u16).
    Resize = 21,
    /// host: send this signal (u8) to the command's process group.
    Signal = 22,
    /// both: the next file, folder or link of a tree, see [`Entry`].
    Entry = 32,
    /// both: bytes of the file whose entry came last.
    Content = 33,
    /// both: the folder is complete.
    Up = 34,
    /// both: the tree is complete.
    End = 35,
    /// agent: the command runs.
    Started = 48,
    /// agent: the command could not be started: its status as a shell's (u8), then a [`Failure`].
    NotStarted = 49,
    /// agent: how the command ended, see [`Exit`]; nothing follows.
    Exit = 50,
    /// agent: the request could not be carried out, see [`Failure`]; nothing follows.
    Failed = 51,
    /// agent: it is done.
    Done = 52,
    /// agent: its own version (text).
    Pong = 53,
}

impl Kind {
    const ALL: [Kind; 22] = [
        Kind::Exec,
        Kind::Put,
        Kind::Get,
        Kind::PowerOff,
        Kind::Ping,
        Kind::Stdin,
        Kind::Stdout,
        Kind::Stderr,
        Kind::Window,
        Kind::Closed,
        Kind::Resize,
        Kind::Signal,
        Kind::Entry,
        Kind::Content,
        Kind::Up,
        Kind::End,
        Kind::Started,
        Kind::NotStarted,
        Kind::Exit,
        Kind::Failed,
        Kind::Done,
        Kind::Pong,
    ];

    /// The kind that this byte stands for.
    pub fn from_byte(byte: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// What was not understood, or may not be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No frame has this kind.
    Kind(u8),
    /// A frame claims more bytes than it may have.
    Length(Kind, u32),
    /// A payload is not what its kind says.
    Payload(Kind, &'static str),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "a frame of unknown kind {kind}"),
            Self::Length(kind, length) => write!(f, "a {kind:?} frame that claims {length} bytes"),
            Self::Payload(kind, problem) => write!(f, "a {kind:?} frame with {problem}"),
        }
    }
}

/// The head of a frame.
pub fn head(kind: Kind, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    [kind as u8, a, b, c, d]
}

/// A whole frame: its kind, its payload, its length with the head.
pub type Frame<'a> = (Kind, &'a [u8], usize);

/// Takes the first whole frame off `bytes`, whose payload may have `limit` bytes: its kind, its payload and its length with
/// the head. `None` while it is incomplete.
///
/// # Errors
/// [`Refused`] for an unknown kind or a length above the limit, as soon as the head is there.
pub fn parse(bytes: &[u8], limit: usize) -> Result<Option<Frame<'_>>, Refused> {
    let Some((&[kind, ref length @ ..], rest)) = bytes.split_first_chunk::<HEAD>() else { return Ok(None) };
    let length = u32::from_le_bytes(*length);
    let kind = Kind::from_byte(kind).ok_or(Refused::Kind(kind))?;
    match usize::try_from(length) {
        Ok(size) if size <= limit => Ok(rest.get(..size).map(|payload| (kind, payload, HEAD + size))),
        _ => Err(Refused::Length(kind, length)),
    }
}

/// Writes a payload into a buffer. What doesn't fit, or may not be, is remembered until [`Encoder::finish`].
#[derive(Debug)]
pub struct Encoder<'a> {
    buffer: &'a mut [u8],
    length: usize,
    problem: Option<&'static str>,
}

impl<'a> Encoder<'a> {
    /// An empty payload.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, length: 0, problem: None }
    }

    /// Appends bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let end = self.length.saturating_add(bytes.len());
        match self.buffer.get_mut(self.length..end) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.length = end;
            }
            None => self.problem = Some("more bytes than fit into it"),
        }
        self
    }

    /// Appends a string, with the NUL that ends it.
    pub fn string(&mut self, string: &[u8]) -> &mut Self {
        if string.contains(&0) {
            self.problem = Some("a NUL in a string");
        }
        self.bytes(string).bytes(&[0])
    }

    /// The payload's length.
    ///
    /// # Errors
    /// [`Refused`] when not everything was appended.
    pub fn finish(&self, kind: Kind) -> Result<usize, Refused> {
        self.problem.map_or(Ok(self.length), |problem| Err(Refused::Payload(kind, problem)))
    }
}

/// Reads a payload.
#[derive(Clone, Copy, Debug)]
struct Decoder<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    fn refused(&self, problem: &'static str) -> Refused {
        Refused::Payload(self.kind, problem)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refused> {
        let (array, rest) = self.rest.split_first_chunk().ok_or_else(|| self.refused("too few bytes"))?;
        self.rest = rest;
        Ok(*array)
    }

    fn string(&mut self) -> Result<&'a CStr, Refused> {
        let string =
            CStr::from_bytes_until_nul(self.rest).map_err(|_| self.refused("a string without its end"))?;
        self.rest = self.rest.get(string.count_bytes() + 1..).unwrap_or_default();
        Ok(string)
    }

    fn strings(&mut self) -> Result<Strings<'a>, Refused> {
        let count = usize::from(u16::from_le_bytes(self.array()?));
        if count > MAX_STRINGS {
            return Err(self.refused("too many strings"));
        }
        let block = self.rest;
        for _ in 0..count {
            self.string()?;
        }
        Ok(Strings { count, block })
    }

    fn end(&self) -> Result<(), Refused> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.refused("more bytes than belong to it")) }
    }
}

/// Strings one behind the other in a payload.
#[derive(Clone, Copy, Debug)]
pub struct Strings<'a> {
    count: usize,
    block: &'a [u8],
}

impl<'a> Strings<'a> {
    /// How many there are, at most [`MAX_STRINGS`].
    pub fn count(&self) -> usize {
        self.count
    }
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a CStr;

    fn next(&mut self) -> Option<&'a CStr> {
        self.count = self.count.checked_sub(1)?;
        let string = CStr::from_bytes_until_nul(self.block).ok()?;
        self.block = self.block.get(string.count_bytes() + 1..)?;
        Some(string)
    }
}

/// The request to run a command.
#[derive(Clone, Copy, Debug)]
pub struct Exec<'a> {
    /// Rows and columns, if it gets a terminal.
    pub terminal: Option<(u16, u16)>,
    /// Its working directory; empty for its user's home.
    pub cwd: &'a CStr,
    /// Its user, by name or number; empty for the agent's own, which is root.
    pub user: &'a CStr,
    /// The program and its arguments: at least one string.
    pub argv: Strings<'a>,
    /// `NAME=VALUE`, over the default environment.
    pub env: Strings<'a>,
}

impl<'a> Exec<'a> {
    /// Writes the request; the length of the payload.
    ///
    /// # Errors
    /// [`Refused`] for what [`Exec::decode`] would refuse.
    pub fn encode<'s>(
        buffer: &mut [u8],
        terminal: Option<(u16, u16)>,
        [cwd, user]: [&[u8]; 2],
        argv: impl ExactSizeIterator<Item = &'s [u8]>,
        env: impl ExactSizeIterator<Item = &'s [u8]>,
    ) -> Result<usize, Refused> {
        let count = |count: usize| {
            let fits = u16::try_from(count).ok().filter(|_| count <= MAX_STRINGS);
            fits.ok_or(Refused::Payload(Kind::Exec, "too many strings"))
        };
        let (arguments, variables) = (count(argv.len())?, count(env.len())?);
        let (rows, columns) = terminal.unwrap_or_default();
        let mut encoder = Encoder::new(buffer);
        encoder.bytes(&[u8::from(terminal.is_some())]);
        encoder.bytes(&rows.to_le_bytes()).bytes(&columns.to_le_bytes()).string(cwd).string(user);
        encoder.bytes(&arguments.to_le_bytes());
        argv.for_each(|string| {
            encoder.string(string);
        });
        encoder.bytes(&variables.to_le_bytes());
        env.for_each(|string| {
            encoder.string(string);
        });
        let length = encoder.finish(Kind::Exec)?;
        Exec::decode(buffer.get(..length).unwrap_or_default())?;
        Ok(length)
    }

    /// Reads the request.
    ///
    /// # Errors
    /// [`Refused`] for an empty argv, a variable without a name, or bytes that are no request.
    pub fn decode(payload: &'a [u8]) -> Result<Self, Refused> {
        let mut input = Decoder { kind: Kind::Exec, rest: payload };
        let [terminal] = input.array()?;
        let rows = u16::from_le_bytes(input.array()?);
        let columns = u16::from_le_bytes(input.array()?);
        let (cwd, user) = (input.string()?, input.string()?);
        let argv = input.strings()?;
        if argv.count() == 0 {
            return Err(input.refused("no program"));
        }
        let env = input.strings()?;
        if env.into_iter().any(|variable| !variable.to_bytes().iter().skip(1).any(|byte| *byte == b'=')) {
            return Err(input.refused("a variable that is not NAME=VALUE"));
        }
        input.end()?;
        Ok(Self { terminal: (terminal != 0).then_some((rows, columns)), cwd, user, argv, env })
    }
}

/// The request to take a tree.
#[derive(Clone, Copy, Debug)]
pub struct Put<'a> {
    /// Where it belongs; when that is a folder, and `name` is not empty, into it.
    pub destination: &'a CStr,
    /// Its name in such a folder.
    pub name: &'a CStr,
}

impl<'a> Put<'a> {
    /// Writes the request; the length of the payload.
    ///
    /// # Errors
    /// [`Refused`] for what [`Put::decode`] would refuse.
    pub fn encode(buffer: &mut [u8], destination: &[u8], name: &[u8]) -> Result<usize, Refused> {
        let length = Encoder::new(buffer).string(destination).string(name).finish(Kind::Put)?;
        Put::decode(buffer.get(..length).unwrap_or_default())?;
        Ok(length)
    }

    /// Reads the request.
    ///
    /// # Errors
    /// [`Refused`] for a name that is a path.
    pub fn decode(payload: &'a [u8]) -> Result<Self, Refused> {
        let mut input = Decoder { kind: Kind::Put, rest: payload };
        let put = Self { destination: input.string()?, name: input.string()? };
        input.end()?;
        if put.destination.is_empty() || put.destination.count_bytes() > MAX_TARGET {
            return Err(input.refused("no usable destination"));
        }
        if !put.name.is_empty() && !is_name(put.name) {
            return Err(input.refused("a name that is none"));
        }
        Ok(put)
    }
}

/// Reads the request to send a tree: its path.
///
/// # Errors
/// [`Refused`] for bytes that are no path.
pub fn decode_get(payload: &[u8]) -> Result<&CStr, Refused> {
    let mut input = Decoder { kind: Kind::Get, rest: payload };
    let path = input.string()?;
    input.end()?;
    if path.is_empty() || path.count_bytes() > MAX_TARGET {
        return Err(input.refused("no usable path"));
    }
    Ok(path)
}

/// Whether this is the name of something in a folder: one component that leads nowhere else.
pub fn is_name(name: &CStr) -> bool {
    let name = name.to_bytes();
    (1..=MAX_NAME).contains(&name.len()) && !name.contains(&b'/') && name != b"." && name != b".."
}

/// What an entry of a tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// A regular file; its content follows.
    File = 1,
    /// A folder; its members follow.
    Folder = 2,
    /// A symbolic link.
    Link = 3,
    /// Something that is not carried (a device, a socket); the target says what.
    Skipped = 4,
}

/// One file, folder or link of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits; a receiver takes the lower nine.
    pub mode: u32,
    /// When it was last modified: seconds and nanoseconds since 1970.
    pub modified: (i64, u32),
    /// How long the file was when its entry was written: a hint, since a file may change.
    pub size: u64,
    /// Its name, empty for the tree's own entry.
    pub name: &'a CStr,
    /// Where a link leads; why something is skipped.
    pub target: &'a CStr,
}

impl<'a> Entry<'a> {
    /// Writes the entry; the length of the payload.
    ///
    /// # Errors
    /// [`Refused`] for what doesn't fit.
    pub fn encode(&self, buffer: &mut [u8]) -> Result<usize, Refused> {
        let mut encoder = Encoder::new(buffer);
        encoder.bytes(&[self.kind as u8]).bytes(&self.mode.to_le_bytes());
        encoder.bytes(&self.modified.0.to_le_bytes()).bytes(&self.modified.1.to_le_bytes());
        encoder.bytes(&self.size.to_le_bytes());
        encoder.string(self.name.to_bytes()).string(self.target.to_bytes()).finish(Kind::Entry)
    }

    /// Reads an entry: the tree's own if `root`, else one that has a name.
    ///
    /// # Errors
    /// [`Refused`] for a name that is a path, a time that is none, a target where there can be none.
    pub fn decode(payload: &'a [u8], root: bool) -> Result<Self, Refused> {
        let mut input = Decoder { kind: Kind::Entry, rest: payload };
        let kind = match input.array()? {
            [1] => EntryKind::File,
            [2] => EntryKind::Folder,
            [3] => EntryKind::Link,
            [4] => EntryKind::Skipped,
            _ => return Err(input.refused("an unknown kind of file")),
        };
        let mode = u32::from_le_bytes(input.array()?);
        let modified = (i64::from_le_bytes(input.array()?), u32::from_le_bytes(input.array()?));
        let size = u64::from_le_bytes(input.array()?);
        let (name, target) = (input.string()?, input.string()?);
        input.end()?;
        if modified.1 >= 1_000_000_000 {
            return Err(input.refused("a time that is none"));
        }
        if if root { !name.is_empty() } else { !is_name(name) } {
            return Err(input.refused("a name that is none"));
        }
        let leads = matches!(kind, EntryKind::Link | EntryKind::Skipped);
        if leads == target.is_empty() || target.count_bytes() > MAX_TARGET || (root && leads) {
            return Err(input.refused("a target that is none"));
        }
        Ok(Self { kind, mode, modified, size, name, target })
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl Exit {
    /// The payload of an `Exit` frame.
    pub fn encode(self) -> [u8; 2] {
        match self {
            Self::Code(code) => [0, code],
            Self::Signal(signal) => [1, signal],
        }
    }

    /// Reads the payload of an `Exit` frame.
    ///
    /// # Errors
    /// [`Refused`] for anything that [`Exit::encode`] did not write.
    pub fn decode(payload: &[u8]) -> Result<Self, Refused> {
        match *payload {
            [0, code] => Ok(Self::Code(code)),
            [1, signal @ 1..=64] => Ok(Self::Signal(signal)),
            _ => Err(Refused::Payload(Kind::Exit, "no status")),
        }
    }
}

/// Why something failed in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure<'a> {
    /// The system's error number; 0 where there is none.
    pub errno: u16,
    /// What could not be done, such as `open /etc/x`.
    pub doing: &'a [u8],
}

impl<'a> Failure<'a> {
    /// Appends it to a payload.
    pub fn encode(&self, encoder: &mut Encoder<'_>) {
        encoder.bytes(&self.errno.to_le_bytes()).bytes(self.doing);
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`Refused`] for a payload without a number.
    pub fn decode(kind: Kind, payload: &'a [u8]) -> Result<Self, Refused> {
        let mut input = Decoder { kind, rest: payload };
        Ok(Self { errno: u16::from_le_bytes(input.array()?), doing: input.rest })
    }
}

/// Reads a `Window` frame: the stream and how many bytes of it.
///
/// # Errors
/// [`Refused`] for a frame of another form, and for no or too many bytes.
pub fn decode_window(payload: &[u8]) -> Result<(Kind, usize), Refused> {
    let mut input = Decoder { kind: Kind::Window, rest: payload };
    let [stream] = input.array()?;
    let bytes = usize::try_from(u32::from_le_bytes(input.array()?)).unwrap_or(usize::MAX);
    input.end()?;
    if !(1..=WINDOW).contains(&bytes) {
        return Err(input.refused("an absurd number"));
    }
    Ok((decode_stream(Kind::Window, stream)?, bytes))
}

/// Reads the stream that a `Window` or `Closed` frame is about.
///
/// # Errors
/// [`Refused`] for what is no stream.
pub fn decode_stream(kind: Kind, stream: u8) -> Result<Kind, Refused> {
    match Kind::from_byte(stream) {
        Some(stream @ (Kind::Stdin | Kind::Stdout | Kind::Stderr)) => Ok(stream),
        _ => Err(Refused::Payload(kind, "no stream")),
    }
}
