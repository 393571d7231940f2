//! Disks of `pontoon run` in the lab: carried in as files, and those that were written carried out again.
//!
//! Opening an image checks and locks it just as a run on this host does, for as long as the lab runs. Inside, the image is a file in
//! the outer machine's memory, so its size counts there. When the command has ended, what comes out is compared with the image,
//! and only what differs is written to it, in place: the image keeps its inode, its owner and its holes. A lab that fails before
//! that leaves the image as it was.
//!
//! Refused: block devices, and more than fits the outer machine.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use devices::disk::{Disk, DiskMode};
use vmm::lab::Run;

use super::Failure;
use super::args::DiskSpec;

/// What is compared and written at once.
const CHUNK: usize = 1 << 20;

/// The disks of one run.
pub(crate) struct Carried {
    disks: Vec<One>,
    /// Where those that were written come out.
    folder: Option<tempfile::TempDir>,
}

struct One {
    spec: DiskSpec,
    inside: PathBuf,
    /// Holds the lock.
    disk: Disk,
}

impl Carried {
    /// Opens and locks the images.
    pub(crate) fn open(specs: &[DiskSpec]) -> Result<Self, Failure> {
        let mut disks = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let disk = Disk::open(&spec.path, spec.mode).map_err(Failure::usage)?;
            if spec.path.metadata().is_ok_and(|found| found.file_type().is_block_device()) {
                return Err(Failure::usage(anyhow!(
                    "{} is a block device of this host, which the lab does not have; use a file",
                    spec.path.display()
                )));
            }
            disks.push(One { spec: spec.clone(), inside: format!("/lab/disk{index}.img").into(), disk });
        }
        let written = disks.iter().any(|one| one.spec.mode == DiskMode::ReadWrite);
        let folder = written
            .then(tempfile::tempdir)
            .transpose()
            .context("making a folder for what the lab writes")
            .map_err(Failure::machine)?;
        Ok(Self { disks, folder })
    }

    /// Bytes that they take in the lab.
    pub(crate) fn bytes(&self) -> u64 {
        self.disks.iter().map(|one| one.disk.bytes()).sum()
    }

    /// Lets the run carry them, and says what `--disk` is to name inside.
    pub(crate) fn put(&self, run: &mut Run) -> Vec<String> {
        let mut words = Vec::with_capacity(self.disks.len());
        for one in &self.disks {
            run.put.push((one.spec.path.clone(), one.inside.clone()));
            if let Some(outside) = self.outside(one) {
                run.get.push((one.inside.clone(), outside));
            }
            words.push(format!("{}{}", one.inside.display(), one.spec.suffix()));
        }
        words
    }

    /// Writes back what has come out.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        for one in &self.disks {
            if let Some(outside) = self.outside(one) {
                update(&one.spec.path, &outside)
                    .with_context(|| {
                        format!("writing what the guest wrote back to {}", one.spec.path.display())
                    })
                    .map_err(Failure::machine)?;
            }
        }
        Ok(())
    }

    fn outside(&self, one: &One) -> Option<PathBuf> {
        let folder = self.folder.as_ref().filter(|_| one.spec.mode == DiskMode::ReadWrite)?;
        Some(folder.path().join(one.inside.file_name()?))
    }
}

/// Makes `image` equal to `new` where they differ, and lets it reach the disk.
fn update(image: &Path, new: &Path) -> io::Result<()> {
    let (old, new) = (OpenOptions::new().read(true).write(true).open(image)?, File::open(new)?);
    let (mut ours, mut theirs) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    loop {
        let n = new.read_at(&mut theirs, at)?;
        if n == 0 {
            return old.sync_data();
        }
        old.read_exact_at(&mut ours[..n], at)?;
        // Page by page, so that holes stay holes.
        for (offset, (ours, theirs)) in (0..).zip(ours[..n].chunks(4096).zip(theirs[..n].chunks(4096))) {
            if ours != theirs {
                old.write_all_at(theirs, at + offset * 4096)?;
            }
        }
        at += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written_back() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        let (image, new) = (dir.path().join("image"), dir.path().join("new"));
        let file = File::create(&image).expect("a new directory is writable");
        file.set_len(3 << 20).expect("it is writable");
        let mut bytes = vec![0; 3 << 20];
        bytes[2 << 20..][..10].fill(7);
        std::fs::write(&new, &bytes).expect("a new directory is writable");
        update(&image, &new).expect("both are there");
        assert_eq!(std::fs::read(&image).expect("it is there"), bytes);
        assert!(file.metadata().expect("it is open").blocks() <= 16, "the rest is a hole still");
    }
}
