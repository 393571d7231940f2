//! The documentation names only what exists.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn documents() -> Vec<PathBuf> {
    let mut found = vec![root().join("README.md")];
    for dir in ["docs", "docs/decisions"] {
        let entries = fs::read_dir(root().join(dir)).expect("the folder exists");
        found.extend(
            entries.flatten().map(|entry| entry.path()).filter(|p| p.extension().is_some_and(|e| e == "md")),
        );
    }
    found
}

#[test]
fn every_path_in_the_documentation_exists() {
    const TOPS: [&str; 7] = ["vmm/", "devices/", "net/", "guest-images/", "tests/", "scripts/", "docs/"];
    let mut checked = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).expect("a document is text");
        for quoted in text.split('`').skip(1).step_by(2) {
            let Some(path) = quoted.split_whitespace().next() else { continue };
            let looks_like_path = TOPS.iter().any(|top| path.starts_with(top))
                && path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b));
            if looks_like_path {
                assert!(
                    root().join(path).exists(),
                    "{} names {path}, which does not exist",
                    document.display()
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 20, "only {checked} paths were found: is this test still looking at the right text?");
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    for document in documents() {
        let text = fs::read_to_string(&document).expect("a document is text");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") || link.starts_with('#') {
                continue;
            }
            let target = link.split('#').next().unwrap_or_default();
            let base = document.parent().expect("a document is in a folder");
            assert!(base.join(target).exists(), "{} links to {link}", document.display());
        }
    }
}
