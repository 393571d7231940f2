//! Who may log into the image as root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, host, io_error};

/// The key pair that is made where the user has none, below the cache; it outlives images that are built anew.
const OWN_PAIR: &str = "ssh/id_ed25519";

/// The content of authorized_keys, and the private key that goes with it when that was made here.
#[derive(Debug)]
pub(crate) struct Authorized {
    pub(crate) text: String,
    pub(crate) identity: Option<PathBuf>,
}

/// The keys in `files`; without any, those of `~/.ssh/id_*.pub`; without any, a pair of our own in `cache`.
pub(crate) fn authorized(cache: &Path, files: &[PathBuf]) -> Result<Authorized, Error> {
    if !files.is_empty() {
        return Ok(Authorized { text: read_all(files)?, identity: None });
    }
    let own = host::home().map(|home| public_keys(&home.join(".ssh"))).unwrap_or_default();
    if !own.is_empty() {
        return Ok(Authorized { text: read_all(&own)?, identity: None });
    }
    let pair = cache.join(OWN_PAIR);
    let public = pair.with_extension("pub");
    if !(pair.is_file() && public.is_file()) {
        generate(&pair)?;
    }
    Ok(Authorized { text: read_all(&[public])?, identity: Some(pair) })
}

/// `id_*.pub` in a directory, sorted.
fn public_keys(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("id_") && name.ends_with(".pub") && path.is_file()
    };
    let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(ours).collect();
    found.sort();
    found
}

fn read_all(files: &[PathBuf]) -> Result<String, Error> {
    let mut text = String::new();
    for path in files {
        let content = fs::read_to_string(path).map_err(io_error("read", path))?;
        let keys: Vec<_> = content.lines().map(str::trim).filter(|line| is_public_key(line)).collect();
        if keys.is_empty() {
            return Err(Error::NoKey { path: path.clone() });
        }
        keys.iter().for_each(|key| {
            text.push_str(key);
            text.push('\n');
        });
    }
    Ok(text)
}

/// A line of authorized_keys without options: a type, base64, perhaps a comment. A private key is none.
pub(super) fn is_public_key(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let (kind, body) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let known =
        ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-sha2-"].iter().any(|begins| kind.starts_with(begins));
    known && body.len() > 16 && body.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
}

fn generate(pair: &Path) -> Result<(), Error> {
    let dir = pair.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(io_error("make", dir))?;
    let keygen = host::find(&host::search_path(), "ssh-keygen", "openssh-client")?;
    for stale in [pair.to_path_buf(), pair.with_extension("pub")] {
        let _ = fs::remove_file(stale);
    }
    let mut command = Command::new(&keygen);
    command.args(["-q", "-t", "ed25519", "-N", "", "-C", "pontoon", "-f"]).arg(pair);
    let output = command.output().map_err(io_error("run", &keygen))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Failed { action: "ssh-keygen", said: String::from_utf8_lossy(&output.stderr).into_owned() })
}
