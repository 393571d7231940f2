//! Disks of whole machines: what a stock guest writes is where it belongs, and nowhere else.
//!
//! Stock guests run in the lab, where disks are carried in and out; what concerns locks and files is shown with the probe.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pontoon_tests::{Pontoon, Probe, debian_image, have_kvm, shell_beside_image, skip, text};

const MIB: u64 = 1 << 20;

/// A script in a stock Debian guest, in the lab, with these disks.
fn debian(disks: &[String], script: &str) -> Output {
    let head = ["run", "debian", "--accel", "lab", "--timeout", "120", "--net", "none"];
    let disks = disks.iter().flat_map(|disk| ["--disk", disk]);
    Pontoon::new(head.into_iter().chain(disks).chain(["--", "sh", "-c", script])).output()
}

/// An image of `mib` MiB whose sectors begin with their numbers.
fn image(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    let file = File::create(&path).expect("a new directory is writable");
    file.set_len(mib * MIB).expect("there is room");
    for sector in (0..mib * MIB / 512).step_by(64) {
        file.write_all_at(format!("sector {sector}\n").as_bytes(), sector * 512).expect("there is room");
    }
    path
}

fn name(path: &Path) -> String {
    path.to_str().expect("a temporary path is text").to_owned()
}

#[test]
fn a_stock_guest_writes_its_disk_reads_another_and_overlays_a_third() {
    if debian_image().is_none() {
        return;
    }
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let [mine, fixed, base] = ["mine.img", "fixed.img", "base.img"].map(|name| image(dir.path(), name, 4));
    let before = [&fixed, &base].map(|path| fs::read(path).expect("it was just made"));
    let script = "
        set -e
        echo sizes $(cat /sys/block/vda/size /sys/block/vdb/size /sys/block/vdc/size)
        echo cache $(cat /sys/block/vda/queue/write_cache)
        echo ids $(cat /sys/block/vd[abc]/serial)
        echo ro $(cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/ro)
        echo found $(dd if=/dev/vdb bs=512 skip=64 count=1 2>/dev/null | head -n 1)
        echo written by the guest | dd of=/dev/vda bs=512 seek=64 conv=notrunc,fsync 2>/dev/null
        yes more of it | dd of=/dev/vda bs=64k seek=16 count=8 iflag=fullblock conv=notrunc 2>/dev/null
        sync
        echo overlaid | dd of=/dev/vdc bs=512 seek=128 conv=notrunc,fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        echo overlay $(dd if=/dev/vdc bs=512 skip=128 count=1 2>/dev/null | head -n 1)
        if echo x | dd of=/dev/vdb conv=notrunc,fsync 2>/dev/null; then echo vdb was written; exit 1; fi
        exit 7";
    let disks = [name(&mine), format!("{},ro", name(&fixed)), format!("{},overlay", name(&base))];
    let output = debian(&disks, script);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(7), "{all}");
    for fact in [
        "sizes 8192 8192 8192",
        "cache write back",
        "ids disk0disk1disk2",
        "ro 0 1 0",
        "found sector 64",
        "overlay overlaid",
    ] {
        assert!(all.contains(fact), "'{fact}' is missing\n{all}");
    }
    let mine = fs::read(&mine).expect("it is still there");
    assert_eq!(mine.len() as u64, 4 * MIB);
    assert!(mine[64 * 512..].starts_with(b"written by the guest\n"));
    let more: Vec<u8> = b"more of it\n".iter().copied().cycle().take(8 * 65536).collect();
    assert!(mine[16 * 65536..][..8 * 65536] == more, "half a MiB is missing");
    assert!(mine[128 * 512..].starts_with(b"sector 128\n"), "what was not written is as it was");
    let after = [&fixed, &base].map(|path| fs::read(path).expect("it is still there"));
    assert!(after == before, "a disk was written that must not be");
}

