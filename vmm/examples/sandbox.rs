//! Runs a command in a machine without a network, with a deadline, and tells what became of it.
//!
//! `sandbox SECONDS COMMAND [ARGUMENTS…]`
//!
//! The guest is the image `debian` (`pontoon image build debian`). The command's output goes to standard output, and its status
//! is the exit status. When the deadline has passed, the guest is asked to shut down, a little later its plug is pulled, and the
//! status is 124.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use guest_images::Store;
use vmm::machine::{Guest, Machine};

/// What the guest gets to shut down.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> Result<ExitCode> {
    // What the library warns of, such as a host that runs no Linux guests.
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(io::stderr).init();
    let mut words = std::env::args().skip(1);
    let seconds: u64 = words.next().and_then(|word| word.parse().ok()).context("how many seconds?")?;
    let argv: Vec<String> = words.collect();
    if argv.is_empty() {
        bail!("which command?");
    }
    let image = Store::open_default()?.get("debian")?;
    let guest = Guest::image(&image).command(argv);
    let (builder, mut console) = Machine::builder().guest(guest)?.memory(256 << 20).console()?;
    let machine = builder.build()?.start()?;

    // The console ends with the machine, whatever ends it; a thread that reads it needs no deadline of its own.
    let output = std::thread::spawn(move || {
        let mut text = Vec::new();
        console.read_to_end(&mut text).map(|_| text)
    });
    let in_time = machine.wait_for(Duration::from_secs(seconds)).is_some();
    let reason = if in_time { machine.wait() } else { machine.shutdown(PATIENCE) };
    let text = output.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    io::stdout().write_all(&text)?;
    writeln!(io::stderr(), "{reason}")?;
    Ok(ExitCode::from(if in_time { reason.status() } else { 124 }))
}
