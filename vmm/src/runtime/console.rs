//! `console.log`: where the console of a machine goes that nobody watches on a terminal.
//!
//! At most [`LOG_MAX`](super::LOG_MAX) bytes, then the file becomes `console.log.1` and a new one begins. A disk that is full costs output, never
//! the machine: what does not fit is counted, a line says so where the output goes on, and every later write is a new try.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A sink for [`MachineBuilder::serial_output`](crate::machine::MachineBuilder::serial_output) that is bounded and never fails.
///
/// ```
/// use std::io::Write;
///
/// use vmm::runtime::ConsoleLog;
///
/// # let folder = tempfile::tempdir()?;
/// let (path, old) = (folder.path().join("console.log"), folder.path().join("console.log.1"));
/// let mut log = ConsoleLog::create(&path, &old, 8)?;
/// log.write_all(b"first\n")?;
/// log.write_all(b"second\n")?;
/// assert_eq!((std::fs::read(&old)?, std::fs::read(&path)?), (b"first\n".to_vec(), b"second\n".to_vec()));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct ConsoleLog {
    path: PathBuf,
    old: PathBuf,
    file: File,
    len: u64,
    max: u64,
    /// Bytes that did not fit since the last that did.
    lost: u64,
    warned: bool,
}

impl ConsoleLog {
    /// A new, empty log at `path`; when it has `max` bytes it becomes `old`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path, old: &Path, max: u64) -> io::Result<Self> {
        let file = begin(path)?;
        Ok(Self { path: path.to_owned(), old: old.to_owned(), file, len: 0, max, lost: 0, warned: false })
    }

    fn rotate(&mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.old)?;
        self.file = begin(&self.path)?;
        self.len = 0;
        Ok(())
    }

    /// Appends all of it, or says how many bytes fitted.
    fn append(&mut self, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        while done < bytes.len() {
            match self.file.write(&bytes[done..]) {
                Ok(0) => return Err((done, io::ErrorKind::WriteZero.into())),
                Ok(n) => {
                    done += n;
                    self.len += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err((done, e)),
            }
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        if self.len > 0 && self.len + bytes.len() as u64 > self.max {
            self.rotate().map_err(|e| (0, e))?;
        }
        if self.lost > 0 {
            let gap = format!("\n[pontoon: {} bytes of output are missing here]\n", self.lost);
            self.append(gap.as_bytes()).map_err(|(_, e)| (0, e))?;
            self.lost = 0;
        }
        self.append(bytes)
    }
}

fn begin(path: &Path) -> io::Result<File> {
    // A new file each time: whoever follows the old one keeps it. Append mode survives a truncation by others.
    let _ = fs::remove_file(path);
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One piece never fills more than one file.
        let piece = &bytes[..bytes.len().min(usize::try_from(self.max).unwrap_or(usize::MAX))];
        if let Err((done, error)) = self.put(piece) {
            self.lost += (piece.len() - done) as u64;
            if !std::mem::replace(&mut self.warned, true) {
                tracing::warn!(file = %self.path.display(), %error, "the console's log cannot be written; output is lost until it can");
            }
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(max: u64) -> (tempfile::TempDir, ConsoleLog) {
        let dir = tempfile::tempdir().unwrap();
        let log = ConsoleLog::create(&dir.path().join("log"), &dir.path().join("old"), max).unwrap();
        (dir, log)
    }

    #[test]
    fn a_full_log_becomes_the_old_one_and_both_are_bounded() {
        let (dir, mut log) = log(10);
        for _ in 0..7 {
            log.write_all(b"1234").unwrap();
        }
        let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
        assert_eq!((read("old").as_slice(), read("log").as_slice()), (&b"12341234"[..], &b"1234"[..]));
        log.write_all(&[b'x'; 35]).unwrap();
        assert!(read("old").len() <= 10 && read("log").len() <= 10);
        assert!(read("log").iter().all(|b| *b == b'x'));
    }

    #[test]
    fn a_full_disk_costs_output_and_a_line_says_how_much() {
        let (dir, mut log) = log(1000);
        log.write_all(b"before").unwrap();
        let disk =
            std::mem::replace(&mut log.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        log.write_all(b"lost").unwrap();
        log.write_all(b"lost as well").unwrap();
        log.file = disk;
        log.write_all(b"after").unwrap();
        let text = fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(text, "before\n[pontoon: 16 bytes of output are missing here]\nafter");
    }
}
