//! The lab, from outside: what a command in it gets and what comes back.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm::lab::{Config, Disk, DiskAccess, Forward, Lab, LabError, Output, Run, UNPRIVILEGED, default_cache};

/// Far beyond what any of these commands takes, also on a loaded host.
const BOUND: Duration = Duration::from_secs(100);

/// The usual outer machine, or nothing where there is no emulator.
fn lab() -> Option<Lab> {
    let config = Config::new(default_cache().expect("HOME is set"));
    match Lab::prepare(&config, &mut guest_images::Silent) {
        Err(LabError::QemuMissing) => {
            pontoon_tests::skip(LabError::QemuMissing);
            None
        }
        lab => Some(lab.expect("the outer machine")),
    }
}

fn run<A: Into<OsString>>(argv: impl IntoIterator<Item = A>) -> Run {
    Run { timeout: Some(BOUND), ..Run::new(argv) }
}

fn shell(script: &str) -> Run {
    run(["sh", "-c", script])
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn the_exit_status_is_exact() {
    let Some(mut lab) = lab() else { return };
    for (script, code) in [("exit 0", 0), ("exit 1", 1), ("exit 255", 255), ("kill -9 $$", 137)] {
        assert_eq!(lab.output(&shell(script)).unwrap().status.code, code, "{script}");
    }
    assert_eq!(lab.output(&run(["/no/such/program"])).unwrap().status.code, 127);
}

#[test]
fn arguments_of_any_bytes_arrive_unchanged() {
    let Some(mut lab) = lab() else { return };
    let nasty = OsString::from_vec((1..=255).chain(*b"\n$(reboot) `x` '\"\\ ").collect());
    let argv = ["printf".into(), "%s|".into(), nasty.clone(), OsString::new(), "last".into()];
    let output = lab.output(&run(argv)).unwrap();
    let expected = [nasty.into_vec(), b"||last|".to_vec()].concat();
    assert_eq!(output.stdout, expected);
}

#[test]
fn streams_are_kept_apart() {
    let Some(mut lab) = lab() else { return };
    let output = lab.output(&shell("echo out; echo err >&2")).unwrap();
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
}

#[test]
fn files_go_in_and_out_unchanged() {
    let Some(mut lab) = lab() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    // 5 MB without a period that any block size divides.
    let content: Vec<u8> = (0..5_000_003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(tree.join("sub/data"), &content).unwrap();
    fs::set_permissions(tree.join("sub/data"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("sub/data", tree.join("link")).unwrap();
    let mut run = shell("cmp /lab/tree/link /lab/tree/sub/data && cp -a /lab/tree /lab/back");
    run.put.push((tree, "/lab/tree".into()));
    run.get.push(("/lab/back".into(), dir.path().join("back")));
    let output = lab.output(&run).unwrap();
    assert_eq!(output.status.code, 0, "{}", String::from_utf8_lossy(&output.stderr));
    let back = dir.path().join("back");
    assert!(fs::read(back.join("sub/data")).unwrap() == content, "the content differs");
    assert_eq!(fs::metadata(back.join("sub/data")).unwrap().permissions().mode() & 0o777, 0o750);
    assert_eq!(fs::read_link(back.join("link")).unwrap(), PathBuf::from("sub/data"));
}

/// Without it, Linux patches its scheduler whenever a first machine comes or a last one goes, and an emulator that translates what is being
/// patched stands still, once in a hundred machines (docs/lab.md, "Limits of the emulator").
#[test]
fn a_virtual_machine_that_never_runs_keeps_kvm_in_use() {
    let Some(mut lab) = lab() else { return };
    let output = lab.output(&run(["ls", "-l", "/proc/1/fd"])).unwrap();
    let open = text(&output);
    for held in ["anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0"] {
        assert!(open.lines().any(|file| file.ends_with(held)), "init does not hold {held}:\n{open}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let Some(mut lab) = lab() else { return };
    let mut run = shell("true");
    run.get.push(("/lab/nothing-here".into(), "/nonexistent/x".into()));
    let error = lab.output(&run).unwrap_err().to_string();
    assert!(error.contains("/lab/nothing-here"), "{error}");
}

#[test]
fn a_time_out_is_named() {
    let Some(mut lab) = lab() else { return };
    let run = Run { timeout: Some(Duration::from_secs(1)), ..Run::new(["sleep", "1000"]) };
    assert!(matches!(lab.output(&run), Err(LabError::TimedOut { .. })));
}

#[test]
fn kvm_is_there_with_nested_paging() {
    let Some(mut lab) = lab() else { return };
    let output = lab.output(&shell("test -c /dev/kvm && cat /sys/module/kvm_amd/parameters/npt")).unwrap();
    assert_eq!(text(&output), "Y");
}

#[test]
fn an_ordinary_user_opens_kvm_and_nothing_else() {
    let Some(mut lab) = lab() else { return };
    let script = "id -u; : <>/dev/kvm && echo kvm; cat /dev/vda >/dev/null 2>&1 || echo closed";
    let output = lab.output(&Run { uid: UNPRIVILEGED, ..shell(script) }).unwrap();
    assert_eq!(text(&output), "1000\nkvm\nclosed");
}

#[test]
fn disks_are_read_written_apart_or_written_through() {
    let Some(mut lab) = lab() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = |name: &str, access| {
        let path = dir.path().join(name);
        let mut content = vec![0; 1 << 20];
        content[..name.len()].copy_from_slice(name.as_bytes());
        fs::write(&path, content).unwrap();
        Disk { path, access }
    };
    // Some names of files mean something to the emulator.
    let disks = vec![
        disk("pri,vate", DiskAccess::Private),
        disk("read only", DiskAccess::ReadOnly),
        disk("written", DiskAccess::ReadWrite),
    ];
    let script = "for disk in b c d; do head -c 5 /dev/vd$disk; echo; done
        echo 12345 >/dev/vdb; head -c 5 /dev/vdb; echo
        (echo 12345 >/dev/vdc) 2>/dev/null || echo no
        echo 12345 >/dev/vdd";
    for uid in [0, UNPRIVILEGED] {
        let run = Run { uid, disks: disks.clone(), ..shell(script) };
        let output = lab.output(&run).unwrap();
        let written = if uid == 0 { "writt" } else { "12345" };
        assert_eq!(text(&output), format!("pri,v\nread \n{written}\n12345\nno"), "uid {uid}");
    }
    let begins = |disk: &Disk| String::from_utf8_lossy(&fs::read(&disk.path).unwrap()[..6]).into_owned();
    assert_eq!(disks.iter().map(begins).collect::<Vec<_>>(), ["pri,va", "read o", "12345\n"]);
}

#[test]
fn a_disk_that_cannot_be_is_named_and_does_not_cost_the_snapshot() {
    let Some(mut lab) = lab() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd");
    fs::write(&path, [0; 513]).unwrap();
    let with = |disks| Run { disks, ..shell("true") };
    let odd = Disk { path: path.clone(), access: DiskAccess::Private };
    let error = lab.output(&with(vec![odd.clone()])).unwrap_err().to_string();
    assert!(error.contains("513 bytes"), "{error}");
    assert!(matches!(lab.output(&with(vec![odd; 5])), Err(LabError::Config(_))));
    let none = Disk { path: "/nonexistent".into(), access: DiskAccess::ReadOnly };
    assert!(matches!(lab.output(&with(vec![none])), Err(LabError::Io { .. })));
    assert_eq!(lab.output(&shell("exit 5")).unwrap().status.code, 5);
}

#[test]
fn runs_share_nothing() {
    let Some(mut lab) = lab() else { return };
    lab.output(&shell("echo x > /etc/left-behind")).unwrap();
    assert_eq!(lab.output(&shell("test -e /etc/left-behind")).unwrap().status.code, 1);
}

#[test]
fn concurrent_runs_do_not_disturb_each_other() {
    let Some(_) = lab() else { return };
    let one = |number: usize| {
        move || {
            let script = format!("echo {number} > /lab/me; for i in 1 2 3; do cat /lab/me; done");
            text(&lab().unwrap().output(&shell(&script)).unwrap())
        }
    };
    let threads: Vec<_> = (0..3).map(|number| std::thread::spawn(one(number))).collect();
    for (number, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().unwrap(), format!("{number}\n{number}\n{number}"));
    }
}

#[test]
fn standard_input_passes_whole() {
    let Some(mut lab) = lab() else { return };
    // Several times the window, so that confirmations matter.
    let content: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let sent = content.clone();
    let sender = std::thread::spawn(move || writer.write_all(&sent));
    let output = lab.output_of(&shell("cat; exit 9"), &reader.into()).unwrap();
    sender.join().unwrap().unwrap();
    assert_eq!(output.status.code, 9);
    assert!(output.stdout == content, "{} bytes came back of {}", output.stdout.len(), content.len());
}

#[test]
fn a_taken_port_is_named_and_does_not_cost_the_snapshot() {
    let Some(mut lab) = lab() else { return };
    let holder = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let host = holder.local_addr().unwrap().port();
    let forward = Forward { udp: false, address: Ipv4Addr::LOCALHOST, host, lab: 80 };
    let run = Run { publish: vec![forward], ..shell("true") };
    assert!(matches!(lab.output(&run), Err(LabError::Publish { .. })));
}

#[test]
fn a_published_port_leads_into_the_lab() {
    let Some(mut lab) = lab() else { return };
    // A port that was free a moment ago: the emulator has to bind it itself.
    let host = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let forward = Forward { udp: false, address: Ipv4Addr::LOCALHOST, host, lab: 80 };
    let run = Run { publish: vec![forward], ..shell("nc -l -p 80 < /etc/hostname | head -n 1") };
    let client = std::thread::spawn(move || {
        let end = Instant::now() + BOUND;
        // The emulator accepts for a server that may not listen yet: an empty answer is tried again.
        while Instant::now() < end {
            let Ok(mut stream) = TcpStream::connect(("127.0.0.1", host)) else { continue };
            let mut answer = String::new();
            let asked = stream.write_all(b"ping\n");
            if asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && !answer.is_empty() {
                return answer;
            }
        }
        String::new()
    });
    let output = lab.output(&run).unwrap();
    assert_eq!((text(&output).as_str(), client.join().unwrap().as_str()), ("ping", "lab\n"));
}

#[test]
fn a_damaged_snapshot_is_made_anew() {
    if lab().is_none() {
        return;
    }
    // A cache of its own that shares the downloads.
    let usual = default_cache().expect("HOME is set");
    let cache = tempfile::tempdir().unwrap();
    symlink(usual.join("apt"), cache.path().join("apt")).unwrap();
    let config = Config { memory_mib: 512, cpus: 1, ..Config::new(cache.path()) };
    let damages: [fn(&Path); 3] = [
        |entry| fs::write(entry.join("state"), "cut").unwrap(),
        // With a digest that fits: only the emulator can find out.
        |entry| {
            fs::write(entry.join("state"), [0; 16]).unwrap();
            let digest = "374708fff7719dd5979ec875d56cd2286f6d3cf7ec317a3b25632aab28ec37bb";
            fs::write(entry.join("digest"), digest).unwrap();
        },
        |entry| fs::remove_file(entry.join("memory")).unwrap(),
    ];
    for damage in damages {
        let mut lab = Lab::prepare(&config, &mut guest_images::Silent).unwrap();
        assert_eq!(text(&lab.output(&shell("echo well")).unwrap()), "well");
        drop(lab);
        let entries = fs::read_dir(cache.path().join("lab")).unwrap().map(|entry| entry.unwrap().path());
        let mut machines = entries.filter(|path| path.join("state").exists());
        damage(&machines.next().expect("one machine"));
    }
    let mut lab = Lab::prepare(&config, &mut guest_images::Silent).unwrap();
    assert_eq!(text(&lab.output(&shell("echo well")).unwrap()), "well");
}
