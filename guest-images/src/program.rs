//! Programs for Linux guests, each built from a package of its own and embedded in this one.
//!
//! They are static, a megabyte each, and mostly the same libraries: so `build/pack.rs` packs them into one LZMA stream, in
//! which each further one costs a tenth of that. They are wanted when an image or the lab is made, which takes seconds;
//! the stream is unpacked (a tenth of a second) when the bytes of the first are asked for, and stays unpacked.

use std::sync::OnceLock;

static PACKED: &[u8] = include_bytes!(env!("PONTOON_PACKED"));

mod places {
    use super::Program;

    include!(env!("PONTOON_PLACES"));
}

/// The init of our Linux images: to be put at `/init` of an initramfs.
pub const INIT: Program = places::INIT;

/// PID 1 of the lab's outer machine: to be put at `/init` of its initramfs.
pub const LAB_INIT: Program = places::LAB_INIT;

/// A static x86-64 ELF program.
///
/// ```
/// use guest_images::{INIT, LAB_INIT};
///
/// // The number is had without unpacking; the bytes, once unpacked, stay.
/// assert_ne!(INIT.id(), LAB_INIT.id());
/// assert!(INIT.bytes().starts_with(b"\x7fELF"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    at: usize,
    len: usize,
    id: u64,
}

impl Program {
    /// The program.
    pub fn bytes(self) -> &'static [u8] {
        static UNPACKED: OnceLock<Vec<u8>> = OnceLock::new();
        let all = UNPACKED.get_or_init(|| {
            let mut all = Vec::new();
            lzma_rs::lzma_decompress(&mut &*PACKED, &mut all).expect("the build packed it");
            all
        });
        &all[self.at..self.at + self.len]
    }

    /// A number that is another one for another program: for keys of caches, and had without unpacking.
    pub fn id(self) -> u64 {
        self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_program_is_unpacked_whole() {
        for program in [INIT, LAB_INIT] {
            assert_eq!(&program.bytes()[..4], b"\x7fELF");
            assert_eq!(program.bytes().len(), program.len);
        }
        assert_ne!(INIT.id(), LAB_INIT.id());
        assert!(PACKED.len() < INIT.len, "together they are smaller than one: {}", PACKED.len());
    }
}
