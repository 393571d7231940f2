//! Many machines from the shell: `--detach`, `ps`, `logs`, `console`, `stop`, `kill` with the probe on this host's KVM.
//!
//! Each test has a runtime folder of its own, so tests don't see each other's machines.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use pontoon_tests::host::{Host, STAY, Terminal, free_port, pid, until};
use pontoon_tests::{have_kvm, text};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

#[test]
fn a_detached_machine_is_listed_logged_and_killed() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let publish = format!("{}:80", free_port());
    let name = host.detach(&["--name", "web", "-p", &publish], STAY);
    assert_eq!(name, "web");
    let list = host.ps(&[]);
    assert_eq!(list.len(), 1);
    let web = &list[0];
    assert_eq!(
        (&web["name"], &web["state"], &web["image"]),
        (&"web".into(), &"running".into(), &"probe".into())
    );
    assert_eq!((&web["memory"], &web["net"]), (&(64 << 20).into(), &"nat".into()));
    assert!(web["mac"].as_str().is_some_and(|mac| mac.starts_with("52:54:00:")));
    assert_eq!(web["published"][0], format!("127.0.0.1:{publish}"));
    let table = host.ok(&["ps"]);
    assert!(table.starts_with("NAME") && table.contains("web") && table.contains("64M"), "{table}");
    until("the probe says that it has booted", || {
        host.ok(&["logs", "web"]).contains("\"boot\"").then_some(())
    });
    // It has a session of its own, and nothing of this process's.
    let stat = fs::read_to_string(format!("/proc/{}/stat", web["pid"])).expect("the process lives");
    let fields: Vec<_> = stat.rsplit(')').next().expect("after the name").split_whitespace().collect();
    assert_eq!(fields[3], web["pid"].to_string(), "the session's leader is the machine");
    assert_eq!(
        fs::read_link(format!("/proc/{}/fd/0", web["pid"])).expect("it has an input"),
        PathBuf::from("/dev/null")
    );
    assert_eq!(host.ok(&["kill", "web"]), "web\n");
    assert!(host.ps(&[]).is_empty());
    let ended = &host.ps(&["-a"])[0];
    assert_eq!((&ended["state"], &ended["exit"]["status"]), (&"ended".into(), &143.into()));
    assert!(host.ok(&["logs", "web"]).contains("\"boot\""), "the log of a machine that ended is kept");
    let again = host.run(&["kill", "web"]);
    assert_eq!(again.status.code(), Some(2), "{}", text(&again));
}

#[test]
fn a_guest_that_ends_by_itself_leaves_its_status_and_its_log() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "job"], "probe.do=end=7");
    let job = until("the job ends", || host.ps(&["-a"]).into_iter().find(|m| m["state"] == "ended"));
    assert_eq!(job["exit"]["status"], 7);
    assert!(host.ok(&["ps", "--all"]).contains("ended (7)"));
}

#[test]
fn two_machines_of_one_name_are_one_machine_and_one_error() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let start = || {
        let args = ["run", "probe", "--accel", "kvm", "--memory", "64M", "--name", "x", "--timeout", "120"];
        let mut pontoon = host.pontoon(&[&args[..], &["--detach", "--cmdline", STAY]].concat());
        pontoon.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pontoon starts")
    };
    let both = [start(), start(), start()].map(|child| child.wait_with_output().expect("pontoon ends"));
    let (won, lost): (Vec<_>, Vec<_>) = both.iter().partition(|output| output.status.success());
    assert_eq!((won.len(), lost.len()), (1, 2), "{}", both.each_ref().map(text).join("\n"));
    let pid = host.ps(&[])[0]["pid"].to_string();
    for output in lost {
        assert_eq!(output.status.code(), Some(2), "{}", text(output));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("called x is running") && error.contains(&pid), "{error}");
    }
}

