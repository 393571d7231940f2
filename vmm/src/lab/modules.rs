//! Kernel modules: which ones the outer machine has, and in which order they load.
//!
//! A Debian package carries no `modules.dep` (the host's depmod makes it), so dependencies are read from the
//! modules themselves: the `.modinfo` section is a run of NUL-terminated `name=value` strings.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::{LabError, at};

/// Loaded before the snapshot, each with its parameters.
pub(super) const EARLY: [(&str, &str); 23] = [
    // A guest of a guest of an emulation is more than anybody wants: without nested, KVM hides SVM.
    ("kvm-amd", "nested=0"),
    ("virtio_pci", ""),
    ("virtio_console", ""),
    ("tun", ""),
    ("bridge", ""),
    ("veth", ""),
    ("dummy", "numdummies=0"),
    ("overlay", ""),
    ("nf_tables", ""),
    ("nf_conntrack", ""),
    ("nft_chain_nat", ""),
    ("nft_ct", ""),
    ("nft_fib_inet", ""),
    ("nft_limit", ""),
    ("nft_log", ""),
    ("nft_masq", ""),
    ("nft_nat", ""),
    ("nft_redir", ""),
    ("nft_reject_inet", ""),
    ("nft_reject_bridge", ""),
    ("nf_log_syslog", ""),
    ("vsock", ""),
    ("net_failover", ""),
];

/// Loaded after the resume: the devices behind them differ from run to run.
pub(super) const LATE: [&str; 2] = ["virtio_blk", "virtio_net"];

/// On the root file system for `modprobe`, not loaded.
pub(super) const AVAILABLE: [&str; 14] = [
    "br_netfilter",
    "vhost_net",
    "vhost_vsock",
    "vsock_loopback",
    "macvlan",
    "macvtap",
    "ifb",
    "sch_netem",
    "sch_tbf",
    "sch_ingress",
    "vxlan",
    "wireguard",
    "ip_tables",
    "iptable_nat",
];

/// The modules below a kernel's module directory, by name (with `_` for `-`).
#[derive(Debug)]
pub(super) struct Tree {
    modules: BTreeMap<String, Module>,
}

/// One module of a tree.
#[derive(Debug)]
struct Module {
    /// Relative to the tree's root, such as `kernel/drivers/net/tun.ko`.
    path: PathBuf,
    /// Names of the modules that have to be loaded before.
    depends: Vec<String>,
}

impl Tree {
    /// Reads the tree below `root` (`/lib/modules/VERSION`): every `.ko` of it.
    pub(super) fn read(root: &Path) -> Result<Self, LabError> {
        let mut modules = BTreeMap::new();
        collect(root, Path::new("kernel"), &mut modules)?;
        Ok(Self { modules })
    }

    /// `wanted` and what it needs, each once, dependencies first.
    pub(super) fn in_order(&self, wanted: &[&str]) -> Result<Vec<&Path>, LabError> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&canonical(name), &mut order, 0)?;
        }
        order.iter().map(|name| Ok(self.get(name)?.path.as_path())).collect()
    }

    /// The text of a `modules.dep` for the modules at `paths`.
    pub(super) fn dep_file(&self, paths: &[&Path]) -> Result<String, LabError> {
        let mut text = String::new();
        for path in paths {
            let name = module_name(path).unwrap_or_default();
            let mut needed = self.in_order(&[&name])?;
            // modules.dep lists the direct dependencies first.
            needed.reverse();
            let needed: Vec<_> = needed.iter().skip(1).map(|path| path.display().to_string()).collect();
            text.push_str(&format!("{}: {}\n", path.display(), needed.join(" ")));
        }
        Ok(text)
    }

    fn visit(&self, name: &str, order: &mut Vec<String>, depth: usize) -> Result<(), LabError> {
        if order.iter().any(|done| done == name) {
            return Ok(());
        }
        if depth > 32 {
            return Err(LabError::Contents(format!("the dependencies of module {name} run in a circle")));
        }
        for needed in &self.get(name)?.depends {
            self.visit(needed, order, depth + 1)?;
        }
        order.push(name.to_owned());
        Ok(())
    }

    fn get(&self, name: &str) -> Result<&Module, LabError> {
        let missing = || LabError::Contents(format!("the kernel has no module {name}"));
        self.modules.get(name).ok_or_else(missing)
    }
}

fn collect(root: &Path, below: &Path, modules: &mut BTreeMap<String, Module>) -> Result<(), LabError> {
    let dir = root.join(below);
    for entry in fs::read_dir(&dir).map_err(at("read", &dir))? {
        let entry = entry.map_err(at("read", &dir))?;
        let path = below.join(entry.file_name());
        if entry.file_type().map_err(at("read", &dir))?.is_dir() {
            collect(root, &path, modules)?;
        } else if let Some(name) = module_name(&path) {
            let file = root.join(&path);
            let depends = depends(&fs::read(&file).map_err(at("read", &file))?);
            modules.insert(name, Module { path, depends });
        }
    }
    Ok(())
}

/// The name of the module in a `.ko` file.
fn module_name(path: &Path) -> Option<String> {
    (path.extension()? == "ko").then_some(())?;
    Some(canonical(path.file_stem()?.to_str()?))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The modules that a module's file names in its `depends=` string.
pub(super) fn depends(file: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = file.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = file.get(start + KEY.len()..).unwrap_or_default();
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = value.split(|byte| *byte == b',').filter(|name| !name.is_empty());
    names.map(|name| canonical(&String::from_utf8_lossy(name))).collect()
}
