//! PID 1 of the lab's outer machine: an ordinary program, static, since it starts in an initramfs without libraries.

use std::path::PathBuf;

use crate::nested;

/// Builds it and says where it is.
pub(crate) fn build() -> PathBuf {
    let flags = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];
    nested::build("lab-init", "lab-init", &flags)
}
