//! Files and folders into the machine and out of it.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::client::Client;
use super::error::{AgentError, local, shown};
use super::link::Link;
use super::tree::{Problem, Receiver, Sender, Totals, Trail};
use super::wire::{Encoder, Kind, MAX_REQUEST, Put};

/// What was copied.
///
/// ```no_run
/// # let agent = vmm::agent::Client::vsock("vsock.sock");
/// // A folder's content, of at most 1 GiB: a guest must not fill this host's disk.
/// let copied = agent.get("/root/results/.", "results", 1 << 30)?;
/// println!("{} files, {} bytes", copied.files, copied.bytes);
/// for (path, why) in &copied.left_out_names {
///     println!("without {path}: {why}");
/// }
/// # Ok::<(), vmm::agent::AgentError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Regular files.
    pub files: u64,
    /// Folders.
    pub folders: u64,
    /// Symbolic links.
    pub links: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// How many things were left out: devices, sockets, pipes, and what vanished meanwhile.
    pub left_out: u64,
    /// The first hundred of them: path within the tree, and why.
    pub left_out_names: Vec<(String, String)>,
}

impl Copied {
    fn new(totals: Totals, link: &mut Link) -> Self {
        let Totals { files, folders, links, skipped, bytes } = totals;
        let names = std::mem::take(&mut link.skipped);
        let left_out_names = names.iter().map(|(path, why)| (shown(path), shown(why))).collect();
        Self { files, folders, links, bytes, left_out: skipped, left_out_names }
    }
}

/// The path's last component as a name, if it has one: `..` and `/` have none, nor has `folder/.`, which means what is in it.
fn name_of(path: &Path) -> Option<&OsStr> {
    let means_content = path.as_os_str().as_bytes().ends_with(b"/.") || path.as_os_str() == ".";
    path.file_name().filter(|_| !means_content)
}

fn c_string(path: &Path) -> Result<CString, AgentError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| AgentError::Request(format!("the path {}", path.display())))
}

impl Client {
    /// Copies a file or folder of this host into the machine: as `destination`, or into it under its own name if that is a folder
    /// there. `folder/.` means what is in the folder.
    ///
    /// Modes (nine bits) and times are kept; everything belongs to root. Links within a folder stay links.
    ///
    /// # Errors
    /// [`AgentError`]; what came before the error is there.
    pub fn put(&self, source: impl AsRef<Path>, destination: impl AsRef<Path>) -> Result<Copied, AgentError> {
        let (source, destination) = (source.as_ref(), destination.as_ref());
        let path = c_string(source)?;
        let name = name_of(source).unwrap_or_default().as_bytes();
        self.put_with(destination, name, |sender| {
            let outcome = sender.tree(&path);
            outcome.map_err(|problem| explain(problem, source, &sender.trail))
        })
    }

    /// Copies what can be read from a descriptor, to its end, into the machine as a file with this mode.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn put_stream(
        &self,
        source: BorrowedFd<'_>,
        destination: &Path,
        mode: u32,
    ) -> Result<Copied, AgentError> {
        self.put_with(destination, b"", |sender| {
            let outcome = sender.stream(source, mode);
            outcome.map_err(|problem| explain(problem, Path::new("standard input"), &sender.trail))
        })
    }

    fn put_with(
        &self,
        destination: &Path,
        name: &[u8],
        send: impl FnOnce(&mut Sender<'_, Link>) -> Result<(), AgentError>,
    ) -> Result<Copied, AgentError> {
        let mut payload = vec![0; MAX_REQUEST];
        let destination = destination.as_os_str().as_bytes();
        let length = Put::encode(&mut payload, destination, name)
            .map_err(|refused| AgentError::Request(refused.to_string()))?;
        let mut link = self.link()?;
        link.queue(Kind::Put, &payload[..length]);
        let mut sender = Sender::new(&mut link);
        send(&mut sender)?;
        let totals = sender.totals;
        match link.answer(link.patience)? {
            (Kind::Done, _) => Ok(Copied::new(totals, &mut link)),
            (kind, _) => Err(AgentError::Protocol(format!("{kind:?} in answer to a tree"))),
        }
    }

    /// Copies a file or folder of the machine to this host: as `destination`, or into it under its own name if that is a folder.
    /// `folder/.` means what is in the folder. At most `limit` bytes of content are written.
    ///
    /// Nothing is written but the destination and what is below it, whatever the machine sends; set-user-ID bits are dropped.
    ///
    /// # Errors
    /// [`AgentError`]; what came before the error is there.
    pub fn get(
        &self,
        source: impl AsRef<Path>,
        destination: impl AsRef<Path>,
        limit: u64,
    ) -> Result<Copied, AgentError> {
        let (source, destination) = (source.as_ref(), destination.as_ref());
        let place = match name_of(source) {
            Some(name) if destination.is_dir() => destination.join(name),
            _ => destination.to_path_buf(),
        };
        let path = c_string(&place)?;
        self.get_with(source, limit, |receiver| {
            let outcome = receiver.tree(&path);
            outcome.map_err(|problem| explain(problem, &place, &receiver.trail))
        })
    }

    /// Copies a file of the machine to a descriptor.
    ///
    /// # Errors
    /// [`AgentError`]; a folder is refused.
    pub fn get_stream(&self, source: &Path, into: BorrowedFd<'_>, limit: u64) -> Result<Copied, AgentError> {
        self.get_with(source, limit, |receiver| {
            let outcome = receiver.stream(into);
            outcome.map_err(|problem| explain(problem, source, &receiver.trail))
        })
    }

    fn get_with(
        &self,
        source: &Path,
        limit: u64,
        receive: impl FnOnce(&mut Receiver<'_, Link>) -> Result<(), AgentError>,
    ) -> Result<Copied, AgentError> {
        let mut payload = vec![0; MAX_REQUEST];
        let length = Encoder::new(&mut payload)
            .string(source.as_os_str().as_bytes())
            .finish(Kind::Get)
            .map_err(|refused| AgentError::Request(refused.to_string()))?;
        let mut link = self.link()?;
        link.queue(Kind::Get, &payload[..length]);
        link.flush()?;
        let mut receiver = Receiver::new(&mut link, limit);
        receive(&mut receiver)?;
        let totals = receiver.totals;
        Ok(Copied::new(totals, &mut link))
    }
}

/// A problem of a copy, with the path at which it came up.
fn explain(problem: Problem<AgentError>, root: &Path, trail: &Trail) -> AgentError {
    let below = shown(trail.path());
    let path =
        if below.is_empty() { root.display().to_string() } else { format!("{}/{below}", root.display()) };
    match problem {
        Problem::Link(error) => error,
        Problem::System(doing, errno) => local(format!("{doing} {path}"))(io::Error::from(errno)),
        Problem::Refused(refused) => AgentError::Protocol(refused.to_string()),
        Problem::Unfit(reason) => AgentError::Unfit { path, reason: reason.to_owned() },
    }
}
