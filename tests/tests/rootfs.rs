//! Debian as people know it, from `pontoon image build debian --rootfs`: systemd, its own initrd, ssh and apt, on a disk, in the lab.
//!
//! Building takes one to three minutes and happens once per kernel: the images stay in a store of the tests' own below the cache. A boot takes
//! about a minute on an idle host with two cores, since all of systemd runs under emulation twice.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest_images::deb::{self, Suite};
use guest_images::{KernelSource, RootfsOptions, Silent, Store, rootfs, store};
use pontoon_tests::{Pontoon, have_lab, skip};

/// From power-on to a shell by ssh, on a host that has other work too.
const BOOT: Duration = Duration::from_secs(600);

/// A built image with the key that opens it.
struct Built {
    store: Store,
    name: &'static str,
    key: PathBuf,
}

/// The image `name` with this kernel, or nothing where this host can't build it.
fn image(name: &'static str, kernel: KernelSource) -> Option<Built> {
    if std::env::var_os("PONTOON_ROOTFS").is_none() {
        skip("PONTOON_ROOTFS=1 is not set: whole Debians are built from the archive, and boot for minutes");
        return None;
    }
    if !have_lab() {
        return None;
    }
    let cache = guest_images::cache_dir().expect("HOME is set").join("tests-rootfs");
    let key = cache.join("id_ed25519");
    fs::create_dir_all(&cache).expect("the cache is writable");
    // Both tests want the pair at once: one makes it, the other waits.
    let lock = fs::File::create(cache.join("lock")).expect("the cache is writable");
    lock.lock().expect("the cache has locks");
    if !key.exists() {
        let made =
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
        if !made.is_ok_and(|status| status.success()) {
            skip("ssh-keygen is not installed (apt-get install openssh-client)");
            return None;
        }
    }
    drop(lock);
    let store = Store::open(&cache);
    let options = RootfsOptions {
        suite: Some(Suite::Bookworm),
        kernel,
        ssh_keys: vec![key.with_extension("pub")],
        ..RootfsOptions::default()
    };
    match store.build_rootfs(name, &options, &mut Silent) {
        Ok(_) => Some(Built { store, name, key }),
        Err(store::Error::Rootfs(
            error @ (rootfs::Error::Missing { .. } | rootfs::Error::NoNamespace { .. }),
        )) => {
            skip(error);
            None
        }
        Err(store::Error::Deb(error @ deb::Error::Unreachable { .. })) => {
            skip(error);
            None
        }
        // Whoever has no network has no image either; everything else is a fault of ours.
        Err(error)
            if ["resolv", "connect", "unreachable"].iter().any(|word| error.to_string().contains(word)) =>
        {
            skip(error);
            None
        }
        Err(error) => unreachable!("the image is not built: {error}"),
    }
}

/// A machine under way; killed when dropped.
struct Machine {
    child: Child,
    console: PathBuf,
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
    fn start(mut pontoon: Pontoon, port: u16, key: &Path, console: PathBuf) -> Self {
        let output = fs::File::create(&console).expect("the temporary directory is writable");
        let errors = output.try_clone().expect("a file can be shared");
        let child = pontoon.command().stdout(output).stderr(errors).spawn().expect("pontoon starts");
        Self { child, console, port, key: key.to_owned() }
    }

