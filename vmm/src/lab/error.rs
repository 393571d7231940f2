//! What can go wrong in the lab, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Why a command was not run in the lab, or not to its end.
///
/// ```no_run
/// use vmm::guest_images::Silent;
/// use vmm::lab::{Config, Lab, LabError};
///
/// let mut lab = match Lab::prepare(&Config::new("/var/cache/pontoon"), &mut Silent) {
///     // A test that skips itself there says so.
///     Err(LabError::QemuMissing) => return,
///     lab => lab.expect("the outer machine"),
/// };
/// ```
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The emulator is not installed.
    #[error(
        "qemu-system-x86_64 is not on this host: the lab is an emulated machine that runs in it; \
         install it with: apt-get install qemu-system-x86"
    )]
    QemuMissing,
    /// The configuration is outside the limits.
    #[error("{0}")]
    Config(String),
    /// The outer machine's packages could not be had.
    #[error("the outer machine's packages: {0}")]
    Packages(#[from] guest_images::deb::Error),
    /// The outer machine's initramfs could not be made.
    #[error("the outer machine's initramfs: {0}")]
    Initramfs(#[from] guest_images::cpio::Error),
    /// A package does not hold what it should.
    #[error("the outer machine's packages have changed: {0}; please report it")]
    Contents(String),
    /// A file of this host.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// One of this process's own streams, or the terminal.
    #[error("cannot use the standard streams: {0}")]
    Stream(io::Error),
    /// The emulator could not be started or talked to.
    #[error("cannot {action}: {source}")]
    Emulator {
        /// What was to be done.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The first boot did not get to its end.
    #[error(
        "the outer kernel did not come up within {seconds} s; the end of its console:\n{console}\n\
         (a loaded host may need another try)"
    )]
    NotUp {
        /// How long it was waited for.
        seconds: u64,
        /// The end of the console.
        console: String,
    },
    /// A resumed machine did not say a word.
    #[error(
        "the outer machine was resumed but did not answer within {seconds} s; the end of its console:\n{console}"
    )]
    NotAnswered {
        /// How long it was waited for.
        seconds: u64,
        /// The end of the console.
        console: String,
    },
    /// The emulator did not take the snapshot.
    #[error("the outer machine could not be resumed: {reason}; the end of its console:\n{console}")]
    NotResumed {
        /// What was refused.
        reason: String,
        /// The end of the console, with the emulator's own messages.
        console: String,
    },
    /// A port of this host could not be had.
    #[error("a published port is taken on this host, or may not be had; the emulator said:\n{console}")]
    Publish {
        /// The end of the console, with the emulator's own messages.
        console: String,
    },
    /// A disk of the run's could not be had.
    #[error("a disk is in use by another machine, or may not be had; the emulator said:\n{console}")]
    Disk {
        /// The end of the console, with the emulator's own messages.
        console: String,
    },
    /// A machine's state passes once, when it is taken or when it is given.
    #[error("the emulator has passed its machine's state already")]
    StateTwice,
    /// The emulator has ended by itself.
    #[error("the outer machine ended while {phase}; the end of its console:\n{console}")]
    Ended {
        /// What it was doing.
        phase: &'static str,
        /// The end of the console, with the emulator's own messages.
        console: String,
    },
    /// The emulator refused a command.
    #[error("the emulator refused {command}: {answer}")]
    Qmp {
        /// The QMP command.
        command: &'static str,
        /// Its answer.
        answer: String,
    },
    /// The command took too long.
    #[error("the command timed out after {seconds} s and was killed with its machine")]
    TimedOut {
        /// Its limit.
        seconds: f64,
    },
    /// The outer machine could not do the job.
    #[error("in the outer machine: {0}")]
    Job(String),
    /// Files could not be fetched.
    #[error("cannot fetch from the lab: {0}")]
    Fetch(String),
    /// A signal ended the wait.
    #[error("interrupted by a signal")]
    Interrupted,
}

impl LabError {
    /// Whether a damaged or unsuitable snapshot would look like this.
    pub(super) fn blames_snapshot(&self) -> bool {
        matches!(
            self,
            Self::NotAnswered { .. } | Self::NotResumed { .. } | Self::Ended { phase: RESUMING, .. }
        )
    }
}

/// The phase in which a bad snapshot shows.
pub(super) const RESUMING: &str = "it was being resumed";

/// An error of the host about `path`; `action` completes "cannot … PATH".
pub(super) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LabError + use<> {
    let path = path.to_path_buf();
    move |source| LabError::Io { action, path, source }
}

/// An error about the emulator; `action` completes "cannot …".
pub(super) fn emulator<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> LabError {
    move |source| LabError::Emulator { action, source: source.into() }
}
