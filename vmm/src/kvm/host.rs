//! What this host's KVM is: there or not, ours to use or not, backed by hardware or by software.
//!
//! **Software KVM.** Some hosts (container sandboxes) answer KVM's ioctls without VT-x or AMD-V behind them. Code at CPL3
//! runs natively there, code at CPL0 is interpreted, about a million instructions per second, and some instructions
//! of a Linux kernel are not known to the interpreter. So small bare-metal guests run well and Linux does not. Such a
//! host is recognised by its CPU flags: a KVM with neither `vmx` nor `svm` in `/proc/cpuinfo`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use kvm_ioctls::{Cap, Kvm};

/// The device node of KVM.
pub const DEV_KVM: &str = "/dev/kvm";
/// Most vCPUs of a machine: APIC ids are 8 bits wide, and 255 means "all".
pub const MAX_CPUS: u8 = 254;
/// The one stable version of the API (linux/Documentation/virt/kvm/api.rst §4.1).
const API_VERSION: i32 = 12;

/// The youngest of [`NEEDED`] (Linux 4.11): a KVM that has it has the others, and asking for each is a system call.
const YOUNGEST: Cap = Cap::ImmediateExit;

/// What the machine cannot do without.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// The processor feature behind a hardware KVM.
///
/// ```
/// use vmm::kvm::{Accel, KvmKind};
///
/// let kind = KvmKind::Hardware(Accel::Svm);
/// assert!(kind.is_usable() && kind.runs_linux());
/// assert!(!KvmKind::Software("no svm in /proc/cpuinfo".into()).runs_linux());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

/// What kind of KVM there is.
///
/// ```
/// use vmm::kvm::{Host, KvmKind};
///
/// match Host::kind() {
///     KvmKind::Hardware(accel) => println!("every guest runs here ({accel:?})"),
///     KvmKind::Software(how) => println!("bare-metal guests run here; Linux in vmm::lab ({how})"),
///     KvmKind::Absent(advice) | KvmKind::Forbidden(advice) => println!("{advice}"),
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// Hardware virtualization: every guest runs.
    Hardware(Accel),
    /// KVM's interface without hardware behind it: bare-metal guests run, Linux guests do not. The text says how it was
    /// recognised.
    Software(String),
    /// No `/dev/kvm`. The text says what to do.
    Absent(String),
    /// `/dev/kvm` is not ours to open. The text says what to do.
    Forbidden(String),
}

impl KvmKind {
    /// Whether a guest of any kind runs here.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Hardware(_) | Self::Software(_))
    }

    /// Whether a stock Linux kernel runs here.
    pub fn runs_linux(&self) -> bool {
        matches!(self, Self::Hardware(_))
    }
}

/// This host's KVM, described.
///
/// ```
/// use vmm::kvm::Host;
///
/// let host = Host::probe();
/// assert_eq!(host.kind.is_usable(), host.api_version.is_some());
/// println!("machines of up to {} vCPUs; {} capabilities are missing", host.max_cpus, host.missing.len());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// What kind it is.
    pub kind: KvmKind,
    /// Version of the API; 12 on every Linux since 2007. `None` when KVM could not be opened.
    pub api_version: Option<i32>,
    /// Names of needed capabilities that are missing.
    pub missing: Vec<&'static str>,
    /// Most vCPUs of a machine here, 0 when KVM could not be opened.
    pub max_cpus: u8,
    /// Whether this host is itself a virtual machine.
    pub nested: bool,
}

/// Why KVM cannot be used here.
///
/// ```
/// use vmm::kvm::{HostError, KvmKind};
///
/// // What a builder is refused with, Host::kind tells beforehand.
/// let error = HostError::Absent("run: modprobe kvm_amd".into());
/// assert_eq!(error.to_string(), "there is no /dev/kvm: run: modprobe kvm_amd");
/// assert_eq!(KvmKind::from(error), KvmKind::Absent("run: modprobe kvm_amd".into()));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No `/dev/kvm`.
    #[error("there is no {DEV_KVM}: {0}")]
    Absent(String),
    /// `/dev/kvm` is not ours to open.
    #[error("{DEV_KVM} may not be opened: {0}")]
    Forbidden(String),
    /// Another error.
    #[error("{DEV_KVM} could not be opened: {0}")]
    Open(io::Error),
    /// A strange API version.
    #[error("{DEV_KVM} speaks API version {0}, this program 12; is it really KVM?")]
    ApiVersion(i32),
    /// Capabilities that are missing.
    #[error("{DEV_KVM} lacks {}; update the host's kernel", .0.join(", "))]
    Missing(Vec<&'static str>),
}

impl Host {
    /// Looks at this host. Never fails: what is wrong is in the answer.
    pub fn probe() -> Self {
        let flags = CpuFlags::of_host();
        let nested = flags.hypervisor;
        match open() {
            Ok(kvm) => Self {
                kind: flags.kind(),
                api_version: Some(kvm.get_api_version()),
                missing: missing(kvm),
                max_cpus: max_cpus(kvm),
                nested,
            },
            Err(e) => Self { kind: e.into(), api_version: None, missing: Vec::new(), max_cpus: 0, nested },
        }
    }

    /// Whether KVM is there and ours to use, of whatever kind: enough for bare-metal guests.
    pub fn is_usable() -> bool {
        open().is_ok()
    }

    /// The kind alone, which is what decides where a guest can run: a few system calls instead of dozens.
    pub fn kind() -> KvmKind {
        match open() {
            Ok(_) => CpuFlags::of_host().kind(),
            Err(e) => e.into(),
        }
    }
}

