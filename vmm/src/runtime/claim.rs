//! A machine's own hold on its name and folder.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::cgroup;
use super::error::RuntimeError;
use super::lock::{self, Outer};
use super::name::MachineName;
use super::place::{Runtime, make_private};
use super::state::{self, Exit, Phase, SCHEMA, State, StateError};
use super::{CONSOLE_LOG, CONSOLE_LOG_OLD, ENDED_MAX, VMM_LOG, VSOCK_SOCKET};

/// Names are looked for from `vm1` to this one.
const NUMBERED_MAX: u32 = 9999;
/// What stays of a detached machine.
const KEPT: [&str; 5] = ["lock", "state.json", CONSOLE_LOG, CONSOLE_LOG_OLD, VMM_LOG];

/// Whether a machine is alive, and what it says of itself.
pub(super) type Seen = (bool, Result<State, StateError>);

impl Runtime {
    /// Takes the name: makes the machine's folder, with `state` in it as "starting" with this process's number. A vsock socket that
    /// `state` does not name is [`VSOCK_SOCKET`] in the folder.
    ///
    /// # Errors
    /// [`RuntimeError::Taken`] when a machine of that name is alive; others when the folder cannot be used.
    pub fn claim(&self, name: &MachineName, state: State) -> Result<Claim, RuntimeError> {
        let outer = Outer::take(self.path())?;
        self.claim_under(&outer, name, state)
    }

    /// Takes the first of `vm1`, `vm2`, … that no living machine has.
    ///
    /// # Errors
    /// As [`Self::claim`], and when there is none up to `vm9999`.
    pub fn claim_numbered(&self, state: State) -> Result<Claim, RuntimeError> {
        let outer = Outer::take(self.path())?;
        for n in 1..=NUMBERED_MAX {
            match self.claim_under(&outer, &MachineName::numbered(n), state.clone()) {
                Err(RuntimeError::Taken { .. }) => {}
                other => return other,
            }
        }
        Err(RuntimeError::NoFreeName(NUMBERED_MAX))
    }

    fn claim_under(&self, outer: &Outer, name: &MachineName, state: State) -> Result<Claim, RuntimeError> {
        self.check_length(name)?;
        let dir = self.machine(name);
        let new = make_private(&dir)?;
        let occupied = Self::occupy(outer, name, &dir, new, state);
        if new && occupied.is_err() {
            // Without opening it, since the lack of descriptors may be why. What fails is left for whoever looks.
            for file in ["lock", state::NEW, state::FILE] {
                let _ = fs::remove_file(dir.join(file));
            }
            let _ = fs::remove_dir(&dir);
        }
        let (lock, state) = occupied?;
        // Only a detached machine leaves its state behind when it ends.
        if state.detached {
            self.forget_oldest(outer);
        }
        Ok(Claim { runtime: self.clone(), name: name.clone(), dir, state, lock: Some(lock) })
    }

    /// Takes the lock of a machine's folder and writes its first state.
    fn occupy(
        outer: &Outer,
        name: &MachineName,
        dir: &Path,
        new: bool,
        state: State,
    ) -> Result<(OwnedFd, State), RuntimeError> {
        let path = dir.join("lock");
        let Some(lock) = lock::take(&path, outer).map_err(RuntimeError::io("locking", &path))? else {
            let pid = State::read(dir).ok().map(|state| state.pid);
            return Err(RuntimeError::Taken { name: name.clone(), pid });
        };
        // Whatever a machine before us left: its log, its sockets.
        if !new {
            empty(dir, &["lock"]).map_err(RuntimeError::io("emptying", dir))?;
        }
        let state = State {
            schema: SCHEMA,
            name: name.to_string(),
            pid: std::process::id(),
            state: Phase::Starting,
            started_at: state::now(),
            started_monotonic: Some(state::monotonic()),
            exit: None,
            vsock: state.vsock.or_else(|| Some(dir.join(VSOCK_SOCKET))),
            ..state
        };
        state.write(dir).map_err(RuntimeError::io("writing the machine's state to", dir))?;
        Ok((lock, state))
    }

    /// Looks at a machine while no name is claimed or given back, and tidies up if it is gone without having done so itself:
    /// whether it is alive, and its state; `None` when there is nothing of it.
    pub(super) fn look_closely(&self, name: &MachineName) -> Result<Option<Seen>, RuntimeError> {
        let outer = Outer::take(self.path())?;
        let dir = self.machine(name);
        let path = dir.join("lock");
        if !path.exists() {
            // Half made by a claim that failed, or no machine's at all: only an empty folder goes.
            let _ = fs::remove_dir(&dir);
            return Ok(None);
        }
        let lock = lock::take(&path, &outer).map_err(RuntimeError::io("locking", &path))?;
        match (lock, State::read(&dir)) {
            (None, state) => Ok(Some((true, state))),
            (Some(_), Ok(state)) if state.state == Phase::Ended => Ok(Some((false, Ok(state)))),
            (Some(_), Ok(state)) if state.detached => {
                state.cgroup.iter().for_each(|path| cgroup::remove(path));
                let reason = "its process was killed or crashed: it left no word".to_owned();
                leave(&dir, state, Exit { status: 137, reason, at: state::now(), stopped: false })
                    .map_err(RuntimeError::io("tidying up", &dir))?;
                Ok(Some((false, State::read(&dir))))
            }
            // In the foreground its terminal has told everything.
            (Some(_), state) => {
                state.ok().and_then(|state| state.cgroup).iter().for_each(|path| cgroup::remove(path));
                self.remove(&outer, &dir);
                Ok(None)
            }
        }
    }

