//! The probe guest: a bare-metal program. Its own build.rs links it; here only the code model is fixed.

use crate::nested;

/// Builds it and tells the crate where it is (`PONTOON_PROBE`, read by `include_bytes!`).
pub(crate) fn build() {
    let path = nested::build("probe", "probe-guest", &["-C", "relocation-model=static"]);
    println!("cargo::rustc-env=PONTOON_PROBE={}", path.display());
}
