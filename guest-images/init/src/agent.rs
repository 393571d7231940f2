//! The guest agent: started beside the command, and again when it ends.
//!
//! It serves the host over vsock, so it is started only where that is: `/dev/vsock` appears when the module of a vsock device has
//! been loaded. It says nothing on the console, nobody waits for it, and its end is not the machine's.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::{say, sys};

const PROGRAM: &str = "/usr/sbin/pontoon-agent";
const DEVICE: &str = "/dev/vsock";
/// One that has lived shorter was not ended by chance.
const TOO_SHORT: Duration = Duration::from_secs(1);
/// After so many short lives in a row it stays away.
const MAX_SHORT_LIVES: u32 = 3;

/// The agent that runs.
#[derive(Debug, Clone, Copy)]
struct Life {
    pid: u32,
    began: Instant,
    /// How many short lives came right before it.
    short_lives: u32,
}

static RUNNING: Mutex<Option<Life>> = Mutex::new(None);

/// Starts it if the machine has a vsock device and the image an agent.
pub(crate) fn start() {
    if Path::new(DEVICE).exists() && Path::new(PROGRAM).exists() {
        start_after(0);
    }
}

fn start_after(short_lives: u32) {
    let mut command = Command::new(PROGRAM);
    command.env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sys::with_clean_signals(&mut command);
    match command.spawn() {
        Ok(child) => set(Some(Life { pid: child.id(), began: Instant::now(), short_lives })),
        Err(error) => say!("cannot start {PROGRAM}: {error}; `pontoon exec` will not work"),
    }
}

/// A child of init has ended: starts the agent again if it was that.
pub(crate) fn reaped(pid: u32, status: i32) {
    let Some(life) = running().filter(|life| life.pid == pid) else { return };
    set(None);
    let short_lives = if life.began.elapsed() < TOO_SHORT { life.short_lives + 1 } else { 0 };
    if short_lives < MAX_SHORT_LIVES {
        start_after(short_lives);
    } else {
        say!("{PROGRAM} ended again (wait status {status:#x}); `pontoon exec` will not work");
    }
}

/// The machine ends: the agent may, too.
pub(crate) fn forget() {
    set(None);
}

fn running() -> Option<Life> {
    RUNNING.lock().map(|life| *life).unwrap_or_default()
}

fn set(life: Option<Life>) {
    // Init has one thread, which does not panic: the lock is never held or poisoned.
    if let Ok(mut running) = RUNNING.lock() {
        *running = life;
    }
}
