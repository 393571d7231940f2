//! Names of machines.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A machine's name: a host name label (RFC 1035 §2.3.1, with digits first allowed by RFC 1123 §2.1), and so a safe file name.
///
/// ```
/// use vmm::runtime::MachineName;
///
/// let name: MachineName = "web-1".parse()?;
/// assert_eq!(name.as_str(), "web-1");
/// assert!("../web".parse::<MachineName>().is_err());
/// # Ok::<(), vmm::runtime::BadName>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineName(String);

/// A text that cannot be a machine's name.
///
/// ```
/// use vmm::runtime::{BadName, MachineName};
///
/// for text in ["", "-web", "web-", "my web", "web_1", &"a".repeat(64)] {
///     assert_eq!(text.parse::<MachineName>(), Err(BadName));
/// }
/// assert!("a".repeat(63).parse::<MachineName>().is_ok());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a machine's name is a host name: letters, digits and inner hyphens, 63 at most; choose one such as web-1"
)]
pub struct BadName;

impl MachineName {
    /// The `n`th name for a machine that was given none: `vm1`, `vm2`, …
    pub fn numbered(n: u32) -> Self {
        Self(format!("vm{n}"))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for MachineName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let ok = (1..=63).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-');
        if ok { Ok(Self(text.to_owned())) } else { Err(BadName) }
    }
}

impl TryFrom<String> for MachineName {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<MachineName> for String {
    fn from(name: MachineName) -> Self {
        name.0
    }
}
