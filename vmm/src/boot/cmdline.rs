//! The kernel's command line: one NUL-terminated line, not longer than the kernel takes.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Loaded};
use crate::layout::{CMDLINE, CMDLINE_MAX};
use crate::memory::GuestMemory;

/// Why a command line was refused.
///
/// ```
/// use vmm::boot::{BootError, BootSource, CmdlineError, Kernel, load};
///
/// let memory = vmm::memory::allocate(64 << 20)?;
/// let kernel = Kernel::Bytes(vmm::guest_images::PROBE.into());
/// let with = |cmdline| load(&memory, &BootSource { kernel: &kernel, initrd: None, cmdline });
/// assert!(with("console=ttyS0 quiet").is_ok());
/// let refused = with("quiet\n");
/// assert!(matches!(refused, Err(BootError::Cmdline(CmdlineError::ControlCharacter(b'\n', 5)))));
/// # Ok::<(), vmm::memory::MemoryError>(())
/// ```
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Longer than the kernel takes.
    #[error("the kernel's command line has {len} bytes, this kernel takes {max}; shorten it")]
    TooLong {
        /// Bytes there are.
        len: usize,
        /// Bytes that the kernel takes.
        max: usize,
    },
    /// A byte that no command line can have.
    #[error("the kernel's command line has a control character ({0:#04x}) at byte {1}; remove it")]
    ControlCharacter(u8, usize),
}

/// Writes the line and returns its length without the NUL.
pub(super) fn write(memory: &GuestMemory, line: &str, kernel: &Loaded) -> Result<usize, BootError> {
    let line = line.as_bytes();
    check(line, kernel.header.cmdline_size as usize)?;
    let at = GuestAddress(CMDLINE);
    memory
        .write_slice(line, at)
        .and_then(|()| memory.write_obj(0u8, GuestAddress(CMDLINE + line.len() as u64)))
        .map_err(|source| BootError::Write { what: "the command line", at: at.0, source })?;
    Ok(line.len())
}

/// `kernel_max` excludes the NUL (boot.rst, `cmdline_size`).
fn check(line: &[u8], kernel_max: usize) -> Result<(), CmdlineError> {
    let max = kernel_max.min(CMDLINE_MAX - 1);
    if line.len() > max {
        return Err(CmdlineError::TooLong { len: line.len(), max });
    }
    match line.iter().position(|byte| byte.is_ascii_control() && *byte != b'\t') {
        Some(at) => Err(CmdlineError::ControlCharacter(line[at], at)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_as_long_as_the_kernel_takes_passes_and_one_more_byte_does_not() {
        assert_eq!(check(&[b'a'; 2047], 2047), Ok(()));
        assert_eq!(check(&[b'a'; 2048], 2047), Err(CmdlineError::TooLong { len: 2048, max: 2047 }));
        assert_eq!(
            check(&vec![b'a'; CMDLINE_MAX], usize::MAX),
            Err(CmdlineError::TooLong { len: CMDLINE_MAX, max: CMDLINE_MAX - 1 })
        );
    }

    #[test]
    fn a_line_that_the_kernel_would_cut_short_is_refused() {
        assert_eq!(check(b"quiet\0panic=1", 2047), Err(CmdlineError::ControlCharacter(0, 5)));
        assert_eq!(check(b"quiet\n", 2047), Err(CmdlineError::ControlCharacter(b'\n', 5)));
        assert_eq!(check("root=/dev/vda name=zoë".as_bytes(), 2047), Ok(()));
    }
}
