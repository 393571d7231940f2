//! What the VMM asks of this boot.
//!
//! The request is a directory of small files, `/pontoon`, that comes as a second archive behind the image's initramfs; so it has no
//! length limit, unlike the kernel command line's 2048 bytes, and no quoting: strings end with NUL, anything else may be in them.
//!
//! | file | content |
//! |---|---|
//! | `argv` | the command: its name and arguments, each ended by NUL; absent or empty: a login shell |
//! | `env` | `NAME=VALUE` strings, each ended by NUL, over the default environment |
//! | `hostname` | the host name, one line |
//! | `console` | `bytes` for a clean channel, anything else for a terminal |
//!
//! The other end is `guest_images::initrd`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;

use crate::console::Mode;

/// The request's parts; all of them have a default.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) argv: Vec<OsString>,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) hostname: Option<String>,
    pub(crate) console: Mode,
}

impl Request {
    /// Reads the files of `dir`; what is not there has its default.
    pub(crate) fn read(dir: &Path) -> Self {
        let file = |name: &str| std::fs::read(dir.join(name)).unwrap_or_default();
        let hostname = String::from_utf8_lossy(&file("hostname")).trim().to_owned();
        Self {
            argv: strings(&file("argv")),
            env: strings(&file("env")).into_iter().filter_map(pair).collect(),
            hostname: (!hostname.is_empty()).then_some(hostname),
            console: if file("console").trim_ascii() == b"bytes" { Mode::Bytes } else { Mode::Terminal },
        }
    }
}

/// The strings of a block in which each ends with NUL.
fn strings(block: &[u8]) -> Vec<OsString> {
    let block = block.strip_suffix(b"\0").unwrap_or(block);
    if block.is_empty() {
        return Vec::new();
    }
    block.split(|&byte| byte == 0).map(|string| OsString::from_vec(string.to_vec())).collect()
}

/// Splits `NAME=VALUE` at the first `=`; something without a name is dropped.
fn pair(string: OsString) -> Option<(OsString, OsString)> {
    let bytes = string.into_vec();
    let at = bytes.iter().position(|&byte| byte == b'=').filter(|&at| at > 0)?;
    Some((OsString::from_vec(bytes[..at].to_vec()), OsString::from_vec(bytes[at + 1..].to_vec())))
}

/// What the kernel command line says to init.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Modules to load by name.
    pub(crate) modules: Vec<String>,
    /// Whether NICs are configured by DHCP.
    pub(crate) dhcp: bool,
}

impl Options {
    /// Parses `/proc/cmdline`; later words win, unknown ones are the kernel's.
    pub(crate) fn parse(cmdline: &str) -> Self {
        let mut options = Self { modules: Vec::new(), dhcp: true };
        for word in cmdline.split_whitespace() {
            match word.strip_prefix("pontoon.").and_then(|word| word.split_once('=')) {
                Some(("modules", list)) => {
                    options.modules =
                        list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
                }
                Some(("dhcp", value)) => options.dhcp = !matches!(value, "off" | "0" | "no"),
                Some(_) | None => {}
            }
        }
        options
    }
}