#[test]
fn machines_without_a_name_are_numbered_and_have_their_own_addresses() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    assert_eq!(host.detach(&[], STAY), "vm1");
    assert_eq!(host.detach(&[], STAY), "vm2");
    let list = host.ps(&[]);
    assert_ne!(list[0]["mac"], list[1]["mac"]);
    host.ok(&["kill", "vm1"]);
    assert_eq!(host.detach(&[], STAY), "vm1");
    assert_eq!(host.ok(&["kill", "vm1", "vm2"]), "vm1\nvm2\n");
}

#[test]
fn a_machine_that_was_killed_by_force_is_seen_as_such_and_its_name_is_free() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], STAY);
    let machine = &host.ps(&[])[0];
    kill_process(pid(machine), Signal::KILL).expect("it is ours");
    let ended = until("the machine is dead", || host.ps(&["-a"]).into_iter().find(|m| m["state"] == "ended"));
    assert_eq!(ended["exit"]["status"], 137);
    assert!(ended["exit"]["reason"].as_str().is_some_and(|reason| reason.contains("killed")));
    assert_eq!(host.detach(&["--name", "a"], STAY), "a");
}

#[test]
fn a_machine_that_hangs_is_listed_and_killed() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], STAY);
    kill_process(pid(&host.ps(&[])[0]), Signal::STOP).expect("it is ours");
    let hung = &host.ps(&[])[0];
    assert_eq!((&hung["state"], &hung["address"]), (&"running".into(), &Value::Null));
    let console = host.run(&["console", "a", "--read-only"]);
    assert_eq!(console.status.code(), Some(125), "{}", text(&console));
    assert_eq!(host.ok(&["kill", "a"]), "a\n");
    assert_eq!(host.ps(&["-a"])[0]["exit"]["status"], 137, "it could not end in order");
}

#[test]
fn what_keeps_a_detached_machine_from_starting_is_told_by_the_command() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let bad = host.run(&["run", "--kernel", "/nonexistent/vmlinuz", "--accel", "kvm", "--net", "none", "-d"]);
    assert_eq!(bad.status.code(), Some(2), "{}", text(&bad));
    assert!(String::from_utf8_lossy(&bad.stderr).contains("/nonexistent/vmlinuz") && bad.stdout.is_empty());
    let holder = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has free ports");
    let port = format!("{}:80", holder.local_addr().expect("it is bound").port());
    let taken = host.run(&["run", "probe", "--accel", "kvm", "-d", "-p", &port]);
    assert_eq!(taken.status.code(), Some(2), "{}", text(&taken));
    assert!(host.ps(&["-a"]).is_empty(), "nothing is left of either");
}

#[test]
fn a_detached_machine_in_the_lab_is_refused_with_the_way_to_do_it() {
    let host = Host::new();
    let refused = host.run(&["run", "probe", "--accel", "lab", "--detach"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("pontoon lab -- "));
}

#[test]
fn a_runtime_folder_that_cannot_be_used_stops_a_detached_machine_only() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let folder = host.dir().join("pontoon");
    fs::create_dir(&folder).expect("a new directory is writable");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).expect("it is ours");
    let args = ["run", "probe", "--accel", "kvm", "--memory", "64M", "--cmdline", "probe.do=end=5"];
    let detached = host.run(&[&args[..], &["--detach"]].concat());
    assert_eq!(detached.status.code(), Some(2), "{}", text(&detached));
    assert!(String::from_utf8_lossy(&detached.stderr).contains("chmod 700"));
    let front = host.run(&args);
    assert_eq!(front.status.code(), Some(5), "{}", text(&front));
    assert!(String::from_utf8_lossy(&front.stderr).contains("chmod 700"));
    for command in [&["ps"][..], &["kill", "x"], &["logs", "x"]] {
        assert_eq!(host.run(command).status.code(), Some(2), "{command:?}");
    }
    let mut relative = host.pontoon(&["ps"]);
    relative.command().env("XDG_RUNTIME_DIR", "run");
    let relative = relative.output();
    assert_eq!(relative.status.code(), Some(2), "{}", text(&relative));
    assert!(String::from_utf8_lossy(&relative.stderr).contains("absolute path"));
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).expect("it is ours");
}

