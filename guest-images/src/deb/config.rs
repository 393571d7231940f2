//! The private apt: its configuration, its sources and its idea of what is installed.
//!
//! What enters: the suite, the host's own sources (their mirrors) and the host's apt.conf.d (their proxies).
//! What leaves: three small files in the suite's directory, rewritten for each request.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Error, apt, io_error, write_atomically};

/// Where Debian's keyring package puts it, on Debian and on Ubuntu.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const MIRROR: &str = "http://deb.debian.org/debian";
const SECURITY_MIRROR: &str = "http://deb.debian.org/debian-security";

/// Packages that others depend on for their maintainer scripts alone. No script runs here, so they count as installed,
/// unless they are what is asked for.
const ONLY_FOR_SCRIPTS: [&str; 12] = [
    "adduser",
    "base-passwd",
    "debconf",
    "dpkg",
    "init-system-helpers",
    "initramfs-tools",
    "libpam-runtime",
    "linux-base",
    "passwd",
    "sensible-utils",
    "ucf",
    "usrmerge",
];

/// A release of Debian that images are built from: those whose kernels are tested.
///
/// ```
/// use guest_images::deb::Suite;
///
/// assert_eq!("trixie".parse::<Suite>()?, Suite::Trixie);
/// assert_eq!(Suite::ALL.map(Suite::name), ["bookworm", "trixie"]);
/// # Ok::<(), guest_images::deb::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Suite {
    /// Debian 12, Linux 6.1.
    Bookworm,
    /// Debian 13, Linux 6.12.
    Trixie,
}

impl Suite {
    /// All of them, oldest first.
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Trixie];

    /// The codename.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// The host's release when it is one of these, else bookworm.
    #[must_use]
    pub fn of_host() -> Self {
        std::fs::read_to_string("/etc/os-release")
            .ok()
            .and_then(|text| Self::in_os_release(&text))
            .unwrap_or(Self::Bookworm)
    }

    /// The suite that an os-release(5) file of Debian names.
    pub(super) fn in_os_release(text: &str) -> Option<Self> {
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
            Some(line.trim_matches(['"', '\'']))
        };
        if value("ID") != Some("debian") {
            return None;
        }
        value("VERSION_CODENAME")?.parse().ok()
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Suite {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|suite| suite.name() == text)
            .ok_or_else(|| Error::UnknownSuite(text.to_owned()))
    }
}

/// Writes `apt.conf`, `sources.list` and `status` for a request of `names`.
pub(super) fn write(dir: &Path, suite: Suite, names: &[&str]) -> Result<(), Error> {
    let dir = &std::path::absolute(dir).map_err(io_error("resolve", dir))?;
    write_atomically(&conf(dir), apt_conf(dir).as_bytes())?;
    write_atomically(&dir.join("status"), status(names).as_bytes())?;
    let sources = dir.join("sources.list");
    // Parsing the host's sources costs a second of apt, and sources rarely change: asked once per cache.
    if sources.exists() {
        return Ok(());
    }
    write_atomically(&sources, sources_of_host(suite, false)?.as_bytes())
}

/// A sources.list of `suite` on the host's mirrors, with its backports if wanted.
pub(crate) fn sources_of_host(suite: Suite, backports: bool) -> Result<String, Error> {
    let keyring = PathBuf::from(KEYRING);
    if !keyring.exists() {
        return Err(Error::MissingKeyring { path: keyring });
    }
    let mirrors = Mirrors::of_host(&apt::host_sources()?);
    let mut list = mirrors.sources_list(suite);
    if backports {
        list.push_str(&entry(&mirrors.main, &format!("{suite}-backports")));
    }
    Ok(list)
}

/// One line of a sources.list.
fn entry(uri: &str, suite: &str) -> String {
    format!("deb [signed-by={KEYRING}] {uri} {suite} main\n")
}

/// The configuration file of the suite's directory.
pub(super) fn conf(dir: &Path) -> PathBuf {
    dir.join("apt.conf")
}

/// Every path of apt points into `dir`. Hooks of the host (`#clear`) must not run: they would act on the
/// host's caches.
fn apt_conf(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"#clear APT::Update;
#clear DPkg;
#clear Acquire::IndexTargets::deb::Contents-deb;
#clear Acquire::IndexTargets::deb::DEP-11;
Dir::State "{dir}";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}";
Dir::Cache::archives "{dir}/archives";
Dir::Etc::sourcelist "{dir}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "{dir}";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Default-Release "";
APT::Sandbox::User "";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Get::Assume-Yes "true";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::AllowInsecureRepositories "false";
"#
    )
}

/// A dpkg status file in which only [`ONLY_FOR_SCRIPTS`] are installed, in a version that satisfies everybody.
fn status(names: &[&str]) -> String {
    let installed = ONLY_FOR_SCRIPTS.into_iter().filter(|name| !names.contains(name));
    installed
        .map(|name| {
            format!(
                "Package: {name}\nStatus: install ok installed\nPriority: optional\nSection: misc\n\
                 Maintainer: nobody <nobody@example.org>\nArchitecture: all\nMulti-Arch: foreign\nVersion: 99:99\n\
                 Provides: debconf-2.0, usr-is-merged (= 99:99)\nDescription: counts as installed\n\n"
            )
        })
        .collect()
}

/// Where the host gets Debian from.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mirrors {
    pub(super) main: String,
    pub(super) security: String,
}

impl Mirrors {
    /// From lines `URI suite component` of the host's sources: the first Debian archive and the first security archive
    /// that serve main; Debian's own servers where there is none (another distribution, or no sources at all).
    pub(super) fn of_host(sources: &[String]) -> Self {
        let debian = |suffix: &'static str| {
            move |line: &String| {
                let mut words = line.split_whitespace();
                let (uri, suite, component) = (words.next()?, words.next()?, words.next()?);
                let base = suite.strip_suffix(suffix)?;
                let known =
                    base.parse::<Suite>().is_ok() || ["stable", "oldstable", "testing"].contains(&base);
                (known && component == "main").then(|| uri.trim_end_matches('/').to_owned())
            }
        };
        Self {
            main: sources.iter().find_map(debian("")).unwrap_or_else(|| MIRROR.to_owned()),
            security: sources
                .iter()
                .find_map(debian("-security"))
                .unwrap_or_else(|| SECURITY_MIRROR.to_owned()),
        }
    }

    /// The private sources.list.
    pub(super) fn sources_list(&self, suite: Suite) -> String {
        let Self { main, security } = self;
        [
            entry(main, suite.name()),
            entry(main, &format!("{suite}-updates")),
            entry(security, &format!("{suite}-security")),
        ]
        .concat()
    }
}
