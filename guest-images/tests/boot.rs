//! The image, booted by QEMU's emulator: what init does as PID 1, with a network and a DHCP server on the other side.
//!
//! QEMU's virtio devices sit on PCI, Pontoon's on MMIO; init finds both by modalias. `isa-debug-exit` stands for the exit device: QEMU
//! ends with 2·status+1. Without qemu-system-x86_64, or without an archive to build the image from, each test says so and is skipped.

#[path = "../../tests/src/skip.rs"]
mod skip;
mod boot {
    pub(crate) mod machine;
}

use boot::machine::{Boot, image};
use guest_images::initrd::{Console, Request};

fn command(argv: &[&str]) -> Request {
    let argv = argv.iter().map(|&text| text.to_owned()).collect();
    Request { argv, console: Console::Bytes, ..Request::default() }
}

#[test]
fn command_ends_the_machine_with_its_status() {
    let Some(image) = image() else { return };
    let boot = Boot::run(&image, &command(&["sh", "-c", "echo to stdout; echo to stderr >&2; exit 42"]), &[]);
    assert_eq!(boot.status, Some(42), "{}", boot.output);
    assert!(boot.output.contains("to stdout\nto stderr\n"), "{}", boot.output);
    assert!(!boot.output.contains("pontoon:"), "init has nothing to say: {}", boot.output);
}

#[test]
fn arguments_arrive_as_they_were_given() {
    let Some(image) = image() else { return };
    let nasty = ["", " ", "it's \"quoted\"", "a\nb", "$HOME `id` \\", "ü☃", "--", "\u{1}\u{7f}"];
    let script = "for a in \"$@\"; do printf '<%s>' \"$a\"; done; printf '{%s}' \"$NASTY\"; hostname";
    let mut request = command(&[&["sh", "-c", script, "sh"], &nasty[..]].concat());
    request.env.push(("NASTY".to_owned(), "x=y z\n'".to_owned()));
    request.hostname = Some("vm-7.example".to_owned());
    let boot = Boot::run(&image, &request, &[]);
    let expected: String = nasty.iter().map(|text| format!("<{text}>")).collect();
    assert!(boot.output.contains(&format!("{expected}{{x=y z\n'}}vm-7.example\n")), "{}", boot.output);
    assert_eq!(boot.status, Some(0));
}

#[test]
fn a_command_longer_than_any_kernel_command_line_arrives() {
    let Some(image) = image() else { return };
    let long = "0123456789".repeat(9000);
    let boot = Boot::run(&image, &command(&["sh", "-c", "printf %s \"$1\" | wc -c", "sh", &long]), &[]);
    assert!(boot.output.contains("90000\n"), "{}", boot.output);
}

#[test]
fn what_cannot_run_has_a_shells_status() {
    let Some(image) = image() else { return };
    let boot = Boot::run(&image, &command(&["no-such-program"]), &[]);
    assert_eq!(boot.status, Some(127), "{}", boot.output);
    assert!(boot.output.contains("pontoon: cannot run no-such-program: No such file"), "{}", boot.output);
    let boot = Boot::run(&image, &command(&["/etc/passwd"]), &[]);
    assert_eq!(boot.status, Some(126), "{}", boot.output);
    let boot = Boot::run(&image, &command(&["sh", "-c", "kill -9 $$"]), &[]);
    // 137; QEMU's exit status has room for seven bits of it.
    assert_eq!(boot.status, Some(137 & 0x7F), "{}", boot.output);
}

#[test]
fn nic_is_configured_by_dhcp_before_the_command() {
    let Some(image) = image() else { return };
    let script = "ip -4 -o addr show eth0; ip route; cat /etc/resolv.conf; ip -o link show lo; ping -c1 -W5 10.0.2.2 >&2 && echo pinged";
    let boot = Boot::run(&image, &command(&["sh", "-c", script]), &["-nic", "user,model=virtio-net-pci"]);
    assert!(
        boot.output.contains("pontoon: eth0 10.0.2.15/24 gateway 10.0.2.2 dns 10.0.2.3\n"),
        "{}",
        boot.output
    );
    assert!(boot.output.contains("inet 10.0.2.15/24 brd 10.0.2.255"), "{}", boot.output);
    assert!(boot.output.contains("default via 10.0.2.2 dev eth0"), "{}", boot.output);
    assert!(boot.output.contains("nameserver 10.0.2.3\n"), "{}", boot.output);
    assert!(boot.output.contains("LOOPBACK,UP"), "{}", boot.output);
    assert!(boot.output.contains("pinged"), "{}", boot.output);
}

#[test]
fn each_of_two_nics_gets_a_lease() {
    let Some(image) = image() else { return };
    let nics = [
        "-nic",
        "user,model=virtio-net-pci",
        "-nic",
        "user,model=virtio-net-pci,net=10.9.9.0/24,dhcpstart=10.9.9.9",
    ];
    let boot = Boot::run(&image, &command(&["ip", "route"]), &nics);
    assert!(boot.output.contains("pontoon: eth0 10.0.2.15/24"), "{}", boot.output);
    assert!(boot.output.contains("pontoon: eth1 10.9.9.9/24"), "{}", boot.output);
}

#[test]
fn shell_has_job_control_and_its_status_is_the_machines() {
    let Some(image) = image() else { return };
    let mut boot = Boot::start(&image, &Request::default(), &[]);
    boot.expect("# ");
    // What is typed before cat runs is not echoed: the shell's line editor has the terminal until then.
    boot.send("echo re''ady; cat\n");
    boot.expect("ready\r\n");
    boot.send("still there\n");
    boot.expect("still there\r\nstill there\r\n");
    boot.send("\u{3}"); // ctrl-C ends cat, not the shell
    boot.expect("# ");
    boot.send("echo $?; tty; sleep 1000 & jobs; exit 3\n");
    boot.expect("130\r\n/dev/ttyS0\r\n");
    let boot = boot.finish();
    assert!(boot.output.contains("Running"), "{}", boot.output);
    assert!(!boot.output.contains("job control turned off"), "{}", boot.output);
    assert_eq!(boot.status, Some(3));
}

