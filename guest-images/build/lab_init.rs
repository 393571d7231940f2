//! PID 1 of the lab's outer machine: an ordinary program, static, since it starts in an initramfs without libraries.

use crate::nested;

/// Builds it and tells the crate where it is (`PONTOON_LAB_INIT`, read by `include_bytes!`).
pub(crate) fn build() {
    let flags = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];
    let path = nested::build("lab-init", "lab-init", &flags);
    println!("cargo::rustc-env=PONTOON_LAB_INIT={}", path.display());
}
