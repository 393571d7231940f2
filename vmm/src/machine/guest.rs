//! What a machine boots, as one thing: an image, the built-in probe, or a kernel and an initrd of the caller's.
//!
//! **Enters:** where kernel, initrd and disk are, which init is in them, and what this boot is to do. **Leaves**, in
//! [`MachineBuilder::guest`], the settings that such a guest wants:
//!
//! | guest | a command is run by | its host name is told | serial input waits for | disk | balloon |
//! |---|---|---|---|---|---|
//! | [`Guest::image`], all in the initrd | the image's init | to the init | the init to be ready | – | yes |
//! | [`Guest::image`] with a disk | refused: ssh, the agent | by `systemd.hostname=` | the kernel's driver | an overlay on the image's | yes |
//! | [`Guest::linux`] | the initrd's init, if it is ours | to the init, if it is ours | the init, the driver | – | yes |
//! | [`Guest::probe`] | refused | – | nothing | – | no |
//!
//! A command and a host name travel in a small archive behind the initrd ([`guest_images::initrd`]): the image stays as it is.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use devices::disk::{Disk, DiskError, DiskMode};
use devices::serial::Hold;
use guest_images::Image;
use guest_images::initrd::{self, Console, Request};

use super::builder::{DEFAULT_CMDLINE, MachineBuilder};
use crate::boot::Kernel;

/// For Linux, besides [`DEFAULT_CMDLINE`]: its kernel says nothing below "critical", since the console belongs to the command or the shell. ("quiet"
/// would let it complain that there is no PCI bus.) A `loglevel=7` that comes later, and therefore counts, shows a boot in full.
const CALM: &str = "loglevel=3";

/// Who is process 1 in a guest.
///
/// ```
/// use vmm::machine::{Guest, Init};
///
/// assert_eq!(Guest::probe().init(), Init::Absent);
/// // A kernel and an initrd of one's own may have any init.
/// assert_eq!(Guest::linux("vmlinuz").initrd("initrd.img").init(), Init::Other);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Nobody: the kernel is a bare-metal program.
    Absent,
    /// The init of our images ([`guest_images::INIT`]): it runs a command or a shell, and says when it is ready for input.
    Ours,
    /// Another one, such as systemd or a distribution's initrd.
    Other,
}

/// Why a machine can't have this guest.
///
/// ```
/// use vmm::machine::{Guest, GuestError, Machine};
///
/// let refused = Machine::builder().guest(Guest::probe().command(["ls"])).err();
/// assert!(matches!(refused, Some(GuestError::NoCommand { .. })));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The guest runs what it runs.
    #[error(
        "{guest} runs no command of yours when it boots; once it is up, use its agent (vmm::agent, pontoon exec), ssh, or its console"
    )]
    NoCommand {
        /// What it is called.
        guest: String,
    },
    /// There is nothing to carry the command in.
    #[error(
        "the guest has no initrd, behind which its command would be carried; give it one whose init is ours"
    )]
    NoInitrd,
    /// The initrd can't be read.
    #[error("could not read the initrd {}: {source}; name a readable cpio archive", path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The command or the host name can't be carried.
    #[error(transparent)]
    Request(#[from] initrd::Error),
    /// The image's disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What a machine boots, and what it is to do.
///
/// ```no_run
/// use guest_images::Store;
/// use vmm::machine::{Guest, Machine};
///
/// let image = Store::open_default()?.get("debian")?;
/// let guest = Guest::image(&image).command(["uname", "-a"]).hostname("vm1");
/// let machine = Machine::builder().guest(guest)?.serial_output(std::io::stdout()).build()?.start()?;
/// // The command's status is the machine's.
/// assert_eq!(machine.wait().status(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Guest {
    name: String,
    kernel: Kernel,
    initrd: Option<Kernel>,
    init: Init,
    disk: Option<PathBuf>,
    /// What the image needs of the kernel's command line.
    needs: String,
    /// What the caller adds to it.
    words: String,
    request: Request,
}

impl From<&Image> for Guest {
    fn from(image: &Image) -> Self {
        Self::image(image)
    }
}

impl Guest {
    fn new(name: String, kernel: Kernel, init: Init) -> Self {
        let (needs, words, request) = (String::new(), String::new(), Request::default());
        Self { name, kernel, initrd: None, init, disk: None, needs, words, request }
    }

    /// An image of [`guest_images::Store`]. Unless it is given a command, it boots to a login shell on its console.
    pub fn image(image: &Image) -> Self {
        let init = if image.disk.is_some() { Init::Other } else { Init::Ours };
        Self {
            initrd: Some(Kernel::Path(image.initrd.clone())),
            disk: image.disk.clone(),
            needs: image.manifest.cmdline.clone(),
            ..Self::new(image.manifest.name.clone(), Kernel::Path(image.kernel.clone()), init)
        }
    }

