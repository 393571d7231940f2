//! Files and folders into frames, and frames into files and folders: both ends of a copy, for the host and for the agent.
//!
//! This one file is compiled into both (see [`wire`](super::wire) for the frames). [`Sender`] walks a tree; [`Receiver`] makes
//! one. Neither holds more than one frame.
//!
//! # What a receiver promises, whoever sends
//!
//! - It writes at the destination and below, nowhere else: every name is one component, checked, and is used relative to the
//!   descriptor of the folder that it belongs to, never following a link. A link that came in an entry is made and never used.
//!   A folder that is a link at the receiver's is refused.
//! - What is there under a file's or link's name is replaced, not written through, unless it is a folder, which is an error.
//!   (The destination itself is the user's own choice: a file there is written, a device or a link too.)
//! - Modes keep their nine permission bits; set-user-ID and the like are dropped. Times are kept.
//! - At most [`Receiver::limit`] bytes of content are written, [`wire::MAX_DEPTH`] folders deep.
//!
//! What a sender leaves out (devices, sockets, pipes, what vanished meanwhile) is named in `Skipped` entries. A link that
//! the user names is followed, links within a tree are carried.

use core::ffi::CStr;
use core::mem::MaybeUninit;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat, Timespec, Timestamps, fchmod, fstat, futimens,
    mkdirat, openat, readlinkat_raw, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::wire::{self, Entry, EntryKind, Kind, Refused};

/// The connection that a tree goes over.
pub trait Link {
    /// Why it failed.
    type Error;

    /// Sends one frame.
    ///
    /// # Errors
    /// When the connection is no more.
    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Self::Error>;

    /// Receives one frame: its kind and the length of its payload, which is put into `payload` ([`wire::MAX_FRAME`] bytes).
    ///
    /// # Errors
    /// When the connection is no more, or the frame is none.
    fn receive(&mut self, payload: &mut [u8]) -> Result<(Kind, usize), Self::Error>;

    /// Something was left out: its path within the tree, and why.
    fn skipped(&mut self, path: &[u8], why: &[u8]);
}

