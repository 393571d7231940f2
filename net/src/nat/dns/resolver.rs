//! The host's resolver, followed as it changes: `/etc/resolv.conf` (resolv.conf(5)), and whether the host has IPv6.
//!
//! The file is looked at when a guest asks something, at most once in [`RECHECK`]; it is read again when its time, size or
//! inode changed, as when a laptop changes its network or a VPN comes up. A resolver on the host's loopback
//! (systemd-resolved's 127.0.0.53, a local dnsmasq) works, because the questions come from the host's own sockets.
//!
//! Limits: [`MAX_SERVERS`] servers, [`MAX_SEARCH`] search domains (glibc takes 3 and 6), the first 64 KiB of the file. Servers
//! with IPv6 addresses are passed over. Without any server it is 127.0.0.1, as resolv.conf(5) says.

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the file is looked at.
pub(crate) const RECHECK: Duration = Duration::from_secs(1);
/// Servers that are asked.
pub(crate) const MAX_SERVERS: usize = 8;
/// Search domains that are passed on.
pub(crate) const MAX_SEARCH: usize = 6;
/// Bytes of a file that are read.
const MAX_BYTES: u64 = 64 << 10;
const DNS_PORT: u16 = 53;

/// Whom the host asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conf {
    /// Never empty.
    pub(crate) servers: Vec<SocketAddrV4>,
    pub(crate) search: Vec<String>,
}

/// What is known of the host's resolver.
#[derive(Debug)]
pub(crate) struct Resolver {
    resolv_conf: PathBuf,
    ipv6_route: PathBuf,
    /// Servers that the user named; the file's are not asked then.
    fixed: Vec<SocketAddrV4>,
    conf: Conf,
    ipv6: bool,
    checked: Option<Instant>,
    stamp: Option<(i64, i64, u64, u64)>,
}

impl Resolver {
    /// Follows the host's, unless `fixed` names servers.
    pub(crate) fn new(fixed: Vec<SocketAddrV4>) -> Self {
        Self::at(fixed, Path::new("/etc/resolv.conf"), Path::new("/proc/net/ipv6_route"))
    }

    fn at(fixed: Vec<SocketAddrV4>, resolv_conf: &Path, ipv6_route: &Path) -> Self {
        Self {
            resolv_conf: resolv_conf.to_owned(),
            ipv6_route: ipv6_route.to_owned(),
            fixed,
            conf: parse(""),
            ipv6: false,
            checked: None,
            stamp: None,
        }
    }

    /// Looks whether something changed, if it is time to.
    pub(crate) fn refresh(&mut self, now: Instant) {
        if self.checked.is_some_and(|at| now.saturating_duration_since(at) < RECHECK) {
            return;
        }
        self.checked = Some(now);
        self.ipv6 = has_default_route(&read(&self.ipv6_route));
        let stamp =
            fs::metadata(&self.resolv_conf).ok().map(|m| (m.mtime(), m.mtime_nsec(), m.size(), m.ino()));
        if stamp != self.stamp || stamp.is_none() {
            self.stamp = stamp;
            let conf = parse(&read(&self.resolv_conf));
            if conf != self.conf {
                tracing::debug!(servers = ?conf.servers, search = ?conf.search, "the host's resolver");
                self.conf = conf;
            }
        }
    }

    /// The servers, the first one to be asked first.
    pub(crate) fn servers(&self) -> &[SocketAddrV4] {
        if self.fixed.is_empty() { &self.conf.servers } else { &self.fixed }
    }

    pub(crate) fn search(&self) -> &[String] {
        &self.conf.search
    }

    /// Whether the host has a way to the IPv6 world.
    pub(crate) fn has_ipv6(&self) -> bool {
        self.ipv6
    }
}