impl From<HostError> for KvmKind {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Forbidden(advice) => Self::Forbidden(advice),
            HostError::Absent(advice) => Self::Absent(advice),
            other => Self::Absent(other.to_string()),
        }
    }
}

/// Opens KVM and checks that it has what a machine needs.
pub(crate) fn open_checked() -> Result<&'static Kvm, HostError> {
    let kvm = open()?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(HostError::ApiVersion(version));
    }
    if kvm.check_extension(YOUNGEST) { Ok(kvm) } else { Err(HostError::Missing(missing(kvm))) }
}

/// One descriptor serves all of a process's machines; it is opened once, and stays.
fn open() -> Result<&'static Kvm, HostError> {
    static OPENED: OnceLock<Kvm> = OnceLock::new();
    if let Some(kvm) = OPENED.get() {
        return Ok(kvm);
    }
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => HostError::Absent(absent_advice()),
        libc::EACCES | libc::EPERM => HostError::Forbidden(forbidden_advice(Path::new(DEV_KVM))),
        errno => HostError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    Ok(OPENED.get_or_init(|| kvm))
}

fn missing(kvm: &Kvm) -> Vec<&'static str> {
    NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect()
}

/// Most vCPUs that both KVM and our tables allow.
pub(crate) fn max_cpus(kvm: &Kvm) -> u8 {
    u8::try_from(kvm.get_max_vcpus()).unwrap_or(MAX_CPUS).min(MAX_CPUS)
}

fn absent_advice() -> String {
    let flags = CpuFlags::of_host();
    match flags.accel {
        Some(Accel::Vmx) => "load its module with 'modprobe kvm_intel', or give this container the device".into(),
        Some(Accel::Svm) => "load its module with 'modprobe kvm_amd', or give this container the device".into(),
        None if flags.hypervisor => {
            "this is a virtual machine without nested virtualization; switch it on in the host, or use --accel lab".into()
        }
        None => "switch on VT-x or AMD-V in the firmware, or use --accel lab".into(),
    }
}

/// Who may open the device: its group.
fn forbidden_advice(device: &Path) -> String {
    let gid = fs::metadata(device).map(|meta| meta.gid()).unwrap_or(0);
    match group_name(&fs::read_to_string("/etc/group").unwrap_or_default(), gid) {
        Some(group) if gid != 0 => {
            format!("it belongs to the group '{group}'; 'sudo usermod -aG {group} $USER', then log in again")
        }
        _ if gid != 0 => format!("it belongs to the group {gid}; become a member of it, then log in again"),
        _ => {
            "only root may open it; 'sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm' opens it to a group"
                .into()
        }
    }
}

fn group_name(etc_group: &str, gid: u32) -> Option<String> {
    etc_group.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

/// The flags of `/proc/cpuinfo` that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CpuFlags {
    accel: Option<Accel>,
    hypervisor: bool,
}

impl CpuFlags {
    /// Those of the first processor; the others have the same, and on a host with hundreds all of them are a megabyte.
    fn of_host() -> Self {
        static READ: OnceLock<CpuFlags> = OnceLock::new();
        *READ.get_or_init(Self::read)
    }

    fn read() -> Self {
        // One entry takes 1.5 to 2.5 KB, and the kernel returns whole entries.
        let mut start = [0; 8192];
        let len = File::open("/proc/cpuinfo").and_then(|mut file| file.read(&mut start)).unwrap_or(0);
        Self::parse(&String::from_utf8_lossy(&start[..len]))
    }

    fn parse(cpuinfo: &str) -> Self {
        let line = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = |flag| line.split_whitespace().any(|word| word == flag);
        let accel = match (has("vmx"), has("svm")) {
            (true, _) => Some(Accel::Vmx),
            (false, true) => Some(Accel::Svm),
            (false, false) => None,
        };
        Self { accel, hypervisor: has("hypervisor") }
    }

    fn kind(self) -> KvmKind {
        match self.accel {
            Some(accel) => KvmKind::Hardware(accel),
            None => KvmKind::Software(
                "/dev/kvm is there, but the CPU has neither vmx nor svm: it interprets kernel code".into(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_told_by_the_cpu_flags() {
        let kind = |flags: &str| CpuFlags::parse(&format!("processor\t: 0\nflags\t\t: {flags}\n")).kind();
        assert_eq!(kind("fpu vmx sse"), KvmKind::Hardware(Accel::Vmx));
        assert_eq!(kind("fpu svm hypervisor"), KvmKind::Hardware(Accel::Svm));
        assert!(matches!(kind("fpu hypervisor vmx_nothing"), KvmKind::Software(_)));
        assert!(!kind("fpu").runs_linux() && kind("fpu").is_usable());
        assert!(CpuFlags::parse("flags : hypervisor").hypervisor);
    }

    #[test]
    fn advice_names_the_group_that_may_open_the_device() {
        let groups = "root:x:0:\nkvm:x:104:alice\n";
        assert_eq!(group_name(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 7), None);
        assert_eq!(group_name("broken\n::\n", 0), None);
    }

    #[test]
    fn a_host_that_has_the_youngest_capability_lacks_none() {
        if let Ok(kvm) = open_checked() {
            assert_eq!(missing(kvm), Vec::<&str>::new());
        }
    }

    #[test]
    fn probing_answers_on_every_host() {
        let host = Host::probe();
        assert_eq!(host.kind.is_usable(), host.api_version.is_some(), "{host:?}");
        assert_eq!(host.kind, Host::kind());
    }
}
