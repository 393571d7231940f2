//! The control queue (virtio 1.3 §5.1.6.5): class, command and data in, one byte of acknowledgement out.
//!
//! `CTRL_RX` (promiscuous and its relatives) is acknowledged and changes nothing: the port delivers what is for this
//! NIC, and filters are a service that a device gives "best effort". The same holds for `CTRL_MAC_TABLE_SET`, which
//! Linux sends whenever it has `CTRL_RX`; its table may be of any length and is not read. `CTRL_GUEST_OFFLOADS`
//! reaches the port. Every
//! other command, and data of the wrong length, is answered with `VIRTIO_NET_ERR`. A chain without room for the
//! acknowledgement breaks the queue, as any broken chain does. At most [`CTRL_BUDGET`] commands are served in a turn.

use net::FramePort;
use virtio_bindings::virtio_net as net_bits;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::config::{
    F_CTRL_GUEST_OFFLOADS, F_CTRL_RX, F_CTRL_RX_EXTRA, GUEST_OFFLOADS, consistent, guest_offloads,
};
use crate::virtio::{QueueError, Ring};

/// Most commands of one turn.
pub const CTRL_BUDGET: usize = 16;
/// Class, command and the longest data that any command here is read for.
const LONGEST: usize = 2 + 8;

const CLASS_RX: u8 = net_bits::VIRTIO_NET_CTRL_RX as u8;
const CLASS_MAC: u8 = net_bits::VIRTIO_NET_CTRL_MAC as u8;
const MAC_TABLE_SET: u8 = net_bits::VIRTIO_NET_CTRL_MAC_TABLE_SET as u8;
/// The two counts of a MAC table, one of them for each kind of address.
const MAC_TABLE_MIN: usize = 2 * size_of::<u32>();
const CLASS_GUEST_OFFLOADS: u8 = net_bits::VIRTIO_NET_CTRL_GUEST_OFFLOADS as u8;
const OFFLOADS_SET: u8 = net_bits::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET as u8;
const RX_ALLMULTI: u8 = net_bits::VIRTIO_NET_CTRL_RX_ALLMULTI as u8;
const RX_NOBCAST: u8 = net_bits::VIRTIO_NET_CTRL_RX_NOBCAST as u8;

/// Serves the commands that are available; true when there may be more.
pub(super) fn serve(
    mem: &GuestMemoryMmap,
    ring: &mut Ring,
    features: u64,
    port: &mut dyn FramePort,
) -> Result<bool, QueueError> {
    let mut budget = CTRL_BUDGET;
    loop {
        while budget > 0 {
            let Some(chain) = ring.pop(mem)? else { break };
            budget -= 1;
            let head = chain.head_index();
            let (mut readable, mut writable) = (Vec::new(), Vec::new());
            Ring::collect_both(mem, chain, &mut readable, &mut writable)?;
            let Some(ack) = writable.first() else { return Err(QueueError::TooSmall { head, bytes: 0 }) };
            let ok = execute(&read_command(&readable), features, port);
            let answer = if ok { net_bits::VIRTIO_NET_OK } else { net_bits::VIRTIO_NET_ERR };
            ack.copy_from(&[answer as u8]);
            ring.add_used(mem, head, 1)?;
        }
        if budget == 0 || !ring.arm(mem, ring.position())? {
            break;
        }
    }
    ring.publish(mem)?;
    Ok(budget == 0)
}

/// A command as copied from guest memory.
struct Command {
    bytes: [u8; LONGEST],
    /// Bytes of the whole command; those beyond [`LONGEST`] were not copied.
    len: usize,
}

fn read_command(readable: &[VolatileSlice<'_>]) -> Command {
    let mut command = Command { bytes: [0; LONGEST], len: 0 };
    for piece in readable {
        if let Some(to) = command.bytes.get_mut(command.len..) {
            piece.copy_to(to);
        }
        command.len += piece.len();
    }
    command
}

/// Does what the guest asks; whether it was possible.
fn execute(command: &Command, features: u64, port: &mut dyn FramePort) -> bool {
    let has = |feature: u64| features & feature != 0;
    if let [CLASS_MAC, MAC_TABLE_SET, ..] = command.bytes {
        return has(F_CTRL_RX) && command.len >= 2 + MAC_TABLE_MIN;
    }
    let Some(bytes) = command.bytes.get(..command.len) else { return false };
    match bytes {
        [CLASS_RX, 0..=RX_ALLMULTI, 0 | 1] => has(F_CTRL_RX),
        [CLASS_RX, 2..=RX_NOBCAST, 0 | 1] => has(F_CTRL_RX_EXTRA),
        [CLASS_GUEST_OFFLOADS, OFFLOADS_SET, data @ ..] if has(F_CTRL_GUEST_OFFLOADS) => {
            <[u8; 8]>::try_from(data).is_ok_and(|bits| set_offloads(u64::from_le_bytes(bits), features, port))
        }
        _ => false,
    }
}

fn set_offloads(wanted: u64, features: u64, port: &mut dyn FramePort) -> bool {
    // The command can take back what was negotiated, and give it again, nothing more (§5.1.6.5.6.2).
    if wanted & !(features & GUEST_OFFLOADS) != 0 || !consistent(wanted) {
        return false;
    }
    let result = port.set_offloads(guest_offloads(wanted));
    if let Err(error) = &result {
        tracing::warn!(%error, wanted, "the port refused other offloads; the guest is told so");
    }
    result.is_ok()
}
