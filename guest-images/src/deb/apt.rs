//! The processes of apt: how they are started, what their answers mean, and how their failures are told apart.
//!
//! stdout is read (answers, or machine-readable progress by APT::Status-Fd); stderr goes to `apt.log`, whose last lines
//! stand in errors. The locale is C, since answers are parsed.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Dependencies, Error, Wanted, config, io_error};
use crate::progress::Progress;

/// How many of apt's last lines an error shows.
const LINES_SHOWN: usize = 8;

/// What apt's fetchers say when the other side is not there.
const UNREACHABLE: [&str; 8] = [
    "Could not resolve",
    "Temporary failure resolving",
    "Could not connect",
    "Unable to connect",
    "Cannot initiate the connection",
    "Connection failed",
    "Connection timed out",
    "Network is unreachable",
];

/// The file whose time tells when the lists were last complete.
pub(super) fn stamp(dir: &Path) -> PathBuf {
    dir.join("lists-complete")
}

/// Downloads and verifies the index.
pub(super) fn update(dir: &Path, progress: &mut dyn Progress) -> Result<(), Error> {
    progress.step("downloading Debian's package index");
    let mut command = command("apt-get", dir)?;
    command.args(["-o", "APT::Status-Fd=1", "-qq", "update"]);
    run(dir, "downloading the package index", command, |_| ())?;
    fs::write(stamp(dir), b"").map_err(io_error("write", &stamp(dir)))
}

/// What must be downloaded for `names`, from the index.
pub(super) fn resolve(dir: &Path, names: &[&str], dependencies: Dependencies) -> Result<Vec<Wanted>, Error> {
    let action = format!("resolving the packages {}", names.join(" "));
    let mut command = command("apt-get", dir)?;
    match dependencies {
        Dependencies::Ignored => command.args(["-qq", "--print-uris", "download"]),
        Dependencies::Included => command.args(["-qq", "--print-uris", "install"]),
    };
    // Without this, apt would not mention what lies in the archive directory already. Here it finds no
    // package (but the subdirectory `partial`, on which it insists).
    command.arg("-o").arg(format!("Dir::Cache::archives={}/", dir.join("lists").display()));
    command.arg("--").args(names);
    let mut lines = Vec::new();
    run(dir, &action, command, |line| lines.push(line.to_owned()))?;
    let packages = lines
        .iter()
        .filter(|line| line.starts_with('\''))
        .map(|line| wanted(line).ok_or_else(|| Error::Answer { action: action.clone(), line: line.clone() }))
        .collect::<Result<Vec<_>, _>>()?;
    for name in names {
        if !packages.iter().any(|wanted| wanted.name == *name) {
            let said = format!("(nothing about {name}: it may be a virtual package; name a real one)");
            return Err(Error::Apt { action, said });
        }
    }
    Ok(packages)
}

/// Downloads `packages` into the directory `into`.
pub(super) fn download(
    dir: &Path,
    into: &Path,
    packages: &[Wanted],
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let total: u64 = packages.iter().map(|wanted| wanted.size).sum();
    let plural = if packages.len() == 1 { "" } else { "s" };
    let action = format!("downloading {} package{plural}", packages.len());
    progress.step(&action);
    let mut command = command("apt-get", dir)?;
    command.args(["-o", "APT::Status-Fd=1", "-qq", "download", "--"]).current_dir(into);
    command.args(packages.iter().map(|wanted| format!("{}={}", wanted.name, wanted.version)));
    let mut done = 0;
    run(dir, &action, command, |line| {
        if let Some(permyriad) = download_status(line) {
            done = done.max(total / 10_000 * permyriad + total % 10_000 * permyriad / 10_000);
            progress.bytes(done, total);
        }
    })?;
    progress.bytes(total, total);
    Ok(())
}

