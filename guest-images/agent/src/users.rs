//! Users by name or number, from /etc/passwd and /etc/group (passwd(5), group(5)), which are read a line at a time.

use core::ffi::CStr;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::thread::{Gid, Uid};

use crate::text::Text;

/// The most supplementary groups that are taken.
const MAX_GROUPS: usize = 64;
/// A longer line is no line of these files; it is skipped.
const LINE: usize = 4096;

/// Who a command runs as.
#[derive(Debug)]
pub(crate) struct User {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    groups: [Gid; MAX_GROUPS],
    group_count: usize,
    pub(crate) name: Text<64>,
    pub(crate) home: Text<1024>,
    pub(crate) shell: Text<1024>,
}

impl User {
    fn new(uid: u32, gid: u32) -> Self {
        let (mut name, mut home, mut shell) = (Text::new(), Text::new(), Text::new());
        if uid == 0 {
            name.push(b"root");
        }
        home.push(if uid == 0 { b"/root" } else { b"/" });
        shell.push(b"/bin/sh");
        let gid = Gid::from_raw(gid);
        Self { uid: Uid::from_raw(uid), gid, groups: [gid; MAX_GROUPS], group_count: 1, name, home, shell }
    }

    /// The groups beside the first.
    pub(crate) fn groups(&self) -> &[Gid] {
        self.groups.get(..self.group_count).unwrap_or_default()
    }

    /// The user that `wanted` means: a name, or a number that need not be in the file. Empty means root.
    ///
    /// `None` when there is no such user.
    pub(crate) fn find(wanted: &CStr) -> Option<Self> {
        let wanted = if wanted.is_empty() { b"0" } else { wanted.to_bytes() };
        let number = number(wanted);
        let mut found = None;
        for_lines(c"/etc/passwd", |line| {
            if found.is_none() {
                found = parse_passwd(line, wanted, number);
            }
        });
        // Root exists without any file; so does whoever is known by number only.
        let mut user = found.or_else(|| number.map(|uid| User::new(uid, uid)))?;
        for_lines(c"/etc/group", |line| user.take_group(line));
        Some(user)
    }

    /// Adds the group of this line of /etc/group if the user is a member.
    fn take_group(&mut self, line: &[u8]) {
        let mut fields = line.split(|byte| *byte == b':');
        let (Some(gid), Some(members)) = (fields.nth(2).and_then(number), fields.next()) else { return };
        let name = self.name.as_bytes();
        let is_member = !name.is_empty() && members.split(|byte| *byte == b',').any(|member| member == name);
        if is_member
            && gid != self.gid.as_raw()
            && let Some(place) = self.groups.get_mut(self.group_count)
        {
            *place = Gid::from_raw(gid);
            self.group_count += 1;
        }
    }
}

/// The user of this line of /etc/passwd, if it is the wanted one.
fn parse_passwd(line: &[u8], wanted: &[u8], number_wanted: Option<u32>) -> Option<User> {
    let mut fields = line.split(|byte| *byte == b':');
    let name = fields.next()?;
    let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
    let (home, shell) = (fields.nth(1)?, fields.next()?);
    if name != wanted && Some(uid) != number_wanted {
        return None;
    }
    let mut user = User::new(uid, gid);
    user.name.clear();
    user.name.push(name);
    if !home.is_empty() {
        user.home.clear();
        user.home.push(home);
    }
    if !shell.is_empty() {
        user.shell.clear();
        user.shell.push(shell);
    }
    Some(user)
}

/// A decimal number; the last one of 32 bits means "none" to the kernel.
fn number(text: &[u8]) -> Option<u32> {
    core::str::from_utf8(text).ok()?.parse().ok().filter(|number| *number != u32::MAX)
}

/// Calls `take` for every line of a file; a file that is not there has none.
fn for_lines(path: &CStr, mut take: impl FnMut(&[u8])) {
    let Ok(file) = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else { return };
    let (mut line, mut overlong) = (Text::<LINE>::new(), false);
    let mut chunk = [0; 1024];
    loop {
        let length = match rustix::io::read(&file, &mut chunk) {
            Ok(0) => break,
            Ok(length) => length,
            Err(Errno::INTR) => continue,
            Err(_) => return,
        };
        for byte in chunk.get(..length).unwrap_or_default() {
            if *byte == b'\n' {
                if !overlong {
                    take(line.as_bytes());
                }
                line.clear();
                overlong = false;
            } else {
                overlong |= !line.push(&[*byte]);
            }
        }
    }
    if !overlong {
        take(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_passwd_is_found_by_name_and_by_number() {
        let line = b"daemon:x:1:7:daemon:/usr/sbin:/usr/sbin/nologin";
        for (wanted, number) in [(&b"daemon"[..], None), (b"1", Some(1))] {
            let user = parse_passwd(line, wanted, number).unwrap();
            assert_eq!((user.uid.as_raw(), user.gid.as_raw()), (1, 7));
            assert_eq!(user.name.as_bytes(), b"daemon");
            assert_eq!(
                (user.home.as_bytes(), user.shell.as_bytes()),
                (&b"/usr/sbin"[..], &b"/usr/sbin/nologin"[..])
            );
        }
        assert!(parse_passwd(line, b"x", Some(7)).is_none());
    }

    #[test]
    fn damaged_lines_are_nobody() {
        for line in
            [&b""[..], b":", b"root", b"root:x:0", b"root:x:zero:0::/:/bin/sh", b"root:x:-1:0::/:/bin/sh"]
        {
            assert!(parse_passwd(line, b"root", Some(0)).is_none());
        }
    }

    #[test]
    fn groups_are_those_that_name_the_user() {
        let mut user = parse_passwd(b"me:x:9:9::/:/bin/sh", b"me", None).unwrap();
        for line in [
            &b"a:x:20:you,me"[..],
            b"b:x:21:men",
            b"c:x:22:",
            b"d:x:23:me",
            b"own:x:9:me",
            b"bad",
            b"e:x:me:me",
        ] {
            user.take_group(line);
        }
        assert_eq!(user.groups().iter().map(|gid| gid.as_raw()).collect::<Vec<_>>(), [9, 20, 23]);
        for gid in 100..300 {
            user.take_group(format!("g:x:{gid}:me").as_bytes());
        }
        assert_eq!(user.groups().len(), MAX_GROUPS);
    }

    #[test]
    fn root_needs_no_file_and_a_number_needs_no_name() {
        assert_eq!(User::find(c"").unwrap().uid.as_raw(), 0);
        assert_eq!(User::find(c"4000123").unwrap().gid.as_raw(), 4_000_123);
        assert!(User::find(c"nobody-has-this-name").is_none());
        assert!(User::find(c"4294967295").is_none());
    }
}
