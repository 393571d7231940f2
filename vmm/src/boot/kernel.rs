//! A kernel image, wherever it is, and what kind it is.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::PathBuf;

use vm_memory::ReadVolatile;

use super::file::ImageFile;
use super::{BzImageError, ElfError, Loaded, bzimage, elf};
use crate::memory::GuestMemory;

/// Bytes of a kernel or an initrd: a file, read straight into guest memory, or bytes that the program carries.
///
/// ```
/// use vmm::boot::Kernel;
///
/// let file: Kernel = "/boot/vmlinuz".into();
/// let carried = Kernel::Bytes(vmm::guest_images::PROBE.into());
/// ```
#[derive(Clone, Debug)]
pub enum Kernel {
    /// A file.
    Path(PathBuf),
    /// The image itself.
    Bytes(Cow<'static, [u8]>),
}

impl<P: Into<PathBuf>> From<P> for Kernel {
    fn from(path: P) -> Self {
        Self::Path(path.into())
    }
}

/// What kind of kernel was found.
///
/// ```
/// use vmm::boot::{BootSource, Kernel, KernelFormat, load};
///
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let kernel = Kernel::Bytes(vmm::guest_images::PROBE.into());
/// let (_, format) = load(&memory, &BootSource { kernel: &kernel, initrd: None, cmdline: "" })?;
/// assert_eq!(format, KernelFormat::Elf);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// A Linux bzImage, entered by the 64-bit boot protocol.
    BzImage,
    /// A static x86-64 ELF: `vmlinux` or a bare-metal program.
    Elf,
}

/// Why a kernel was not loaded.
///
/// ```
/// use vmm::boot::{BootError, BootSource, Kernel, KernelError, load};
///
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let packed = Kernel::Bytes(b"\x1f\x8b".as_slice().into());
/// let refused = load(&memory, &BootSource { kernel: &packed, initrd: None, cmdline: "" });
/// let Err(BootError::Kernel(KernelError::NotAKernel { found, advice, .. })) = refused else { panic!() };
/// assert_eq!((found, advice), ("it is gzip data", "unpack it with gunzip first"));
/// # Ok::<(), vmm::memory::MemoryError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be opened.
    #[error("could not open the kernel {}: {source}; name a bzImage (vmlinuz) or a vmlinux", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image could not be read.
    #[error("could not read {what} of the kernel {name}: {source}; is it a regular, complete file?")]
    Read {
        /// The image.
        name: String,
        /// Which part.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Neither a bzImage nor an ELF.
    #[error("{name} is neither a bzImage nor an ELF ({found}); {advice}")]
    NotAKernel {
        /// The image.
        name: String,
        /// What it looks like.
        found: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A bzImage that is not usable.
    #[error("the bzImage {name} {source}")]
    BzImage {
        /// The image.
        name: String,
        /// What is wrong.
        source: BzImageError,
    },
    /// An ELF that is not usable.
    #[error("the ELF {name} {source}")]
    Elf {
        /// The image.
        name: String,
        /// What is wrong.
        source: ElfError,
    },
}

/// What an image can be read through: sought in, and read into guest memory directly.
pub(super) trait Image: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> Image for T {}

impl Kernel {
    /// What messages call it.
    pub fn name(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Bytes(bytes) => format!("(embedded, {} bytes)", bytes.len()),
        }
    }
}

/// First bytes of images that people mistake for kernels that boot here.
const LOOKALIKES: [(&[u8], &str, &str); 6] = [
    (b"\x1f\x8b", "it is gzip data", "unpack it with gunzip first"),
    (b"\xfd7zXZ", "it is xz data", "unpack it with unxz first"),
    (b"\x28\xb5\x2f\xfd", "it is zstd data", "unpack it with unzstd first"),
    (b"QFI\xfb", "it is a qcow2 disk image", "a disk is given with --disk, the kernel with --kernel"),
    (b"!<arch>", "it is a Debian package", "take boot/vmlinuz-* out of it with dpkg-deb -x"),
    (b"070701", "it is a cpio archive", "that is an initrd; give it with --initrd"),
];

/// Bytes from the start that decide the format.
const SNIFFED: usize = 0x206;

pub(super) fn load(memory: &GuestMemory, kernel: &Kernel) -> Result<Loaded, KernelError> {
    match kernel {
        Kernel::Path(path) => {
            let file = File::open(path).map_err(|source| KernelError::Open { path: path.clone(), source })?;
            let mut file = ImageFile::new(file).map_err(|source| KernelError::Read {
                name: kernel.name(),
                what: "the first bytes",
                source,
            })?;
            load_image(memory, &mut file, kernel)
        }
        Kernel::Bytes(bytes) => load_image(memory, &mut Cursor::new(bytes), kernel),
    }
}

fn load_image<F: Image>(memory: &GuestMemory, image: &mut F, kernel: &Kernel) -> Result<Loaded, KernelError> {
    let name = || kernel.name();
    let read = |what, source| KernelError::Read { name: name(), what, source };
    let size = image.seek(SeekFrom::End(0)).map_err(|e| read("the size", e))?;
    let mut head = [0; SNIFFED];
    let len = read_at(image, 0, &mut head).map_err(|e| read("the first bytes", e))?;
    let head = &head[..len];
    if head.starts_with(b"\x7fELF") {
        elf::load(memory, image, size).map_err(|source| KernelError::Elf { name: name(), source })
    } else if head.get(0x202..) == Some(b"HdrS") {
        bzimage::load(memory, image, size).map_err(|source| KernelError::BzImage { name: name(), source })
    } else {
        let (found, advice) = LOOKALIKES
            .iter()
            .find(|(magic, ..)| head.starts_with(magic))
            .map_or(("no known header", "name a bzImage (vmlinuz) or a vmlinux"), |(_, f, a)| (*f, *a));
        Err(KernelError::NotAKernel { name: name(), found, advice })
    }
}

/// Reads at `offset` until `buf` is full or the image ends, and says how many bytes there were.
pub(super) fn read_at<F: Image>(image: &mut F, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    image.seek(SeekFrom::Start(offset))?;
    let mut len = 0;
    while len < buf.len() {
        match image.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}
