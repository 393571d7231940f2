//! Kernel modules: what the hardware asks for, with what that needs, in the order in which it loads.
//!
//! Every device in sysfs has a `modalias`; `modules.alias` maps patterns of it to modules, `modules.dep` modules to
//! files and to what must be there before. Loading virtio_mmio makes virtio devices appear, whose modaliases ask for virtio_net, and
//! so on: sysfs is walked until a walk asks for nothing new.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::{say, sys};

pub(crate) mod index;

use index::Index;

/// Bounds the walks: bus, device, and room for one more generation.
const MAX_WALKS: usize = 5;
/// Bounds the depth of a device path below /sys/devices (a real one has fewer than ten parts).
const MAX_DEPTH: usize = 24;

/// Loads the modules named `extra` and those of the hardware that is there.
pub(crate) fn load(extra: &[String]) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let dir = PathBuf::from("/lib/modules").join(release.trim());
    let text = |name: &str| fs::read_to_string(dir.join(name));
    let index = match (text("modules.dep"), text("modules.alias")) {
        (Ok(dep), Ok(alias)) => Index::parse(&dep, &alias),
        (Err(error), _) | (_, Err(error)) => {
            // A kernel with everything built in needs no modules; one without its modules shows soon enough.
            return say!("no modules for kernel {} in {}: {error}", release.trim(), dir.display());
        }
    };
    let mut loader = Loader { dir, index, tried: BTreeSet::new() };
    for _ in 0..MAX_WALKS {
        let mut asked = BTreeSet::new();
        collect_modaliases(Path::new("/sys/devices"), MAX_DEPTH, &mut asked);
        let mut loaded = false;
        for modalias in &asked {
            let matching: Vec<_> = loader.index.matching(modalias).map(str::to_owned).collect();
            for name in matching {
                loaded |= loader.load(&name);
            }
        }
        if !loaded {
            break;
        }
    }
    for name in extra {
        loader.load(name);
    }
}

struct Loader {
    dir: PathBuf,
    index: Index,
    /// Each module is tried once, whether that succeeds or not; this also ends circles.
    tried: BTreeSet<String>,
}

impl Loader {
    /// Loads a module after what it depends on; says whether anything new was loaded.
    fn load(&mut self, name: &str) -> bool {
        let name = index::normal(name);
        if !self.tried.insert(name.clone()) {
            return false;
        }
        let Some(module) = self.index.module(&name).cloned() else {
            say!("the image has no module {name}");
            return false;
        };
        for dependency in &module.needs {
            self.load(dependency);
        }
        let path = self.dir.join(&module.file);
        let compressed = path.extension().is_some_and(|extension| extension != "ko");
        let loaded = File::open(&path).and_then(|file| sys::load_module(&file, compressed));
        match loaded {
            Ok(()) => true,
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => false,
            Err(error) => {
                say!("cannot load the module {}: {error}", path.display());
                false
            }
        }
    }
}

/// The content of every `modalias` file below `dir`. Links are not followed: they lead out of the tree or in circles.
fn collect_modaliases(dir: &Path, depth: usize, into: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => collect_modaliases(&entry.path(), depth - 1, into),
            Ok(kind) if kind.is_file() && entry.file_name() == "modalias" => {
                if let Ok(text) = fs::read_to_string(entry.path()) {
                    into.insert(text.trim().to_owned());
                }
            }
            Ok(_) | Err(_) => {}
        }
    }
}