/// Why a copy failed. Where it did is in [`Trail`].
#[derive(Debug, PartialEq, Eq)]
pub enum Problem<E> {
    /// The connection failed.
    Link(E),
    /// The system refused this: `open`, `write`, …
    System(&'static str, Errno),
    /// The other side sent something that it may not.
    Refused(Refused),
    /// The tree cannot be carried.
    Unfit(&'static str),
}

impl<E> From<Refused> for Problem<E> {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

/// Turns an error number into a problem.
fn system<E>(doing: &'static str) -> impl FnOnce(Errno) -> Problem<E> {
    move |errno| Problem::System(doing, errno)
}

/// What was carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Regular files.
    pub files: u64,
    /// Folders.
    pub folders: u64,
    /// Symbolic links.
    pub links: u64,
    /// Left out.
    pub skipped: u64,
    /// Bytes of content.
    pub bytes: u64,
}

/// Where in the tree a walk is: names joined by `/`. What does not fit is cut; it is for messages only.
#[derive(Debug)]
pub struct Trail {
    bytes: [u8; 1024],
    length: usize,
}

impl Trail {
    fn new() -> Self {
        Self { bytes: [0; 1024], length: 0 }
    }

    /// The path within the tree; empty for its own entry.
    pub fn path(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// Appends a name; the length to go back to.
    fn enter(&mut self, name: &CStr) -> usize {
        let before = self.length;
        let slash: &[u8] = if before == 0 { b"" } else { b"/" };
        for part in [slash, name.to_bytes()] {
            let room = self.bytes.get_mut(self.length..).unwrap_or_default();
            let fits = room.len().min(part.len());
            for (to, from) in room.iter_mut().zip(part) {
                *to = *from;
            }
            self.length += fits;
        }
        before
    }

    fn leave(&mut self, before: usize) {
        self.length = before;
    }
}

fn modified(stat: &Stat) -> (i64, u32) {
    (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

/// Sends a tree.
pub struct Sender<'a, L> {
    link: &'a mut L,
    /// One frame's worth of content.
    buffer: [u8; wire::MAX_FRAME],
    /// Where it is, or where it failed.
    pub trail: Trail,
    /// What was sent.
    pub totals: Totals,
}

impl<'a, L: Link> Sender<'a, L> {
    /// A sender over this connection.
    pub fn new(link: &'a mut L) -> Self {
        Self { link, buffer: [0; wire::MAX_FRAME], trail: Trail::new(), totals: Totals::default() }
    }

    /// Sends the file or folder at `path`, to the end.
    ///
    /// # Errors
    /// [`Problem`]; the other side has an unfinished tree then.
    pub fn tree(&mut self, path: &CStr) -> Result<(), Problem<L::Error>> {
        // Looked at before it is opened: opening a device can do things.
        let stat = statat(CWD, path, AtFlags::empty()).map_err(system("find"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
                self.file(&file.map_err(system("open"))?, c"")?;
            }
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let folder = openat(CWD, path, flags, Mode::empty()).map_err(system("open"))?;
                self.folder(folder.as_fd(), c"", 0)?;
            }
            _ => return Err(Problem::Unfit("it is neither a file nor a folder")),
        }
        self.send(Kind::End, 0)
    }

    /// Sends what is read from `file` as a tree of one file.
    ///
    /// # Errors
    /// As [`Sender::tree`].
    pub fn stream(&mut self, file: BorrowedFd<'_>, mode: u32) -> Result<(), Problem<L::Error>> {
        let (name, target) = (c"", c"");
        self.entry(&Entry { kind: EntryKind::File, mode, modified: (0, 0), size: 0, name, target })?;
        self.content(file)?;
        self.send(Kind::End, 0)
    }

    /// Sends a frame whose payload is the first `length` bytes of the buffer.
    fn send(&mut self, kind: Kind, length: usize) -> Result<(), Problem<L::Error>> {
        let payload = self.buffer.get(..length).unwrap_or_default();
        self.link.send(kind, payload).map_err(Problem::Link)
    }

    fn entry(&mut self, entry: &Entry<'_>) -> Result<(), Problem<L::Error>> {
        let length = entry.encode(&mut self.buffer)?;
        self.send(Kind::Entry, length)
    }

    fn content(&mut self, file: BorrowedFd<'_>) -> Result<(), Problem<L::Error>> {
        loop {
            let length = match rustix::io::read(file, &mut self.buffer[..]) {
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Problem::System("read", errno)),
            };
            self.send(Kind::Content, length)?;
            self.totals.bytes += length as u64;
            if length == 0 {
                self.totals.files += 1;
                return Ok(());
            }
        }
    }

    fn file(&mut self, file: &OwnedFd, name: &CStr) -> Result<(), Problem<L::Error>> {
        let stat = fstat(file).map_err(system("look at"))?;
        self.entry(&Entry {
            kind: EntryKind::File,
            mode: stat.st_mode & 0o777,
            modified: modified(&stat),
            size: u64::try_from(stat.st_size).unwrap_or(0),
            name,
            target: c"",
        })?;
        self.content(file.as_fd())
    }

    fn folder(&mut self, folder: BorrowedFd<'_>, name: &CStr, depth: usize) -> Result<(), Problem<L::Error>> {
        if depth >= wire::MAX_DEPTH {
            return Err(Problem::Unfit("there are more than 128 folders within each other"));
        }
        let stat = fstat(folder).map_err(system("look at"))?;
        let (kind, mode) = (EntryKind::Folder, stat.st_mode & 0o777);
        self.entry(&Entry { kind, mode, modified: modified(&stat), size: 0, name, target: c"" })?;
        // Room for a handful of entries; the longest has 280 bytes.
        let mut room = [MaybeUninit::<u8>::uninit(); 2048];
        let mut members = RawDir::new(folder, &mut room);
        while let Some(member) = members.next() {
            let member = member.map_err(system("read"))?;
            let name = member.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let before = self.trail.enter(name);
            self.member(folder, name, depth)?;
            self.trail.leave(before);
        }
        self.totals.folders += 1;
        self.send(Kind::Up, 0)
    }

    fn member(&mut self, folder: BorrowedFd<'_>, name: &CStr, depth: usize) -> Result<(), Problem<L::Error>> {
        let open = |flags: OFlags| {
            let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(folder, name, flags, Mode::empty())
        };
        let stat = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return self.skip(name, c"it vanished"),
            Err(errno) => return Err(Problem::System("look at", errno)),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            // Not blocking, in case that it has become a pipe since it was looked at.
            FileType::RegularFile => match open(OFlags::NONBLOCK) {
                Ok(file) => self.file(&file, name),
                Err(Errno::NOENT) => self.skip(name, c"it vanished"),
                Err(errno) => Err(Problem::System("open", errno)),
            },
            FileType::Directory => {
                let below = open(OFlags::DIRECTORY).map_err(system("open"))?;
                self.folder(below.as_fd(), name, depth + 1)
            }
            FileType::Symlink => self.link(folder, name, &stat),
            FileType::Socket => self.skip(name, c"it is a socket"),
            FileType::Fifo => self.skip(name, c"it is a pipe"),
            _ => self.skip(name, c"it is a device"),
        }
    }

    fn link(&mut self, folder: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<(), Problem<L::Error>> {
        let mut room = [0; wire::MAX_TARGET + 1];
        let length = match readlinkat_raw(folder, name, &mut room[..wire::MAX_TARGET]) {
            Ok(length) => length,
            Err(Errno::NOENT | Errno::INVAL) => return self.skip(name, c"it changed"),
            Err(errno) => return Err(Problem::System("read the link", errno)),
        };
        let target = room.get(..=length).and_then(|bytes| CStr::from_bytes_with_nul(bytes).ok());
        let Some(target) = target.filter(|target| !target.is_empty()) else {
            return self.skip(name, c"its target is none");
        };
        let kind = EntryKind::Link;
        self.entry(&Entry { kind, mode: 0o777, modified: modified(stat), size: 0, name, target })?;
        self.totals.links += 1;
        Ok(())
    }

    fn skip(&mut self, name: &CStr, why: &CStr) -> Result<(), Problem<L::Error>> {
        let kind = EntryKind::Skipped;
        self.entry(&Entry { kind, mode: 0, modified: (0, 0), size: 0, name, target: why })?;
        self.totals.skipped += 1;
        self.link.skipped(self.trail.path(), why.to_bytes());
        Ok(())
    }
}

/// What is at a file's own place.
enum Place<'a> {
    /// The destination, as the user gave it.
    Destination(&'a CStr),
    /// A name in a folder that is being received.
    Member(BorrowedFd<'a>, &'a CStr),
}

/// Receives a tree.
pub struct Receiver<'a, L> {
    link: &'a mut L,
    buffer: [u8; wire::MAX_FRAME],
    /// Where it is, or where it failed.
    pub trail: Trail,
    /// What was received.
    pub totals: Totals,
    /// The most bytes of content.
    pub limit: u64,
}

impl<'a, L: Link> Receiver<'a, L> {
    /// A receiver over this connection, for at most `limit` bytes of content.
    pub fn new(link: &'a mut L, limit: u64) -> Self {
        let (trail, totals) = (Trail::new(), Totals::default());
        Self { link, buffer: [0; wire::MAX_FRAME], trail, totals, limit }
    }

