//! Links the guest for no operating system; the library and its tests are linked as usual.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=link.ld");
    let script = format!("-Wl,-T,{}/link.ld", env!("CARGO_MANIFEST_DIR"));
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", &script] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
