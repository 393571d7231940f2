//! What is asked and answered.

use std::net::Ipv4Addr;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::machine::{Counters, NicCounters};

/// A request: `{"do":"status"}`.
///
/// ```
/// use vmm::runtime::control::Request;
///
/// // One line of JSON each, so a shell can ask, too: socat - UNIX:control.sock
/// let request: Request = serde_json::from_str(r#"{"do":"connect","port":22}"#)?;
/// assert_eq!(request, Request::Connect { port: 22, guest: None });
/// assert_eq!(serde_json::to_string(&Request::PowerButton)?, r#"{"do":"power-button"}"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// What the machine is doing: a [`Status`].
    Status,
    /// The TCP connections through the NAT, at most 256: a list of [`Flow`]. Answered when the network is next served; never, while
    /// the guest has not started its NIC.
    Flows,
    /// Press the power button: the guest is asked to shut down.
    PowerButton,
    /// The guest is being asked to shut down, in whatever way: its end is one that was asked for.
    Stopping,
    /// End the machine at once.
    Kill,
    /// Attach to the console.
    Console {
        /// Type to it, too.
        #[serde(default)]
        write: bool,
    },
    /// Open a TCP connection into the guest.
    Connect {
        /// The guest's port.
        port: u16,
        /// The guest's address; the only guest's, when not said.
        #[serde(default)]
        guest: Option<Ipv4Addr>,
    },
}

/// What a machine is doing.
///
/// ```
/// use vmm::runtime::control::Status;
///
/// // What an older version does not say has its default.
/// let status: Status = serde_json::from_str(r#"{"uptime_ms":1500,"of a later version":1}"#)?;
/// assert_eq!((status.uptime_ms / 1000, status.nics.len()), (1, 0));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Milliseconds since the guest was started, by a clock that does not jump.
    pub uptime_ms: u64,
    /// Its network interfaces, in order.
    pub nics: Vec<Nic>,
    /// DHCP leases of its NAT.
    pub leases: Vec<Lease>,
    /// Who is attached to the console.
    pub consoles: usize,
    /// Bytes of console output that were lost.
    pub serial_lost: u64,
    /// Interrupts of each virtio device, in order.
    pub virtio_interrupts: Vec<u64>,
    /// Accesses of the guest to ports and addresses that no device has.
    pub unclaimed_accesses: u64,
}

/// What an interface has counted, as the host sees it: `rx` is what the guest sent.
///
/// ```
/// use vmm::machine::NicCounters;
/// use vmm::runtime::control::Nic;
///
/// let mut counters = NicCounters::default();
/// counters.device.tx_frames = 3;
/// counters.device.tx_bad_length = 1;
/// let nic = Nic::from(&counters);
/// assert_eq!((nic.from_guest_frames, nic.dropped), (3, vec![("BadLength".to_owned(), 1)]));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nic {
    /// Frames to the guest.
    pub to_guest_frames: u64,
    /// Their bytes.
    pub to_guest_bytes: u64,
    /// Frames from the guest.
    pub from_guest_frames: u64,
    /// Their bytes.
    pub from_guest_bytes: u64,
    /// Frames that were refused, by reason.
    pub dropped: Vec<(String, u64)>,
    /// How often the device stopped because the guest broke its rules.
    pub broken: u64,
}

/// A DHCP lease.
///
/// ```
/// use vmm::runtime::control::Lease;
///
/// let lease: Lease = serde_json::from_str(r#"{"address":"192.168.122.17","mac":"52:54:00:12:34:56"}"#)?;
/// assert_eq!((lease.address.octets()[3], lease.name, lease.expires_s), (17, None, 0));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Its Ethernet address.
    pub mac: String,
    /// The name that it gave.
    #[serde(default)]
    pub name: Option<String>,
    /// Seconds until it ends.
    #[serde(default)]
    pub expires_s: u64,
}

/// A TCP connection through the NAT.
///
/// ```no_run
/// use vmm::runtime::Runtime;
///
/// let mut control = Runtime::open()?.find_alive(&"web".parse()?)?.control()?;
/// for flow in control.flows()? {
///     println!("{} -> {} ({})", flow.guest, flow.world, flow.state);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// The guest's end.
    pub guest: String,
    /// The world's end.
    pub world: String,
    /// How far it is.
    #[serde(default)]
    pub state: String,
}

impl From<&net::nat::Lease> for Lease {
    fn from(lease: &net::nat::Lease) -> Self {
        Self {
            address: lease.address,
            mac: lease.mac.to_string(),
            name: lease.name.clone(),
            expires_s: lease.until.saturating_duration_since(Instant::now()).as_secs(),
        }
    }
}

impl From<&NicCounters> for Nic {
    fn from(counters: &NicCounters) -> Self {
        let (device, port) = (&counters.device, &counters.port);
        let device_drops = [
            ("BadLength", device.tx_bad_length),
            ("BadHeader", device.tx_bad_header),
            ("ReceiveBufferTooSmall", device.rx_too_small),
        ];
        let dropped = port.drops().map(|(why, n)| (format!("{why:?}"), n));
        let ours = device_drops.into_iter().filter(|(_, n)| *n > 0).map(|(why, n)| (why.to_owned(), n));
        Self {
            to_guest_frames: device.rx_frames,
            to_guest_bytes: device.rx_bytes,
            from_guest_frames: device.tx_frames,
            from_guest_bytes: device.tx_bytes,
            dropped: dropped.chain(ours).collect(),
            broken: device.broken,
        }
    }
}

impl From<&Counters> for Status {
    fn from(counters: &Counters) -> Self {
        Self {
            nics: counters.nics.iter().map(Nic::from).collect(),
            serial_lost: counters.serial_lost,
            virtio_interrupts: counters.virtio_interrupts.clone(),
            unclaimed_accesses: counters.unclaimed_ports.saturating_add(counters.unclaimed_mmio),
            ..Self::default()
        }
    }
}
