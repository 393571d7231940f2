//! A machine's share of the host's CPUs: a cgroup (version 2) of its own.
//!
//! **Where.** Below the cgroup that this process is in, or else beside it: a cgroup that has processes of its own can't share out CPUs
//! (the "no internal processes" rule, Documentation/admin-guide/cgroup-v2.rst), unless it is the root. Either takes the right to
//! write there: root has it, and so has a user in a session of systemd, whose manager delegates.
//!
//! **Life.** [`CpuGroup::enter`] makes `pontoon-NAME` and moves this process into it, with all of its threads; the drop moves it
//! back and removes the group. After SIGKILL an empty group is left, for [`remove`] or the next machine of that name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::name::MachineName;

const ROOT: &str = "/sys/fs/cgroup";
/// Microseconds over which [`CpuLimits::millis`] is counted: the kernel's own default.
const PERIOD: u64 = 100_000;
/// How often a group that is busy is tried to be removed, and the pause between.
const REMOVALS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);
/// What the groups' names begin with.
const PREFIX: &str = "pontoon-";

/// What a machine may have of the CPUs.
///
/// ```no_run
/// use vmm::runtime::{CpuGroup, CpuLimits, MachineName};
///
/// let half = CpuLimits { millis: Some(500), weight: None };
/// // This process and all its threads, until the group is dropped.
/// let group = CpuGroup::enter(&MachineName::numbered(1), half)?;
/// # Ok::<(), vmm::runtime::CgroupError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuLimits {
    /// At most so many thousandths of one CPU: 1500 is one and a half.
    pub millis: Option<u32>,
    /// Its weight where CPUs are short, 1 to 10000; everybody has 100 unless told otherwise.
    pub weight: Option<u16>,
}