#[test]
fn a_file_system_that_the_guest_wrote_is_whole_and_has_its_files() {
    if debian_image().is_none() {
        return;
    }
    let made = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let path = dir.path().join("fs.img");
    File::create(&path).and_then(|file| file.set_len(32 * MIB)).expect("there is room");
    let mke2fs = made(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4"]).arg(&path));
    if !mke2fs.is_ok_and(|status| status.success()) {
        return skip("mke2fs is not installed (apt-get install e2fsprogs)");
    }
    let script = "
        set -e
        mount -t ext4 /dev/vda /mnt
        mkdir /mnt/folder
        head -c 3000000 /dev/urandom >/mnt/folder/random
        md5sum </mnt/folder/random
        sync
        umount /mnt";
    let output = debian(&[name(&path)], script);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    let checked = made(Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&path));
    assert!(checked.is_ok_and(|status| status.success()), "e2fsck finds errors\n{all}");
    let dumped = dir.path().join("random");
    let order = format!("dump /folder/random {}", dumped.display());
    made(Command::new("/sbin/debugfs").arg("-R").arg(order).arg(&path)).expect("debugfs comes with mke2fs");
    let sum = Command::new("md5sum").stdin(File::open(&dumped).expect("debugfs found it")).output();
    let sum = String::from_utf8_lossy(&sum.expect("md5sum is installed").stdout).into_owned();
    let sum = sum.split_whitespace().next().unwrap_or_default();
    assert!(sum.len() == 32 && all.contains(sum), "the file has other bytes\n{all}");
}

/// Runs on the emulated host. One guest; its first disk's overlay has 1 MiB of room, its second disk is cut short while it runs, and the
/// machine is killed as soon as the guest says that its third is written.
const FAULTS: &str = r#"
set -e
for image in base cut kept; do dd if=/dev/zero of=$image.img bs=1M count=4 2>/dev/null; done
mkdir /small
mount -t tmpfs -o size=1M none /small
mkfifo typed
TMPDIR=/small pontoon run debian --accel kvm --net none --timeout 150 \
    --disk base.img,overlay --disk cut.img --disk kept.img -- sh -c '
        dd if=/dev/zero of=/dev/vda bs=1M count=4 conv=fsync; echo status of the full disk: $?
        echo bytes of it: $(dd if=/dev/vda bs=512 count=1 2>/dev/null | wc -c)
        echo ready for the cut; read line
        dd if=/dev/vdb of=/dev/null bs=64k skip=40 count=1; echo status of the cut disk: $?
        echo bytes of it: $(dd if=/dev/vdb bs=512 count=1 2>/dev/null | wc -c)
        echo safe and sound | dd of=/dev/vdc conv=notrunc,fsync; echo it is synced; read line
    ' <typed >console 2>errors &
pid=$!
exec 3>typed
said() {
    n=0
    until grep -q "$1" console; do
        if [ $n -gt 120 ] || ! kill -0 $pid; then cat console errors; exit 1; fi
        sleep 1
        n=$((n + 1))
    done
}
said 'ready for the cut'
truncate -s 1M cut.img
echo go >&3
said 'it is synced'
kill -9 $pid
head -n 1 kept.img
grep -a -e 'status of' -e 'bytes of' console
cat errors
ls -A /small | wc -l
"#;

#[test]
fn a_disk_that_fails_is_the_guests_io_error_and_what_was_synced_survives_sigkill() {
    let Some(image) = debian_image() else { return };
    let output = shell_beside_image(&image, FAULTS);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    for fact in
        ["safe and sound", "status of the full disk: 1", "status of the cut disk: 1", "the disk failed"]
    {
        assert!(all.contains(fact), "'{fact}' is missing\n{all}");
    }
    assert_eq!(all.matches("bytes of it: 512").count(), 2, "both disks go on\n{all}");
    assert!(all.trim_end().lines().any(|line| line.trim() == "0"), "the overlay left a file\n{all}");
}

/// Asserts exit status 2 and one message on standard error that says all of these.
#[track_caller]
fn refused(accel: &str, disk: &str, says: &[&str]) {
    let output = Pontoon::new(["run", "probe", "--accel", accel, "--net", "none", "--disk", disk]).output();
    let all = text(&output);
    assert_eq!(output.status.code(), Some(2), "{disk}\n{all}");
    for word in says {
        assert!(all.contains(word), "{disk} does not say '{word}':\n{all}");
    }
}