/// The real packages that `name` depends on.
pub(super) fn depends(dir: &Path, name: &str) -> Result<Vec<String>, Error> {
    let mut command = command("apt-cache", dir)?;
    command.args(["--important", "depends", "--", name]);
    let mut names = Vec::new();
    run(dir, &format!("reading what {name} depends on"), command, |line| {
        if let Some(dependency) = line.trim().strip_prefix("Depends: ").filter(|name| !name.starts_with('<'))
        {
            names.push(dependency.to_owned());
        }
    })?;
    Ok(names)
}

/// The host's package sources as `URI suite component`; nothing when apt does not tell.
pub(super) fn host_sources() -> Result<Vec<String>, Error> {
    let mut command = bare_command("apt-get")?;
    command.args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]);
    let Ok(output) = command.output() else { return Ok(Vec::new()) };
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// Parses `'URI' FILE SIZE SHA256:HEX`, where FILE is `NAME_VERSION_ARCHITECTURE.deb` with `%3a` for the epoch's colon.
pub(super) fn wanted(line: &str) -> Option<Wanted> {
    let mut words = line.split(' ');
    let (_uri, file, size, sum) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let sha256 = sum.strip_prefix("SHA256:").filter(|sum| sum.len() == 64)?;
    if file.contains('/') || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut parts = file.strip_suffix(".deb")?.split('_');
    let (name, version, architecture) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || !["amd64", "all"].contains(&architecture) {
        return None;
    }
    Some(Wanted {
        name: name.to_owned(),
        version: version.replace("%3a", ":"),
        file: file.to_owned(),
        sha256: sha256.to_ascii_lowercase(),
        size: size.parse().ok()?,
    })
}

/// Parses `dlstatus:1:12.6863:Retrieving…` into ten-thousandths.
pub(super) fn download_status(line: &str) -> Option<u64> {
    let percent = line.strip_prefix("dlstatus:")?.split(':').nth(1)?;
    let (whole, fraction) = percent.split_once('.').unwrap_or((percent, "0"));
    let hundredths: String = fraction.chars().chain("00".chars()).take(2).collect();
    let permyriad = whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)?;
    Some(permyriad.min(10_000))
}

fn command(program: &'static str, dir: &Path) -> Result<Command, Error> {
    let mut command = bare_command(program)?;
    command.arg("-c").arg(std::path::absolute(config::conf(dir)).map_err(io_error("resolve", dir))?);
    Ok(command)
}

fn bare_command(program: &'static str) -> Result<Command, Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|dir| dir.join(program).is_file()) {
        return Err(Error::MissingProgram { program, package: "apt" });
    }
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").env_remove("APT_CONFIG");
    command.stdin(Stdio::null());
    Ok(command)
}

/// Runs `command`, hands each line of its stdout to `each`, and turns a failure into an error.
fn run(dir: &Path, action: &str, mut command: Command, mut each: impl FnMut(&str)) -> Result<(), Error> {
    let log = dir.join("apt.log");
    let stderr = File::create(&log).map_err(io_error("write", &log))?;
    tracing::debug!(?command, "starting apt");
    let started = command.stdout(Stdio::piped()).stderr(stderr).spawn();
    let mut child = started.map_err(io_error("run apt for", dir))?;
    let stdout = child.stdout.take().expect("stdout was asked to be a pipe");
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.map_err(io_error("read apt's answer for", dir))?;
        each(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().map_err(io_error("wait for apt in", dir))?;
    if status.success() {
        return Ok(());
    }
    Err(failure(action, &fs::read_to_string(&log).or_else(unreadable).unwrap_or_default()))
}

fn unreadable(error: io::Error) -> io::Result<String> {
    Ok(format!("(its messages cannot be read: {error})"))
}

/// The error that apt's messages mean.
pub(super) fn failure(action: &str, log: &str) -> Error {
    let lines: Vec<_> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let said = lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n");
    if UNREACHABLE.iter().any(|text| log.contains(text)) {
        return Error::Unreachable { said };
    }
    Error::Apt { action: action.to_owned(), said }
}
