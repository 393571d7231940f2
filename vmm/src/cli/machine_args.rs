//! What the user may type about machines that run.

use clap::Args;
use vmm::runtime::MachineName;

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show detached machines that have ended, too, and how
    #[arg(short, long)]
    pub(crate) all: bool,

    /// Print a JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// The machines' names
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<MachineName>,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// The machines' names
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<MachineName>,

    /// Seconds that the guests have to shut down before their machines are ended
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) time: u32,
}

#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// The machine's name
    #[arg(value_name = "NAME")]
    pub(crate) name: MachineName,

    /// Only read
    #[arg(long)]
    pub(crate) read_only: bool,
}

#[derive(Debug, Args)]
pub(crate) struct NcArgs {
    /// The machine's name, or its guest's address
    #[arg(value_name = "NAME")]
    pub(crate) guest: String,

    /// The guest's TCP port
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: u16,
}

#[derive(Debug, Args)]
pub(crate) struct NetInspectArgs {
    /// The machine's name
    #[arg(value_name = "NAME")]
    pub(crate) name: MachineName,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct NetLsArgs {
    /// Print a JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The machine's name; one that has ended is as good
    #[arg(value_name = "NAME")]
    pub(crate) name: MachineName,

    /// Go on with what the guest writes from now on, until the machine ends
    #[arg(short, long)]
    pub(crate) follow: bool,

    /// What the machine's own process had to say, instead of the guest's console
    #[arg(long)]
    pub(crate) vmm: bool,
}