    /// Receives a tree as `destination`, which need not exist; what it is in must.
    ///
    /// # Errors
    /// [`Problem`]; what came before it is there.
    pub fn tree(&mut self, destination: &CStr) -> Result<(), Problem<L::Error>> {
        let (kind, length) = self.next()?;
        let mut root = [0; 64];
        let entry = self.copied(kind, length, &mut root, true)?;
        match entry.kind {
            EntryKind::File => self.file(&Place::Destination(destination), &entry)?,
            EntryKind::Folder => {
                let (folder, is_new) = self.open_root(destination)?;
                self.members(folder.as_fd(), 0)?;
                if is_new {
                    finish(&folder, &entry)?;
                }
            }
            EntryKind::Link | EntryKind::Skipped => {
                return Err(Refused::Payload(Kind::Entry, "no content").into());
            }
        }
        self.end()
    }

    /// Receives a tree of one file into `file`.
    ///
    /// # Errors
    /// [`Problem`]; a folder is refused.
    pub fn stream(&mut self, file: BorrowedFd<'_>) -> Result<(), Problem<L::Error>> {
        let (kind, length) = self.next()?;
        let mut root = [0; 64];
        if self.copied(kind, length, &mut root, true)?.kind != EntryKind::File {
            return Err(Problem::Unfit("it is a folder; give a folder to copy it to"));
        }
        self.content(file)?;
        self.end()
    }

    fn next(&mut self) -> Result<(Kind, usize), Problem<L::Error>> {
        self.link.receive(&mut self.buffer).map_err(Problem::Link)
    }

    fn end(&mut self) -> Result<(), Problem<L::Error>> {
        match self.next()? {
            (Kind::End, 0) => Ok(()),
            (kind, _) => Err(Refused::Payload(kind, "a tree that had ended").into()),
        }
    }

