//! Leaves the tables for unwinding out of the release binary: it aborts on a panic (Cargo.toml), so that nothing reads them, and they
//! are a tenth of it. docs/decisions/0003-static-binary.md.

fn main() {
    const SCRIPT: &str = "link/without-unwinding.ld";
    println!("cargo:rerun-if-changed={SCRIPT}");
    let release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    if let (true, Ok(here)) = (release, std::env::var("CARGO_MANIFEST_DIR")) {
        println!("cargo:rustc-link-arg-bin=pontoon=-Wl,-T,{here}/{SCRIPT}");
    }
}
