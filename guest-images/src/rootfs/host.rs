//! What this host builds with: its programs, and the way in which an ordinary user becomes root of a chroot.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Error;

/// Where Debian has programs that an ordinary user's PATH leaves out.
const MORE: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// How mmdebstrap becomes root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// It is.
    Root,
    /// In a user namespace with a range of ids.
    Unshare,
    /// With libraries that pretend.
    Fakechroot,
}

impl Mode {
    /// As mmdebstrap calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Unshare => "unshare",
            Self::Fakechroot => "fakechroot",
        }
    }
}

/// What was found.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) mmdebstrap: PathBuf,
    pub(super) debugfs: PathBuf,
    pub(super) mode: Mode,
    /// PATH with the administrator's directories.
    pub(super) path: OsString,
    /// The host's proxies, as lines of apt.conf.
    pub(super) apt_options: Vec<String>,
}

impl Host {
    /// Looks for everything, and names the first thing that is missing.
    pub(super) fn look() -> Result<Self, Error> {
        let path = search_path();
        let mmdebstrap = find(&path, "mmdebstrap", "mmdebstrap")?;
        let debugfs = find(&path, "debugfs", "e2fsprogs")?;
        find(&path, "mke2fs", "e2fsprogs")?;
        let user = rustix::process::geteuid().as_raw();
        let mode = match user {
            0 => Mode::Root,
            _ => match lacking(&path, user) {
                None => Mode::Unshare,
                Some(_) if has(&path, "fakechroot") && has(&path, "fakeroot") => Mode::Fakechroot,
                Some(error) => return Err(error),
            },
        };
        Ok(Self { mmdebstrap, debugfs, mode, apt_options: proxies(), path })
    }
}

pub(super) fn search_path() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::env::split_paths(&path).chain(MORE.iter().map(PathBuf::from));
    std::env::join_paths(all).unwrap_or(path)
}

pub(super) fn find(path: &OsString, program: &'static str, package: &'static str) -> Result<PathBuf, Error> {
    let found = std::env::split_paths(path).map(|dir| dir.join(program)).find(|file| file.is_file());
    found.ok_or(Error::Missing { program, package })
}

fn has(path: &OsString, program: &'static str) -> bool {
    find(path, program, "").is_ok()
}

/// What an ordinary user lacks for a user namespace with a range of ids.
fn lacking(path: &OsString, user: u32) -> Option<Error> {
    let no = |lacking: &str, advice: String| Some(Error::NoNamespace { lacking: lacking.to_owned(), advice });
    if !(has(path, "newuidmap") && has(path, "newgidmap")) {
        return no("newuidmap is not on this host", "sudo apt-get install uidmap".to_owned());
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let Some(name) = user_name(&passwd, user) else {
        return no("this user has no entry in /etc/passwd", "it as another user".to_owned());
    };
    for file in ["/etc/subuid", "/etc/subgid"] {
        if !has_range(&fs::read_to_string(file).unwrap_or_default(), name) {
            let advice =
                format!("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}");
            return no(&format!("{file} has no range for {name}"), advice);
        }
    }
    let unshared = Command::new("unshare")
        .args(["--user", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !unshared.is_ok_and(|status| status.success()) {
        let advice = "sudo sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000";
        return no("the kernel gives it none", advice.to_owned());
    }
    None
}

/// The name of a user in a passwd(5) file.
pub(super) fn user_name(passwd: &str, user: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id.parse() == Ok(user)).then_some(name)
    })
}

/// Whether a subuid(5) file gives this user a range that Debian's ids fit in.
pub(super) fn has_range(subuid: &str, name: &str) -> bool {
    subuid.lines().any(|line| {
        let mut fields = line.split(':');
        let owner = fields.next();
        let count = fields.nth(1).and_then(|count| count.trim().parse::<u32>().ok());
        owner == Some(name) && count.is_some_and(|count| count >= 65_536)
    })
}

/// The proxies that the host's apt uses.
fn proxies() -> Vec<String> {
    let Ok(output) = Command::new("apt-config").arg("dump").env_remove("APT_CONFIG").output() else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| is_proxy(line)).map(str::to_owned).collect()
}

pub(super) fn is_proxy(line: &str) -> bool {
    let key = line.split(' ').next().unwrap_or_default();
    key.starts_with("Acquire::http") && key.contains("::Proxy") && !line.ends_with("\"\";")
}

/// The user's home directory.
pub(super) fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute() && home != Path::new("/"))
}
