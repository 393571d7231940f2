//! The port to the supervisor: frames in, frames out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::wire::{self, Kind};
use crate::{Context, Error};

/// The kernel's driver takes at most 32 KiB per write; a frame with its head stays below that.
pub(crate) const CHUNK: usize = (32 << 10) - 16;

/// How long the port may take to appear.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Link {
    port: File,
    /// Read, but not yet a whole frame.
    pending: Vec<u8>,
}

impl Link {
    /// Opens the only virtio-serial port, waiting for its driver to find it.
    pub(crate) fn open() -> Result<Link, Error> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(path) = find_port(Path::new("/dev"))? {
                let port = OpenOptions::new().read(true).write(true).open(&path);
                let port = port.context(|| format!("open {}", path.display()))?;
                return Ok(Link { port, pending: Vec::new() });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err("no virtio-serial port appeared in /dev".into())
    }

    pub(crate) fn send(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        wire::write_frame(&mut self.port, kind, payload)
    }

    /// Blocks for the next frame.
    pub(crate) fn receive(&mut self) -> io::Result<(Kind, Vec<u8>)> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(frame);
            }
            self.fill()?;
        }
    }

    /// A whole frame that has already been read, if there is one.
    pub(crate) fn take(&mut self) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let Some((kind, payload, length)) = wire::parse_frame(&self.pending)? else { return Ok(None) };
        let payload = payload.to_vec();
        self.pending.drain(..length);
        Ok(Some((kind, payload)))
    }

    /// Reads what there is, blocking for the first byte.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        let length = self.port.read(&mut buffer)?;
        if length == 0 {
            // Nobody is connected at the other end: between the snapshot and the resume, or for good.
            thread::sleep(Duration::from_millis(5));
        }
        self.pending.extend_from_slice(buffer.get(..length).unwrap_or_default());
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

/// Lets an archive be sent as `Fetched` frames.
pub(crate) struct Fetched<'a>(pub(crate) &'a mut Link);

impl Write for Fetched<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..CHUNK).unwrap_or(bytes);
        self.0.send(Kind::Fetched, piece)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn find_port(dev: &Path) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(dev)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"vport") {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
