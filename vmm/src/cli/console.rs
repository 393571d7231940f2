//! `pontoon console`: this terminal as the console of a detached machine.

use std::io::{self, IsTerminal};

use anyhow::{Context, anyhow};
use vmm::console::{Escape, RawMode};
use vmm::runtime::Runtime;

use super::machine_args::ConsoleArgs;
use super::registry::{asking, failure};
use super::relay::{Ended, relay};
use super::{Failure, output};

pub(crate) fn console(args: &ConsoleArgs) -> Result<u8, Failure> {
    let name = &args.name;
    let entry = Runtime::open().and_then(|runtime| runtime.find_alive(name)).map_err(failure)?;
    let attached = entry.control().and_then(|client| client.console(!args.read_only));
    let (stream, writer) = attached.map_err(|error| asking(name, error))?;
    if !writer && !args.read_only {
        output::note("somebody else types here; this is for reading only");
    }
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    if terminal {
        output::note(&format!("the console of {name}; ctrl-A d leaves it"));
    }
    let raw = if terminal {
        RawMode::enter(io::stdin()).context("preparing the terminal").map_err(Failure::machine)?
    } else {
        None
    };
    let escape = raw.as_ref().map(|_| Escape::attached());
    let stays =
        || output::note(&format!("{name} goes on; ctrl-A d leaves it, pontoon stop {name} ends it\r"));
    let ended = relay(&stream, escape, &stays);
    drop(raw);
    match ended {
        Ok(Ended::Closed | Ended::Refused) if terminal => {
            output::note(&format!("\n{name} has ended, or this console was cut off"))
        }
        Ok(Ended::Detached) => output::note(&format!("\n{name} goes on")),
        Ok(Ended::Closed | Ended::Refused | Ended::NoReader) => {}
        Err(error) => {
            return Err(Failure::machine(anyhow!(error).context(format!("joining the console of {name}"))));
        }
    }
    Ok(0)
}
