//! What the user sees: one line per error, tables, and progress of long work.
//!
//! Results go to standard output, everything about the work to standard error, so that a pipe gets results.

// The command line is the one place that prints; everything below it returns values.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "printing is this module's work")]

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
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
    eprintln!("pontoon: {line}");
}

/// Prints a line about the work.
pub(crate) fn note(text: &str) {
    eprintln!("pontoon: {text}");
}

/// Prints a result as one line of JSON.
pub(crate) fn json(value: &impl Serialize) {
    let text = serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    line(&text);
}

/// Prints a line of the result; a reader that has gone away is not an error.
pub(crate) fn line(text: &str) {
    let _ = writeln!(io::stdout().lock(), "{text}");
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
        eprint!("\r\x1b[K{}{detail}", self.step);
        let _ = io::stderr().flush();
    }
}

impl Progress for Bar {
    fn step(&mut self, what: &str) {
        what.clone_into(&mut self.step);
        if self.terminal {
            self.draw("");
        } else {
            eprintln!("{what}");
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
            eprint!("\r\x1b[K");
        }
        eprintln!("{what}");
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
