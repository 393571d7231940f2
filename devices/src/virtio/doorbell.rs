//! [`Doorbell`]: what gives a device's worker a turn.

use std::io;

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// One eventfd for all that calls for a turn of a device's worker: a kick of any of its queues, written by KVM without
/// leaving the kernel or by the transport, and what the device has to tell itself: an activation, a reset, a turn whose budget
/// was used up.
///
/// Which queue was kicked is not told. Looking at a ring that has nothing new costs less than a descriptor, an ioeventfd and
/// a registration for each queue of each device; and KVM on Intel's processors answers a write to an ioeventfd
/// that takes any value without decoding the guest's instruction.
///
/// ```
/// use devices::virtio::Doorbell;
///
/// let bell = Doorbell::new()?;
/// bell.ring();
/// bell.ring();
/// assert!(bell.silence(), "however often it was rung, it is one turn");
/// assert!(!bell.silence());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Doorbell(EventFd);

impl Doorbell {
    /// A silent doorbell.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }

    /// Calls for a turn, behind those that other devices' events have called for.
    pub fn ring(&self) {
        // Fails only when the counter is at its limit, and then it is readable anyway.
        let _ = self.0.write(1);
    }

    /// Silences it, before the turn that looks at the rings. Whether it had rung.
    pub fn silence(&self) -> bool {
        self.0.read().is_ok()
    }

    /// The eventfd, for KVM and for whoever else rings.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }

    /// Lets the worker of `device` hear it, as `token`.
    pub(in crate::virtio) fn listen(&self, ops: &mut EventOps, token: u32, device: &'static str) {
        if let Err(error) = ops.add(Events::with_data(&self.0, token, EventSet::IN)) {
            tracing::error!(%error, device, "its doorbell can't be polled, and it will not work");
        }
    }
}
