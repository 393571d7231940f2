//! An archive of Debian packages on the host's loopback: enough for apt in a guest, and no internet is needed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use sha2::{Digest, Sha256};

/// Serves until the test's process ends.
pub(crate) struct Repository {
    port: u16,
}

impl Repository {
    /// An archive of packages, each with a program of its own name that prints the text.
    pub(crate) fn serve(packages: &[(&str, &str)]) -> Self {
        let mut files = BTreeMap::new();
        let mut index = String::new();
        for (name, text) in packages {
            let (control, deb) = package(name, text);
            let sum: String = Sha256::digest(&deb).iter().map(|byte| format!("{byte:02x}")).collect();
            write!(index, "{control}Filename: ./{name}.deb\nSize: {}\nSHA256: {sum}\n\n", deb.len())
                .expect("a String takes everything");
            files.insert(format!("/./{name}.deb"), deb.clone());
            files.insert(format!("/{name}.deb"), deb);
        }
        files.insert("/./Packages".to_owned(), index.clone().into_bytes());
        files.insert("/Packages".to_owned(), index.into_bytes());
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has ports");
        let port = listener.local_addr().expect("it is bound").port();
        let files = Arc::new(files);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let files = Arc::clone(&files);
                // A client that goes away is no fault of the server.
                thread::spawn(move || answer(stream, &files));
            }
        });
        Self { port }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

/// Requests of one connection, until it is closed.
fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(request) = lines.next().transpose()? {
        while lines.next().transpose()?.is_some_and(|header| !header.is_empty()) {}
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (status, body) = match files.get(path) {
            Some(body) => ("200 OK", body.as_slice()),
            None => ("404 Not Found", &b""[..]),
        };
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len())?;
        stream.write_all(body)?;
    }
    Ok(())
}

/// The control file and the package, by dpkg-deb.
fn package(name: &str, text: &str) -> (String, Vec<u8>) {
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let root = dir.path().join(name);
    let put = |path: &Path, mode, content: &str| {
        fs::create_dir_all(path.parent().expect("it is in a folder")).expect("it is writable");
        fs::write(path, content).expect("it is writable");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    let control = format!(
        "Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: says hello\n"
    );
    put(&root.join("DEBIAN/control"), 0o644, &control);
    put(&root.join("usr/bin").join(name), 0o755, &format!("#!/bin/sh\necho '{text}'\n"));
    let deb = dir.path().join("it.deb");
    let mut command = Command::new("dpkg-deb");
    command.args(["--root-owner-group", "-Zgzip", "--build"]).arg(&root).arg(&deb);
    let output = command.output().expect("dpkg-deb is installed where images are built");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (control, fs::read(deb).expect("it was made a moment ago"))
}
