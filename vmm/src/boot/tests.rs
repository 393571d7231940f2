//! Images, good and wild, against small machines: what is refused, and that nothing is written where it should not be.

use std::borrow::Cow;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::memory::allocate;

const MIB: u64 = 1 << 20;

/// A bzImage of protocol 2.15 with `payload` bytes of 0xcc behind two setup sectors.
fn bzimage(payload: usize) -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    image.extend(std::iter::repeat_n(0xcc, payload));
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]); // setup_sects
    put(0x1f4, &(payload as u32 / 16).to_le_bytes()); // syssize
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &0x7fu16.to_le_bytes()); // xloadflags
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x20_0000u32.to_le_bytes()); // init_size
    image
}

/// A static ELF with one segment of `code` at 1 MiB and `bss` zero bytes behind it.
fn elf(code: &[u8], bss: u64) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image.extend(code);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]); // ET_EXEC, x86-64
    put(24, &0x10_0000u64.to_le_bytes()); // e_entry
    put(32, &64u64.to_le_bytes()); // e_phoff
    put(54, &[56, 0, 1, 0]); // e_phentsize, e_phnum
    put(64, &[1, 0, 0, 0, 7]); // PT_LOAD
    put(72, &0x1000u64.to_le_bytes()); // p_offset
    put(80, &0x10_0000u64.to_le_bytes()); // p_vaddr
    put(88, &0x10_0000u64.to_le_bytes()); // p_paddr
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64 + bss).to_le_bytes());
    image
}

fn bytes(image: Vec<u8>) -> Kernel {
    Kernel::Bytes(Cow::Owned(image))
}

fn boot(
    memory: &GuestMemory,
    image: Vec<u8>,
    initrd: Option<Vec<u8>>,
) -> Result<(Entry, KernelFormat), String> {
    let initrd = initrd.map(bytes);
    let source = BootSource { kernel: &bytes(image), initrd: initrd.as_ref(), cmdline: "quiet" };
    load(memory, &source).map_err(|e| e.to_string())
}

fn refusal(memory: u64, image: Vec<u8>) -> String {
    boot(&allocate(memory).unwrap(), image, None).unwrap_err()
}

#[test]
fn a_bzimage_is_loaded_where_it_prefers_to_be() {
    let memory = allocate(32 * MIB).unwrap();
    let entry = boot(&memory, bzimage(0x1000), None).unwrap();
    assert_eq!(entry, (Entry { rip: 0x100_0200 }, KernelFormat::BzImage));
    let at = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!((at(0xff_ffff), at(0x100_0000), at(0x100_0fff), at(0x100_1000)), (0, 0xcc, 0xcc, 0));
    let mut line = [0xff; 6];
    memory.read_slice(&mut line, GuestAddress(crate::layout::CMDLINE)).unwrap();
    assert_eq!(&line, b"quiet\0");
}

#[test]
fn an_initrd_ends_where_memory_ends() {
    let memory = allocate(32 * MIB).unwrap();
    boot(&memory, bzimage(0x1000), Some(vec![0x70; 0x1801])).unwrap();
    let zero_page = |at| memory.read_obj::<u32>(GuestAddress(crate::layout::ZERO_PAGE + at)).unwrap();
    assert_eq!((zero_page(0x218), zero_page(0x21c)), (0x1ff_e000, 0x1801));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1ff_f800)).unwrap(), 0x70);
}

#[test]
fn an_initrd_that_would_lie_on_the_kernel_is_refused() {
    let memory = allocate(20 * MIB).unwrap();
    let refused = boot(&memory, bzimage(0x1000), Some(vec![1; 3 << 20])).unwrap_err();
    assert!(
        refused.contains("does not fit between the kernel's end at 0x1200000 and 0x1400000"),
        "{refused}"
    );
    assert!(boot(&memory, bzimage(0x1000), Some(vec![1; 2 << 20])).is_ok());
    assert!(boot(&memory, bzimage(0x1000), Some(vec![])).unwrap_err().contains("is empty"));
}

#[test]
fn kernels_that_cannot_boot_here_are_refused_by_name() {
    let with = |at: usize, value: &[u8]| {
        let mut image = bzimage(0x1000);
        image[at..at + value.len()].copy_from_slice(value);
        refusal(32 * MIB, image)
    };
    assert!(with(0x206, &[0x0b, 2]).contains("boot protocol 2.11, older than 2.12"));
    assert!(with(0x236, &[0x7e]).contains("has no 64-bit entry"));
    assert!(with(0x1f4, &[0xff; 4]).contains("the file is truncated"));
    assert!(with(0x258, &[0; 8]).contains("wants to be loaded at 0x0"));
    assert!(with(0x258, &[0xff; 8]).contains("wants to be loaded at 0xffffffffffffffff"));
    assert!(with(0x214, &[0; 4]).contains("wants to be loaded at 0x0"));
    assert!(refusal(16 * MIB, bzimage(0x1000)).contains("give it at least 82 MiB"));
    assert!(refusal(32 * MIB, bzimage(0x1000)[..0x220].to_vec()).contains("ends within its header"));
}