/// Why there are no limits.
///
/// ```no_run
/// use vmm::runtime::{CgroupError, CpuGroup, CpuLimits, MachineName};
///
/// let limits = CpuLimits { millis: Some(500), weight: None };
/// match CpuGroup::enter(&MachineName::numbered(1), limits) {
///     Ok(group) => println!("half a CPU, by {}", group.path().display()),
///     // An ordinary user whose session is not delegated: go on without a limit, or give up.
///     Err(CgroupError::Refused { path, .. }) => println!("{} is not ours", path.display()),
///     Err(CgroupError::Missing) => println!("no limits on this host"),
/// }
/// ```
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Nothing to do it with.
    #[error("this host has no cgroups of version 2 at {ROOT}, or they don't share out CPUs")]
    Missing,
    /// We may not.
    #[error("making a cgroup in {} failed: {source}; limits take root, or a session whose cgroup is delegated (systemd-run --user --scope -p Delegate=yes …)", .path.display())]
    Refused {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A cgroup with this process in it.
///
/// ```no_run
/// # use vmm::runtime::{CpuGroup, CpuLimits, MachineName};
/// let group = CpuGroup::enter(&MachineName::numbered(1), CpuLimits { millis: None, weight: Some(50) })?;
/// println!("{}", group.path().display());
/// drop(group); // this process is where it was, and the group is gone
/// # Ok::<(), vmm::runtime::CgroupError>(())
/// ```
#[derive(Debug)]
pub struct CpuGroup {
    path: PathBuf,
    home: PathBuf,
}

impl CpuGroup {
    /// Makes the machine's group and moves this process into it.
    ///
    /// # Errors
    /// [`CgroupError`]; nothing is left then.
    pub fn enter(name: &MachineName, limits: CpuLimits) -> Result<Self, CgroupError> {
        let own = fs::read_to_string("/proc/self/cgroup").map_err(|_| CgroupError::Missing)?;
        Self::enter_below(Path::new(ROOT), &own, name, limits)
    }

    fn enter_below(
        root: &Path,
        own: &str,
        name: &MachineName,
        limits: CpuLimits,
    ) -> Result<Self, CgroupError> {
        let has_cpu = fs::read_to_string(root.join("cgroup.controllers"))
            .is_ok_and(|controllers| controllers.split_whitespace().any(|c| c == "cpu"));
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let (true, Some(own)) = (has_cpu, own) else { return Err(CgroupError::Missing) };
        let home = root.join(own);
        let beside = home.parent().filter(|_| !own.is_empty()).map(Path::to_path_buf);
        let mut refusal = CgroupError::Missing;
        for parent in [Some(home.clone()), beside].into_iter().flatten() {
            let path = parent.join(format!("{PREFIX}{name}"));
            match make(&parent, &path, limits) {
                Ok(()) => return Ok(Self { path, home }),
                Err(source) => {
                    let _ = fs::remove_dir(&path);
                    refusal = CgroupError::Refused { path: parent, source };
                }
            }
        }
        Err(refusal)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        if enter(&self.home).is_ok() {
            // The machine's kernel thread goes with the machine, which may have been a moment ago.
            remove(&self.path);
        }
    }
}

fn make(parent: &Path, path: &Path, limits: CpuLimits) -> io::Result<()> {
    let control = parent.join("cgroup.subtree_control");
    if !fs::read_to_string(&control)?.split_whitespace().any(|controller| controller == "cpu") {
        fs::write(&control, "+cpu")?;
    }
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    // A group that a killed machine left may have other limits.
    let quota =
        limits.millis.map_or("max".to_owned(), |millis| (u64::from(millis) * PERIOD / 1000).to_string());
    fs::write(path.join("cpu.max"), format!("{quota} {PERIOD}"))?;
    fs::write(path.join("cpu.weight"), limits.weight.unwrap_or(100).to_string())?;
    enter(path)
}

/// Moves this process.
fn enter(group: &Path) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

/// Removes the group that a dead machine left, if it is one.
pub(super) fn remove(path: &Path) {
    let ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
    if !ours || !path.starts_with(ROOT) {
        return;
    }
    // A dying process lets go of its locks before its virtual machine, and with that a kernel thread in the group, is gone.
    for _ in 0..REMOVALS {
        match fs::remove_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(PAUSE),
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: CpuLimits = CpuLimits { millis: Some(500), weight: Some(20) };

    /// Ordinary files in the place of a cgroup file system.
    fn groups(controllers: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("user/scope")).unwrap();
        fs::write(dir.path().join("cgroup.controllers"), controllers).unwrap();
        for folder in ["", "user", "user/scope"] {
            fs::write(dir.path().join(folder).join("cgroup.subtree_control"), "memory").unwrap();
        }
        dir
    }

    fn name() -> MachineName {
        "web".parse().unwrap()
    }

    #[test]
    fn a_machine_gets_a_group_with_its_limits_and_is_moved_there_and_back() {
        let dir = groups("cpu memory");
        let group = CpuGroup::enter_below(dir.path(), "0::/user/scope\n", &name(), HALF).unwrap();
        let read = |file: &str| fs::read_to_string(group.path().join(file)).unwrap();
        assert!(group.path().ends_with("user/scope/pontoon-web"));
        assert_eq!((read("cpu.max").as_str(), read("cpu.weight").as_str()), ("50000 100000", "20"));
        assert_eq!(read("cgroup.procs"), std::process::id().to_string());
        drop(group);
        let home = fs::read_to_string(dir.path().join("user/scope/cgroup.procs")).unwrap();
        assert_eq!(home, std::process::id().to_string());
    }

    #[test]
    fn a_group_that_cannot_be_below_is_made_beside() {
        let dir = groups("cpu");
        // A file where the folder would be: as much of a refusal as EBUSY.
        fs::write(dir.path().join("user/scope/pontoon-web"), "").unwrap();
        let group = CpuGroup::enter_below(dir.path(), "0::/user/scope\n", &name(), HALF).unwrap();
        assert!(group.path().ends_with("user/pontoon-web"));
    }

    #[test]
    fn where_there_is_nothing_to_do_it_with_is_said() {
        let dir = groups("memory");
        let refused = CpuGroup::enter_below(dir.path(), "0::/user/scope\n", &name(), HALF);
        assert!(matches!(refused, Err(CgroupError::Missing)));
        let dir = groups("cpu");
        let refused = CpuGroup::enter_below(dir.path(), "3:cpu:/x\n", &name(), HALF);
        assert!(matches!(refused, Err(CgroupError::Missing)));
        let refused = CpuGroup::enter_below(dir.path(), "0::/gone/away\n", &name(), HALF);
        assert!(matches!(refused, Err(CgroupError::Refused { .. })));
    }
}