    fn said(&self) -> String {
        fs::read(&self.console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn ssh(&self, command: &str) -> Output {
        Command::new("ssh")
            .args([
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "LogLevel=ERROR",
            ])
            .args(["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=60"])
            .args(["-o", "ServerAliveInterval=30", "-F", "none", "-i"])
            .arg(&self.key)
            .args(["-p", &self.port.to_string(), "root@127.0.0.1", command])
            .stdin(Stdio::null())
            .output()
            .expect("ssh starts")
    }

    /// What the command prints, in a guest that is up.
    fn answer(&self, command: &str) -> String {
        let output = self.ssh(command);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command}: {}\n{out}\n{err}\n{}", output.status, self.said());
        out.trim().to_owned()
    }

    /// Until ssh lets us in.
    fn wait_for_ssh(&mut self) {
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
    fn wait_for_end(&mut self) -> Option<i32> {
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
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|socket| socket.local_addr())
        .expect("loopback has ports")
        .port()
}

/// What every image of ours must be, once it is up.
fn check(machine: &mut Machine, kernel: &str) {
    machine.wait_for_ssh();
    // `running` and not `degraded`: no unit has failed.
    let state = machine.ssh("systemctl is-system-running --wait; systemctl --failed --no-legend --plain");
    assert_eq!(String::from_utf8_lossy(&state.stdout).trim(), "running", "{}", machine.said());
    let release = machine.answer("uname -r");
    assert!(release.starts_with(kernel), "{release}");
    let lease = machine.answer("ip -4 -o addr show dev eth0; ip route; resolvectl dns eth0; hostname");
    for fact in ["inet 192.168.122.", "default via 192.168.122.1", "(eth0): 192.168.122.1", "guest1"] {
        assert!(lease.contains(fact), "'{fact}' is missing\n{lease}");
    }
    // Made at the first boot, and the journal is on the disk.
    let own = machine.answer("cat /etc/machine-id; ls /etc/ssh/ssh_host_*; findmnt -nro SOURCE,FSTYPE,OPTIONS /; dpkg -l | grep -c ^ii");
    assert!(own.contains("ssh_host_ed25519_key") && own.contains("/dev/vda ext4 rw"), "{own}");
    assert_eq!(own.lines().next().map(str::len), Some(32), "{own}");
}

#[test]
fn debian_12_boots_to_running_with_ssh_and_its_disk_stays_as_it_was() {
    let Some(built) = image("debian-rootfs", KernelSource::Suite) else { return };
    let image = built.store.get(built.name).expect("it was built a moment ago");
    let disk = image.disk.clone().expect("it has one");
    let before = fs::metadata(&disk).and_then(|meta| meta.modified()).expect("it is there");
    // As a user has it: the image by its name, in the user's store.
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let home = dir.path().join("pontoon");
    fs::create_dir(&home).expect("it is writable");
    let usual = |name| guest_images::cache_dir().expect("HOME is set").join(name);
    for (name, target) in [("images", built.store.images_dir()), ("lab", usual("lab")), ("apt", usual("apt"))]
    {
        fs::create_dir_all(&target).expect("the cache is writable");
        std::os::unix::fs::symlink(target, home.join(name)).expect("it is writable");
    }
    let port = free_port();
    let publish = format!("{port}:22");
    let words =
        ["run", built.name, "--accel", "lab", "--name", "guest1", "--timeout", "1000", "-p", &publish];
    let mut pontoon = Pontoon::new(words);
    pontoon.command().env("XDG_CACHE_HOME", dir.path());
    let mut machine = Machine::start(pontoon, port, &built.key, dir.path().join("console"));
    check(&mut machine, "6.1.");
    // The package manager works; an archive, if this host reaches one, through the NAT.
    let update =
        machine.ssh("apt-get -q update && apt-get install -y -q --no-install-recommends hello && hello");
    let said = String::from_utf8_lossy(&update.stdout).into_owned();
    if update.status.success() {
        assert!(said.contains("Hello, world!"), "{said}");
    } else {
        skip(format_args!("apt-get in the guest: {}", said.lines().last().unwrap_or("no answer")));
    }
    // Power-off ends the command.
    machine.ssh("systemctl poweroff");
    assert_eq!(machine.wait_for_end(), Some(0), "{}", machine.said());
    let after = fs::metadata(&disk).and_then(|meta| meta.modified()).expect("it is there");
    assert_eq!(after, before, "a machine wrote to its image");
    image.verify().expect("it is as it was built");
}

#[test]
fn the_kernel_of_backports_boots_the_same_system_on_an_overlay_of_a_block_device() {
    let Some(built) = image("backports", KernelSource::Backports) else { return };
    let image = built.store.get(built.name).expect("it was built a moment ago");
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    let port = free_port();
    // The same by hand: two port forwards in a row, a disk of the lab, an overlay of ours on it.
    let script = format!(
        "pontoon run --kernel vmlinuz --initrd initrd --disk /dev/vdb,overlay --accel kvm --name guest1 --timeout 1000 \
         -p 0.0.0.0:{port}:22 --cmdline '{} systemd.hostname=guest1'",
        image.manifest.cmdline
    );
    let put = |path: &Path| {
        format!("{}:/lab/{}", path.display(), path.file_name().expect("it has a name").display())
    };
    let forward = format!("127.0.0.1:{port}:{port}");
    let disk = format!("{},ro", image.disk.as_ref().expect("it has one").display());
    let words = [
        "lab",
        "--timeout",
        "1030",
        "--put",
        &put(&image.kernel),
        "--put",
        &put(&image.initrd),
        "--disk",
        &disk,
        "-p",
        &forward,
        "--",
        "sh",
        "-c",
        &script,
    ];
    let mut machine = Machine::start(Pontoon::new(words), port, &built.key, dir.path().join("console"));
    check(&mut machine, "6.12.");
    machine.ssh("systemctl poweroff");
    assert_eq!(machine.wait_for_end(), Some(0), "{}", machine.said());
}

#[test]
fn flags_of_a_disk_are_refused_where_there_is_none() {
    for words in [
        &["image", "build", "debian", "--size", "4G"][..],
        &["image", "build", "debian", "--rootfs", "--size", "1M"],
        &["image", "build", "ubuntu", "--rootfs"],
        &["image", "build", "debian", "--rootfs", "--ssh-key", "/dev/null"],
        &["image", "build", "debian", "--rootfs", "--name", "a/b"],
        &["image", "build", "debian", "--rootfs", "--package", "a,b"],
        &["image", "build", "debian", "--rootfs", "--suite", "sid"],
    ] {
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        let mut pontoon = Pontoon::new(words);
        pontoon.command().env("XDG_CACHE_HOME", dir.path());
        let output = pontoon.output();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words:?}\n{said}");
        let lines = said.lines().count();
        assert_eq!(lines, 1, "{said}");
    }
}