#[test]
fn what_is_no_kernel_is_told_what_it_is() {
    assert!(refusal(4 * MIB, b"\x1f\x8b\x08".to_vec()).contains("gunzip"));
    assert!(refusal(4 * MIB, b"QFI\xfb".to_vec()).contains("--disk"));
    assert!(refusal(4 * MIB, vec![]).contains("neither a bzImage nor an ELF"));
    let missing = BootSource { kernel: &Kernel::from("/nonexistent/vmlinuz"), initrd: None, cmdline: "" };
    let refused = load(&allocate(4 * MIB).unwrap(), &missing).unwrap_err().to_string();
    assert!(refused.contains("could not open the kernel /nonexistent/vmlinuz"), "{refused}");
}

#[test]
fn an_elf_is_loaded_at_its_physical_address() {
    let memory = allocate(4 * MIB).unwrap();
    assert_eq!(
        boot(&memory, elf(&[0xf4; 16], 0x1000), None).unwrap(),
        (Entry { rip: 0x10_0000 }, KernelFormat::Elf)
    );
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_000f)).unwrap(), 0xf4);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(crate::layout::ZERO_PAGE + 0x202)).unwrap(), 0x5372_6448);
}

#[test]
fn an_elf_with_wild_headers_is_refused_by_the_field() {
    let with = |at: usize, value: &[u8]| {
        let mut image = elf(&[0xf4; 16], 0);
        image[at..at + value.len()].copy_from_slice(value);
        refusal(4 * MIB, image)
    };
    assert!(with(4, &[1]).contains("not a 64-bit"));
    assert!(with(16, &[3]).contains("-static -no-pie"));
    assert!(with(18, &[183]).contains("machine 183"));
    assert!(with(56, &[0]).contains("0 program headers"));
    assert!(with(56, &[0xff, 0xff]).contains("65535 program headers"));
    assert!(with(32, &[0xff; 8]).contains("truncated"));
    assert!(with(72, &[0xff; 8]).contains("truncated"));
    assert!(with(88, &0x9000u64.to_le_bytes()).contains("a segment of 0x10 bytes at 0x9000"));
    assert!(with(88, &[0xff; 8]).contains("0xffffffffffffffff"));
    assert!(with(104, &[0xff; 8]).contains("a segment of 0xffffffffffffffff bytes"));
    assert!(with(104, &[0; 8]).contains("which is in none of its segments"));
    assert!(with(104, &[1, 0]).contains("more bytes in the file"));
    assert!(with(24, &0x10_0010u64.to_le_bytes()).contains("which is in none of its segments"));
    assert!(refusal(4 * MIB, elf(&[0xf4; 16], 4 << 20)).contains("give it more"));
}

/// Whether everything below 1 MiB is untouched: what an image, as opposed to the loader, must never write.
fn low_memory_is_zero(memory: &GuestMemory) -> bool {
    let mut low = vec![0; 0x10_0000];
    memory.read_slice(&mut low, GuestAddress(0)).unwrap();
    low.iter().all(|byte| *byte == 0)
}

/// Changes to an image: where, and to what. Most hit the headers.
fn damage(len: usize) -> impl Strategy<Value = (Vec<(usize, u8)>, usize)> {
    let at = prop_oneof![4 => 0..200usize, 4 => 0x1f0..0x270usize, 1 => 0..len];
    let byte = prop_oneof![Just(0u8), Just(0xff), Just(0x80), any::<u8>()];
    (prop::collection::vec((at, byte), 0..6), prop_oneof![Just(len), 0..len])
}

fn damaged(mut image: Vec<u8>, (changes, len): (Vec<(usize, u8)>, usize)) -> Vec<u8> {
    for (at, byte) in changes {
        if let Some(slot) = image.get_mut(at) {
            *slot = byte;
        }
    }
    image.truncate(len);
    image
}

proptest! {
    #[test]
    fn a_damaged_bzimage_neither_panics_nor_writes_below_1_mib(damage in damage(0x1600)) {
        let memory = allocate(20 * MIB).unwrap();
        let image = bytes(damaged(bzimage(0x1000), damage));
        if let Ok(loaded) = kernel::load(&memory, &image) {
            prop_assert!(loaded.entry.0 >= 0x10_0000 && loaded.end <= 20 * MIB);
            prop_assert!(loaded.entry.0 < loaded.end);
        }
        prop_assert!(low_memory_is_zero(&memory));
    }

    #[test]
    fn a_damaged_elf_neither_panics_nor_writes_below_1_mib(damage in damage(0x1010)) {
        let memory = allocate(4 * MIB).unwrap();
        let image = bytes(damaged(elf(&[0xf4; 16], 0x1000), damage));
        if let Ok(loaded) = kernel::load(&memory, &image) {
            prop_assert!(loaded.entry.0 >= 0x10_0000 && loaded.end <= 4 * MIB);
            prop_assert!(loaded.entry.0 < loaded.end);
        }
        prop_assert!(low_memory_is_zero(&memory));
    }
}