#[test]
fn a_machine_in_the_foreground_is_listed_and_leaves_nothing() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let (mut child, machine) = host.in_the_foreground();
    assert_eq!(machine["name"], "vm1");
    let logs = host.run(&["logs", "vm1"]);
    assert_eq!(logs.status.code(), Some(2), "{}", text(&logs));
    host.ok(&["kill", "vm1"]);
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
    assert!(host.ps(&["-a"]).is_empty() && !host.folder("vm1").exists());
    let (mut child, _) = host.in_the_foreground();
    child.kill().expect("it is ours");
    child.wait().expect("it ends");
    assert!(host.ps(&["-a"]).is_empty() && !host.folder("vm1").exists());
}

#[test]
fn a_detached_machine_keeps_nothing_of_its_starter_open() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let lock = host.dir().join("lock of a script");
    let flags = "--accel kvm --memory 64M --timeout 120 --name a";
    let script = format!(r#"exec 9>"$1"; "$2" run probe --detach {flags} --cmdline "$3""#);
    let output = std::process::Command::new("sh")
        .args(["-c", &script, "sh"])
        .args([lock.as_os_str(), pontoon_tests::pontoon().as_os_str(), STAY.as_ref()])
        .env("XDG_RUNTIME_DIR", host.dir())
        .current_dir(host.dir())
        .output()
        .expect("a shell starts");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let process = PathBuf::from(format!("/proc/{}", host.ps(&[])[0]["pid"]));
    let open: Vec<_> = fs::read_dir(process.join("fd"))
        .expect("the process lives")
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .collect();
    assert!(!open.contains(&lock) && open.contains(&host.folder("a").join("lock")), "{open:?}");
    assert_eq!(fs::read_link(process.join("cwd")).expect("the process lives"), PathBuf::from("/"));
}

#[test]
fn a_machine_whose_starter_is_gone_before_it_runs_ends() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    // What `run --detach` starts, with nobody at the other end of its pipe.
    let args = ["--detached", "run", "probe", "--accel", "kvm", "--memory", "64M", "-d", "--cmdline", STAY];
    let mut pontoon = host.pontoon(&args);
    let output = pontoon.command().stdout(writer).output().expect("pontoon starts");
    assert_eq!(output.status.code(), Some(125), "{}", text(&output));
    assert!(host.ps(&["-a"]).is_empty());
}

#[test]
fn following_a_log_ends_with_the_machine() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], "probe.do=wait=1500;end=0");
    let mut pontoon = host.pontoon(&["logs", "-f", "a"]);
    let mut child = pontoon.command().stdout(Stdio::piped()).spawn().expect("pontoon starts");
    let lines: Vec<String> =
        BufReader::new(child.stdout.take().expect("it is piped")).lines().map_while(Result::ok).collect();
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    let verbs = |verb: &str| lines.iter().filter(|line| line.contains(verb)).count();
    assert_eq!((verbs("\"boot\""), verbs("\"wait\"")), (1, 1), "{lines:?}");
}

#[test]
fn a_console_shows_what_was_said_and_is_left_without_harm() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], STAY);
    let mut terminal = Terminal::new();
    let mut child = terminal.start(host.pontoon(&["console", "a"]).command());
    terminal.expect("\"event\":\"boot\"");
    // The key that stops a machine on its own terminal does not stop this one.
    terminal.master.write_all(b"\x01x").expect("the terminal takes it");
    terminal.expect("a goes on; ctrl-A d leaves it");
    terminal.master.write_all(b"\x01d").expect("the terminal takes it");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert_eq!(host.ps(&[])[0]["state"], "running");
}

#[test]
fn a_console_ends_with_its_machine_and_a_foreground_machine_has_none_to_give() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], STAY);
    let mut pontoon = host.pontoon(&["console", "a", "--read-only"]);
    let mut child = pontoon.command().stdout(Stdio::piped()).spawn().expect("pontoon starts");
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    assert!(lines.next().is_some_and(|line| line.is_ok_and(|line| line.contains("\"boot\""))));
    host.ok(&["kill", "a"]);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    let (mut child, _) = host.in_the_foreground();
    let refused = host.run(&["console", "vm1"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("terminal"));
    host.ok(&["kill", "vm1"]);
    child.wait().expect("it ends");
    let gone = host.run(&["console", "vm1"]);
    assert_eq!(gone.status.code(), Some(2), "{}", text(&gone));
}

