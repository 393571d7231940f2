//! ELF: `vmlinux` and bare-metal programs, loaded at their physical addresses and entered at `e_entry` like a bzImage at
//! its 64-bit entry.
//!
//! Accepted: ELF64, little-endian, x86-64, `ET_EXEC`, 1 to 64 program headers, each `PT_LOAD` from 1 MiB up inside RAM
//! below the MMIO hole, the entry inside one of them. What lies between `p_filesz` and `p_memsz` is zero already.

use std::io;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::kernel::{Image, read_at};
use super::{KernelFormat, Loaded};
use crate::layout::HIGH_RAM;
use crate::memory::GuestMemory;

const EHDR_LEN: usize = 64;
const PHDR_LEN: usize = 56;
const MAX_SEGMENTS: u16 = 64;
const PT_LOAD: u32 = 1;
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
/// `ELFCLASS64`, `ELFDATA2LSB`, `EV_CURRENT`.
const IDENT: [u8; 3] = [2, 1, 1];

/// Why an ELF was refused.
///
/// ```
/// use vmm::boot::{BootError, BootSource, ElfError, Kernel, KernelError, load};
///
/// // A program of this host's: 64 bits, x86-64, but position-independent, or in need of more than there is.
/// let mut elf = vec![0; 64];
/// elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
/// (elf[16], elf[18], elf[20]) = (3, 62, 1); // ET_DYN, EM_X86_64
/// let kernel = Kernel::Bytes(elf.into());
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let refused = load(&memory, &BootSource { kernel: &kernel, initrd: None, cmdline: "" });
/// let Err(BootError::Kernel(KernelError::Elf { source, .. })) = refused else { panic!() };
/// assert!(matches!(source, ElfError::NotStatic(3)));
/// # Ok::<(), vmm::memory::MemoryError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The image ends within its headers.
    #[error("ends within its headers ({0} bytes); the file is truncated: fetch or build it again")]
    Truncated(u64),
    /// Not for this machine.
    #[error(
        "is not a 64-bit little-endian x86-64 program (class, data, version {ident:?}, machine {machine}); take an x86-64 kernel"
    )]
    WrongMachine {
        /// `EI_CLASS`, `EI_DATA`, `EI_VERSION`.
        ident: [u8; 3],
        /// `e_machine`.
        machine: u16,
    },
    /// Not an executable with fixed addresses.
    #[error("is of type {0}, not a static executable (2); link it with -static -no-pie")]
    NotStatic(u16),
    /// Program headers that are not there, too many, or of a wrong size.
    #[error(
        "has {count} program headers of {size} bytes; 1 to 64 of 56 bytes are accepted: it is damaged or no kernel"
    )]
    ProgramHeaders {
        /// `e_phnum`
        count: u16,
        /// `e_phentsize`
        size: u16,
    },
    /// A segment's bytes are not all in the file.
    #[error(
        "promises {len:#x} bytes at offset {offset:#x}, but has {have:#x} in all; the file is truncated: fetch it again"
    )]
    Short {
        /// `p_offset`
        offset: u64,
        /// `p_filesz`
        len: u64,
        /// Bytes there are.
        have: u64,
    },
    /// A segment outside of RAM.
    #[error(
        "has a segment of {size:#x} bytes at {at:#x}; the machine has memory for kernels from 0x100000 to {ram:#x}: give it more, or link the kernel lower"
    )]
    OutsideRam {
        /// `p_paddr`
        at: u64,
        /// `p_memsz`
        size: u64,
        /// End of the RAM there.
        ram: u64,
    },
    /// More bytes in the file than in memory.
    #[error("has a segment at {at:#x} with more bytes in the file than in memory; it is damaged")]
    WildSegment {
        /// `p_paddr`
        at: u64,
    },
    /// The entry is in no segment.
    #[error(
        "starts at {0:#x}, which is in none of its segments; it is damaged, or not linked at physical addresses"
    )]
    WildEntry(u64),
    /// Reading failed.
    #[error("could not be read: {0}")]
    Read(#[from] io::Error),
    /// Loading failed after every check had passed.
    #[error("could not be loaded: {0}; did the file change meanwhile?")]
    Load(linux_loader::loader::Error),
}

