//! The machine's orderly end.
//!
//! With systemd, `systemctl poweroff`; with an init that takes it as busybox's does (ours), SIGUSR2 to PID 1, which is what
//! `poweroff` sends.

use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::sys;

/// There exactly while systemd is PID 1 (sd_booted(3)).
const SYSTEMD: &core::ffi::CStr = c"/run/systemd/system";

/// Asks for the end. Returns when it has been asked for; what could not be done, if it could not.
pub(crate) fn power_off() -> Result<(), (&'static str, Option<Errno>)> {
    if access(SYSTEMD, Access::EXISTS).is_err() {
        return kill_process(Pid::INIT, Signal::USR2).map_err(|errno| ("signal PID 1", Some(errno)));
    }
    let Some(child) = sys::fork().map_err(|errno| ("make a process", Some(errno)))? else {
        sys::default_signals();
        let string = |text: &'static core::ffi::CStr| text.as_ptr().cast::<u8>();
        let arguments = [string(c"systemctl"), string(c"poweroff"), core::ptr::null()];
        let variables = [string(c"PATH=/usr/sbin:/usr/bin:/sbin:/bin"), core::ptr::null()];
        sys::execute(c"/usr/bin/systemctl", &arguments, &variables);
        sys::exit(127)
    };
    match waitpid(Some(child), WaitOptions::empty()) {
        Ok(Some((_, status))) if status.exit_status() == Some(0) => Ok(()),
        Ok(_) => {
            Err(("get `systemctl poweroff` done; `systemctl list-jobs` in the machine may tell why", None))
        }
        Err(errno) => Err(("wait for systemctl", Some(errno))),
    }
}
