//! What a kernel module says about itself: the `.modinfo` section of its ELF file.
//!
//! The section holds `name=value` strings, each ended by NUL (Linux include/linux/moduleparam.h, `MODULE_INFO`). depmod(8) would read them, but
//! it is not on every host, and Debian's packages come without its indexes. Only 64-bit little-endian ELF is read: x86-64.
//!
//! The file comes from a verified package, but is parsed as if it did not: every offset is checked.

/// ELF64 header: offset of the section headers, size and number of them, index of their names' section (System V gABI 4).
const E_SHOFF: usize = 0x28;
const E_SHENTSIZE: usize = 0x3A;
const E_SHNUM: usize = 0x3C;
const E_SHSTRNDX: usize = 0x3E;
/// ELF64 section header: name, offset in the file, size.
const SH_NAME: usize = 0x00;
const SH_OFFSET: usize = 0x18;
const SH_SIZE: usize = 0x20;
const SHDR_LEN: usize = 0x40;

/// What matters of a module here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Modinfo {
    /// Patterns of the modaliases that it drives.
    pub(super) aliases: Vec<String>,
    /// Modules whose symbols it uses.
    pub(super) depends: Vec<String>,
    /// Modules that should be there before it (`softdep=pre: …`).
    pub(super) soft_before: Vec<String>,
}

/// Reads the section; `None` when the file is no such ELF or has no such section.
pub(super) fn parse(elf: &[u8]) -> Option<Modinfo> {
    let mut info = Modinfo::default();
    for entry in section(elf, b".modinfo")?.split(|&byte| byte == 0) {
        let Ok(text) = std::str::from_utf8(entry) else { continue };
        let names = |list: &str, separator: char| {
            list.split(separator).filter(|name| !name.is_empty()).map(str::to_owned).collect::<Vec<_>>()
        };
        match text.split_once('=') {
            Some(("alias", pattern)) => info.aliases.push(pattern.to_owned()),
            Some(("depends", list)) => info.depends.extend(names(list, ',')),
            Some(("softdep", text)) => {
                let before = text.split("pre:").nth(1).unwrap_or_default();
                info.soft_before.extend(names(before.split("post:").next().unwrap_or_default(), ' '));
            }
            Some(_) | None => {}
        }
    }
    Some(info)
}

fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    // 64-bit, little-endian.
    if elf.get(..6)? != b"\x7fELF\x02\x01" || half(elf, E_SHENTSIZE)? != SHDR_LEN {
        return None;
    }
    let table = word(elf, E_SHOFF)?;
    let header = |index: usize| elf.get(table.checked_add(index * SHDR_LEN)?..)?.get(..SHDR_LEN);
    let body = |header: &[u8]| elf.get(word(header, SH_OFFSET)?..)?.get(..word(header, SH_SIZE)?);
    let names = body(header(half(elf, E_SHSTRNDX)?)?)?;
    (0..half(elf, E_SHNUM)?).filter_map(header).find_map(|header| {
        let at = u32::from_le_bytes(header.get(SH_NAME..SH_NAME + 4)?.try_into().ok()?);
        let name = names.get(usize::try_from(at).ok()?..)?.split(|&byte| byte == 0).next()?;
        if name == wanted { body(header) } else { None }
    })
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?)).ok()
}
