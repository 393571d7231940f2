//! Debian as people know it, from `pontoon image build debian --rootfs`: systemd, its own initrd, ssh and apt, on a disk, in the lab.
//!
//! One image with both kernels of Debian 12 is built, once per cache, and booted twice: as the README's recipe does, and as any
//! distribution's disk is, with the kernel that was taken out of it. What that costs is in docs/images.md. `PONTOON_ROOTFS=0` leaves these tests out;
//! `PONTOON_ROOTFS=all` adds an image of Debian 13 and the real archive.

mod rootfs {
    pub(crate) mod built;
    pub(crate) mod machine;
    pub(crate) mod repository;
}

use std::fs;

use pontoon_tests::{Pontoon, skip};
use rootfs::built::{Built, everything};
use rootfs::machine::{Machine, free_port};
use rootfs::repository::Repository;

/// Debian 12 with its own kernel, 6.1, and that of its backports, 6.12.
const BOOKWORM: [&str; 4] = ["--suite", "bookworm", "--kernel", "both"];
const TRIXIE: [&str; 2] = ["--suite", "trixie"];
const NAME: &str = "debian-rootfs";

/// What every machine of ours must be, once it is up: a shell script for the guest, and what it prints.
const CHECK: &str = "systemctl is-system-running --wait; systemctl --failed --no-legend --plain; uname -r; \
    ip -4 -o addr show dev eth0; ip route; resolvectl dns eth0; hostname; cat /etc/machine-id | wc -c; ls /etc/ssh/ssh_host_*; \
    findmnt -nro SOURCE,FSTYPE,OPTIONS /; dpkg --audit; dpkg -l | grep -c '^ii'";

/// The README's line that begins so, without its remark.
fn readme(begins: &str) -> String {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("it is there");
    let mut lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim_end());
    lines.find(|line| line.starts_with(begins)).expect("the README has a recipe for it").to_owned()
}

fn assert_is_well(said: &str, kernel: &str) {
    let mut lines = said.lines();
    // `running` and not `degraded`: no unit has failed.
    assert_eq!(lines.next(), Some("running"), "{said}");
    let release = lines.next().unwrap_or_default();
    assert!(release.starts_with(kernel), "{release} and not {kernel}\n{said}");
    let facts = [
        "inet 192.168.122.",
        "default via 192.168.122.1",
        "(eth0): 192.168.122.1",
        "\nguest1\n",
        // Made at the first boot: 32 digits and a newline.
        "\n33\n",
        "ssh_host_ed25519_key",
        " ext4 rw",
    ];
    for fact in facts {
        assert!(said.contains(fact), "'{fact}' is missing\n{said}");
    }
    let packages: u32 = lines.last().and_then(|line| line.parse().ok()).expect("dpkg counts packages");
    assert!(packages > 100, "{said}");
}

/// Boots an image by its name, as a user does; looks at it by ssh over a published port; installs a package; powers it off.
fn boot_by_name(built: &Built, kernel: &str, archive: bool) {
    let image = built.image();
    let disk = image.disk.clone().expect("it has one");
    let before = fs::metadata(&disk).and_then(|meta| meta.modified()).expect("it is there");
    let port = free_port();
    // As the README has it, with a port and a name of ours.
    let typed =
        readme("pontoon run debian-rootfs ").replace("2222", &port.to_string()).replace(NAME, &built.name);
    let mut pontoon = built.pontoon(typed.split(' ').skip(1));
    pontoon.command().args(["--accel", "lab", "--name", "guest1", "--timeout", "900"]);
    let mut machine = Machine::start(pontoon, port, &built.key);
    machine.wait_for_ssh();
    assert_is_well(&machine.answer(CHECK), kernel);
    // Through the machine's NAT to a server on the host's loopback, which the emulator has at 10.0.2.2.
    let repository = Repository::serve(&[("hello-pontoon", "Hello from a package!")]);
    let said = machine.answer(&format!(
        "echo 'deb [trusted=yes] http://10.0.2.2:{}/ ./' >/root/our.list; \
         set -e; export DEBIAN_FRONTEND=noninteractive; \
         get() {{ apt-get -q -y -o Dir::Etc::sourcelist=/root/our.list -o Dir::Etc::sourceparts=- \"$@\"; }}; \
         get update; get install hello-pontoon; hello-pontoon",
        repository.port()
    ));
    assert!(said.ends_with("Hello from a package!"), "{said}");
    if archive {
        let said = machine
            .answer("apt-get -q update && apt-get install -y -q --no-install-recommends hello && hello");
        assert!(said.contains("Hello, world!"), "{said}");
    }
    // Power-off ends the command.
    machine.ssh("systemctl poweroff");
    let status = machine.wait_for_end();
    assert_eq!(status, Some(0), "it ended with {status:?}\n{}", machine.said());
    let after = fs::metadata(&disk).and_then(|meta| meta.modified()).expect("it is there");
    assert_eq!(after, before, "a machine wrote to its image");
    image.verify().expect("it is as it was built");
}

