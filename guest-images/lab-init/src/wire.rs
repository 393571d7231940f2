//! What the lab's supervisor and the init of its outer machine say to each other.
//!
//! This one file is compiled into both: into `lab-init`, and into the VMM as `lab::wire`.
//!
//! **Frames** travel over one virtio-serial port, in both directions: a kind (1 byte), a payload length
//! (4 bytes, little-endian, at most [`MAX_PAYLOAD`]) and the payload. The conversation:
//!
//! ```text
//! first boot   init  -> Ready                      the machine may be snapshotted now
//! each resume  host  -> Start(job)
//!              init  -> Hello                      the machine runs, the clock is set
//!              host  -> Stdin* StdinEnd, Signal, Resize
//!              init  -> Stdout*, Stderr*, StdinTaken*, then Fetched* and Exit; or Failed(reason)
//! ```
//!
//! Standard input is flow-controlled: the host has at most [`STDIN_WINDOW`] bytes under way that
//! `StdinTaken` has not yet confirmed, so that `Signal` and `Resize` never queue behind a command that
//! does not read.
//!
//! **Archives** carry files, into the machine on a read-only disk and out of it in `Fetched` frames. An
//! archive is a run of entries (see [`Header`]), ended by an entry of kind `End`; what follows is padding.
//! Paths, arguments and variables are bytes, never text: nothing here assumes UTF-8.

use std::io::{self, Read, Write};

/// The longest payload of a frame, in bytes. A job has to fit into one frame.
pub const MAX_PAYLOAD: usize = 8 << 20;
/// Bytes of standard input that may be on their way to the command.
pub const STDIN_WINDOW: usize = 64 << 10;
/// The longest path, link target, argument or variable that is accepted, in bytes.
pub const MAX_STRING: usize = 1 << 20;
/// The most members of a list (arguments, variables, paths).
pub const MAX_LIST: usize = 1 << 16;

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// init: everything is loaded and nothing is under way; take the snapshot.
    Ready = 1,
    /// host: run this [`Job`].
    Start = 2,
    /// init: `Start` has been read.
    Hello = 3,
    /// init: bytes that the command wrote to its standard output.
    Stdout = 4,
    /// init: bytes that the command wrote to its standard error.
    Stderr = 5,
    /// host: bytes for the command's standard input.
    Stdin = 6,
    /// host: there is no more standard input.
    StdinEnd = 7,
    /// init: so many bytes of standard input (u32) have reached the command.
    StdinTaken = 8,
    /// host: the terminal now has so many rows and columns (two u16).
    Resize = 9,
    /// host: send this signal (u8) to the command.
    Signal = 10,
    /// init: a piece of the archive of fetched files.
    Fetched = 11,
    /// init: the command has ended, see [`Exit`]; nothing follows.
    Exit = 12,
    /// init: the job could not be done, and why (text); nothing follows.
    Failed = 13,
}

impl Kind {
    const ALL: [Kind; 13] = [
        Kind::Ready,
        Kind::Start,
        Kind::Hello,
        Kind::Stdout,
        Kind::Stderr,
        Kind::Stdin,
        Kind::StdinEnd,
        Kind::StdinTaken,
        Kind::Resize,
        Kind::Signal,
        Kind::Fetched,
        Kind::Exit,
        Kind::Failed,
    ];

    fn from_byte(byte: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Writes one frame.
///
/// # Errors
/// Those of `out`, and `InvalidInput` for a payload above [`MAX_PAYLOAD`].
pub fn write_frame(out: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a {kind:?} frame of {} bytes is above the limit of {MAX_PAYLOAD}", payload.len()),
        ));
    }
    // One write for head and payload: each write is an exit of the outer machine.
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend(payload);
    out.write_all(&frame)?;
    out.flush()
}

/// Takes the first whole frame off `bytes`: its kind, its payload and its length with the head. `None`
/// while the frame is incomplete.
///
/// # Errors
/// `InvalidData` for an unknown kind or a length above [`MAX_PAYLOAD`].
pub fn parse_frame(bytes: &[u8]) -> io::Result<Option<(Kind, &[u8], usize)>> {
    let Some((head, rest)) = bytes.split_first_chunk::<5>() else { return Ok(None) };
    let [kind, length @ ..] = *head;
    let length = u32::from_le_bytes(length) as usize;
    let kind = Kind::from_byte(kind).ok_or_else(|| invalid(format!("a frame of unknown kind {kind}")))?;
    if length > MAX_PAYLOAD {
        return Err(invalid(format!("a {kind:?} frame claims {length} bytes, above {MAX_PAYLOAD}")));
    }
    Ok(rest.get(..length).map(|payload| (kind, payload, 5 + length)))
}

/// One command to run, as the host asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment, `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// The working directory.
    pub cwd: Vec<u8>,
    /// User and group that the command runs as.
    pub uid: u32,
    /// Rows and columns, when the command gets a terminal of its own.
    pub terminal: Option<(u16, u16)>,
    /// The host's wall clock, in nanoseconds since 1970.
    pub now: u64,
    /// What to send back when the command has ended.
    pub fetch: Vec<Vec<u8>>,
}

