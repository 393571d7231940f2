//! Builds the guests that this crate embeds: each is a package of its own, since it is linked unlike the
//! workspace, and each has its own file here that says how.

#[path = "build/agent.rs"]
mod agent;
#[path = "build/init.rs"]
mod init;
#[path = "build/lab_init.rs"]
mod lab_init;
#[path = "build/nested.rs"]
mod nested;
#[path = "build/pack.rs"]
mod pack;
#[path = "build/probe.rs"]
mod probe;

fn main() {
    // The list of watched files is complete: without it cargo would rerun this on every touched source.
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    agent::build();
    pack::pack(&[("INIT", init::build()), ("LAB_INIT", lab_init::build())]);
    probe::build();
}
