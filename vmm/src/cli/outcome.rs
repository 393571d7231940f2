//! What the end of a machine means to a shell, and to `pontoon ps -a`.
//!
//! | ended by | status | |
//! |---|---|---|
//! | the guest: exit device, power-off, reset | its own, or 0 | with a COMMAND whose status never came: 125, or 143 if somebody had asked for the end |
//! | a signal | 128 + its number | |
//! | `--timeout` | 124 | |
//! | a crash of the guest, of KVM, of this program | 126, 125 | never counts as asked for |

use libc::SIGTERM;
use vmm::machine::ExitReason;

use super::signals::Wake;
use super::{STATUS_MACHINE, STATUS_TIMEOUT};

/// What a shell calls a command that was asked to end: 128 + SIGTERM.
const STATUS_ASKED: u8 = 143;

/// How a machine ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: u8,
    pub(crate) reason: String,
    /// Whether the status alone does not tell.
    pub(crate) noteworthy: bool,
    /// Whether somebody had asked for it: `pontoon stop`.
    pub(crate) stopped: bool,
}

impl Outcome {
    /// The end of a machine that ran a `command`, or none, and that somebody had or had not `asked` to end.
    pub(crate) fn of(wake: Wake, command: bool, asked: bool) -> Self {
        match wake {
            Wake::Ended(reason) => Self::of_guest(&reason, command, asked),
            Wake::Deadline => {
                let reason = "the time-out has passed; the machine was stopped".to_owned();
                Self { status: STATUS_TIMEOUT, reason, noteworthy: true, stopped: false }
            }
            Wake::Signal(number) => {
                // As a shell reports a process that a signal ended.
                let status = u8::try_from(128 + number).unwrap_or(u8::MAX);
                let stopped = asked && number == SIGTERM;
                let reason = if stopped {
                    "the guest did not shut down in time; ended by force".to_owned()
                } else {
                    format!("ended by signal {number}")
                };
                Self { status, reason, noteworthy: false, stopped }
            }
        }
    }

    fn of_guest(reason: &ExitReason, command: bool, asked: bool) -> Self {
        let in_order = matches!(reason, ExitReason::PowerOff | ExitReason::Reset);
        let told = matches!(reason, ExitReason::Status(_));
        // The command's status never came: the guest crashed, or was told to end by something else.
        let status = match (command && in_order, asked) {
            (true, true) => STATUS_ASKED,
            (true, false) => STATUS_MACHINE,
            (false, _) => reason.status(),
        };
        let text = match reason {
            _ if in_order && asked => format!("{reason}, as it was asked to"),
            _ if in_order && command => {
                format!("{reason} without telling the command's exit status; see its console")
            }
            ExitReason::Stopped => "stopped".to_owned(),
            _ => reason.to_string(),
        };
        let noteworthy = command && in_order || !(in_order || told);
        Self { status, reason: text, noteworthy, stopped: asked && (in_order || told) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(reason: ExitReason, command: bool, asked: bool) -> (u8, bool) {
        let outcome = Outcome::of(Wake::Ended(reason), command, asked);
        (outcome.status, outcome.stopped)
    }

    #[test]
    fn an_end_that_was_asked_for_is_told_from_one_that_came_by_itself() {
        let both =
            |reason: &ExitReason, command| [false, true].map(|asked| of(reason.clone(), command, asked));
        assert_eq!(both(&ExitReason::PowerOff, false), [(0, false), (0, true)]);
        assert_eq!(both(&ExitReason::PowerOff, true), [(125, false), (143, true)]);
        assert_eq!(both(&ExitReason::Reset, true), [(125, false), (143, true)]);
        assert_eq!(
            both(&ExitReason::Status(7), true),
            [(7, false), (7, true)],
            "the command ended by itself"
        );
        assert_eq!(
            both(&ExitReason::Crashed("io"), true),
            [(125, false), (125, false)],
            "nobody asks for that"
        );
        assert_eq!(both(&ExitReason::Stopped, false), [(124, false), (124, false)], "kill is not stop");
    }

    #[test]
    fn a_stop_that_took_force_is_a_stop_and_other_signals_are_not() {
        let signal = |number, asked| {
            let outcome = Outcome::of(Wake::Signal(number), true, asked);
            (outcome.status, outcome.stopped)
        };
        assert_eq!(
            [signal(15, true), signal(15, false), signal(1, true)],
            [(143, true), (143, false), (129, false)]
        );
        assert!(!Outcome::of(Wake::Deadline, true, true).stopped);
    }
}
