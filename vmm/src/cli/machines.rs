//! `pontoon ps`, `stop` and `kill`: the machines of this user.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use serde_json::{Value, json};
use vmm::runtime::control::{Client, Status};
use vmm::runtime::{CONTROL_SOCKET, Condition, Entry, MachineName, Process, Runtime};

use super::machine_args::{KillArgs, PsArgs, StopArgs};
use super::registry::failure;
use super::{Failure, netinfo, output};

/// How long a machine may take to tell what it is doing.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a guest's agent may take to say that it is there.
const AGENT: Duration = Duration::from_millis(500);
/// How often it is looked whether a guest could be asked at all.
const LOOK: Duration = Duration::from_millis(100);
/// How long a process may take to end in order, once asked by a signal, before it is killed.
const ORDERLY: Duration = Duration::from_secs(5);
/// How long the kernel may take to end a process that it killed.
const KILLED: Duration = Duration::from_secs(10);

pub(crate) fn ps(args: &PsArgs) -> Result<u8, Failure> {
    let runtime = Runtime::open().map_err(failure)?;
    let mut entries = runtime.list().map_err(failure)?;
    entries.retain(|entry| args.all || entry.is_alive());
    if args.json {
        output::json(&entries.iter().map(|entry| describe(entry, ask(entry).as_ref())).collect::<Vec<_>>());
        return Ok(0);
    }
    let rows: Vec<_> = entries.iter().map(|entry| row(entry, ask(entry).as_ref())).collect();
    output::table(&["NAME", "STATE", "IMAGE", "ADDRESS", "PORTS", "MEMORY", "UPTIME"], &rows);
    Ok(0)
}

/// What a machine says itself; a machine that hangs does not keep the others from being listed.
fn ask(entry: &Entry) -> Option<Status> {
    if !entry.is_alive() {
        return None;
    }
    Client::connect_within(&entry.file(CONTROL_SOCKET), PATIENCE).and_then(|mut client| client.status()).ok()
}

fn describe(entry: &Entry, status: Option<&Status>) -> Value {
    let mut object = match entry.state() {
        Ok(state) => serde_json::to_value(state).unwrap_or_default(),
        Err(error) => json!({ "error": error.to_string() }),
    };
    object["name"] = json!(entry.name());
    object["state"] = json!(entry.condition().as_str());
    object["uptime_s"] = json!(uptime(entry, status).map(|up| up.as_secs()));
    object["address"] = json!(netinfo::address(entry, status));
    object["folder"] = json!(entry.folder());
    object
}

fn row(entry: &Entry, status: Option<&Status>) -> Vec<String> {
    let name = entry.name().to_string();
    let Ok(state) = entry.state() else {
        return vec![name, Condition::Unreadable.as_str().to_owned()];
    };
    let condition = match &state.exit {
        Some(exit) if !entry.is_alive() => {
            format!("{} ({}): {}", entry.condition().as_str(), exit.status, exit.reason)
        }
        _ => entry.condition().as_str().to_owned(),
    };
    let kernel =
        || state.kernel.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into());
    let image = state.image.clone().or_else(kernel);
    [
        name,
        condition,
        image.unwrap_or_default(),
        netinfo::address(entry, status).map(|at| at.to_string()).unwrap_or_default(),
        state.published.join(" "),
        format!("{}M", state.memory >> 20),
        uptime(entry, status).map(words).unwrap_or_default(),
    ]
    .map(output::cell)
    .to_vec()
}

/// Since the guest was started; of a machine that can't be asked, since its process was.
fn uptime(entry: &Entry, status: Option<&Status>) -> Option<Duration> {
    status.map(|status| Duration::from_millis(status.uptime_ms)).or_else(|| entry.age())
}

/// A duration as its two largest units.
fn words(span: Duration) -> String {
    let s = span.as_secs();
    let (days, hours, minutes) = (s / 86400, s / 3600 % 24, s / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, m) => format!("{m}m {}s", s % 60),
        (0, h, m) => format!("{h}h {m}m"),
        (d, h, _) => format!("{d}d {h}h"),
    }
}

