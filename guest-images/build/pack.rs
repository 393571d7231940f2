//! The programs for Linux guests, packed one behind the other into one LZMA stream: each is static, so each brings the
//! same libraries, and what they have in common is stored once. Beside the stream, a source file says where each is.

#![allow(clippy::panic, reason = "a build script tells cargo what is wrong by its panic")]

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

use lzma_rust2::{LzmaOptions, LzmaWriter};

/// The best compression, slow to make and as fast as any to unpack.
const PRESET: u32 = 9;

/// Packs `programs` (the name of its constant, its file) into OUT_DIR (`PONTOON_PACKED`, `PONTOON_PLACES`; read by `src/program.rs`).
pub(crate) fn pack(programs: &[(&str, PathBuf)]) {
    let (mut whole, mut places) = (Vec::new(), String::new());
    for (name, path) in programs {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("cannot read {path:?}: {error}"));
        let mut id = DefaultHasher::new();
        id.write(&bytes);
        let (at, len, id) = (whole.len(), bytes.len(), id.finish());
        writeln!(
            places,
            "pub(super) const {name}: Program = Program {{ at: {at}, len: {len}, id: {id:#x} }};"
        )
        .expect("a String takes everything");
        whole.extend(bytes);
    }
    let mut options = LzmaOptions::with_preset(PRESET);
    options.dict_size = u32::try_from(whole.len()).expect("a few megabytes").next_power_of_two();
    let size = u64::try_from(whole.len()).expect("usize has 64 bits");
    let packed = LzmaWriter::new_use_header(Vec::new(), &options, Some(size))
        .and_then(|mut writer| writer.write_all(&whole).and_then(|()| writer.finish()))
        .unwrap_or_else(|error| panic!("cannot pack the guests' programs: {error}"));
    let out = std::env::var("OUT_DIR").unwrap_or_else(|error| panic!("cargo did not set OUT_DIR: {error}"));
    put(&Path::new(&out).join("programs.lzma"), "PONTOON_PACKED", &packed);
    put(&Path::new(&out).join("places.rs"), "PONTOON_PLACES", places.as_bytes());
}

fn put(path: &Path, variable: &str, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap_or_else(|error| panic!("cannot write {path:?}: {error}"));
    println!("cargo::rustc-env={variable}={}", path.display());
}
