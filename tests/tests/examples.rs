//! Every type that a program can name shows by an example what it is for.
//!
//! The sources are read as text, as rustfmt leaves them: a type's line begins with `pub struct` and the like; it is public when each module
//! down to it is, or when a public module of its crate re-exports its name. Types that a macro declares, such as `bitflags!`, escape it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The crates of the library.
const CRATES: [&str; 4] = ["net", "devices", "guest-images", "vmm"];

/// A module's file, and whether a program can name what is public in it.
struct Module {
    file: PathBuf,
    public: bool,
}

/// The modules of a crate that are no tests, its root first.
fn modules(root: PathBuf) -> Vec<Module> {
    let mut found = vec![Module { file: root, public: true }];
    let mut next = 0;
    while let Some(Module { file, public }) = found.get(next) {
        let (text, folder, public) = (read(file), children_of(file), *public);
        let lines: Vec<&str> = text.lines().collect();
        for (n, line) in lines.iter().enumerate() {
            let (declared_public, name) = match (line.strip_prefix("pub mod "), line.split_once("mod ")) {
                (Some(name), _) => (true, name),
                (None, Some(("" | "pub(crate) " | "pub(super) ", name))) => (false, name),
                _ => continue,
            };
            let Some(name) = name.strip_suffix(';') else { continue };
            if n > 0 && lines[n - 1].starts_with("#[") {
                // `cfg(test)`, or a path that leads out of the crate.
                continue;
            }
            let places = [folder.join(format!("{name}.rs")), folder.join(name).join("mod.rs")];
            let file = places.into_iter().find(|place| place.is_file()).expect("rustc finds it there, too");
            found.push(Module { file, public: public && declared_public });
        }
        next += 1;
    }
    found
}

/// The folder in which the files of a module's modules are.
fn children_of(file: &Path) -> PathBuf {
    let folder = file.parent().expect("a file is in a folder");
    match file.file_stem().and_then(|stem| stem.to_str()) {
        Some("mod" | "lib") => folder.to_owned(),
        stem => folder.join(stem.expect("our files have names")),
    }
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).expect("a source is text")
}

/// The names that public modules give to what is elsewhere.
fn reexported(modules: &[Module]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for module in modules.iter().filter(|module| module.public) {
        let text = format!("\n{}", read(&module.file));
        for statement in text.split("\npub use ").skip(1).filter_map(|rest| rest.split(';').next()) {
            names.extend(statement.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned));
        }
    }
    names
}

/// The name that a line declares a public type by.
fn declared(line: &str) -> Option<&str> {
    let kinds = ["struct", "enum", "union", "trait", "unsafe trait", "type"];
    let rest =
        kinds.iter().find_map(|kind| line.strip_prefix("pub ")?.strip_prefix(kind)?.strip_prefix(' '))?;
    rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

/// Whether the documentation above line `n` has an example.
fn has_example(lines: &[&str], n: usize) -> bool {
    let above = lines[..n].iter().rev();
    let documentation = above.take_while(|line| !line.is_empty() && !line.starts_with('}'));
    documentation.clone().any(|line| line.starts_with("/// ```"))
}

#[test]
fn every_public_type_has_an_example() {
    let (mut types, mut without) = (0, Vec::new());
    for name in CRATES {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("src/lib.rs");
        let modules = modules(root);
        let reexported = reexported(&modules);
        for module in &modules {
            let text = read(&module.file);
            let lines: Vec<&str> = text.lines().collect();
            for (n, line) in lines.iter().enumerate() {
                let Some(declared) = declared(line) else { continue };
                if !module.public && !reexported.contains(declared) {
                    continue;
                }
                types += 1;
                if !has_example(&lines, n) {
                    without.push(format!("{}:{}: {declared}", module.file.display(), n + 1));
                }
            }
        }
    }
    assert!(types > 200, "only {types} types were found: is this test still looking at the right text?");
    assert!(without.is_empty(), "{} types without an example:\n{}", without.len(), without.join("\n"));
}