impl Job {
    /// The payload of a `Start` frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_list(&mut out, &self.argv);
        put_list(&mut out, &self.env);
        put_bytes(&mut out, &self.cwd);
        out.extend(self.uid.to_le_bytes());
        let (rows, columns) = self.terminal.unwrap_or((0, 0));
        out.push(u8::from(self.terminal.is_some()));
        out.extend(rows.to_le_bytes());
        out.extend(columns.to_le_bytes());
        out.extend(self.now.to_le_bytes());
        put_list(&mut out, &self.fetch);
        out
    }

    /// Reads the payload of a `Start` frame.
    ///
    /// # Errors
    /// `InvalidData` or `UnexpectedEof` for anything that [`Job::encode`] did not write.
    pub fn decode(mut bytes: &[u8]) -> io::Result<Job> {
        let input = &mut bytes;
        let argv = get_list(input)?;
        let env = get_list(input)?;
        let cwd = get_bytes(input)?;
        let uid = u32::from_le_bytes(get_array(input)?);
        let [has_terminal] = get_array(input)?;
        let rows = u16::from_le_bytes(get_array(input)?);
        let columns = u16::from_le_bytes(get_array(input)?);
        let now = u64::from_le_bytes(get_array(input)?);
        let fetch = get_list(input)?;
        if !bytes.is_empty() {
            return Err(invalid(format!("{} bytes follow the job", bytes.len())));
        }
        Ok(Job { argv, env, cwd, uid, terminal: (has_terminal != 0).then_some((rows, columns)), now, fetch })
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit status, 128 + n for a command that signal n killed.
    pub status: u8,
    /// How many processes the outer kernel killed for want of memory during the job.
    pub oom_kills: u32,
}

impl Exit {
    /// The payload of an `Exit` frame.
    pub fn encode(self) -> [u8; 5] {
        let [a, b, c, d] = self.oom_kills.to_le_bytes();
        [self.status, a, b, c, d]
    }

    /// Reads the payload of an `Exit` frame.
    ///
    /// # Errors
    /// `InvalidData` for a payload of another length.
    pub fn decode(bytes: &[u8]) -> io::Result<Exit> {
        let [status, oom_kills @ ..] =
            <[u8; 5]>::try_from(bytes).map_err(|_| invalid(format!("an Exit of {} bytes", bytes.len())))?;
        Ok(Exit { status, oom_kills: u32::from_le_bytes(oom_kills) })
    }
}

/// What an entry of an archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// Nothing follows.
    End = 0,
    /// A regular file; `size` bytes of content follow the header.
    File = 1,
    /// A directory; `size` is 0.
    Directory = 2,
    /// A symbolic link; the `size` bytes that follow are its target.
    Link = 3,
    /// A path that could not be read; the `size` bytes that follow say why.
    Missing = 4,
}

/// The head of an archive's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, without the file type.
    pub mode: u32,
    /// Bytes of content that follow.
    pub size: u64,
    /// Where it belongs.
    pub path: Vec<u8>,
}

impl Header {
    /// Writes the entry's head; exactly `size` bytes of content have to follow.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut bytes = vec![self.kind as u8];
        bytes.extend(self.mode.to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        put_bytes(&mut bytes, &self.path);
        out.write_all(&bytes)
    }

    /// Writes the entry that ends an archive.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_end(out: &mut impl Write) -> io::Result<()> {
        Header { kind: EntryKind::End, mode: 0, size: 0, path: Vec::new() }.write(out)
    }

    /// Reads an entry's head.
    ///
    /// # Errors
    /// Those of `input`, and `InvalidData` for an unknown kind or an absurd length.
    pub fn read(input: &mut impl Read) -> io::Result<Header> {
        let [kind] = get_array(input)?;
        let kind = match kind {
            0 => EntryKind::End,
            1 => EntryKind::File,
            2 => EntryKind::Directory,
            3 => EntryKind::Link,
            4 => EntryKind::Missing,
            _ => return Err(invalid(format!("an archive entry of unknown kind {kind}"))),
        };
        let mode = u32::from_le_bytes(get_array(input)?);
        let size = u64::from_le_bytes(get_array(input)?);
        let path = get_bytes(input)?;
        if !matches!(kind, EntryKind::File) && size > MAX_STRING as u64 {
            return Err(invalid(format!("a {kind:?} entry of {size} bytes")));
        }
        Ok(Header { kind, mode, size, path })
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

fn put_list(out: &mut Vec<u8>, list: &[Vec<u8>]) {
    out.extend((list.len() as u32).to_le_bytes());
    for member in list {
        put_bytes(out, member);
    }
}

fn get_array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut array = [0; N];
    input.read_exact(&mut array)?;
    Ok(array)
}

fn get_bytes(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let length = u32::from_le_bytes(get_array(input)?) as usize;
    if length > MAX_STRING {
        return Err(invalid(format!("a string of {length} bytes, above {MAX_STRING}")));
    }
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn get_list(input: &mut impl Read) -> io::Result<Vec<Vec<u8>>> {
    let length = u32::from_le_bytes(get_array(input)?) as usize;
    if length > MAX_LIST {
        return Err(invalid(format!("a list of {length} members, above {MAX_LIST}")));
    }
    (0..length).map(|_| get_bytes(input)).collect()
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
