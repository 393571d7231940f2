//! What a build is decided by, without building: the plan, the script, the host's files, debugfs' listings. The whole build, and what it
//! boots to, is in tests/tests/rootfs.rs.

use super::*;

fn plan<'a>(options: &'a RootfsOptions, authorized: &'a str) -> Plan<'a> {
    Plan { suite: Suite::Bookworm, options, authorized }
}

const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJUfDKzCA4zKPm+9Rj2ZC5Pmhv2oRVmDfnwPGbJ3Zt5a me@here\n";

#[test]
fn the_recipe_changes_with_whatever_goes_in() {
    let usual = RootfsOptions::default();
    let recipe = plan(&usual, KEY).recipe();
    assert_eq!(recipe, plan(&usual, KEY).recipe());
    assert_ne!(recipe, plan(&usual, "ssh-ed25519 another\n").recipe());
    assert_ne!(recipe, Plan { suite: Suite::Trixie, ..plan(&usual, KEY) }.recipe());
    for other in [
        RootfsOptions { kernel: KernelSource::Backports, ..usual.clone() },
        RootfsOptions { kernel: KernelSource::Both, ..usual.clone() },
        RootfsOptions { size: 3 << 30, ..usual.clone() },
        RootfsOptions { packages: vec!["htop".into()], ..usual.clone() },
    ] {
        assert_ne!(recipe, plan(&other, KEY).recipe(), "{other:?}");
    }
    // Where the suite comes from and whether to look for newer packages is no part of the system.
    let same = RootfsOptions { refresh: true, suite: Some(Suite::Bookworm), ..usual.clone() };
    assert_eq!(recipe, plan(&same, KEY).recipe());
}

#[test]
fn the_kernel_of_backports_is_named_by_its_suite() {
    let options = RootfsOptions { kernel: KernelSource::Backports, ..RootfsOptions::default() };
    let plan_of = plan(&options, KEY);
    assert!(plan_of.includes().ends_with(",linux-image-cloud-amd64/bookworm-backports"));
    assert_eq!(plan_of.second_kernel(), None);
}

#[test]
fn both_kernels_are_the_suites_and_then_that_of_its_backports() {
    let options = RootfsOptions { kernel: KernelSource::Both, ..RootfsOptions::default() };
    let plan_of = plan(&options, KEY);
    assert!(plan_of.includes().ends_with(",linux-image-cloud-amd64"));
    let hook = plan_of.second_kernel().unwrap();
    assert!(hook.contains(" install linux-image-cloud-amd64/bookworm-backports "), "{hook}");
}

#[test]
fn sizes_and_names_that_cannot_be_are_refused() {
    let with =
        |size, package: &str| RootfsOptions { size, packages: vec![package.into()], ..Default::default() };
    assert!(with(1 << 30, "libstdc++6").check().is_ok());
    for size in [0, (1 << 30) - 1, (1 << 40) + 1] {
        assert!(matches!(with(size, "htop").check(), Err(Error::Size(_))), "{size}");
    }
    // A comma or a slash would be another request to apt, a leading - an option, ? and ~ a pattern.
    for name in ["", "a", "-y", "a,b", "a/sid", "?installed", "~i", "A", "a b", "./x.deb"] {
        assert!(matches!(with(1 << 30, name).check(), Err(Error::PackageName(_))), "{name}");
    }
}

#[test]
fn the_script_is_one_that_a_shell_can_read() {
    let script = script::script("12345678-1234-1234-1234-123456789abc", KEY);
    let mut shell = Command::new("sh");
    shell.arg("-n").stdin(Stdio::piped());
    let mut child = shell.spawn().unwrap();
    io::Write::write_all(child.stdin.as_mut().unwrap(), script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    // One argument of execve(2) has less than 128 KiB.
    assert!(script.len() < 100 << 10, "{}", script.len());
    for fact in ["authorized_keys", KEY.trim(), "UUID=12345678-1234-1234-1234-123456789abc / ext4"] {
        assert!(script.contains(fact), "{fact}");
    }
}

#[test]
fn packages_are_read_from_among_other_output() {
    let said = "Reading...\npontoon-package b 1:2 cc\npontoon-package a 1 aa\npontoon-package a 1 aa\npontoon-package x\n";
    let names: Vec<_> = packages(said).into_iter().map(|p| (p.name, p.version, p.sha256)).collect();
    assert_eq!(names, [("a".into(), "1".into(), "aa".into()), ("b".into(), "1:2".into(), "cc".into())]);
}

#[test]
fn the_newest_kernel_of_a_listing_is_taken() {
    let listing = "/12/040755/0/0/./4096/\n/2/040755/0/0/../4096/\n/13/100644/0/0/vmlinuz-6.1.0-9-cloud-amd64/1/\n\
                   /14/100644/0/0/vmlinuz-6.12.9+bpo-cloud-amd64/1/\n/15/100644/0/0/initrd.img-7.0/1/\n\
                   /16/100644/0/0/vmlinuz-9 x/1/\n/17/100644/0/0/vmlinuz-/0/\n";
    assert_eq!(ext4::newest_release(listing).as_deref(), Some("6.12.9+bpo-cloud-amd64"));
    assert_eq!(ext4::newest_release("/12/040755/0/0/./4096/\n"), None);
}

#[test]
fn ids_are_found_where_the_host_keeps_them() {
    let passwd = "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n";
    assert_eq!(host::user_name(passwd, 1000), Some("me"));
    assert_eq!(host::user_name(passwd, 7), None);
    assert!(host::has_range("you:100000:65536\nme:165536:65536\n", "me"));
    assert!(!host::has_range("me:165536:1000\n", "me"), "too small for Debian's nobody");
    assert!(!host::has_range("mean:165536:65536\nme\n", "me"));
}

#[test]
fn proxies_of_the_host_are_taken_and_nothing_else() {
    assert!(host::is_proxy("Acquire::http::Proxy \"http://proxy:3142\";"));
    assert!(host::is_proxy("Acquire::https::Proxy::deb.debian.org \"DIRECT\";"));
    assert!(!host::is_proxy("Acquire::http::Proxy \"\";"));
    assert!(!host::is_proxy("APT::Update::Post-Invoke:: \"rm -rf /\";"));
}

#[test]
fn keys_come_from_the_files_that_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("a.pub"), dir.path().join("id_rsa"));
    fs::write(&good, format!("# mine\n{KEY}\n")).unwrap();
    fs::write(&bad, "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n").unwrap();
    let authorized = keys::authorized(dir.path(), std::slice::from_ref(&good)).unwrap();
    assert_eq!((authorized.text.as_str(), authorized.identity), (KEY, None));
    assert!(
        matches!(keys::authorized(dir.path(), &[good, bad.clone()]), Err(Error::NoKey { path }) if path == bad)
    );
    assert!(matches!(keys::authorized(dir.path(), &[dir.path().join("none")]), Err(Error::Io { .. })));
    // Options in front would be a command of somebody else's for root's logins.
    assert!(!keys::is_public_key("command=\"x\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me"));
}

#[test]
fn what_mmdebstrap_does_is_told_in_our_words() {
    assert_eq!(step("I: running apt-get update..."), Some("downloading Debian's package index"));
    assert_eq!(step("I: something new"), None);
    assert_eq!(step("W: running apt-get update..."), None);
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let last =
        follow("one\nI: extracting archives...\nE: no\n".as_bytes(), &log, &mut crate::Silent).unwrap();
    assert!(last.ends_with("E: no"));
    assert!(fs::read_to_string(&log).unwrap().starts_with("one\n"));
}
