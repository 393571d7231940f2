//! The cache of outer machines: found, or made under a lock, or thrown away.
//!
//! Below `<cache>/lab/` there are two kinds of entries, named by the hash of everything that goes into them:
//!
//! - `base-HASH/`: `kernel`, `initrd`, `packages` (a list of versions). Depends on this program, its
//!   `lab-init` and the wanted packages.
//! - `machine-HASH/`: `memory` (a sparse file, shared by every run), `state`, `digest` (SHA-256 of the
//!   state). Depends on the base, the emulator, the memory size and the CPU count.
//!
//! Each has a `….lock` beside it: exclusive while the entry is made, shared while it is used. An entry is made
//! as `….part` and renamed when it is complete and on the disk; what a killed maker left is removed
//! by the next one. Entries that nobody has used for two weeks are removed when a new one is made.

use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use guest_images::Progress;
use guest_images::deb::Freshness;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sha2::{Digest, Sha256};

use super::error::{LabError, at, emulator};
use super::modules::{AVAILABLE, EARLY, LATE};
use super::qemu::{self, Hardware, Machine, Purpose};
use super::wire::{self, Kind};
use super::{Config, base};

/// How long the first boot may take: about 5 s on an idle host.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// Unused entries are removed after this time.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// A complete outer machine, in use (and so not removed by anybody) as long as this lives.
#[derive(Debug)]
pub(super) struct Snapshot {
    dir: PathBuf,
    base: PathBuf,
    program: PathBuf,
    /// The emulated devices' state.
    pub(super) state: Vec<u8>,
    memory_mib: u32,
    cpus: u8,
    /// Shared locks of the two entries.
    _locks: [File; 2],
}

impl Snapshot {
    /// The snapshot of `config` out of the cache, made if it is not there or damaged.
    pub(super) fn find_or_make(config: &Config, progress: &mut dyn Progress) -> Result<Self, LabError> {
        check(config)?;
        let program = qemu::find()?;
        let lab = config.cache.join("lab");
        fs::create_dir_all(&lab).map_err(at("make", &lab))?;
        // A machine is named by the path of its base, among others: by whatever link the cache is reached, it is the same.
        let lab = fs::canonicalize(&lab).map_err(at("find", &lab))?;
        let base = lab.join(format!("base-{}", base_key(config)));
        let dir = lab.join(format!("machine-{}", machine_key(&base, &program, config)?));
        let maker = Maker { config, program: &program, base: &base, dir: &dir };
        if config.renew {
            maker.make_base(progress)?;
            maker.make_machine(progress)?;
        }
        // Another process may remove what we have made before we hold it: once is bad luck, twice is not.
        for _ in 0..3 {
            if let Some(snapshot) = maker.open()? {
                return Ok(snapshot);
            }
            maker.make_base_unless_there(progress)?;
            maker.make_machine(progress)?;
        }
        Err(LabError::Config(format!("entries of {} vanish while they are used", lab.display())))
    }

    /// What every resume of this snapshot starts with.
    pub(super) fn hardware<'a>(&'a self, paths: &'a Paths) -> Hardware<'a> {
        Hardware {
            program: &self.program,
            kernel: &paths.kernel,
            initrd: &paths.initrd,
            memory: &paths.memory,
            memory_mib: self.memory_mib,
            cpus: self.cpus,
        }
    }

    /// Where its files are.
    pub(super) fn paths(&self) -> Paths {
        Paths::of(&self.base, &self.dir)
    }

    /// Throws it away, and lets go of it, so that a new one can be made; runs that have started keep their
    /// open files.
    pub(super) fn discard(self) -> Result<(), LabError> {
        remove(&self.dir)
    }
}

/// The files of an outer machine.
#[derive(Debug)]
pub(super) struct Paths {
    kernel: PathBuf,
    initrd: PathBuf,
    memory: PathBuf,
}

impl Paths {
    fn of(base: &Path, dir: &Path) -> Self {
        Self { kernel: base.join("kernel"), initrd: base.join("initrd"), memory: dir.join("memory") }
    }
}

/// Everything that making an entry needs.
struct Maker<'a> {
    config: &'a Config,
    program: &'a Path,
    base: &'a Path,
    dir: &'a Path,
}