/// Checks and loads the ELF of `size` bytes.
pub(super) fn load<F: Image>(memory: &GuestMemory, image: &mut F, size: u64) -> Result<Loaded, ElfError> {
    let (entry, segments) = headers(image, size)?;
    let ram = super::initrd::ram_end(memory);
    let (mut end, mut entry_found) = (0, false);
    for segment in &segments {
        let last = segment.check(size, ram)?;
        end = end.max(last);
        entry_found |= (segment.at..segment.at + segment.file_size).contains(&entry);
    }
    if !entry_found {
        return Err(ElfError::WildEntry(entry));
    }
    // An offset of 0, not None: the loader then leaves the notes alone, which nobody here needs or has checked.
    Elf::load(memory, Some(GuestAddress(0)), image, None).map_err(ElfError::Load)?;
    Ok(Loaded { format: KernelFormat::Elf, entry: GuestAddress(entry), end, header: made_up_header() })
}

/// A `PT_LOAD` program header.
struct Loadable {
    offset: u64,
    at: u64,
    file_size: u64,
    mem_size: u64,
}

impl Loadable {
    /// The first address behind the segment, if it fits the file of `have` bytes and the RAM up to `ram`.
    fn check(&self, have: u64, ram: u64) -> Result<u64, ElfError> {
        let Self { offset, at, file_size, mem_size } = *self;
        if offset.checked_add(file_size).is_none_or(|end| end > have) {
            return Err(ElfError::Short { offset, len: file_size, have });
        }
        if file_size > mem_size {
            return Err(ElfError::WildSegment { at });
        }
        match at.checked_add(mem_size) {
            Some(end) if at >= HIGH_RAM && end <= ram => Ok(end),
            _ => Err(ElfError::OutsideRam { at, size: mem_size, ram }),
        }
    }
}

/// The entry and the segments that the headers tell of.
fn headers<F: Image>(image: &mut F, size: u64) -> Result<(u64, Vec<Loadable>), ElfError> {
    let mut ehdr = [0; EHDR_LEN];
    if read_at(image, 0, &mut ehdr)? < EHDR_LEN {
        return Err(ElfError::Truncated(size));
    }
    let ident = [ehdr[4], ehdr[5], ehdr[6]];
    let machine = u16_at(&ehdr, 18);
    if ident != IDENT || machine != EM_X86_64 {
        return Err(ElfError::WrongMachine { ident, machine });
    }
    if u16_at(&ehdr, 16) != ET_EXEC {
        return Err(ElfError::NotStatic(u16_at(&ehdr, 16)));
    }
    let (entry, table, phentsize, count) =
        (u64_at(&ehdr, 24), u64_at(&ehdr, 32), u16_at(&ehdr, 54), u16_at(&ehdr, 56));
    if !(1..=MAX_SEGMENTS).contains(&count) || usize::from(phentsize) != PHDR_LEN || table < EHDR_LEN as u64 {
        return Err(ElfError::ProgramHeaders { count, size: phentsize });
    }
    let mut segments = Vec::with_capacity(usize::from(count));
    for index in 0..u64::from(count) {
        let mut phdr = [0; PHDR_LEN];
        let at = table.checked_add(index * PHDR_LEN as u64).ok_or(ElfError::Truncated(size))?;
        if at > size || read_at(image, at, &mut phdr)? < PHDR_LEN {
            return Err(ElfError::Truncated(size));
        }
        let mem_size = u64_at(&phdr, 40);
        if u32_at(&phdr, 0) == PT_LOAD && mem_size > 0 {
            let (offset, at, file_size) = (u64_at(&phdr, 8), u64_at(&phdr, 24), u64_at(&phdr, 32));
            segments.push(Loadable { offset, at, file_size, mem_size });
        }
    }
    Ok((entry, segments))
}

/// The parts of a setup header that a kernel without one is entitled to (boot.rst, "64-bit Boot Protocol").
fn made_up_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020c,
        kernel_alignment: 0x100_0000,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        ..setup_header::default()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