    /// Removes a dead machine's folder at once for everybody who looks. What fails is tried again by the next.
    fn remove(&self, _: &Outer, dir: &Path) {
        let gone = self.path().join(format!(".gone-{}", std::process::id()));
        let _ = fs::remove_dir_all(&gone);
        let removed = fs::rename(dir, &gone).and_then(|()| fs::remove_dir_all(&gone));
        if let Err(e) = removed
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::info!(folder = %dir.display(), error = %e, "what a machine left could not be removed");
        }
    }

    /// Removes what interrupted removals left, among these names.
    pub(super) fn finish_removals(&self, _: &Outer, names: &[OsString]) {
        for name in names.iter().filter(|name| is_half_removed(name)) {
            let _ = fs::remove_dir_all(self.path().join(name));
        }
    }

    /// Keeps the number of machines that have ended within [`ENDED_MAX`], and removes what an interrupted removal left.
    fn forget_oldest(&self, outer: &Outer) {
        let names: Vec<_> = fs::read_dir(self.path())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        // No more machines than may have ended: none of their states need be read.
        if names.len() <= ENDED_MAX && !names.iter().any(|name| is_half_removed(name)) {
            return;
        }
        self.finish_removals(outer, &names);
        let (mut ended, now) = (Vec::new(), state::now());
        for name in names {
            let Some(text) = name.to_str() else { continue };
            let Ok(name) = text.parse::<MachineName>() else { continue };
            let dir = self.machine(&name);
            // The state first: the locks of living machines need not be touched.
            if let Ok(State { exit: Some(exit), .. }) = State::read(&dir)
                && lock::is_held(&dir.join("lock")).is_ok_and(|held| !held)
            {
                // One that ended in the future did so before the host's clock was set back.
                ended.push((if exit.at > now { 0 } else { exit.at }, dir));
            }
        }
        ended.sort();
        let surplus = ended.len().saturating_sub(ENDED_MAX);
        for (_, dir) in &ended[..surplus] {
            self.remove(outer, dir);
        }
    }
}

/// Whether it is what a removal that was interrupted left.
pub(super) fn is_half_removed(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".gone-")
}

/// Writes the last state and removes everything that only a living machine needs.
fn leave(dir: &Path, state: State, exit: Exit) -> io::Result<()> {
    State { state: Phase::Ended, exit: Some(exit), ..state }.write(dir)?;
    empty(dir, &KEPT)
}

/// Removes what is in a machine's folder, except for the files called `keep`.
fn empty(dir: &Path, keep: &[&str]) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| keep.contains(&name)) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A name that is this process's, with its folder. Dropping it without [`Claim::end`] leaves nothing: the machine did not
/// get to run.
///
/// ```no_run
/// use vmm::machine::Machine;
/// use vmm::runtime::control::Control;
/// use vmm::runtime::{CONTROL_SOCKET, Phase, Runtime, State, VSOCK_SOCKET};
///
/// // A machine that `pontoon ps`, `exec` and `stop` find.
/// let mut claim = Runtime::open()?.claim_numbered(State::default())?;
/// let control = Control::bind(&claim.file(CONTROL_SOCKET))?;
/// # let image = guest_images::Store::open_default()?.get("debian")?;
/// let machine = Machine::builder()
///     .guest(&image)?
///     .vsock(claim.file(VSOCK_SOCKET))
///     .worker(move |remote| control.serve(remote))
///     .build()?
///     .start()?;
/// claim.update(|state| state.state = Phase::Running)?;
/// let reason = machine.wait();
/// claim.end(reason.status(), &reason.to_string());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Claim {
    runtime: Runtime,
    name: MachineName,
    dir: PathBuf,
    state: State,
    lock: Option<OwnedFd>,
}

impl Claim {
    /// The name.
    pub fn name(&self) -> &MachineName {
        &self.name
    }

    /// The path of a file in the machine's folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What was last written.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Changes the state, in the file too.
    ///
    /// # Errors
    /// When the file cannot be written; readers then find the state before.
    pub fn update(&mut self, change: impl FnOnce(&mut State)) -> Result<(), RuntimeError> {
        change(&mut self.state);
        self.state.write(&self.dir).map_err(RuntimeError::io("writing the machine's state to", &self.dir))
    }

    /// Gives the name back after the machine has run. A detached machine leaves its console's log and how it ended.
    pub fn end(self, status: u8, reason: &str) {
        self.leave(Exit { status, reason: reason.to_owned(), at: state::now(), stopped: false });
    }

    /// The same for a machine that ended because somebody had asked for it.
    pub fn end_stopped(self, status: u8, reason: &str) {
        self.leave(Exit { status, reason: reason.to_owned(), at: state::now(), stopped: true });
    }

    fn leave(mut self, exit: Exit) {
        if !self.state.detached {
            return; // The drop removes everything.
        }
        // Without the outer lock: the name is ours until our own lock goes.
        if let Err(e) = leave(&self.dir, self.state.clone(), exit) {
            tracing::warn!(folder = %self.dir.display(), error = %e, "the machine's last state could not be written");
        }
        self.lock = None;
    }
}

#[cfg(test)]
impl Claim {
    /// The process dies here and now.
    pub(super) fn crash(mut self) {
        self.lock = None;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.lock.is_none() {
            return;
        }
        match Outer::take(self.runtime.path()) {
            Ok(outer) => {
                self.runtime.remove(&outer, &self.dir);
                self.runtime.forget_oldest(&outer);
            }
            Err(e) => {
                tracing::info!(error = %e, "the machine's folder is left for the next command to remove")
            }
        }
    }
}
