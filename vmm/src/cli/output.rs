//! What the user sees: one line per error, tables, and progress of long work.
//!
//! Results go to standard output, everything about the work to standard error, so that a pipe gets results. Neither a full disk nor a
//! reader that has gone ends the work: what standard error does not take is lost, and what standard output does not take is the
//! command's own error at its end ([`results_arrived`]).

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use guest_images::Progress;
use serde::Serialize;

/// Prints an error with its causes on one line.
pub(crate) fn error(error: &anyhow::Error) {
    let mut line = String::new();
    for (at, cause) in error.chain().enumerate() {
        let text = cause.to_string();
        // A cause that the text before it already quotes would be said twice.
        if !line.contains(&text) {
            let _ = write!(line, "{}{text}", if at == 0 { "" } else { ": " });
        }
    }
    say(&format!("pontoon: {line}\n"));
}

/// Prints a line about the work.
pub(crate) fn note(text: &str) {
    say(&format!("pontoon: {text}\n"));
}

/// Writes to standard error. Where that takes nothing there is nobody left to tell, and no reason to end a machine.
fn say(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Prints a result as one line of JSON.
pub(crate) fn json(value: &impl Serialize) {
    let text = serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    line(&text);
}

/// Why a part of the results was lost, if it was.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Prints a line of the result; a reader that has gone away is not an error.
pub(crate) fn line(text: &str) {
    if let Err(error) = writeln!(io::stdout().lock(), "{text}")
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        let _ = LOST.set(error);
    }
}

/// Whether standard output has taken every result: asked at the end.
pub(crate) fn results_arrived() -> Result<(), &'static io::Error> {
    LOST.get().map_or(Ok(()), Err)
}

/// Prints rows in columns as wide as their widest cell.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let print = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(text, "{cell:width$}  ");
        }
        line(text.trim_end());
    };
    print(&mut header.iter().copied());
    for row in rows {
        print(&mut row.iter().map(String::as_str));
    }
}

/// A cell is never empty, and has nothing in it that a terminal would obey.
pub(crate) fn cell(text: String) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Bytes that may still be logged.
static LOG_LEFT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Lets the log have so many bytes more, and no others.
pub(crate) fn limit_log(bytes: u64) {
    LOG_LEFT.store(bytes, Ordering::Relaxed);
}

/// Where the log goes: standard error, within its limit.
pub(crate) struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len() as u64;
        let within =
            LOG_LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(len));
        if within.is_ok() { io::stderr().write(bytes) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Draws progress: one line that rewrites itself on a terminal, one line per step elsewhere.
pub(crate) struct Bar {
    terminal: bool,
    step: String,
    drawn: Option<Instant>,
}

/// A terminal is redrawn no more often than this.
const REDRAW: Duration = Duration::from_millis(100);

impl Bar {
    pub(crate) fn new() -> Self {
        Self { terminal: io::stderr().is_terminal(), step: String::new(), drawn: None }
    }

    fn draw(&mut self, detail: &str) {
        self.drawn = Some(Instant::now());
        // Carriage return and "erase to end of line" (ECMA-48 EL).
        say(&format!("\r\x1b[K{}{detail}", self.step));
    }
}

impl Progress for Bar {
    fn step(&mut self, what: &str) {
        what.clone_into(&mut self.step);
        if self.terminal {
            self.draw("");
        } else {
            say(&format!("{what}\n"));
        }
    }

    fn bytes(&mut self, done: u64, total: u64) {
        if self.terminal && self.drawn.is_none_or(|at| at.elapsed() >= REDRAW) {
            let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
            self.draw(&format!("  {percent}% of {} MiB", total >> 20));
        }
    }

    fn done(&mut self, what: &str) {
        if self.terminal {
            say("\r\x1b[K");
        }
        say(&format!("{what}\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_has_nothing_that_a_terminal_obeys() {
        assert_eq!(cell("a\x1b[2Jb\n".into()), "a?[2Jb?");
        assert_eq!(cell(String::new()), "-");
    }
}
