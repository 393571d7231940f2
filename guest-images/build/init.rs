//! The init of our Linux images: an ordinary program, static so that it runs in an empty initramfs.

use std::path::PathBuf;

use crate::nested;

/// Builds it and says where it is.
pub(crate) fn build() -> PathBuf {
    let flags = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];
    nested::build("init", "init", &flags)
}
