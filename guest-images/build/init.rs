//! The init of our Linux images: an ordinary program, static so that it runs in an empty initramfs.

use crate::nested;

/// Builds it and tells the crate where it is (`PONTOON_INIT`, read by `include_bytes!`).
pub(crate) fn build() {
    let flags = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];
    let path = nested::build("init", "init", &flags);
    println!("cargo::rustc-env=PONTOON_INIT={}", path.display());
}