pub(crate) fn kill(args: &KillArgs) -> Result<u8, Failure> {
    let runtime = Runtime::open().map_err(failure)?;
    each(&args.names, |name| {
        let process = runtime.find_alive(name).and_then(|entry| entry.process()).map_err(failure)?;
        end(&process, name)
    })
}

/// Asks all of the guests first, then waits for all of them.
pub(crate) fn stop(args: &StopArgs) -> Result<u8, Failure> {
    let runtime = Runtime::open().map_err(failure)?;
    let mut asked: HashMap<_, _> = args.names.iter().map(|name| (name, ask_guest(&runtime, name))).collect();
    let deadline = Instant::now() + Duration::from_secs(args.time.into());
    each(&args.names, |name| {
        // A name that is there twice is done with.
        let Some(asked) = asked.remove(name) else { return Ok(()) };
        let (process, refusal) = asked?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if process.wait(left.min(LOOK)) {
                return Ok(());
            }
            if let Ok(why) = refusal.try_recv() {
                output::note(&format!(
                    "{name}: the guest can't be asked to shut down ({why}); the machine is ended"
                ));
                break;
            }
            if left.is_zero() {
                output::note(&format!("{name}: the guest did not shut down in time; the machine is ended"));
                break;
            }
        }
        end(&process, name)
    })
}

/// The machine's process, and where it is told if its guest could not be asked to shut down.
fn ask_guest(runtime: &Runtime, name: &MachineName) -> Result<(Process, Receiver<String>), Failure> {
    let entry = runtime.find_alive(name).map_err(failure)?;
    let process = entry.process().map_err(failure)?;
    let (tell, refusal) = channel();
    // On a thread of its own, which ends with us: a guest may take its time to answer, or never do.
    std::thread::spawn(move || {
        if let Err(why) = shut_down(&entry) {
            // Nobody listens any more when the machine has ended meanwhile.
            let _ = tell.send(why);
        }
    });
    Ok((process, refusal))
}

/// Lets the guest's agent power off, or else presses the power button. The machine is told first, so that its end is one that was
/// asked for.
fn shut_down(entry: &Entry) -> Result<(), String> {
    // One that does not listen, or is of an older version, only ends without knowing why.
    let _ = entry.control().and_then(|mut control| control.stopping());
    if let Some(agent) = entry.agent()
        && agent.wait_until_ready(AGENT).is_ok()
        && agent.power_off().is_ok()
    {
        return Ok(());
    }
    entry.control().and_then(|mut control| control.power_button()).map_err(|error| error.to_string())
}

/// Ends a machine's process: in order, or else by force.
fn end(process: &Process, name: &MachineName) -> Result<(), Failure> {
    let signal = |what: std::io::Result<()>| {
        what.map_err(|error| anyhow!(error).context(format!("ending process {} of {name}", process.pid())))
            .map_err(Failure::machine)
    };
    signal(process.terminate())?;
    if process.wait(ORDERLY) {
        return Ok(());
    }
    signal(process.kill())?;
    if process.wait(KILLED) {
        return Ok(());
    }
    Err(Failure::machine(anyhow!("process {} of {name} does not end, though it was killed", process.pid())))
}

/// Does something with each machine, prints the names of those with which it went well, and tells of all the others; the last of them is
/// how the command ends.
fn each(
    names: &[MachineName],
    mut work: impl FnMut(&MachineName) -> Result<(), Failure>,
) -> Result<u8, Failure> {
    let mut failed = None;
    for name in names {
        match work(name) {
            Ok(()) => output::line(name.as_str()),
            Err(error) => {
                if let Some(Failure::Usage(before) | Failure::Machine(before)) = failed.replace(error) {
                    output::error(&before);
                }
            }
        }
    }
    failed.map_or(Ok(0), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uptime_reads_as_its_two_largest_units() {
        let said = [0, 59, 61, 3600 + 120, 2 * 86400 + 3 * 3600].map(|s| words(Duration::from_secs(s)));
        assert_eq!(said, ["0s", "59s", "1m 1s", "1h 2m", "2d 3h"]);
    }
}
