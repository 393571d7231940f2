//! Boots a kernel with this terminal as its console: the smallest program around the library.
//!
//! `boot KERNEL [--initrd FILE] [--cmdline TEXT] [--memory MIB] [--cpus N] [--bare-metal]`
//!
//! Ctrl-A x stops the machine. The exit status is the guest's.

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use vmm::console::RawMode;
use vmm::machine::{Machine, MachineBuilder};

fn main() -> Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let machine = parse()?
        .serial_output(io::stdout())
        .serial_input(io::stdin().as_fd().try_clone_to_owned()?)
        .console_escape(true)
        .build()?;
    let terminal = RawMode::enter(io::stdin())?;
    let reason = machine.start()?.wait();
    drop(terminal);
    tracing::info!("{reason}");
    Ok(ExitCode::from(reason.status()))
}

fn parse() -> Result<MachineBuilder> {
    let mut machine = Machine::builder();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        machine = match arg.as_str() {
            "--initrd" => machine.initrd(value()?),
            "--cmdline" => machine.cmdline(value()?),
            "--memory" => machine.memory(value()?.parse::<u64>()? << 20),
            "--cpus" => machine.cpus(value()?.parse()?),
            "--bare-metal" => machine.bare_metal(true),
            option if option.starts_with('-') => bail!("there is no option {option}"),
            kernel => machine.kernel(kernel),
        };
    }
    Ok(machine)
}