impl Maker<'_> {
    /// The snapshot, if both entries are there and whole.
    fn open(&self) -> Result<Option<Snapshot>, LabError> {
        let locks = [lock_file(self.base)?, lock_file(self.dir)?];
        for lock in &locks {
            lock.lock_shared().map_err(at("lock", self.dir))?;
            // The age of the lock file is how long the entry has been unused.
            lock.set_modified(SystemTime::now()).map_err(at("touch the lock of", self.dir))?;
        }
        let state = self.dir.join("state");
        let Ok(state) = fs::read(state) else { return Ok(None) };
        let whole = fs::read_to_string(self.dir.join("digest")).is_ok_and(|digest| digest == hex(&state))
            && fs::metadata(self.dir.join("memory"))
                .is_ok_and(|memory| memory.len() == u64::from(self.config.memory_mib) << 20)
            && self.has_base();
        Ok(whole.then(|| Snapshot {
            dir: self.dir.to_owned(),
            base: self.base.to_owned(),
            program: self.program.to_owned(),
            state,
            memory_mib: self.config.memory_mib,
            cpus: self.config.cpus,
            _locks: locks,
        }))
    }

    fn make_base_unless_there(&self, progress: &mut dyn Progress) -> Result<(), LabError> {
        let lock = lock_file(self.base)?;
        // Every run holds it shared as long as it lasts, and nobody shall wait for those only to look.
        lock.lock_shared().map_err(at("lock", self.base))?;
        if self.has_base() {
            return Ok(());
        }
        lock.unlock().and_then(|()| lock.lock()).map_err(at("lock", self.base))?;
        if self.has_base() {
            return Ok(());
        }
        self.make_base_locked(Freshness::Remembered, progress)
    }

    fn has_base(&self) -> bool {
        self.base.join("initrd").is_file() && self.base.join("kernel").is_file()
    }

    fn make_base(&self, progress: &mut dyn Progress) -> Result<(), LabError> {
        let lock = lock_file(self.base)?;
        lock.lock().map_err(at("lock", self.base))?;
        self.make_base_locked(Freshness::Newest, progress)
    }

    fn make_base_locked(&self, freshness: Freshness, progress: &mut dyn Progress) -> Result<(), LabError> {
        let part = start_part(self.base)?;
        base::make(&self.config.cache, &part, &self.config.packages, freshness, progress)?;
        finish_part(&part, self.base, &["kernel", "initrd"])
    }

    /// Boots the outer machine and keeps its state. Whoever comes second finds the first one's.
    fn make_machine(&self, progress: &mut dyn Progress) -> Result<(), LabError> {
        let lock = lock_file(self.dir)?;
        if let Err(error) = lock.try_lock() {
            if let TryLockError::Error(source) = error {
                return Err(at("lock", self.dir)(source));
            }
            progress.step("lab: waiting for another process that uses the outer machine");
            lock.lock().map_err(at("lock", self.dir))?;
            drop(lock);
            if let Ok(Some(_)) = self.open() {
                return Ok(());
            }
            return self.make_machine(progress);
        }
        progress.step("lab: booting the outer machine once (about 10 s)");
        let part = start_part(self.dir)?;
        let paths = Paths::of(self.base, &part);
        let hardware = Hardware {
            program: self.program,
            kernel: &paths.kernel,
            initrd: &paths.initrd,
            memory: &paths.memory,
            memory_mib: self.config.memory_mib,
            cpus: self.config.cpus,
        };
        let state = boot(&hardware)?;
        for (name, content) in [("state", state.as_slice()), ("digest", hex(&state).as_bytes())] {
            let path = part.join(name);
            fs::write(&path, content).map_err(at("write", &path))?;
        }
        finish_part(&part, self.dir, &["memory", "state", "digest"])?;
        progress.done("lab: the outer machine is ready");
        self.remove_unused();
        Ok(())
    }

    /// Removes entries that nobody has used for long. Failures only cost disk space.
    fn remove_unused(&self) {
        let Some(entries) = self.dir.parent().and_then(|lab| fs::read_dir(lab).ok()) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|extension| extension == "lock") {
                let _ = remove_if_unused(&path);
            }
        }
    }
}

fn remove_if_unused(lock_path: &Path) -> std::io::Result<()> {
    let lock = File::options().write(true).open(lock_path)?;
    let age = SystemTime::now().duration_since(lock.metadata()?.modified()?).unwrap_or_default();
    if lock.try_lock().is_err() {
        return Ok(());
    }
    // Whoever made this was killed: a maker holds the lock.
    let part = lock_path.with_extension("part");
    if part.is_dir() {
        fs::remove_dir_all(&part)?;
    }
    let entry = lock_path.with_extension("");
    if age < KEEP {
        return Ok(());
    }
    if entry.is_dir() {
        fs::remove_dir_all(&entry)?;
    }
    fs::remove_file(lock_path)
}

fn check(config: &Config) -> Result<(), LabError> {
    let Config { memory_mib, cpus, .. } = config;
    if !(256..=3072).contains(memory_mib) {
        return Err(LabError::Config(format!(
            "the lab can have 256 to 3072 MiB of memory, not {memory_mib}"
        )));
    }
    if !(1..=8).contains(cpus) {
        return Err(LabError::Config(format!("the lab can have 1 to 8 CPUs, not {cpus}")));
    }
    Ok(())
}