    /// The probe, a bare-metal guest inside of this library (docs/probe.md): its orders are [`Self::words`]. It wants 64 MiB.
    ///
    /// ```no_run
    /// use net::nat::NatConfig;
    /// use vmm::machine::{Guest, Machine};
    /// use vmm::network::Network;
    ///
    /// let network = Network::nat(NatConfig::default())?;
    /// let probe = Guest::probe().words("probe.do=dhcp;ping=gw,count=3");
    /// let machine = Machine::builder().guest(probe)?.memory(64 << 20).nic(network.nic("probe")?).build()?.start()?;
    /// assert_eq!(machine.wait().status(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn probe() -> Self {
        Self::new("the probe".to_owned(), Kernel::Bytes(Cow::Borrowed(guest_images::PROBE)), Init::Absent)
    }

    /// A Linux kernel of the caller's: a bzImage or a `vmlinux`.
    ///
    /// ```no_run
    /// use devices::disk::{Disk, DiskMode};
    /// use vmm::machine::{Guest, Machine};
    ///
    /// let cloud = Guest::linux("vmlinuz").initrd("initrd.img").words("root=/dev/vda1");
    /// let disk = Disk::open("noble.img", DiskMode::Overlay)?;
    /// let machine = Machine::builder().guest(cloud)?.disk(disk).memory(1 << 30).build()?.start()?;
    /// machine.wait();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn linux(kernel: impl Into<Kernel>) -> Self {
        let kernel = kernel.into();
        Self::new(kernel.name(), kernel, Init::Other)
    }

    /// Another initrd.
    #[must_use]
    pub fn initrd(mut self, initrd: impl Into<Kernel>) -> Self {
        self.initrd = Some(initrd.into());
        self
    }

    /// The initrd of [`Self::linux`] is one of our images', or has their init.
    #[must_use]
    pub fn our_init(mut self) -> Self {
        self.init = Init::Ours;
        self
    }

    /// What the guest's init is to run, instead of a shell: a program, looked up in PATH, and its arguments. Its output is the
    /// console, its status becomes the machine's ([`super::ExitReason::Status`]). The console carries bytes then, unless
    /// [`Self::console`] says otherwise afterwards.
    #[must_use]
    pub fn command(mut self, argv: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.request.argv = argv.into_iter().map(Into::into).collect();
        self.request.console = if self.request.argv.is_empty() { Console::Terminal } else { Console::Bytes };
        self
    }

    /// Adds a variable to the command's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.env.push((name.into(), value.into()));
        self
    }

    /// How the guest's init treats its console: as a terminal for people, or as eight clean bits each way.
    #[must_use]
    pub fn console(mut self, console: Console) -> Self {
        self.request.console = console;
        self
    }

    /// The guest's host name, where it can be told one (see the module's table).
    #[must_use]
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.request.hostname = Some(name.into());
        self
    }

    /// Words for the end of the kernel's command line.
    #[must_use]
    pub fn words(mut self, words: impl Into<String>) -> Self {
        self.words = words.into();
        self
    }

    /// Who is process 1.
    pub fn init(&self) -> Init {
        self.init
    }

    /// The kernel, and the initrd if there is one.
    pub fn files(&self) -> (&Kernel, Option<&Kernel>) {
        (&self.kernel, self.initrd.as_ref())
    }

    /// The image's disk; each machine has an overlay of its own on it.
    pub fn disk(&self) -> Option<&Path> {
        self.disk.as_deref()
    }

    /// What the kernel's command line has besides what every Linux guest gets: what the image needs, then [`Self::words`].
    pub fn extra_words(&self) -> String {
        let mut all = self.needs.clone();
        // systemd(1): it comes before /etc/hostname, and networkd tells it to DHCP.
        let name = self.request.hostname.as_ref().filter(|_| self.disk.is_some());
        let hostname = name.map(|name| format!("systemd.hostname={name}"));
        for more in [hostname.as_deref().unwrap_or_default(), &self.words] {
            join(&mut all, more);
        }
        all
    }

    fn cmdline(&self) -> String {
        let extra = self.extra_words();
        if self.init == Init::Absent {
            return extra;
        }
        let mut line = DEFAULT_CMDLINE.to_owned();
        join(&mut line, CALM);
        join(&mut line, &extra);
        line
    }

    /// The initrd with what this boot is to do behind it: our init reads it, another one ignores it.
    fn initrd_with_request(&self) -> Result<Option<Kernel>, GuestError> {
        if !self.request.argv.is_empty() && self.init != Init::Ours {
            return Err(GuestError::NoCommand { guest: self.name.clone() });
        }
        match &self.initrd {
            None if !self.request.argv.is_empty() => Err(GuestError::NoInitrd),
            None => Ok(None),
            Some(initrd) if self.disk.is_some() || self.request == Request::default() => {
                Ok(Some(initrd.clone()))
            }
            Some(initrd) => {
                let bytes = match initrd {
                    Kernel::Bytes(bytes) => bytes.clone(),
                    Kernel::Path(path) => Cow::Owned(
                        std::fs::read(path)
                            .map_err(|source| GuestError::Initrd { path: path.clone(), source })?,
                    ),
                };
                Ok(Some(Kernel::Bytes(Cow::Owned(initrd::with_request(&bytes, &self.request)?))))
            }
        }
    }
}

