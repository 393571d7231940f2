//! Modules made by hand: what their ELF files say, what is selected, what the indexes hold; and the small files.

use proptest::prelude::*;

use super::modinfo::{self, Modinfo};
use super::*;

/// An ELF64 file with a `.modinfo` section of these strings.
fn module(strings: &[&str]) -> Vec<u8> {
    let content: Vec<u8> = strings.iter().flat_map(|text| text.bytes().chain([0])).collect();
    let names = b"\0.modinfo\0.shstrtab\0";
    let (content_at, names_at) = (0x40, 0x40 + content.len());
    let table_at = names_at + names.len();
    let mut elf = vec![0; 0x40];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[0x28..0x30].copy_from_slice(&(table_at as u64).to_le_bytes());
    elf[0x3A..0x40].copy_from_slice(&[0x40, 0, 3, 0, 2, 0]);
    elf.extend_from_slice(&content);
    elf.extend_from_slice(names);
    elf.extend_from_slice(&[0; 0x40]);
    for (name, at, len) in [(1_u32, content_at, content.len()), (10, names_at, names.len())] {
        let mut header = [0; 0x40];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
        elf.extend_from_slice(&header);
    }
    elf
}

#[test]
fn modinfo_is_read() {
    let elf = module(&[
        "license=GPL",
        "alias=virtio:d00000001v*",
        "depends=virtio_ring,virtio",
        "softdep=pre: crc32c other post: late",
        "alias=x",
    ]);
    let expected = Modinfo {
        aliases: vec!["virtio:d00000001v*".to_owned(), "x".to_owned()],
        depends: vec!["virtio_ring".to_owned(), "virtio".to_owned()],
        soft_before: vec!["crc32c".to_owned(), "other".to_owned()],
    };
    assert_eq!(modinfo::parse(&elf), Some(expected));
    assert_eq!(modinfo::parse(&module(&["depends="])), Some(Modinfo::default()));
}

proptest! {
    /// A damaged file gives some answer, never a panic.
    #[test]
    fn damaged_modules_do_not_panic(at in 0_usize..400, value: u8, cut in 0_usize..400) {
        let mut elf = module(&["alias=a", "depends=b"]);
        if let Some(byte) = elf.get_mut(at) {
            *byte = value;
        }
        elf.truncate(elf.len().saturating_sub(cut));
        let _ = modinfo::parse(&elf);
    }
}

/// A module tree: files by path, with `modules.order` listing them.
fn tree(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut order = String::new();
    for (path, content) in files {
        fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
        fs::write(dir.path().join(path), content).unwrap();
        order.push_str(path.strip_suffix(".xz").unwrap_or(path));
        order.push('\n');
    }
    fs::write(dir.path().join("modules.order"), order).unwrap();
    dir
}

#[test]
fn selection_is_closed_and_indexed() {
    let mut packed = Vec::new();
    lzma_rs::xz_compress(&mut module(&["depends=", "alias=virtio:d00000004v*"]).as_slice(), &mut packed)
        .unwrap();
    let dir = tree(&[
        ("kernel/virtio.ko", module(&["depends="])),
        ("kernel/net/virtio_net.ko", module(&["depends=virtio,built_in", "alias=virtio:d00000001v*"])),
        ("kernel/virtio-rng.ko.xz", packed),
        ("kernel/unused.ko", module(&["alias=virtio:d00000099v*"])),
    ]);
    let modules = modules::select(dir.path(), &["virtio_net", "virtio-rng", "not_in_this_kernel"]).unwrap();
    assert_eq!(modules.keys().collect::<Vec<_>>(), ["virtio", "virtio_net", "virtio_rng"]);
    assert_eq!(modules["virtio_rng"].file, "kernel/virtio-rng.ko");
    assert_eq!(&modules["virtio_rng"].elf[..4], b"\x7fELF", "unpacked");
    assert_eq!(
        modules::dep_index(&modules),
        "kernel/virtio.ko:\nkernel/net/virtio_net.ko: kernel/virtio.ko\nkernel/virtio-rng.ko:\n"
    );
    assert_eq!(
        modules::alias_index(&modules),
        "alias virtio:d00000001v* virtio_net\nalias virtio:d00000004v* virtio_rng\n"
    );
}

#[test]
fn file_that_is_no_module_is_named() {
    let dir = tree(&[("kernel/virtio.ko", b"no ELF".to_vec())]);
    let Err(Error::Content { path, .. }) = modules::select(dir.path(), &["virtio"]) else {
        panic!("selected")
    };
    assert!(path.ends_with("kernel/virtio.ko"));
    let dir = tree(&[("kernel/virtio.ko.xz", b"no xz".to_vec())]);
    assert!(matches!(modules::select(dir.path(), &["virtio"]), Err(Error::Content { .. })));
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(modules::select(empty.path(), &[]), Err(Error::Io { .. })));
}

#[test]
fn recipe_depends_on_everything_that_is_put_in() {
    let extra = ["nfs".to_owned()];
    let recipes = [recipe(Suite::Bookworm, &[]), recipe(Suite::Trixie, &[]), recipe(Suite::Bookworm, &extra)];
    assert_eq!(recipes[0], recipe(Suite::Bookworm, &[]));
    assert!(recipes[0] != recipes[1] && recipes[0] != recipes[2]);
}

#[test]
fn scripts_are_shell() {
    for (path, _, content) in
        FILES.iter().filter(|(path, ..)| path.ends_with("script") || path.ends_with("profile"))
    {
        let output = Command::new("sh").args(["-n", "-c", content]).output().unwrap();
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn init_is_small() {
    let init = crate::INIT.bytes();
    assert_eq!(&init[..4], b"\x7fELF");
    assert!(init.len() < 1_300_000, "{}", init.len());
}

#[test]
fn agent_is_tiny() {
    assert_eq!(&crate::AGENT[..4], b"\x7fELF");
    assert!(crate::AGENT.len() < 64_000, "{}", crate::AGENT.len());
}
