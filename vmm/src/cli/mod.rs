//! The command line: what the user types becomes calls of the library, and what comes back becomes lines and
//! an exit status.
//!
//! Nothing here can be done only here: whoever embeds the library has the same calls.

mod agent_args;
mod args;
mod attach;
mod carry;
mod check;
mod console;
mod cp;
mod detach;
mod exec;
mod image;
mod inlab;
mod lab;
mod logs;
mod machine_args;
mod machines;
mod nc;
mod netinfo;
mod network;
mod outcome;
mod output;
mod registry;
mod relay;
mod run;
mod signals;
mod sys;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::{CommandFactory, Parser};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use args::{Cli, Command};

/// The user asked for something that cannot be.
const STATUS_USAGE: u8 = 2;
/// The machine failed, not the guest: docker's number for "the tool itself".
const STATUS_MACHINE: u8 = 125;
/// `--timeout` ran out: the number of coreutils' timeout(1).
const STATUS_TIMEOUT: u8 = 124;

/// How a command ends when it cannot do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request is wrong: exit status 2.
    Usage(anyhow::Error),
    /// The machine, the network or a build failed: exit status 125.
    Machine(anyhow::Error),
}

impl Failure {
    pub(crate) fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::Usage(error.into())
    }

    pub(crate) fn machine(error: impl Into<anyhow::Error>) -> Self {
        Self::Machine(error.into())
    }
}

pub(crate) fn main() -> ExitCode {
    // A reader that has gone away (`pontoon image ls | head`) ends us as it ends any other command.
    sys::one_arena();
    let cli = Cli::parse();
    start_log(&cli);
    let outcome = match cli.command {
        Command::Check(args) => check::check(&args),
        Command::Run(args) if args.detach && !cli.detached => detach::start(&args),
        Command::Run(args) => run::run(*args, cli.detached),
        Command::Ps(args) => machines::ps(&args),
        Command::Kill(args) => machines::kill(&args),
        Command::Stop(args) => machines::stop(&args),
        Command::Console(args) => console::console(&args),
        Command::Nc(args) => nc::nc(&args),
        Command::Logs(args) => logs::logs(&args),
        Command::Exec(args) => exec::exec(&args),
        Command::Cp(args) => cp::cp(&args),
        Command::Image(command) => image::image(command),
        Command::Net(command) => attach::net(command),
        Command::Lab(args) => lab::lab(args),
        Command::Completions { shell } => completions(shell),
        Command::Man => man(),
    };
    let outcome = outcome.and_then(|status| match output::results_arrived() {
        // The guest's or the command's own failure says more.
        Err(error) if status == 0 => {
            Err(Failure::machine(anyhow!("writing to standard output: {error}; is its disk full?")))
        }
        _ => Ok(status),
    });
    let (status, error) = match outcome {
        Ok(status) => return ExitCode::from(status),
        Err(Failure::Usage(error)) => (STATUS_USAGE, error),
        Err(Failure::Machine(error)) => (STATUS_MACHINE, error),
    };
    output::error(&error);
    ExitCode::from(status)
}

/// Logs go to stderr; `-v` shows what the network does, `-vv` every refused frame, `--log` or RUST_LOG anything:
/// `net=debug,vmm=info` (modules and what is below them), `debug` (everything).
fn start_log(cli: &Cli) {
    let default = match cli.verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let default = Targets::new().with_default(default);
    let filter = match &cli.log {
        Some(text) => text.parse().unwrap_or_else(|error| {
            output::note(&format!("--log is not a filter ({error}); write for example net=debug,vmm=info"));
            default
        }),
        None => std::env::var("RUST_LOG").ok().and_then(|text| text.parse().ok()).unwrap_or(default),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| output::Log)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time();
    tracing_subscriber::registry().with(lines).with(filter).init();
}

fn completions(shell: clap_complete::Shell) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pontoon", &mut script);
    print_all(&script)
}

fn man() -> Result<u8, Failure> {
    let mut page = Vec::new();
    render(&Cli::command().display_name("pontoon"), "pontoon", &mut page)
        .context("writing the manual")
        .map_err(Failure::machine)?;
    print_all(&page)
}

/// The manual of a command, and of those below it.
fn render(command: &clap::Command, name: &str, page: &mut Vec<u8>) -> std::io::Result<()> {
    clap_mangen::Man::new(command.clone()).render(page)?;
    for sub in command.get_subcommands() {
        let below = format!("{name}-{}", sub.get_name());
        render(&sub.clone().display_name(below.clone()).bin_name(below.clone()), &below, page)?;
    }
    Ok(())
}

fn print_all(bytes: &[u8]) -> Result<u8, Failure> {
    match std::io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::machine(anyhow::Error::new(error).context("writing to standard output")))
        }
        _ => Ok(0),
    }
}