    /// Decodes an entry whose strings shall outlive the buffer.
    fn copied<'e>(
        &self,
        kind: Kind,
        length: usize,
        room: &'e mut [u8],
        root: bool,
    ) -> Result<Entry<'e>, Problem<L::Error>> {
        if kind != Kind::Entry {
            return Err(Refused::Payload(kind, "no place in a tree here").into());
        }
        let payload = self.buffer.get(..length).unwrap_or_default();
        let Some(room) = room.get_mut(..length) else {
            return Err(Refused::Payload(kind, "more bytes than an entry has").into());
        };
        room.copy_from_slice(payload);
        Ok(Entry::decode(room, root)?)
    }

    /// The folder at the destination, and whether it was made just now.
    fn open_root(&self, destination: &CStr) -> Result<(OwnedFd, bool), Problem<L::Error>> {
        let is_new = match mkdirat(CWD, destination, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(Problem::System("make", errno)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok((openat(CWD, destination, flags, Mode::empty()).map_err(system("open"))?, is_new))
    }

    /// Receives a folder's members, to the frame that leaves it.
    fn members(&mut self, folder: BorrowedFd<'_>, depth: usize) -> Result<(), Problem<L::Error>> {
        if depth >= wire::MAX_DEPTH {
            return Err(Refused::Payload(Kind::Entry, "too deep a folder").into());
        }
        loop {
            match self.next()? {
                (Kind::Up, 0) => {
                    self.totals.folders += 1;
                    return Ok(());
                }
                (kind, length) => self.member(folder, kind, length, depth)?,
            }
        }
    }

    fn member(
        &mut self,
        folder: BorrowedFd<'_>,
        kind: Kind,
        length: usize,
        depth: usize,
    ) -> Result<(), Problem<L::Error>> {
        // Kept on the stack of this call only while a folder's members come, for the folder's mode, time and name.
        let mut room = [0; 32 + wire::MAX_NAME + wire::MAX_TARGET];
        let entry = self.copied(kind, length, &mut room, false)?;
        let before = self.trail.enter(entry.name);
        match entry.kind {
            EntryKind::File => self.file(&Place::Member(folder, entry.name), &entry)?,
            EntryKind::Folder => {
                let below = self.make_folder(folder, entry.name)?;
                self.members(below.as_fd(), depth + 1)?;
                finish(&below, &entry)?;
            }
            EntryKind::Link => self.make_link(folder, &entry)?,
            EntryKind::Skipped => {
                self.totals.skipped += 1;
                self.link.skipped(self.trail.path(), entry.target.to_bytes());
            }
        }
        self.trail.leave(before);
        Ok(())
    }

    fn make_folder(&self, folder: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Problem<L::Error>> {
        match mkdirat(folder, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(Problem::System("make", errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(folder, name, flags, Mode::empty()).map_err(system("open the folder"))
    }

    fn make_link(&mut self, folder: BorrowedFd<'_>, entry: &Entry<'_>) -> Result<(), Problem<L::Error>> {
        remove(folder, entry.name)?;
        symlinkat(entry.target, folder, entry.name).map_err(system("make the link"))?;
        // A file system without times for links is no reason to fail.
        let _ = utimensat(folder, entry.name, &times(entry), AtFlags::SYMLINK_NOFOLLOW);
        self.totals.links += 1;
        Ok(())
    }

    fn file(&mut self, place: &Place<'_>, entry: &Entry<'_>) -> Result<(), Problem<L::Error>> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOCTTY | OFlags::CLOEXEC;
        let private = Mode::RUSR | Mode::WUSR;
        let file = match place {
            Place::Destination(path) => openat(CWD, *path, flags | OFlags::TRUNC, private),
            Place::Member(folder, name) => {
                remove(*folder, name)?;
                openat(*folder, *name, flags | OFlags::EXCL | OFlags::NOFOLLOW, private)
            }
        };
        let file = file.map_err(system("make"))?;
        self.content(file.as_fd())?;
        // The user may have named a device.
        let stat = fstat(&file).map_err(system("look at"))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            finish(&file, entry)?;
        }
        Ok(())
    }

    fn content(&mut self, file: BorrowedFd<'_>) -> Result<(), Problem<L::Error>> {
        loop {
            let length = match self.next()? {
                (Kind::Content, 0) => {
                    self.totals.files += 1;
                    return Ok(());
                }
                (Kind::Content, length) => length,
                (kind, _) => return Err(Refused::Payload(kind, "no place in a file").into()),
            };
            self.totals.bytes = self.totals.bytes.saturating_add(length as u64);
            if self.totals.bytes > self.limit {
                return Err(Problem::Unfit("it is larger than the limit that was set"));
            }
            let mut rest = self.buffer.get(..length).unwrap_or_default();
            while !rest.is_empty() {
                match rustix::io::write(file, rest) {
                    Ok(0) => return Err(Problem::System("write", Errno::IO)),
                    Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(Problem::System("write", errno)),
                }
            }
        }
    }
}

/// Takes what has this name out of the way, unless it is a folder.
fn remove<E>(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Problem<E>> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(Problem::System("replace", errno)),
    }
}

fn times(entry: &Entry<'_>) -> Timestamps {
    let (seconds, nanoseconds) = entry.modified;
    let modified = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: modified, last_modification: modified }
}

/// Gives a file or folder that is complete its mode and time.
fn finish<E>(file: &OwnedFd, entry: &Entry<'_>) -> Result<(), Problem<E>> {
    fchmod(file, Mode::from_raw_mode(entry.mode & 0o777)).map_err(system("set the mode of"))?;
    // What came from a stream has no time.
    if entry.modified != (0, 0) {
        futimens(file, &times(entry)).map_err(system("set the time of"))?;
    }
    Ok(())
}
