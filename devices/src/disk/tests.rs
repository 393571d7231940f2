//! Opening images: what is refused, and who may have them together.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::*;

/// An image with these bytes, in a folder of its own.
fn image(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn refused(path: &Path, mode: DiskMode) -> String {
    match Disk::open(path, mode) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_no_disk_is_refused_with_what_to_do() {
    let (dir, path) = image(&[0; 1000]);
    let says = |path: &Path, words: &[&str]| {
        for mode in [DiskMode::ReadWrite, DiskMode::ReadOnly, DiskMode::Overlay] {
            let text = refused(path, mode);
            for word in words {
                assert!(text.contains(word), "'{word}' is missing: {text}");
            }
        }
    };
    says(&path, &["1000 bytes", "truncate -s 1024"]);
    says(dir.path(), &["a directory", "raw image file"]);
    says(&dir.path().join("none.img"), &["none.img", "No such file"]);
    says(Path::new("/dev/null"), &["neither a file nor a block device"]);
    fs::write(&path, []).unwrap();
    says(&path, &["empty", "truncate -s 1G"]);
    // A FIFO is refused, not waited for.
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    says(&fifo, &["neither a file nor a block device"]);
}

#[test]
fn formats_of_others_are_refused_with_the_command_that_converts_them() {
    let heads: [(&[u8], &str); 7] = [
        (b"QFI\xfb\0\0\0\x03", "qemu-img convert -f qcow2 -O raw"),
        (b"KDMV\x01\0\0\0", "qemu-img convert -f vmdk -O raw"),
        (b"# Disk DescriptorFile\n", "qemu-img convert -f vmdk -O raw"),
        (b"vhdxfile", "qemu-img convert -f vhdx -O raw"),
        (b"\x1f\x8b\x08\0", "gunzip -k"),
        (b"\xfd7zXZ\0", "unxz -k"),
        (b"\x28\xb5\x2f\xfd", "unzstd -k"),
    ];
    for (head, advice) in heads {
        let (_dir, path) = image(&[head, &[0; 4096][head.len()..]].concat());
        let text = refused(&path, DiskMode::ReadOnly);
        assert!(text.contains(advice), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
    let (_dir, path) = image(&[&[0; 0x40][..], &[0x7f, 0x10, 0xda, 0xbe], &[0; 1000]].concat());
    assert!(refused(&path, DiskMode::Overlay).contains("-f vdi"));
    let (_dir, path) = image(&[&[0; 1024][..], b"conectix", &[0; 504]].concat());
    assert!(refused(&path, DiskMode::ReadOnly).contains("-f vpc"));
}

#[test]
fn a_name_with_a_quote_is_quoted_for_the_shell() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("it's.img");
    fs::write(&path, []).unwrap();
    let text = refused(&path, DiskMode::ReadOnly);
    assert!(text.contains(r"it'\''s.img'"), "{text}");
}

#[test]
fn one_image_has_one_writer_or_any_number_of_readers() {
    let (_dir, path) = image(&[0; 4096]);
    let open = |mode| Disk::open(&path, mode);
    let writer = open(DiskMode::ReadWrite).unwrap();
    assert!(matches!(open(DiskMode::ReadWrite), Err(DiskError::InUse(_))));
    assert!(matches!(open(DiskMode::ReadOnly), Err(DiskError::Written(_))));
    assert!(matches!(open(DiskMode::Overlay), Err(DiskError::Written(_))));
    assert!(refused(&path, DiskMode::ReadWrite).contains(",overlay"), "it says how both can run");
    drop(writer);
    let readers = [
        open(DiskMode::ReadOnly).unwrap(),
        open(DiskMode::Overlay).unwrap(),
        open(DiskMode::Overlay).unwrap(),
    ];
    assert!(matches!(open(DiskMode::ReadWrite), Err(DiskError::InUse(_))));
    drop(readers);
    open(DiskMode::ReadWrite).unwrap();
}

#[test]
fn a_link_to_an_image_is_the_same_image() {
    let (dir, path) = image(&[0; 4096]);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let _writer = Disk::open(&path, DiskMode::ReadWrite).unwrap();
    assert!(matches!(Disk::open(&link, DiskMode::ReadWrite), Err(DiskError::InUse(_))));
}

#[test]
fn an_overlay_leaves_no_name_and_takes_no_room_until_it_is_written() {
    use std::os::unix::fs::MetadataExt;
    let (dir, path) = image(&[0; 1 << 20]);
    let written = tempfile::tempfile_in(dir.path()).unwrap();
    written.set_len(1 << 20).unwrap();
    let view = written.try_clone().unwrap();
    let overlay = Overlay::new(File::open(&path).unwrap(), written, 1 << 20);
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk.img"]);
    assert_eq!(view.metadata().unwrap().blocks(), 0);
    overlay.zero(512, 512, false).unwrap();
    assert_eq!(view.metadata().unwrap().blocks(), 8, "one cluster was copied");
}

#[test]
fn zeros_that_are_written_end_where_they_shall() {
    let file = tempfile::tempfile().unwrap();
    // Less than a row, whole rows, and more than one call takes.
    for (at, len) in [(1, 7), (512, 4096), (100, 5000), (4095, (2 << 20) + 4097)] {
        let size = at + len + 3;
        file.write_all_at(&vec![7; size], 0).unwrap();
        raw::write_zeros(&file, at as u64, len as u64).unwrap();
        let mut bytes = vec![1; size];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
        assert_eq!(
            (zeros, &bytes[..at], &bytes[at + len..]),
            (len, &vec![7; at][..], &[7; 3][..]),
            "{at} {len}"
        );
    }
}

#[test]
fn zeroing_touches_nothing_beside_its_range() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 8192], 0).unwrap();
    raw::zero(&file, 100, 5000, false).unwrap();
    let mut bytes = [1; 8192];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..100].iter().chain(&bytes[5100..]).all(|byte| *byte == 7));
    assert!(bytes[100..5100].iter().all(|byte| *byte == 0));
}

#[test]
fn bytes_go_from_a_program_to_scattered_guest_memory_and_back() {
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
    let slices = [(0x800, 3), (0x100, 4)].map(|(at, len)| memory.get_slice(GuestAddress(at), len).unwrap());
    let mut buffers = GuestBuffers::new(&memory, &slices).unwrap();
    assert_eq!(buffers.put(b"abcdefghij"), 7, "there is no more room");
    let mut back = [0; 10];
    assert_eq!((buffers.take(&mut back), &back), (7, b"abcdefg\0\0\0"));
    // A short transfer goes on where it stopped.
    buffers.advance(2);
    assert_eq!((buffers.take(&mut back[..4]), &back[..4]), (4, &b"cdef"[..]));
    assert_eq!(buffers.take(&mut []), 0);
}
