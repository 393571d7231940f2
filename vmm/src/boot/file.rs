//! [`ImageFile`]: a kernel's file, whose headers are read once.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Bytes from the start that are read at once: the headers of every kernel, which the checks and the loader look at
/// field by field.
const HEAD: usize = 4096;

/// A file with its first bytes in memory. Seeking costs nothing; what lies behind the head is read straight to where it belongs.
pub(super) struct ImageFile {
    file: File,
    head: Vec<u8>,
    len: u64,
    at: u64,
    /// Where the file itself stands.
    file_at: u64,
}

impl ImageFile {
    /// Reads the head. Fails for what can't be sought in, such as a pipe.
    pub(super) fn new(mut file: File) -> io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        let mut head = vec![0; HEAD];
        let mut filled = 0;
        while filled < HEAD.min(usize::try_from(len).unwrap_or(HEAD)) {
            match file.read_at(&mut head[filled..], filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        head.truncate(filled);
        Ok(Self { file, head, len, at: 0, file_at: len })
    }

    /// What of the head lies at the current place.
    fn rest_of_head(&self) -> &[u8] {
        usize::try_from(self.at).ok().and_then(|at| self.head.get(at..)).unwrap_or_default()
    }
}

impl Seek for ImageFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl Read for ImageFile {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = match self.rest_of_head() {
            [] => self.file.read_at(into, self.at)?,
            mut head => head.read(into)?,
        };
        self.at += n as u64;
        Ok(n)
    }
}

impl ReadVolatile for ImageFile {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        into: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let n = match self.rest_of_head() {
            [] => {
                if self.file_at != self.at {
                    self.file.seek(SeekFrom::Start(self.at)).map_err(VolatileMemoryError::IOError)?;
                }
                let n = self.file.read_volatile(into)?;
                self.file_at = self.at + n as u64;
                n
            }
            mut head => head.read_volatile(into)?,
        };
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Any way through the file gives its bytes, and nothing behind its end.
        #[test]
        fn every_read_gives_what_the_file_has(
            len in 0usize..3 * HEAD,
            steps in proptest::collection::vec((0usize..4 * HEAD, 0usize..2 * HEAD, any::<bool>(), any::<bool>()), 1..9),
        ) {
            let bytes: Vec<u8> = (0..len).map(|n| (n * 7 + n / 251) as u8).collect();
            let mut file = tempfile::tempfile().unwrap();
            std::io::Write::write_all(&mut file, &bytes).unwrap();
            let mut image = ImageFile::new(file).unwrap();
            prop_assert_eq!(image.seek(SeekFrom::End(0)).unwrap(), len as u64);
            let mut at = len;
            for (to, room, seeks, volatile) in steps {
                if seeks {
                    at = image.seek(SeekFrom::Start(to as u64)).unwrap() as usize;
                }
                let mut into = vec![0; room];
                let n = if volatile {
                    image.read_volatile(&mut VolatileSlice::from(&mut into[..])).unwrap()
                } else {
                    image.read(&mut into).unwrap()
                };
                let left = bytes.get(at..).unwrap_or_default();
                prop_assert!(n <= room && (n > 0 || room == 0 || left.is_empty()));
                prop_assert_eq!(&into[..n], &left[..n]);
                at += n;
            }
        }
    }
}