fn base_key(config: &Config) -> String {
    let mut hash = Sha256::new();
    hash.update(base::REVISION.to_le_bytes());
    hash.update(guest_images::LAB_INIT.id().to_le_bytes());
    hash.update(format!("{EARLY:?} {LATE:?} {AVAILABLE:?}"));
    for package in base::PACKAGES.into_iter().chain(config.packages.iter().map(String::as_str)) {
        hash.update(package);
        hash.update([0]);
    }
    short_hex(hash)
}

/// The emulator counts by its file's identity: asking it for its version would cost more than a resume.
fn machine_key(base: &Path, program: &Path, config: &Config) -> Result<String, LabError> {
    let program = program.canonicalize().map_err(at("find", program))?;
    let metadata = fs::metadata(&program).map_err(at("look at", &program))?;
    let modified = metadata.modified().map_err(at("look at", &program))?;
    let memory = Path::new("memory");
    let hardware = Hardware {
        program: &program,
        kernel: Path::new("kernel"),
        initrd: Path::new("initrd"),
        memory,
        memory_mib: config.memory_mib,
        cpus: config.cpus,
    };
    let mut hash = Sha256::new();
    hash.update(format!("{base:?} {} {modified:?} {}", metadata.len(), qemu::identity(&hardware)));
    Ok(short_hex(hash))
}

fn short_hex(hash: Sha256) -> String {
    hash.finalize().iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn lock_file(entry: &Path) -> Result<File, LabError> {
    let path = entry.with_extension("lock");
    File::options().create(true).truncate(false).write(true).open(&path).map_err(at("open", &path))
}

/// An empty `….part` beside the entry.
fn start_part(entry: &Path) -> Result<PathBuf, LabError> {
    let part = entry.with_extension("part");
    remove(&part)?;
    fs::create_dir(&part).map_err(at("make", &part))?;
    Ok(part)
}

/// Writes the files through to the disk and gives the entry its name.
fn finish_part(part: &Path, entry: &Path, files: &[&str]) -> Result<(), LabError> {
    for name in files {
        let path = part.join(name);
        File::open(&path).and_then(|file| file.sync_all()).map_err(at("sync", &path))?;
    }
    remove(entry)?;
    fs::rename(part, entry).map_err(at("name", entry))
}

fn remove(dir: &Path) -> Result<(), LabError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// Boots a machine up to its `Ready` and returns its devices' state. Its memory is then in the memory file.
fn boot(hardware: &Hardware<'_>) -> Result<Vec<u8>, LabError> {
    let mut machine = Machine::start(hardware, &Purpose::Boot)?;
    wait_for_ready(&mut machine)?;
    machine.save()
}

fn wait_for_ready(machine: &mut Machine) -> Result<(), LabError> {
    let deadline = Instant::now() + BOOT_PATIENCE;
    let mut bytes = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let console = machine.console.tail();
            return Err(LabError::NotUp { seconds: BOOT_PATIENCE.as_secs(), console });
        }
        let mut fds =
            [PollFd::new(&machine.port, PollFlags::IN), PollFd::new(&machine.console, PollFlags::IN)];
        let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(emulator("wait for the emulator")(error)),
        }
        machine.console.drain();
        match (&machine.port).read(&mut buffer) {
            Ok(0) => {
                let console = machine.console.tail();
                return Err(LabError::Ended { phase: "it booted for the first time", console });
            }
            Ok(length) => bytes.extend_from_slice(buffer.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(emulator("read from the outer machine")(error)),
        }
        match wire::parse_frame(&bytes).map_err(emulator("understand the outer machine"))? {
            Some((Kind::Ready, _, _)) => return Ok(()),
            Some((kind, _, _)) => {
                return Err(LabError::Job(format!("it began with {kind:?}, not with Ready")));
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_lasts_keeps_nobody_from_another_outer_machine_on_the_same_base() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base-0");
        fs::create_dir(&base).unwrap();
        for file in ["kernel", "initrd"] {
            fs::write(base.join(file), "").unwrap();
        }
        let run = lock_file(&base).unwrap();
        run.lock_shared().unwrap();
        let config = Config::new(dir.path().to_owned());
        let maker = Maker {
            config: &config,
            program: Path::new("qemu"),
            base: &base,
            dir: &dir.path().join("machine-0"),
        };
        // Would wait for the end of the run, and so for ever.
        maker.make_base_unless_there(&mut guest_images::Silent).unwrap();
    }
}
