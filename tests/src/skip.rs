// How a test says that it cannot run here. One file for all crates: each includes it by its path, since the arrows
// between crates allow no common dependency.

/// Says that the calling test cannot run here, and why; the test then returns.
///
/// It passes, prints the reason, and leaves a line in the file that `PONTOON_SKIPS` names: `scripts/test` prints
/// those at its end, so that nobody takes a skipped test for a passed one.
#[allow(clippy::print_stderr, dead_code, unreachable_pub, reason = "told to whoever runs the tests")]
pub fn skip(reason: impl std::fmt::Display) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("SKIPPED {name}: {reason}");
    let Some(path) = std::env::var_os("PONTOON_SKIPS").filter(|path| !path.is_empty()) else { return };
    if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
        // One write, so that lines of parallel tests don't mix.
        let _ = std::io::Write::write_all(&mut file, format!("  {name}: {reason}\n").as_bytes());
    }
}
