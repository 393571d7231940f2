//! A machine with an ssh server behind a published port, in the lab.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use pontoon_tests::Pontoon;
use tempfile::TempDir;

/// From power-on to a shell by ssh, on a host that has other work too.
const BOOT: Duration = Duration::from_secs(600);

/// A machine under way; killed when dropped.
pub(crate) struct Machine {
    child: Child,
    /// Holds the console's file, and the socket of ssh's one connection.
    dir: TempDir,
    port: u16,
    key: PathBuf,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    pub(crate) fn start(mut pontoon: Pontoon, port: u16, key: &Path) -> Self {
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        let output =
            fs::File::create(dir.path().join("console")).expect("the temporary directory is writable");
        let errors = output.try_clone().expect("a file can be shared");
        let child = pontoon.command().stdout(output).stderr(errors).spawn().expect("pontoon starts");
        Self { child, dir, port, key: key.to_owned() }
    }

    /// Its console, and what pontoon had to say; without what directs a terminal, in which a test runner's output would get lost.
    pub(crate) fn said(&self) -> String {
        let bytes = fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).chars().filter(|&c| c == '\n' || !c.is_control()).collect()
    }

    /// A command in the guest. Under emulation a handshake takes seconds, so that one connection serves all.
    pub(crate) fn ssh(&self, command: &str) -> Output {
        const OPTIONS: [&str; 8] = [
            "UserKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=no",
            "LogLevel=ERROR",
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "ConnectTimeout=60",
            "ControlMaster=auto",
            "ControlPersist=yes",
        ];
        Command::new("ssh")
            .args(OPTIONS.iter().flat_map(|option| ["-o", option]))
            .args(["-o", &format!("ControlPath={}", self.dir.path().join("ssh").display())])
            .args(["-F", "none", "-i"])
            .arg(&self.key)
            .args(["-p", &self.port.to_string(), "root@127.0.0.1", command])
            .stdin(Stdio::null())
            .output()
            .expect("ssh starts")
    }

    /// What the command prints, in a guest that is up.
    pub(crate) fn answer(&self, command: &str) -> String {
        let output = self.ssh(command);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command}: {}\n{out}\n{err}\n{}", output.status, self.said());
        out.trim().to_owned()
    }

    /// Until ssh lets us in.
    pub(crate) fn wait_for_ssh(&mut self) {
        let end = Instant::now() + BOOT;
        while !self.ssh("true").status.success() {
            let ended = self.child.try_wait().expect("it is our child");
            assert!(ended.is_none(), "it ended with {ended:?}\n{}", self.said());
            assert!(Instant::now() < end, "no ssh within {BOOT:?}\n{}", self.said());
            // Between two tries of a client that fails at once.
            sleep(Duration::from_secs(1));
        }
    }

    /// Its exit status, when it ends by itself.
    pub(crate) fn wait_for_end(&mut self) -> Option<i32> {
        let end = Instant::now() + BOOT;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status.code();
            }
            assert!(Instant::now() < end, "it does not end\n{}", self.said());
            sleep(Duration::from_millis(200));
        }
    }
}

/// A port that was free a moment ago: the emulator has to bind it itself.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|socket| socket.local_addr())
        .expect("loopback has ports")
        .port()
}