/// Apart from the boots, so that it can be had while other tests use the other core (.config/nextest.toml).
#[test]
fn an_image_of_debian_12_is_built_with_both_kernels_and_found_again() {
    let Some(built) = Built::get(NAME, &BOOKWORM) else { return };
    let image = built.image();
    assert!(image.manifest.cmdline.starts_with("root=UUID="), "{:?}", image.manifest.cmdline);
    let kernels: Vec<_> =
        image.manifest.packages.iter().filter(|package| package.name.starts_with("linux-image-6.")).collect();
    assert_eq!(kernels.len(), 2, "{kernels:?}");
    assert!(image.manifest.packages.iter().all(|package| package.sha256.len() == 64), "{:?}", image.manifest);
    // What docs/images.md and the manifest call the root.
    let stats = built.debugfs("stats -h");
    let uuid = image.manifest.cmdline.split(['=', ' ']).nth(2).unwrap_or_default();
    assert!(stats.contains("volume name:   debian\n") && stats.contains(uuid), "{uuid}\n{stats}");
    let listing = built.debugfs("ls -p /boot");
    for begins in ["vmlinuz-6.1.", "vmlinuz-6.12.", "initrd.img-6.1.", "initrd.img-6.12."] {
        assert!(listing.contains(&format!("/{begins}")), "{begins}\n{listing}");
    }
    // The build's own traces are not in it.
    let traces = built.debugfs("ls -p /etc/dpkg/dpkg.cfg.d") + &built.debugfs("ls -p /etc/apt/apt.conf.d");
    assert!(!traces.contains("mmdebstrap"), "{traces}");
    let again = built.pontoon(["image", "ls"]).output();
    let row = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(row.contains("debian-rootfs") && row.contains("6.12.") && row.contains("2048 MiB"), "{row}");
}

#[test]
fn the_image_boots_by_its_name_with_ssh_and_apt_and_stays_as_it_was() {
    let Some(built) = Built::get(NAME, &BOOKWORM) else { return };
    boot_by_name(&built, "6.12.", everything());
}

#[test]
fn a_partitioned_disk_boots_with_the_kernel_in_it_and_nc_leads_ssh_there() {
    let Some(built) = Built::get(NAME, &BOOKWORM) else { return };
    let dir = tempfile::tempdir().expect("the temporary directory is writable");
    // As docs/images.md tells of any distribution's disk image. Debian 12's own kernel, since the other test boots the other.
    let disk = built.in_a_partition(dir.path().join("debian.img"));
    let kernel = disk.take_out("vmlinuz-6.1.", dir.path().join("vmlinuz"));
    let initrd = disk.take_out("initrd.img-6.1.", dir.path().join("initrd"));
    // On the emulated host everything is as on one that virtualizes: a machine in the background, and commands that find it.
    let script = r#"
        set -e
        chmod 600 key
        pontoon run --kernel vmlinuz --initrd initrd --disk /dev/vdb,overlay --accel kvm --name guest1 --timeout 900 \
            --cmdline 'root=/dev/vda1 ro systemd.hostname=guest1' --detach >/dev/null
        enter() {
            ssh -o ProxyCommand='pontoon nc %h %p' -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no \
                -o LogLevel=ERROR -o BatchMode=yes -o ConnectTimeout=120 -i key root@"$1" "$2"
        }
        trap 'pontoon logs guest1 >&2; pontoon ps -a >&2' EXIT
        # The agent is there before sshd is.
        pontoon exec --wait 600 guest1 -- systemctl is-system-running --wait
        enter guest1 "$CHECK"
        address=$(pontoon ps --json | sed 's/.*"address":"\([0-9.]*\)".*/\1/')
        enter "$address" 'echo by its address: $(hostname)'
        enter guest1 'findmnt -nbro SIZE /'
        head -c 300000 /dev/urandom >big
        test "$(enter guest1 'cat >/root/big; sha256sum </root/big' <big)" = "$(sha256sum <big)"
        enter guest1 'exit 42' || echo "status $?"
        pontoon stop --time 300 guest1
        pontoon ps -a
        trap - EXIT
    "#;
    let mut words = vec!["lab".to_owned(), "--timeout".to_owned(), "930".to_owned()];
    words.extend(["--package".to_owned(), "openssh-client".to_owned()]);
    for (from, to) in [(&kernel, "vmlinuz"), (&initrd, "initrd"), (&built.key, "key")] {
        words.extend(["--put".to_owned(), format!("{}:/lab/{to}", from.display())]);
    }
    words.extend(["--disk".to_owned(), format!("{},ro", disk.path.display())]);
    words.extend(["--", "env"].map(str::to_owned));
    words.extend([format!("CHECK={CHECK}"), "sh".to_owned(), "-c".to_owned(), script.to_owned()]);
    let output = built.pontoon(words).output();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}\n{errors}");
    let (state, rest) = said.split_once('\n').expect("exec prints a line");
    assert_eq!(state, "running", "{said}\n{errors}");
    let (checked, rest) = rest.split_once("by its address: guest1\n").expect("the second way in");
    assert_is_well(checked.trim_end(), "6.1.");
    // It has grown to its partition.
    let (size, rest) = rest.split_once('\n').expect("a size");
    assert!(size.parse::<u64>().is_ok_and(|size| size > 5 << 29), "{size}");
    assert!(rest.starts_with("status 42\n"), "{rest}");
    assert!(rest.contains("stopped (0): the guest powered off, as it was asked to"), "{rest}\n{errors}");
}

#[test]
fn debian_13_boots_to_running_as_debian_12_does() {
    if !everything() {
        return skip("PONTOON_ROOTFS=all is not set: Debian 13 would be built and booted, too");
    }
    let Some(built) = Built::get("trixie-rootfs", &TRIXIE) else { return };
    boot_by_name(&built, "6.12.", true);
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
