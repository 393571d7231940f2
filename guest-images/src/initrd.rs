//! What a boot is asked to do, as an archive that goes behind an image's initrd.
//!
//! The kernel unpacks one archive after the other, so a second, tiny one carries the command into an image that stays as it was built.
//! Nothing is quoted or encoded: arguments may hold spaces, quotes, newlines, anything but NUL, and the kernel command line's
//! limit of 2048 bytes does not apply. The other end, with the format of the files, is `init/src/request.rs`.
//!
//! Limits, checked here so that they don't surprise there: a string below 128 KiB and all strings below 1 MiB together (Linux's
//! own limits for execve(2), the second halved), a host name by RFC 1123 (letters, digits, `-`, `.`; 1 to 63 bytes).

use crate::cpio::Tree;

#[cfg(test)]
mod tests;

/// execve(2): MAX_ARG_STRLEN, the NUL included.
const STRING_MAX: usize = 128 * 1024;
/// Half of what execve(2) allows with an 8 MiB stack: the environment that init adds must fit too.
const STRINGS_MAX: usize = 1024 * 1024;
/// RFC 1123 §2.1 for one label; Linux takes 64.
const HOSTNAME_MAX: usize = 63;
/// The kernel aligns archives to this.
const ALIGN: usize = 4;

/// Why a request cannot be carried.
///
/// ```
/// use guest_images::initrd::{Error, Request};
///
/// let request = Request { hostname: Some("-vm1".into()), ..Request::default() };
/// assert_eq!(request.to_archive(), Err(Error::Hostname("-vm1".into())));
/// let request = Request { argv: vec!["echo".into(), "a\0b".into()], ..Request::default() };
/// assert_eq!(request.to_archive(), Err(Error::Nul("a\0b".into())));
/// ```
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No program takes a string with NUL in it.
    #[error("{0:?} holds a NUL, which no argument and no variable can hold")]
    Nul(String),
    /// execve(2) would refuse it in the guest.
    #[error(
        "a string of {0} bytes in the command is too long: Linux takes less than 131072; hand it over in a file or on standard input"
    )]
    StringTooLong(usize),
    /// execve(2) would refuse it in the guest.
    #[error(
        "the command and its environment have {0} bytes; at most 1048576 are carried: hand data over in a file or on standard input"
    )]
    TooLong(usize),
    /// A variable needs a name without `=`.
    #[error("{0:?} cannot be the name of an environment variable: it is empty or holds =")]
    VariableName(String),
    /// Not a host name.
    #[error(
        "{0:?} cannot be a host name: 1 to 63 letters, digits, - and ., not beginning or ending with - or ."
    )]
    Hostname(String),
}

/// How the guest's console treats what passes.
///
/// ```
/// use guest_images::initrd::{Console, Request};
///
/// // Output that a program captures: no CR before its newlines.
/// let request = Request { argv: vec!["ls".into()], console: Console::Bytes, ..Request::default() };
/// assert!(request.to_archive()?.windows(6).any(|bytes| bytes == b"bytes\n"));
/// # Ok::<(), guest_images::initrd::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Console {
    /// A terminal: echo, line editing, ctrl-C, newline to CR LF. For people.
    #[default]
    Terminal,
    /// Eight clean bits each way. For output that is captured and input that comes from a pipe.
    Bytes,
}

/// What one boot is to do. The default is a login shell on a terminal.
///
/// ```
/// use guest_images::initrd::{Request, with_request};
///
/// let request = Request { argv: vec!["ls".into(), "/my files".into()], ..Request::default() };
/// let initrd = with_request(b"070701 an archive of the image's", &request)?;
/// # Ok::<(), guest_images::initrd::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// The command: its name (looked up in PATH) and its arguments; empty for a login shell.
    pub argv: Vec<String>,
    /// Variables over init's default environment, which has PATH, HOME, USER, LOGNAME, SHELL and TERM.
    pub env: Vec<(String, String)>,
    /// The guest's host name; `None` for the image's own.
    pub hostname: Option<String>,
    /// The console's mode.
    pub console: Console,
}

impl Request {
    /// The archive, a multiple of 512 bytes long; put it behind an initrd at a multiple of 4, with zeros between.
    ///
    /// # Errors
    /// [`Error`] when something in the request cannot be carried.
    pub fn to_archive(&self) -> Result<Vec<u8>, Error> {
        self.check()?;
        let mut tree = Tree::new();
        let mut file = |name: &str, data: Vec<u8>| {
            tree.file(format!("pontoon/{name}"), 0o600, data).expect("a constant path, and at most 1 MiB");
        };
        if !self.argv.is_empty() {
            file("argv", strings(self.argv.iter().cloned()));
        }
        if !self.env.is_empty() {
            file("env", strings(self.env.iter().map(|(name, value)| format!("{name}={value}"))));
        }
        if let Some(hostname) = &self.hostname {
            file("hostname", format!("{hostname}\n").into_bytes());
        }
        if self.console == Console::Bytes {
            file("console", b"bytes\n".to_vec());
        }
        if tree.is_empty() {
            tree.dir("pontoon", 0o700).expect("a constant path");
        }
        Ok(tree.to_bytes())
    }

    fn check(&self) -> Result<(), Error> {
        let mut total = 0;
        let variables = self.env.iter().flat_map(|(name, value)| [name, value]);
        for string in self.argv.iter().chain(variables) {
            if string.contains('\0') {
                return Err(Error::Nul(string.clone()));
            }
            // A variable's name and value are one string with `=`; one byte of slack for that.
            if string.len() + 2 > STRING_MAX {
                return Err(Error::StringTooLong(string.len()));
            }
            total += string.len() + 1;
        }
        if total > STRINGS_MAX {
            return Err(Error::TooLong(total));
        }
        for (name, value) in &self.env {
            if name.is_empty() || name.contains('=') {
                return Err(Error::VariableName(name.clone()));
            }
            let len = name.len() + value.len() + 2;
            if len > STRING_MAX {
                return Err(Error::StringTooLong(len));
            }
        }
        self.hostname.iter().try_for_each(|name| check_hostname(name))
    }
}

/// `initrd` with the request behind it.
///
/// # Errors
/// Those of [`Request::to_archive`].
pub fn with_request(initrd: &[u8], request: &Request) -> Result<Vec<u8>, Error> {
    let archive = request.to_archive()?;
    let mut out = Vec::with_capacity(initrd.len() + ALIGN + archive.len());
    out.extend_from_slice(initrd);
    out.resize(initrd.len().next_multiple_of(ALIGN), 0);
    out.extend_from_slice(&archive);
    Ok(out)
}

fn strings(strings: impl Iterator<Item = String>) -> Vec<u8> {
    strings.flat_map(|string| string.into_bytes().into_iter().chain([0])).collect()
}

fn check_hostname(name: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let good = bytes.len() <= HOSTNAME_MAX
        && bytes.iter().all(|&byte| allowed(byte))
        && edge(bytes.first())
        && edge(bytes.last());
    if good { Ok(()) } else { Err(Error::Hostname(name.to_owned())) }
}
