//! Which kernel modules go into the image: the named ones that this kernel has, and what they need.
//!
//! What enters: a module tree as a Debian kernel package has it (`modules.order`, `.ko` or `.ko.xz` files; no depmod indexes).
//! What leaves: the files, uncompressed (the kernel's own unpacking costs boot time), and the two indexes that init reads,
//! filtered to them. A named module that this kernel has built in, or does not have, is left out: lists serve several kernels.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::modinfo::{self, Modinfo};
use crate::store::{Error, io_error};

/// One module on its way into the image.
#[derive(Debug)]
pub(super) struct Module {
    /// Its path below the module directory, without a compression suffix.
    pub(super) file: String,
    /// The uncompressed ELF file.
    pub(super) elf: Vec<u8>,
    info: Modinfo,
}

/// Modules by name (`_` for `-`).
pub(super) type Modules = BTreeMap<String, Module>;

/// The module's name as the kernel spells it.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads `names` and their closure from the module directory `dir`.
pub(super) fn select(dir: &Path, names: &[&str]) -> Result<Modules, Error> {
    let files = files_of(dir)?;
    let mut selected = Modules::new();
    let mut left: Vec<_> = names.iter().map(|name| normal(name)).collect();
    let mut seen = BTreeSet::new();
    while let Some(name) = left.pop() {
        // A dependency that has no file is built in.
        let Some(path) = files.get(&name) else { continue };
        if !seen.insert(name.clone()) {
            continue;
        }
        let elf = read(&dir.join(path))?;
        let info = modinfo::parse(&elf).ok_or_else(|| Error::Content {
            path: dir.join(path),
            problem: "it has no .modinfo section, so it is no module of an x86-64 kernel".to_owned(),
        })?;
        left.extend(info.depends.iter().chain(&info.soft_before).map(|name| normal(name)));
        let file = path.strip_suffix(".xz").unwrap_or(path).to_owned();
        selected.insert(name, Module { file, elf, info });
    }
    Ok(selected)
}

/// `modules.dep` of the selection: `FILE: FILE…`, in the order of names.
pub(super) fn dep_index(modules: &Modules) -> String {
    let mut text = String::new();
    for module in modules.values() {
        let _ = write!(text, "{}:", module.file);
        let needed = module.info.depends.iter().chain(&module.info.soft_before);
        for needed in needed.filter_map(|name| modules.get(&normal(name))) {
            let _ = write!(text, " {}", needed.file);
        }
        text.push('\n');
    }
    text
}

/// `modules.alias` of the selection.
pub(super) fn alias_index(modules: &Modules) -> String {
    let mut text = String::new();
    for (name, module) in modules {
        // An alias is one word; a pattern with a blank in it would be another line's.
        for alias in module.info.aliases.iter().filter(|alias| !alias.contains(char::is_whitespace)) {
            let _ = writeln!(text, "alias {alias} {name}");
        }
    }
    text
}

/// The files of the tree by module name. `modules.order` lists them without looking at the disk, as `.ko` even when they are compressed.
fn files_of(dir: &Path) -> Result<BTreeMap<String, String>, Error> {
    let order = dir.join("modules.order");
    let text = fs::read_to_string(&order).map_err(io_error("read", &order))?;
    let mut files = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let base = line.rsplit('/').next().unwrap_or(line);
        let name = normal(base.split_once(".ko").map_or(base, |(stem, _)| stem));
        let path = [line.to_owned(), format!("{line}.xz")].into_iter().find(|path| dir.join(path).is_file());
        if let Some(path) = path {
            files.insert(name, path);
        }
    }
    Ok(files)
}

fn read(path: &PathBuf) -> Result<Vec<u8>, Error> {
    let bytes = fs::read(path).map_err(io_error("read", path))?;
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(bytes);
    }
    let mut elf = Vec::new();
    lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut elf).map_err(|error| Error::Content {
        path: path.clone(),
        problem: format!("cannot unpack it: {error:?}"),
    })?;
    Ok(elf)
}
