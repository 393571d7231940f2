//! Links the agent without any libc: it starts in an initramfs that has none, and is a twentieth of the size.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for argument in
        ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack"]
    {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