/// The beginning of a file; empty when it can't be read.
fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(path) {
        // What was read before an error is as good as a short file.
        let _ = file.take(MAX_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn parse(text: &str) -> Conf {
    let (mut servers, mut search) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") if servers.len() < MAX_SERVERS => {
                let address = words.next().and_then(|word| word.parse::<Ipv4Addr>().ok());
                servers.extend(address.map(|address| SocketAddrV4::new(address, DNS_PORT)));
            }
            // The last of these lines counts.
            Some("search") => search = words.map(str::to_owned).collect(),
            Some("domain") => search = words.take(1).map(str::to_owned).collect(),
            _ => {}
        }
    }
    if servers.is_empty() {
        servers.push(SocketAddrV4::new(Ipv4Addr::LOCALHOST, DNS_PORT));
    }
    search.retain(|domain| domain != ".");
    search.truncate(MAX_SEARCH);
    Conf { servers, search }
}

/// Whether `/proc/net/ipv6_route` has a default route that leads somewhere: not the kernel's "unreachable" on lo.
fn has_default_route(text: &str) -> bool {
    text.lines().any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [destination, prefix, .., flags, device] = fields[..] else { return false };
        let reject = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 0x200 != 0);
        prefix == "00" && destination.bytes().all(|b| b == b'0') && device != "lo" && !reject
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn server(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    #[test]
    fn servers_and_search_domains_are_read_and_ipv6_servers_passed_over() {
        let conf = parse(
            "# comment\nsearch a.example\nnameserver 127.0.0.53\nnameserver fe80::1%2\nnameserver 10.0.0.1 # x\n\
             options edns0\nsearch b.example c.example .\n",
        );
        assert_eq!(conf.servers, [server("127.0.0.53:53"), server("10.0.0.1:53")]);
        assert_eq!(conf.search, ["b.example", "c.example"]);
        assert_eq!(parse("domain d.example").search, ["d.example"]);
        assert_eq!(parse("nameserver ::1").servers, [server("127.0.0.1:53")]);
        assert_eq!(parse(&"nameserver 1.1.1.1\n".repeat(50)).servers.len(), MAX_SERVERS);
    }

    #[test]
    fn a_changed_file_is_followed_within_a_second_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let (conf, routes) = (dir.path().join("resolv.conf"), dir.path().join("ipv6_route"));
        let now = Instant::now();
        let mut resolver = Resolver::at(Vec::new(), &conf, &routes);
        resolver.refresh(now);
        assert_eq!(resolver.servers(), [server("127.0.0.1:53")], "no file");
        fs::write(&conf, "nameserver 10.0.0.1").unwrap();
        resolver.refresh(now + RECHECK / 2);
        assert_eq!(resolver.servers(), [server("127.0.0.1:53")]);
        resolver.refresh(now + RECHECK);
        assert_eq!(resolver.servers(), [server("10.0.0.1:53")]);
        // Replaced, as resolvconf does: same size, another inode.
        fs::write(dir.path().join("new"), "nameserver 10.0.0.2").unwrap();
        fs::rename(dir.path().join("new"), &conf).unwrap();
        resolver.refresh(now + RECHECK * 2);
        assert_eq!(resolver.servers(), [server("10.0.0.2:53")]);
    }

    #[test]
    fn servers_that_the_user_named_win() {
        let mut resolver = Resolver::new(vec![server("9.9.9.9:5353")]);
        resolver.refresh(Instant::now());
        assert_eq!(resolver.servers(), [server("9.9.9.9:5353")]);
    }

    #[test]
    fn only_a_default_route_that_leads_somewhere_is_ipv6() {
        let zero = "0".repeat(32);
        let line = |prefix: &str, flags: &str, device: &str| {
            format!("{zero} {prefix} {zero} 00 {zero} 00000400 00000001 00000000 {flags} {device}\n")
        };
        assert!(has_default_route(&line("00", "00450003", "eth0")));
        assert!(!has_default_route(&line("00", "00200200", "lo")));
        assert!(!has_default_route(&line("00", "00200200", "eth0")));
        assert!(!has_default_route(&line("40", "00000001", "eth0")));
        assert!(!has_default_route(""));
    }

    proptest! {
        #[test]
        fn any_text_is_a_configuration(text in "(?s).{0,300}") {
            let conf = parse(&text);
            prop_assert!(!conf.servers.is_empty() && conf.search.len() <= MAX_SEARCH);
            has_default_route(&text);
        }
    }
}
