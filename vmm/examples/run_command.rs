//! Runs a command in a fresh machine through the guest's agent, and captures what it writes.
//!
//! `run_command COMMAND [ARGUMENTS…]`
//!
//! The guest is the image `debian` (`pontoon image build debian`). Unlike a command that the guest's init runs, one of the agent's has
//! its output and its errors apart, and there may be many of them, at once or one after the other, in one machine.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use guest_images::Store;
use vmm::agent::Command;
use vmm::machine::Machine;

/// Most bytes of output that are kept.
const LIMIT: usize = 1 << 20;
/// What a boot may take.
const BOOT: Duration = Duration::from_secs(60);

fn main() -> Result<ExitCode> {
    // What the library warns of, such as a host that runs no Linux guests.
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(io::stderr).init();
    let mut words = std::env::args().skip(1);
    let Some(program) = words.next() else { bail!("which command?") };
    let image = Store::open_default()?.get("debian")?;
    let (builder, guest) = Machine::builder().guest(&image)?.memory(256 << 20).agent()?;
    let machine = builder.build()?.start()?;

    guest.wait_until_ready(BOOT)?;
    let output = guest.output(Command::new(program).args(words), LIMIT)?;
    io::stdout().write_all(&output.stdout)?;
    io::stderr().write_all(&output.stderr)?;

    // In order, with what it has on disks written back; the plug is pulled if it takes too long.
    guest.power_off()?;
    machine.wait_for(Duration::from_secs(10));
    drop(machine);
    Ok(ExitCode::from(output.status.code()))
}
