//! One QEMU per boot: started, talked to over its serial line, ended in bounded time.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helper of tests: what fails here fails the test, what is skipped is said"
)]

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use guest_images::initrd::{self, Request};
use guest_images::{BuildOptions, Error, Image, Silent, Store, deb};

/// Nothing that is waited for takes this long on the slowest machine; it only ends what hangs.
const PATIENCE: Duration = Duration::from_secs(100);
const QEMU: &str = "qemu-system-x86_64";

/// The image, built once per target directory; `None`, with a line on stderr, where that is impossible.
pub(crate) fn image() -> Option<Image> {
    if Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_err() {
        crate::skip::skip(format_args!("{QEMU} is not installed"));
        return None;
    }
    let store = Store::open(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("pontoon"));
    match store.build("debian", &BuildOptions::default(), &mut Silent) {
        Ok(image) => Some(image),
        Err(Error::Deb(
            error @ (deb::Error::Unreachable { .. }
            | deb::Error::MissingProgram { .. }
            | deb::Error::MissingKeyring { .. }),
        )) => {
            crate::skip::skip(&error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A machine that runs.
pub(crate) struct Boot {
    qemu: Child,
    input: ChildStdin,
    chunks: Receiver<Vec<u8>>,
    output: Vec<u8>,
    seen: usize,
    _initrd: tempfile::NamedTempFile,
}

/// A machine that has ended.
pub(crate) struct Ended {
    /// All that came over the serial line.
    pub(crate) output: String,
    /// The byte that was written to the exit device; `None` when the machine ended otherwise.
    pub(crate) status: Option<u8>,
}

const EXIT_DEVICE: [&str; 2] = ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"];

impl Boot {
    /// Boots with the request and more arguments for QEMU, to the end.
    pub(crate) fn run(image: &Image, request: &Request, arguments: &[&str]) -> Ended {
        Self::start(image, request, arguments).finish()
    }

    /// Like `run` without NICs and without the exit device.
    pub(crate) fn without_exit_device(image: &Image, request: &Request) -> Ended {
        Self::spawn(image, request, "", &["-nic", "none"]).finish()
    }

    /// Like `run` without NICs, with more words on the kernel's command line.
    pub(crate) fn with_cmdline(image: &Image, request: &Request, words: &str) -> Ended {
        Self::spawn(image, request, words, &[&EXIT_DEVICE[..], &["-nic", "none"]].concat()).finish()
    }

    /// Boots; without `-nic` in the arguments there is no network.
    pub(crate) fn start(image: &Image, request: &Request, arguments: &[&str]) -> Self {
        let mut all = EXIT_DEVICE.to_vec();
        if !arguments.contains(&"-nic") {
            all.extend(["-nic", "none"]);
        }
        all.extend(arguments);
        Self::spawn(image, request, "", &all)
    }

    fn spawn(image: &Image, request: &Request, words: &str, arguments: &[&str]) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes = initrd::with_request(&std::fs::read(&image.initrd).unwrap(), request).unwrap();
        file.write_all(&bytes).unwrap();
        let mut qemu = Command::new(QEMU)
            .args([
                "-accel",
                "tcg",
                "-M",
                "q35",
                "-cpu",
                "max",
                "-m",
                "256",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-serial", "stdio", "-monitor", "none", "-kernel"])
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(file.path())
            .arg("-append")
            // On a busy host the emulated timer is late, which the kernel takes for broken wiring.
            .arg(format!("console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable {words}"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = qemu.stdin.take().unwrap();
        let mut stdout = qemu.stdout.take().unwrap();
        let (sender, chunks) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { qemu, input, chunks, output: Vec::new(), seen: 0, _initrd: file }
    }

    /// Waits until the machine has printed `text` after what was expected before.
    pub(crate) fn expect(&mut self, text: &str) {
        loop {
            let found = self.output[self.seen..].windows(text.len()).position(|part| part == text.as_bytes());
            if let Some(at) = found {
                self.seen += at + text.len();
                return;
            }
            assert!(self.receive(), "the machine ended before it printed {text:?}: {}", self.text());
        }
    }

    /// Types.
    pub(crate) fn send(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
    }

    /// Waits for the end.
    pub(crate) fn finish(mut self) -> Ended {
        while self.receive() {}
        let code = self.qemu.wait().unwrap().code().unwrap_or(-1);
        let status = (code % 2 == 1).then(|| u8::try_from(code / 2)).and_then(Result::ok);
        Ended { output: self.text(), status }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Takes the next output; `false` at its end.
    fn receive(&mut self) -> bool {
        match self.chunks.recv_timeout(PATIENCE) {
            Ok(chunk) => {
                self.output.extend(chunk);
                true
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => false,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                panic!("nothing for {PATIENCE:?} after: {}", self.text())
            }
        }
    }
}

impl Drop for Boot {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
