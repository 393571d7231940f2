//! `state.json`: what a machine says of itself, in a file.
//!
//! Read tolerantly: a field that is missing has its default, one that is unknown is ignored, so that programs of different
//! versions can list each other's machines. What changes the meaning of a field raises [`SCHEMA`].

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Version of the meaning of the fields.
pub(super) const SCHEMA: u32 = 1;
/// Most bytes that are read.
const MAX: u64 = 64 << 10;
pub(super) const FILE: &str = "state.json";
/// What it is called before it replaces the old one.
pub(super) const NEW: &str = ".state.json.new";

/// How far a machine is, as it says itself; the lock says whether that is still so.
///
/// ```
/// use vmm::runtime::Phase;
///
/// let phase = |text| serde_json::from_str::<Phase>(text);
/// assert_eq!(phase(r#""running""#)?, Phase::Running);
/// assert_eq!(phase(r#""a later version's""#)?, Phase::Unknown);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its devices and its network are being made.
    #[default]
    Starting,
    /// The guest runs.
    Running,
    /// It has ended in order, and said how.
    Ended,
    /// Something that this version does not know.
    #[serde(other)]
    Unknown,
}

/// How a machine ended.
///
/// ```
/// use vmm::runtime::Exit;
///
/// let exit: Exit = serde_json::from_str(r#"{"status":3,"reason":"the guest said so"}"#)?;
/// assert_eq!((exit.status, exit.stopped), (3, false));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exit {
    /// The exit status of its process.
    pub status: u8,
    /// Why, in words.
    pub reason: String,
    /// When, in seconds since 1970.
    pub at: u64,
    /// Somebody had asked for it: `pontoon stop`.
    pub stopped: bool,
}

/// What a machine says of itself.
///
/// ```
/// use vmm::runtime::{Phase, State};
///
/// // `state.json` of a machine that has only just begun.
/// let state: State = serde_json::from_str(r#"{"schema":1,"name":"vm1","pid":4711,"memory":536870912}"#)?;
/// assert_eq!((state.state, state.memory >> 20, state.exit), (Phase::Starting, 512, None));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// [`SCHEMA`] of the writer.
    pub schema: u32,
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// How far it is.
    pub state: Phase,
    /// Whether it has no terminal: its console is in a log and can be attached to.
    pub detached: bool,
    /// The image that it was made from.
    pub image: Option<String>,
    /// The kernel's file.
    pub kernel: Option<PathBuf>,
    /// vCPUs.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// What its NIC is plugged into: `nat`, `tap:br0`, `none`.
    pub net: String,
    /// The host's interface behind the NIC: the TAP's name.
    pub interface: Option<String>,
    /// Its NIC's address.
    pub mac: Option<String>,
    /// The NAT's subnet.
    pub subnet: Option<String>,
    /// Published ports, such as `127.0.0.1:8080:80`.
    pub published: Vec<String>,
    /// The socket that leads to the guest's vsock ports.
    pub vsock: Option<PathBuf>,
    /// The cgroup that limits its CPU time.
    pub cgroup: Option<PathBuf>,
    /// When it was started, in seconds since 1970: to be shown. The host's clock may have been set since.
    pub started_at: u64,
    /// The same by a clock that nobody sets: the host's CLOCK_MONOTONIC in seconds.
    pub started_monotonic: Option<u64>,
    /// Where its console goes, if to a file.
    pub console_log: Option<PathBuf>,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// Why a state could not be read.
///
/// ```no_run
/// use vmm::runtime::{Runtime, StateError};
///
/// for machine in Runtime::open()?.list()? {
///     if let Err(StateError::Schema(version)) = machine.state() {
///         println!("{} was started by a later pontoon (version {version} of its state)", machine.name());
///     }
/// }
/// # Ok::<(), vmm::runtime::RuntimeError>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file cannot be read.
    #[error("reading its state failed: {0}; if it should be gone, end it: pontoon kill")]
    Io(#[from] io::Error),
    /// It is no state.
    #[error(
        "its state is not what a machine writes: {0}; something else has written there: end it with pontoon kill"
    )]
    Malformed(#[from] serde_json::Error),
    /// It is too large to be one.
    #[error("its state is larger than {} KiB; something else has written there: end it with pontoon kill", MAX >> 10)]
    TooLarge,
    /// It was written by a later version.
    #[error("its state has version {0}, and this program knows {SCHEMA}; use the program that started it")]
    Schema(u32),
}

impl State {
    /// The state in a machine's folder.
    pub(super) fn read(dir: &Path) -> Result<Self, StateError> {
        let mut text = Vec::new();
        File::open(dir.join(FILE))?.take(MAX + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX {
            return Err(StateError::TooLarge);
        }
        let state: Self = serde_json::from_slice(&text)?;
        if state.schema > SCHEMA {
            return Err(StateError::Schema(state.schema));
        }
        Ok(state)
    }

    /// Replaces the state in a machine's folder.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self).map_err(io::Error::other)?;
        let new = dir.join(NEW);
        fs::write(&new, text)?;
        fs::rename(&new, dir.join(FILE))
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Seconds since the host was started, those that it slept left out: all of its processes count the same.
pub(super) fn monotonic() -> u64 {
    clock_gettime(ClockId::Monotonic).tv_sec.try_into().unwrap_or(0)
}
