//! The hook that turns an installed chroot into the image: a shell script, written anew for each build.
//!
//! Everything stands in the script itself, since the namespace in which it runs may not read the builder's files.

use std::fmt::Write as _;

/// Ends a file in the script. Nothing that is written here contains it: keys are single lines that begin with their type.
const END: &str = "END_OF_PONTOON_FILE";

/// Files that the image gets: path, mode, content.
const FILES: [(&str, &str, &str); 10] = [
    ("etc/systemd/network/80-pontoon.network", "644", include_str!("files/network")),
    ("etc/systemd/system/pontoon-host-keys.service", "644", include_str!("files/host-keys.service")),
    (
        "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf",
        "644",
        include_str!("files/autologin.conf"),
    ),
    ("etc/systemd/system/pontoon-agent.service", "644", include_str!("files/agent.service")),
    ("etc/udev/rules.d/80-pontoon-agent.rules", "644", include_str!("files/agent.rules")),
    ("etc/ssh/sshd_config.d/pontoon.conf", "644", include_str!("files/sshd.conf")),
    ("etc/systemd/resolved.conf.d/pontoon.conf", "644", include_str!("files/resolved.conf")),
    ("etc/hostname", "644", "debian\n"),
    (
        "etc/hosts",
        "644",
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n",
    ),
    ("etc/default/locale", "644", "LANG=C.UTF-8\n"),
];

/// The hook for an image whose file system has this UUID, and whose root may be logged into with these keys.
pub(super) fn script(uuid: &str, authorized: &str) -> String {
    let mut text = String::from("set -eu\nexport LC_ALL=C\nroot=$1\n");
    let mut add = |line: std::fmt::Arguments<'_>| text.write_fmt(line).expect("a String takes everything");
    add(format_args!("uuid='{uuid}'\ninside() {{ chroot \"$root\" \"$@\"; }}\n"));
    let fstab = format!("UUID={uuid} / ext4 errors=remount-ro,x-systemd.growfs 0 1\n");
    let own = [("etc/fstab", "644", fstab.as_str()), ("root/.ssh/authorized_keys", "600", authorized)];
    add(format_args!("install -d -m 700 \"$root/root/.ssh\"\n"));
    for (path, mode, content) in FILES.into_iter().chain(own) {
        let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
        add(format_args!("mkdir -p \"$root/{dir}\"\ncat >\"$root/{path}\" <<'{END}'\n{content}{END}\n"));
        add(format_args!("chmod {mode} \"$root/{path}\"\n"));
    }
    add(format_args!("{}", include_str!("files/customize.sh")));
    text
}
