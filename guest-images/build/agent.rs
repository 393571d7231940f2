//! The guest agent: a program without any libc. Its own build.rs links it; here only the code model is fixed.

use crate::nested;

/// Builds it and tells the crate where it is (`PONTOON_AGENT`, read by `include_bytes!`).
pub(crate) fn build() {
    let path = nested::build("agent", "pontoon-agent", &["-C", "relocation-model=static"]);
    println!("cargo::rustc-env=PONTOON_AGENT={}", path.display());
}
