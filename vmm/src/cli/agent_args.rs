//! What the user may type about commands and files in a running machine.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueHint};
use vmm::runtime::MachineName;

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// The command gets a terminal of its own [default: when standard input and output are terminals]
    #[arg(short, long)]
    pub(crate) terminal: bool,

    /// The command gets no terminal
    #[arg(short = 'T', long, conflicts_with = "terminal")]
    pub(crate) no_terminal: bool,

    /// Pass standard input on; it is passed on anyway, unless -n
    #[arg(short, long, conflicts_with = "no_stdin")]
    pub(crate) interactive: bool,

    /// The command has no standard input
    #[arg(short, long)]
    pub(crate) no_stdin: bool,

    /// Set a variable; NAME alone takes this shell's value
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,

    /// The working directory in the machine [default: the user's home]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<PathBuf>,

    /// The user in the machine, by name or number [default: root]
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,

    #[command(flatten)]
    pub(crate) patience: Patience,

    /// The machine's name
    #[arg(value_name = "NAME")]
    pub(crate) machine: MachineName,

    /// The command and its arguments, with or without -- before them; its exit status becomes this command's
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Copy at most so many MiB out of the machine
    #[arg(long, value_name = "MIB")]
    pub(crate) limit: Option<u64>,

    #[command(flatten)]
    pub(crate) patience: Patience,

    /// Print one JSON object: files, folders, links, bytes, left_out
    #[arg(long)]
    pub(crate) json: bool,

    /// PATH here, NAME:PATH in a machine, or - for standard input; FOLDER/. means what is in it
    #[arg(value_name = "SOURCE", value_hint = ValueHint::AnyPath)]
    pub(crate) source: OsString,

    /// PATH here, NAME:PATH in a machine, or - for standard output
    #[arg(value_name = "DESTINATION", value_hint = ValueHint::AnyPath)]
    pub(crate) destination: OsString,
}

/// How long a machine may take to boot.
#[derive(Debug, Args)]
pub(crate) struct Patience {
    /// How long after its start a machine may take until its agent answers
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub(crate) wait: u32,
}
