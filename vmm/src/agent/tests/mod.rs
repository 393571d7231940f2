//! The client and the real agent, which runs here as a process of this host on a Unix socket; and agents that lie.

mod copy;
mod exec;
mod frames;
mod hostile;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command as HostCommand, Stdio};

use super::{Client, Command};

/// A running agent, and the folder that it is in.
struct Agent {
    process: Child,
    client: Client,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("pontoon-agent");
        // Written by another process: while one of this process's threads forks, a file that is open for writing can't be run.
        let mut cat = HostCommand::new("sh")
            .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
            .arg(&program)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        cat.stdin.take().unwrap().write_all(guest_images::AGENT).unwrap();
        assert!(cat.wait().unwrap().success());
        let socket = dir.path().join("socket");
        let mut command = HostCommand::new(&program);
        command.arg("--unix").arg(&socket).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "listening\n");
        Self { process, client: Client::unix(&socket), dir }
    }

    /// What a shell script wrote and how it ended.
    fn sh(&self, script: &str) -> super::Output {
        self.client.output(&sh(script), 1 << 20).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// How many descriptors the agent's listener has.
    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn sh(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(script);
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}