#[test]
fn a_guest_that_never_shuts_down_is_ended_when_its_time_is_up() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], STAY);
    host.detach(&["--name", "b"], STAY);
    // The probe has neither an agent nor ears for a power button.
    let stopped = host.run(&["stop", "--time", "1", "a", "b", "c"]);
    let (out, err) = (String::from_utf8_lossy(&stopped.stdout), String::from_utf8_lossy(&stopped.stderr));
    assert_eq!((stopped.status.code(), &*out), (Some(2), "a\nb\n"), "{}", text(&stopped));
    assert_eq!(err.matches("did not shut down in time").count(), 2, "{err}");
    assert!(err.contains("no machine called c"), "{err}");
    assert!(host.ps(&[]).is_empty());
    for machine in host.ps(&["-a"]) {
        assert_eq!((&machine["state"], &machine["exit"]["status"]), (&"stopped".into(), &143.into()));
    }
    assert_eq!(host.run(&["stop", "a"]).status.code(), Some(2));
}

#[test]
fn a_guest_that_ends_while_it_is_asked_to_was_stopped() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], "probe.do=static=192.168.122.9/24;wait=1500;end=reset");
    host.ok(&["stop", "--time", "30", "a"]);
    let a = &host.ps(&["-a"])[0];
    assert_eq!(
        (&a["state"], &a["exit"]["status"], &a["exit"]["stopped"]),
        (&"stopped".into(), &0.into(), &true.into())
    );
    assert!(host.ok(&["ps", "-a"]).contains("stopped (0): the guest asked for a reset"));
}

#[test]
fn a_machines_network_is_shown_with_what_went_over_it() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a", "--subnet", "192.168.122.0/24"], "probe.do=dhcp;wait=60000");
    host.detach(&["--name", "b", "--net", "none"], "probe.do=end=0");
    let inspect = || -> Value {
        serde_json::from_str(&host.ok(&["net", "inspect", "a", "--json"])).expect("--json prints JSON")
    };
    let shown = until("the guest has sent something", || {
        let shown = inspect();
        (shown["interfaces"][0]["counters"]["from_guest_frames"].as_u64() > Some(1)).then_some(shown)
    });
    let nic = &shown["interfaces"][0];
    let lease = until("the guest has its lease", || inspect()["leases"].get(0).cloned());
    let address = lease["address"].as_str().expect("a lease has an address").to_owned();
    assert!(address.starts_with("192.168.122.") && lease["mac"] == nic["mac"], "{lease}");
    assert_eq!(host.ps(&[])[0]["address"], address);
    let facts = (&nic["type"], &nic["source"], &nic["model"]);
    assert_eq!(facts, (&"nat".into(), &"192.168.122.0/24".into(), &"virtio".into()));
    assert_eq!(nic["mac"], host.ps(&[])[0]["mac"]);
    let table = host.ok(&["net", "inspect", "a"]);
    assert!(
        table.contains("52:54:00:") && table.contains("from the guest") && table.contains(&address),
        "{table}"
    );
    let nets: Value = serde_json::from_str(&host.ok(&["net", "ls", "--json"])).expect("--json prints JSON");
    assert_eq!((&nets[0]["net"], &nets[0]["machines"][0]["name"]), (&"nat".into(), &"a".into()));
    assert_eq!(nets.as_array().map(Vec::len), Some(1), "a machine without a NIC is on no network");
    until("b has ended, and has no network to show", || {
        (host.run(&["net", "inspect", "b"]).status.code() == Some(2)).then_some(())
    });
}

