//! bzImage: the header is checked (boot.rst, "The Real-Mode Kernel Header"), the protected-mode part is read to the
//! address that the kernel prefers, and the kernel unpacks itself when it runs.
//!
//! A relocatable kernel goes to `pref_address`, another one to `code32_start`; from there it uses `init_size` bytes,
//! which must lie in RAM below the MMIO hole. The 64-bit entry is 0x200 bytes into the protected-mode part.

use std::io;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::kernel::{Image, read_at};
use super::{KernelFormat, Loaded};
use crate::layout::HIGH_RAM;
use crate::memory::GuestMemory;

/// Where the setup header stands in the image and in `boot_params`.
pub(super) const SETUP_HEADER: u64 = 0x1f1;
/// The first version that tells of a 64-bit entry (`xloadflags`).
const PROTOCOL_2_12: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
/// `XLF_KERNEL_64`: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// Why a bzImage was refused.
///
/// ```
/// use vmm::boot::{BootError, BootSource, BzImageError, Kernel, KernelError, load};
///
/// // "HdrS" at 0x202, and nothing behind it.
/// let mut cut = vec![0; 0x206];
/// cut[0x202..].copy_from_slice(b"HdrS");
/// let kernel = Kernel::Bytes(cut.into());
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let refused = load(&memory, &BootSource { kernel: &kernel, initrd: None, cmdline: "" });
/// let Err(BootError::Kernel(KernelError::BzImage { source, .. })) = refused else { panic!() };
/// assert!(matches!(source, BzImageError::Truncated(_)));
/// # Ok::<(), vmm::memory::MemoryError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// The image ends within its header.
    #[error("ends within its header, at byte {0}; the file is truncated: fetch it again")]
    Truncated(u64),
    /// The image is shorter than its header says.
    #[error("is {have} bytes long, but its header promises {want}; the file is truncated: fetch it again")]
    Short {
        /// Bytes there are.
        have: u64,
        /// Bytes there should be.
        want: u64,
    },
    /// A boot protocol before 2.12.
    #[error(
        "speaks boot protocol {}.{:02}, older than 2.12 (Linux 3.8); take a newer kernel",
        .0 >> 8, .0 & 0xff
    )]
    Old(u16),
    /// No 64-bit entry, or a zImage.
    #[error(
        "has no 64-bit entry (loadflags {loadflags:#x}, xloadflags {xloadflags:#x}); take an x86-64 kernel"
    )]
    No64Bit {
        /// The field `loadflags`.
        loadflags: u8,
        /// The field `xloadflags`.
        xloadflags: u16,
    },
    /// Addresses in the header that no kernel has.
    #[error("wants to be loaded at {0:#x}, where no kernel belongs; the file is damaged")]
    WildAddress(u64),
    /// Not enough RAM below the hole.
    #[error(
        "needs guest memory from {start:#x} to {end:#x}, but the machine has {ram:#x} there; give it at least {} MiB",
        (.end >> 20) + 64
    )]
    TooLarge {
        /// First byte used.
        start: u64,
        /// First byte behind it.
        end: u64,
        /// End of the RAM there.
        ram: u64,
    },
    /// Reading failed.
    #[error("could not be read: {0}")]
    Read(#[from] io::Error),
    /// Loading failed after every check had passed.
    #[error("could not be loaded: {0}; did the file change meanwhile?")]
    Load(linux_loader::loader::Error),
}

/// Checks and loads the bzImage of `size` bytes.
pub(super) fn load<F: Image>(memory: &GuestMemory, image: &mut F, size: u64) -> Result<Loaded, BzImageError> {
    let mut header = setup_header::default();
    let want = header.as_slice().len();
    let len = read_at(image, SETUP_HEADER, header.as_mut_slice())?;
    if len < want {
        return Err(BzImageError::Truncated(SETUP_HEADER + len as u64));
    }
    let start = check(&header, size)?;
    let end = start + u64::from(header.init_size).max(size);
    let ram = super::initrd::ram_end(memory);
    if end > ram {
        return Err(BzImageError::TooLarge { start, end, ram });
    }
    let loaded = BzImage::load(memory, Some(GuestAddress(start)), image, Some(GuestAddress(HIGH_RAM)))
        .map_err(BzImageError::Load)?;
    let header = loaded.setup_header.unwrap_or(header);
    Ok(Loaded {
        format: KernelFormat::BzImage,
        entry: GuestAddress(start + ENTRY_64),
        end: end.max(loaded.kernel_end),
        header,
    })
}

/// Where the kernel is to be loaded, if its header makes sense.
fn check(header: &setup_header, size: u64) -> Result<u64, BzImageError> {
    let (version, loadflags, xloadflags) = (header.version, header.loadflags, header.xloadflags);
    if version < PROTOCOL_2_12 {
        return Err(BzImageError::Old(version));
    }
    if loadflags & LOADED_HIGH == 0 || xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BzImageError::No64Bit { loadflags, xloadflags });
    }
    // boot.rst: "for backwards compatibility, if setup_sects is 0, the real value is 4".
    let setup_sects = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    // syssize counts 16-byte paragraphs; signed images have bytes behind them.
    let want = (setup_sects + 1) * SECTOR + u64::from(header.syssize) * 16;
    if size < want || header.syssize == 0 {
        return Err(BzImageError::Short {
            have: size,
            want: want.max((setup_sects + 1) * SECTOR + ENTRY_64),
        });
    }
    let start =
        if header.relocatable_kernel != 0 { header.pref_address } else { u64::from(header.code32_start) };
    if !(HIGH_RAM..1 << 31).contains(&start) || !start.is_multiple_of(4096) {
        return Err(BzImageError::WildAddress(start));
    }
    if u64::from(header.code32_start) < HIGH_RAM {
        return Err(BzImageError::WildAddress(u64::from(header.code32_start)));
    }
    Ok(start)
}
