//! Disks of `pontoon run` in the lab: files and block devices of this host become disks of the emulated one (`vmm::lab::Disk`), whatever their size;
//! nothing is copied.
//!
//! Opening an image checks and locks it just as a run on this host does, for as long as the lab runs. What the guest writes to an
//! image reaches it at once; what an overlay's guest writes is kept apart by the emulator, in a file of this host that has no name.

use devices::disk::{Disk, DiskMode};
use vmm::lab::{self, DiskAccess, Run};

use super::Failure;
use super::args::DiskSpec;

/// The disks of one run, locked as long as this lives.
pub(crate) struct Carried {
    disks: Vec<(DiskSpec, Disk)>,
}

impl Carried {
    /// Opens and locks the images.
    pub(crate) fn open(specs: &[DiskSpec]) -> Result<Self, Failure> {
        let open = |spec: &DiskSpec| Ok((spec.clone(), Disk::open(&spec.path, spec.mode)?));
        let disks = specs.iter().map(open).collect::<Result<_, devices::disk::DiskError>>();
        Ok(Self { disks: disks.map_err(Failure::usage)? })
    }

    /// Gives the run these disks, and says what `--disk` is to name inside.
    pub(crate) fn put(&self, run: &mut Run) -> Vec<String> {
        let mut words = Vec::with_capacity(self.disks.len());
        for (spec, _) in &self.disks {
            let (access, suffix) = match spec.mode {
                DiskMode::ReadWrite => (DiskAccess::ReadWrite, ""),
                DiskMode::ReadOnly => (DiskAccess::ReadOnly, ",ro"),
                // Inside, an overlay would be in the outer machine's memory.
                DiskMode::Overlay => (DiskAccess::Private, ""),
            };
            words.push(format!("{}{suffix}", lab::disk_device(run.disks.len()).display()));
            run.disks.push(lab::Disk { path: spec.path.clone(), access });
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn each_disk_becomes_one_of_the_labs_in_order() {
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        let spec = |name: &str, mode| {
            let path: PathBuf = dir.path().join(name);
            std::fs::write(&path, [1; 512]).expect("a new directory is writable");
            DiskSpec { path, mode }
        };
        let specs =
            [spec("a", DiskMode::Overlay), spec("b", DiskMode::ReadOnly), spec("c", DiskMode::ReadWrite)];
        let carried = Carried::open(&specs).unwrap_or_else(|_| unreachable!("they are images"));
        let mut run = Run::new(["true"]);
        assert_eq!(carried.put(&mut run), ["/dev/vdb", "/dev/vdc,ro", "/dev/vdd"]);
        let access: Vec<_> = run.disks.iter().map(|disk| disk.access).collect();
        assert_eq!(access, [DiskAccess::Private, DiskAccess::ReadOnly, DiskAccess::ReadWrite]);
        assert!(Carried::open(&specs[2..]).is_err(), "it is locked while the lab runs");
    }
}