/// Runs `pontoon nc` with this input and gives what came back.
fn nc(host: &Host, to: &[&str], input: Vec<u8>) -> Output {
    let mut pontoon = host.pontoon(&[&["nc"], to].concat());
    let command = pontoon.command().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("pontoon starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    let writer = std::thread::spawn(move || {
        // A guest that refuses takes none of it.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("pontoon ends");
    writer.join().expect("the writer has not failed");
    output
}

#[test]
fn nc_leads_into_the_guest_by_name_and_by_address_and_back() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    // A guest may be asked for before it is up.
    host.detach(&["--name", "a"], "probe.do=dhcp;listen=7,count=3;wait=60000");
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let output = nc(&host, &["a", "7"], sent.clone());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == sent, "{} of {} bytes, or others", output.stdout.len(), sent.len());
    let address = host.ps(&[])[0]["address"].as_str().expect("it has a lease by now").to_owned();
    assert_eq!(nc(&host, &[&address, "7"], b"by its address".to_vec()).stdout, b"by its address");
    // A second network has the same addresses: then a name is wanted, and that one is not led astray.
    host.detach(
        &["--name", "b", "--mac", host.ps(&[])[0]["mac"].as_str().expect("it has one")],
        "probe.do=dhcp;wait=60000",
    );
    until("the other guest has the same address", || (host.ps(&[])[1]["address"] == address).then_some(()));
    let unclear = nc(&host, &[&address, "7"], Vec::new());
    assert_eq!(unclear.status.code(), Some(2), "{}", text(&unclear));
    assert!(String::from_utf8_lossy(&unclear.stderr).contains("a, b"), "{}", text(&unclear));
    assert_eq!(nc(&host, &["a", "7"], b"by its name".to_vec()).stdout, b"by its name");
}

#[test]
fn nc_to_what_is_not_there_ends_and_says_so_where_that_is_known() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], "probe.do=dhcp;wait=60000");
    let closed = nc(&host, &["a", "81"], b"anybody?".to_vec());
    assert_eq!((closed.status.code(), closed.stdout.as_slice()), (Some(1), &b""[..]), "{}", text(&closed));
    assert!(String::from_utf8_lossy(&closed.stderr).contains("port 81 of a"), "{}", text(&closed));
    for (to, says) in
        [(&["nobody", "22"], "no machine"), (&["10.9.8.7", "22"], "10.9.8.7"), (&["a.b", "22"], "neither")]
    {
        let refused = nc(&host, to, Vec::new());
        assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
        assert!(String::from_utf8_lossy(&refused.stderr).contains(says), "{}", text(&refused));
    }
}

#[test]
fn a_guest_without_a_driver_for_vsock_is_told_to_who_does_not_want_to_wait() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "bare"], STAY);
    let output = host.run(&["exec", "--wait", "0", "bare", "true"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("within 1 s") && said.contains("vmw_vsock_virtio_transport"), "{said}");
}

#[test]
fn a_followed_log_that_becomes_the_old_one_is_read_to_its_end_and_the_new_one_goes_on() {
    if !have_kvm() {
        return;
    }
    let host = Host::new();
    host.detach(&["--name", "a"], STAY);
    let mut pontoon = host.pontoon(&["logs", "--follow", "a"]);
    let mut child = pontoon.command().stdout(Stdio::piped()).spawn().expect("pontoon starts");
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("\"static\"")), "the probe's orders are carried out");
    // What the machine does when its log is full.
    let (log, old) = (host.folder("a").join("console.log"), host.folder("a").join("console.log.1"));
    let mut full = fs::OpenOptions::new().append(true).open(&log).expect("it is ours");
    full.write_all(b"last of the old\n").expect("there is room");
    fs::rename(&log, &old).expect("it is ours");
    fs::write(&log, "first of the new\n").expect("there is room");
    assert_eq!(lines.by_ref().take(2).collect::<Vec<_>>(), ["last of the old", "first of the new"]);
    host.ok(&["kill", "a"]);
    assert_eq!(lines.count(), 0);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert!(
        host.ok(&["logs", "a"]).ends_with("last of the old\nfirst of the new\n"),
        "both are shown in order"
    );
}
