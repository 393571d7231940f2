//! The power button: whoever presses it wants the machine off, in order.
//!
//! The kernel's `button` driver makes it an input device, named as below, whose events come through `evdev`. A press becomes
//! SIGPWR, which init waits for anyway; one that came while init was not yet waiting is still in the device.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::{say, sys};

const CLASS: &str = "/sys/class/input";
const NAME: &str = "Power Button";

/// The button, if the machine has one.
pub(crate) struct Button(Option<File>);

impl Button {
    /// Finds it, and lets SIGPWR, which must be blocked, tell of it.
    pub(crate) fn find() -> Self {
        Self(device().and_then(|device| match listen(&device) {
            Ok(file) => Some(file),
            Err(error) => {
                say!("the power button {} does not work: {error}", device.display());
                None
            }
        }))
    }

    /// Whether it was pressed since this was last asked.
    pub(crate) fn pressed(&self) -> bool {
        // 24 bytes are one struct input_event of x86-64.
        self.0.as_ref().is_some_and(|mut device| device.read(&mut [0; 24]).is_ok_and(|n| n > 0))
    }
}

fn listen(device: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(device)?;
    sys::signal_on_input(&file, libc::SIGPWR)?;
    Ok(file)
}

fn device() -> Option<std::path::PathBuf> {
    let events = fs::read_dir(CLASS).ok()?.flatten();
    let names = events.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| name.starts_with("event"))
        .find(|name| {
            fs::read_to_string(format!("{CLASS}/{name}/device/name")).is_ok_and(|text| text.trim() == NAME)
        })
        .map(|name| Path::new("/dev/input").join(name))
}
