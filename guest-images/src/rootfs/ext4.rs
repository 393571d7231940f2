//! Files out of an ext4 image without mounting it, by e2fsprogs' debugfs.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::host::Host;
use super::{Error, io_error};

/// Copies the kernel and the initrd of the highest release in `/boot` of the image `dir/disk` to `dir/vmlinuz` and
/// `dir/initrd`; returns the release.
pub(super) fn take_boot_files(host: &Host, dir: &Path, disk: &str) -> Result<String, Error> {
    let listing = debugfs(host, dir, disk, "ls -p /boot")?;
    let release = newest_release(&listing).ok_or(Error::NoKernel("vmlinuz"))?;
    for (from, to, what) in [("vmlinuz", "vmlinuz", "vmlinuz"), ("initrd.img", "initrd", "initrd.img")] {
        // The file's name comes from the image: it was checked to be of the harmless kind.
        debugfs(host, dir, disk, &format!("dump /boot/{from}-{release} {to}"))?;
        if !fs::metadata(dir.join(to)).is_ok_and(|meta| meta.len() > 0) {
            return Err(Error::NoKernel(what));
        }
    }
    Ok(release)
}

/// What debugfs prints for one request. Its exit status is 0 whatever happened: what matters is looked at.
fn debugfs(host: &Host, dir: &Path, disk: &str, request: &str) -> Result<String, Error> {
    let mut command = Command::new(&host.debugfs);
    command.args(["-R", request, disk]).current_dir(dir).env("LC_ALL", "C").env("DEBUGFS_PAGER", "__none__");
    let output = command.output().map_err(io_error("run", &host.debugfs))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(Error::Failed { action: "reading the new file system with debugfs", said })
}

/// The highest release that a listing by `ls -p` (`/inode/mode/uid/gid/name/size/`) has a kernel of.
pub(super) fn newest_release(listing: &str) -> Option<String> {
    let releases = listing.lines().filter_map(|line| line.split('/').nth(5)?.strip_prefix("vmlinuz-"));
    let harmless = |name: &&str| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.~_".contains(&byte))
    };
    releases.filter(harmless).max_by_key(|name| numbers(name)).map(str::to_owned)
}

/// A release's numbers: 6.12.9 comes after 6.1.140, whatever strings say.
fn numbers(release: &str) -> Vec<u64> {
    let digits = release.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    digits.map(|digits| digits.parse().unwrap_or(u64::MAX)).collect()
}