#[test]
fn what_is_no_disk_is_one_clear_error() {
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).expect("a new directory is writable");
        path.to_str().expect("a temporary path is text").to_owned()
    };
    for accel in ["kvm", "lab"] {
        refused(accel, "/nonexistent/disk.img", &["/nonexistent/disk.img", "No such file"]);
        refused(accel, "/tmp", &["a directory", "raw image"]);
        refused(accel, "/dev/zero", &["neither a file nor a block device"]);
        refused(accel, &file("empty", b""), &["empty", "truncate -s 1G"]);
        refused(accel, &file("odd", &[1; 700]), &["700 bytes", "truncate -s 1024"]);
        refused(
            accel,
            &file("a.qcow2", &[b"QFI\xfb".as_slice(), &[0; 508]].concat()),
            &["qcow2", "qemu-img convert"],
        );
        refused(accel, &(file("both", &[0; 512]) + ",ro,overlay"), &["--disk", "leave out"]);
    }
}

/// A machine that is killed when it goes out of scope.
struct Machine(Child);

impl Machine {
    /// A probe that has its lease, and waits to be killed.
    fn waiting(disk: &str, tmp: &Path) -> Self {
        let probe = Probe::new().flag(["--disk", disk]).timeout(Duration::from_secs(100));
        let mut pontoon = probe.order("dhcp").order("wait=100000").command();
        let command = pontoon.command().env("TMPDIR", tmp).stdout(Stdio::piped());
        let mut machine = Self(command.spawn().expect("pontoon starts"));
        let console = BufReader::new(machine.0.stdout.as_mut().expect("it is piped"));
        let has_lease = |line: String| line.contains(r#""order":"dhcp""#) && line.contains(r#""ok":true"#);
        assert!(console.lines().map_while(Result::ok).any(has_lease), "it ended without a lease");
        machine
    }

    fn kill(mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it was killed");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing is left to be done if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn two_machines_cannot_write_one_image_but_may_share_a_base() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let tmp = tempfile::tempdir().expect("the temporary directory is writable");
    let path = name(&image(dir.path(), "disk.img", 1));
    let writer = Machine::waiting(&path, tmp.path());
    for accel in ["kvm", "lab"] {
        refused(accel, &path, &["in use by another machine", ",overlay"]);
        refused(accel, &format!("{path},ro"), &["being written by another machine"]);
        refused(accel, &format!("{path},overlay"), &["being written by another machine"]);
    }
    // However a machine ends, its lock ends with it.
    writer.kill();
    let overlay = format!("{path},overlay");
    let others = [Machine::waiting(&overlay, tmp.path()), Machine::waiting(&overlay, tmp.path())];
    refused("kvm", &path, &["in use by another machine"]);
    let left = fs::read_dir(tmp.path()).expect("it is still there").count();
    assert_eq!(left, 0, "an overlay has no name");
    others.into_iter().for_each(Machine::kill);
    Probe::new().flag(["--disk", &path]).order("dhcp").run().all_ok();
}

#[test]
fn more_devices_than_there_are_lines_is_one_clear_error() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let base = format!("{},overlay", name(&image(dir.path(), "disk.img", 1)));
    let head = ["run", "probe", "--accel", "kvm", "--net", "none"];
    let disks = ["--disk", base.as_str()].into_iter().cycle().take(2 * 9);
    let output = Pontoon::new(head.into_iter().chain(disks)).output();
    let all = text(&output);
    assert_eq!(output.status.code(), Some(2), "{all}");
    assert!(all.contains("virtio devices are more than the 8"), "{all}");
}

#[test]
fn an_overlay_that_finds_no_room_says_where_to_put_it() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let base = format!("{},overlay", name(&image(dir.path(), "disk.img", 1)));
    let mut pontoon = Pontoon::new(["run", "probe", "--accel", "kvm", "--net", "none", "--disk", &base]);
    pontoon.command().env("TMPDIR", "/nonexistent/folder");
    let output = pontoon.output();
    let all = text(&output);
    assert_eq!(output.status.code(), Some(2), "{all}");
    assert!(all.contains("/nonexistent/folder") && all.contains("set TMPDIR"), "{all}");
}