/// Puts `more` behind `line`, a blank between them.
fn join(line: &mut String, more: &str) {
    if !line.is_empty() && !more.is_empty() {
        line.push(' ');
    }
    line.push_str(more);
}

impl MachineBuilder {
    /// What the machine boots, in one go: kernel, initrd, command line, [`Self::bare_metal`], [`Self::balloon`] and
    /// [`Self::hold_input`] are as the guest wants them (see [`Guest`]), and its disk, if it has one, is the next of the machine's.
    /// What is said afterwards counts.
    ///
    /// # Errors
    /// [`GuestError`].
    pub fn guest(self, guest: impl Into<Guest>) -> Result<Self, GuestError> {
        let guest = guest.into();
        let linux = guest.init != Init::Absent;
        let hold = match guest.init {
            Init::Absent => None,
            Init::Ours => Some(Hold::Out1),
            Init::Other => Some(Hold::Interrupt),
        };
        let initrd = guest.initrd_with_request()?;
        let builder = self.cmdline(guest.cmdline()).bare_metal(!linux).balloon(linux).hold_input(hold);
        let builder = match &guest.disk {
            Some(path) => builder.disk(Disk::open(path, DiskMode::Overlay)?),
            None => builder,
        };
        let builder = builder.kernel(guest.kernel);
        Ok(match initrd {
            Some(initrd) => builder.initrd(initrd),
            None => builder,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    const ARCHIVE: &[u8] = b"070701: an initrd of some length";

    fn initrd_of(guest: &Guest) -> Vec<u8> {
        match guest.initrd_with_request().unwrap() {
            Some(Kernel::Bytes(bytes)) => bytes.into_owned(),
            other => panic!("{other:?}"),
        }
    }

    /// A kernel whose initrd is [`ARCHIVE`].
    fn linux() -> Guest {
        Guest::linux("vmlinuz").initrd(Kernel::Bytes(Cow::Borrowed(ARCHIVE)))
    }

    #[test]
    fn a_command_and_a_host_name_are_carried_behind_the_initrd() {
        let guest = linux().our_init().command(["echo", "two words"]).env("A", "b").hostname("vm1");
        let request = Request {
            argv: vec!["echo".into(), "two words".into()],
            env: vec![("A".into(), "b".into())],
            hostname: Some("vm1".into()),
            console: Console::Bytes,
        };
        assert_eq!(initrd_of(&guest), initrd::with_request(ARCHIVE, &request).unwrap());
        assert_eq!(guest.cmdline(), format!("{DEFAULT_CMDLINE} {CALM}"));
    }

    #[test]
    fn an_initrd_with_nothing_to_carry_is_not_read() {
        let guest = Guest::linux("vmlinuz").initrd("/nonexistent/initrd").words("root=/dev/vda1");
        assert!(matches!(guest.initrd_with_request(), Ok(Some(Kernel::Path(_)))));
        assert_eq!(guest.cmdline(), format!("{DEFAULT_CMDLINE} {CALM} root=/dev/vda1"));
        let named = guest.hostname("vm1").initrd_with_request();
        assert!(matches!(named, Err(GuestError::Initrd { .. })), "{named:?}");
    }

    #[test]
    fn a_command_that_nobody_would_run_is_refused() {
        let refused = |guest: Guest| Machine::builder().guest(guest.command(["ls"])).err();
        assert!(matches!(refused(Guest::probe()), Some(GuestError::NoCommand { .. })));
        assert!(matches!(refused(linux()), Some(GuestError::NoCommand { .. })));
        assert!(matches!(refused(Guest::linux("vmlinuz").our_init()), Some(GuestError::NoInitrd)));
        let bad = refused(linux().our_init().hostname("no_name"));
        assert!(matches!(bad, Some(GuestError::Request(initrd::Error::Hostname(_)))), "{bad:?}");
    }

    #[test]
    fn a_system_on_a_disk_is_told_its_name_and_boots_from_an_overlay() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.img");
        std::fs::write(&disk, [7; 512]).unwrap();
        let system =
            Guest { disk: Some(disk.clone()), needs: "root=UUID=1".into(), ..linux() }.hostname("vm1");
        assert_eq!(system.extra_words(), "root=UUID=1 systemd.hostname=vm1");
        assert_eq!(initrd_of(&system), ARCHIVE, "its own init reads no request");
        let boots = |guest: &Guest| Machine::builder().guest(guest.clone());
        let (first, second) = (boots(&system), boots(&system));
        assert!(first.is_ok() && second.is_ok(), "any number of machines");
        let writer = Disk::open(&disk, DiskMode::ReadWrite);
        assert!(matches!(writer, Err(DiskError::InUse(_) | DiskError::Written(_))), "nobody writes to it");
        drop((first, second));
        std::fs::remove_file(&disk).unwrap();
        assert!(matches!(boots(&system).err(), Some(GuestError::Disk(_))));
    }

    #[test]
    fn the_probe_gets_its_orders_alone() {
        let probe = Guest::probe().words("probe.do=dhcp").hostname("vm1");
        assert_eq!(probe.cmdline(), "probe.do=dhcp");
        assert!(matches!(probe.initrd_with_request(), Ok(None)));
    }
}