#[test]
fn orphans_are_reaped() {
    let Some(image) = image() else { return };
    let script = "for i in 1 2 3 4 5; do (true &) ; done; sleep 1; ps -o stat,comm | grep -c '^Z' ; exit 0";
    let boot = Boot::run(&image, &command(&["sh", "-c", script]), &[]);
    assert!(boot.output.contains("0\n"), "{}", boot.output);
}

#[test]
fn disk_is_written_back_before_the_end() {
    let Some(image) = image() else { return };
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(16 << 20).unwrap();
    let drive = format!("file={},format=raw,if=virtio,cache=writethrough", disk.path().display());
    let script =
        "mke2fs /dev/vda >/dev/null 2>&1; mount /dev/vda /mnt; echo kept >/mnt/file; exec sh -c 'exit 5'";
    let boot = Boot::run(&image, &command(&["sh", "-c", script]), &["-drive", &drive]);
    assert_eq!(boot.status, Some(5), "{}", boot.output);
    let script =
        "mount /dev/vda /mnt && cat /mnt/file; echo unclean: $(dmesg | grep -c 'unchecked fs\\|recover')";
    let boot = Boot::run(&image, &command(&["sh", "-c", script]), &["-drive", &drive]);
    assert!(boot.output.contains("kept\nunclean: 0\n"), "{}", boot.output);
}

#[test]
fn without_an_exit_device_the_machine_powers_off() {
    let Some(image) = image() else { return };
    let boot = Boot::without_exit_device(&image, &command(&["sh", "-c", "exit 9"]));
    assert_eq!(boot.status, None, "QEMU ends with 0, which is no exit device's answer: {}", boot.output);
}

#[test]
fn poweroff_in_the_guest_ends_it() {
    let Some(image) = image() else { return };
    let boot = Boot::run(&image, &command(&["sh", "-c", "poweroff; sleep 1000"]), &[]);
    assert_eq!(boot.status, None, "{}", boot.output);
}

#[test]
fn modules_of_the_command_line_are_loaded() {
    let Some(image) = image() else { return };
    let boot = Boot::with_cmdline(
        &image,
        &command(&["sh", "-c", "lsmod"]),
        "pontoon.modules=overlay,no-such-module",
    );
    assert!(boot.output.contains("overlay"), "{}", boot.output);
    assert!(boot.output.contains("pontoon: the image has no module no_such_module\n"), "{}", boot.output);
}

#[test]
fn lease_is_applied_with_all_its_options() {
    let Some(image) = image() else { return };
    let script = r#"
modprobe dummy numdummies=0; ip link add d0 type dummy
lease() { interface=d0 ip=$2 mask=24 mtu=1400 dns="10.5.0.3 10.5.0.4" domain=lan hostname=named router=10.9.9.9 \
    staticroutes="0.0.0.0/0 10.5.0.1 172.16.0.0/12 10.5.0.2 10.6.0.0/16 0.0.0.0 10.7.0.0/16 10.8.0.1" /etc/udhcpc.script $1; }
lease deconfig; lease bound 10.5.0.7
echo [lease: $(cat /run/pontoon/net/d0)]; hostname; cat /etc/resolv.conf; ip route; ip link show d0 | grep -o 'mtu [0-9]*'
ip addr add 10.5.0.99/24 dev d0; lease renew 10.5.0.7; echo same: $(ip -o addr show d0 | grep -c 'inet ')
lease renew 10.5.0.8; echo other: $(ip -o addr show d0 | grep -c 'inet ')
lease deconfig; echo gone: $(ip -o addr show d0 | grep -c 'inet ') $(wc -l </etc/resolv.conf)
"#;
    let boot = Boot::run(&image, &command(&["sh", "-c", script]), &[]);
    for line in [
        "[lease: 10.5.0.7/24 gateway 10.5.0.1 dns 10.5.0.3 10.5.0.4]\nnamed\n",
        "search lan\nnameserver 10.5.0.3\nnameserver 10.5.0.4\n",
        "default via 10.5.0.1 dev d0", // option 121 beats option 3
        "172.16.0.0/12 via 10.5.0.2 dev d0",
        "10.6.0.0/16 dev d0",
        "10.8.0.1 dev d0",
        "10.7.0.0/16 via 10.8.0.1 dev d0", // a gateway outside of the subnet
        "mtu 1400",
        "same: 2\n",
        "other: 1\n",
        "gone: 0 0\n",
    ] {
        assert!(boot.output.contains(line), "{line:?} in {}", boot.output);
    }
    assert!(!boot.output.contains("10.9.9.9"), "{}", boot.output);
}

#[test]
fn nic_without_a_dhcp_server_delays_the_boot_but_does_not_stop_it() {
    let Some(image) = image() else { return };
    // A hub with nobody else on it.
    let nic = ["-nic", "hubport,hubid=0,model=virtio-net-pci"];
    let boot =
        Boot::run(&image, &command(&["sh", "-c", "pidof udhcpc >/dev/null && echo it keeps trying"]), &nic);
    assert!(
        boot.output.contains("pontoon: eth0 has no address: no DHCP server has answered yet"),
        "{}",
        boot.output
    );
    assert!(boot.output.contains("it keeps trying\n"), "{}", boot.output);
}
