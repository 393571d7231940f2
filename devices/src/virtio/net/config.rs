//! Features and configuration space of a NIC (virtio 1.3 §5.1.3, §5.1.4).
//!
//! What is offered follows from [`net::Offloads`] of the port: whoever completes checksums and cuts super-segments
//! for the guest may also hand such frames to it.

use std::sync::atomic::{AtomicBool, Ordering};

use net::{MacAddr, Offloads};
use virtio_bindings::virtio_net as bit;

use crate::virtio::read_config_space;

pub(super) const F_CSUM: u64 = 1 << bit::VIRTIO_NET_F_CSUM;
pub(super) const F_GUEST_CSUM: u64 = 1 << bit::VIRTIO_NET_F_GUEST_CSUM;
pub(super) const F_CTRL_GUEST_OFFLOADS: u64 = 1 << bit::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
pub(super) const F_MTU: u64 = 1 << bit::VIRTIO_NET_F_MTU;
pub(super) const F_MAC: u64 = 1 << bit::VIRTIO_NET_F_MAC;
pub(super) const F_GUEST_TSO4: u64 = 1 << bit::VIRTIO_NET_F_GUEST_TSO4;
pub(super) const F_GUEST_TSO6: u64 = 1 << bit::VIRTIO_NET_F_GUEST_TSO6;
pub(super) const F_GUEST_ECN: u64 = 1 << bit::VIRTIO_NET_F_GUEST_ECN;
pub(super) const F_HOST_TSO4: u64 = 1 << bit::VIRTIO_NET_F_HOST_TSO4;
pub(super) const F_HOST_TSO6: u64 = 1 << bit::VIRTIO_NET_F_HOST_TSO6;
pub(super) const F_HOST_ECN: u64 = 1 << bit::VIRTIO_NET_F_HOST_ECN;
pub(super) const F_MRG_RXBUF: u64 = 1 << bit::VIRTIO_NET_F_MRG_RXBUF;
pub(super) const F_STATUS: u64 = 1 << bit::VIRTIO_NET_F_STATUS;
pub(super) const F_CTRL_VQ: u64 = 1 << bit::VIRTIO_NET_F_CTRL_VQ;
pub(super) const F_CTRL_RX: u64 = 1 << bit::VIRTIO_NET_F_CTRL_RX;
pub(super) const F_CTRL_RX_EXTRA: u64 = 1 << bit::VIRTIO_NET_F_CTRL_RX_EXTRA;
pub(super) const F_GUEST_USO4: u64 = 1 << bit::VIRTIO_NET_F_GUEST_USO4;
pub(super) const F_GUEST_USO6: u64 = 1 << bit::VIRTIO_NET_F_GUEST_USO6;
pub(super) const F_HOST_USO: u64 = 1 << bit::VIRTIO_NET_F_HOST_USO;

/// The features that say what the guest takes over in reception; `CTRL_GUEST_OFFLOADS` switches among them.
pub(super) const GUEST_OFFLOADS: u64 =
    F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_USO4 | F_GUEST_USO6;

/// The features that a port's abilities allow.
pub(super) fn offered(port: Offloads) -> u64 {
    let always = F_MAC
        | F_MTU
        | F_STATUS
        | F_MRG_RXBUF
        | F_CTRL_VQ
        | F_CTRL_RX
        | F_CTRL_RX_EXTRA
        | F_CTRL_GUEST_OFFLOADS;
    let by_port = [
        (Offloads::CSUM, F_CSUM | F_GUEST_CSUM),
        (Offloads::TSO4, F_HOST_TSO4 | F_GUEST_TSO4),
        (Offloads::TSO6, F_HOST_TSO6 | F_GUEST_TSO6),
        (Offloads::ECN, F_HOST_ECN | F_GUEST_ECN),
        (Offloads::USO, F_HOST_USO | F_GUEST_USO4 | F_GUEST_USO6),
    ];
    let offered =
        by_port.iter().filter(|(able, _)| port.contains(*able)).fold(always, |all, (_, bits)| all | bits);
    // A port that can segment but not complete checksums offers neither.
    DEPENDENCIES.iter().fold(offered, |all, (feature, needs)| {
        if all & feature != 0 && all & needs == 0 { all & !feature } else { all }
    })
}

/// A feature, and those of which it needs at least one (§5.1.3.1). A need comes before what needs it.
const DEPENDENCIES: [(u64, u64); 11] = [
    (F_GUEST_TSO4, F_GUEST_CSUM),
    (F_GUEST_TSO6, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_GUEST_USO4, F_GUEST_CSUM),
    (F_GUEST_USO6, F_GUEST_CSUM),
    (F_HOST_TSO4, F_CSUM),
    (F_HOST_TSO6, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
    (F_HOST_USO, F_CSUM),
    (F_CTRL_RX | F_CTRL_RX_EXTRA, F_CTRL_VQ),
    (F_CTRL_GUEST_OFFLOADS, F_CTRL_VQ),
];

/// Whether no feature lacks what it needs.
pub(super) fn consistent(features: u64) -> bool {
    DEPENDENCIES.iter().all(|(feature, needs)| features & feature == 0 || features & needs != 0)
}

/// What a guest with these features takes over in reception.
pub(super) fn guest_offloads(features: u64) -> Offloads {
    let all = |bits: u64, offload: Offloads| {
        if features & bits == bits { offload } else { Offloads::empty() }
    };
    all(F_GUEST_CSUM, Offloads::CSUM)
        | all(F_GUEST_TSO4, Offloads::TSO4)
        | all(F_GUEST_TSO6, Offloads::TSO6)
        | all(F_GUEST_ECN, Offloads::ECN)
        | all(F_GUEST_USO4 | F_GUEST_USO6, Offloads::USO)
}

/// `struct virtio_net_config`, as far as the offered features define it.
pub(super) struct ConfigSpace {
    mac: MacAddr,
    mtu: u16,
    link_up: AtomicBool,
}

impl ConfigSpace {
    pub(super) fn new(mac: MacAddr, mtu: u16, link_up: bool) -> Self {
        Self { mac, mtu, link_up: AtomicBool::new(link_up) }
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac.0);
        space[6] = if self.link_up.load(Ordering::SeqCst) { bit::VIRTIO_NET_S_LINK_UP as u8 } else { 0 };
        // Bytes 8 and 9, max_virtqueue_pairs, do not exist without VIRTIO_NET_F_MQ.
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        read_config_space(&space, offset, data);
    }

    /// Takes the link's state; true when it is a change.
    pub(super) fn set_link(&self, up: bool) -> bool {
        self.link_up.swap(up, Ordering::SeqCst) != up
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_offer_follows_the_port() {
        let plain = offered(Offloads::empty());
        assert_eq!(plain & (F_CSUM | F_HOST_TSO4 | GUEST_OFFLOADS), 0);
        assert_eq!(plain & F_MRG_RXBUF, F_MRG_RXBUF);
        let full = offered(Offloads::all());
        assert_eq!(full & GUEST_OFFLOADS, GUEST_OFFLOADS);
        assert_eq!(guest_offloads(full), Offloads::all());
        assert_eq!(guest_offloads(full & !F_GUEST_USO6), Offloads::all() - Offloads::USO);
    }

    #[test]
    fn the_configuration_holds_mac_link_and_mtu() {
        let config = ConfigSpace::new(MacAddr([0x52, 0x54, 0, 1, 2, 3]), 1500, true);
        let mut all = [0xaa; 16];
        config.read(0, &mut all);
        assert_eq!(all, [0x52, 0x54, 0, 1, 2, 3, 1, 0, 0, 0, 0xdc, 5, 0, 0, 0, 0]);
        assert!(config.set_link(false));
        assert!(!config.set_link(false));
        let mut status = [0xff; 2];
        config.read(6, &mut status);
        assert_eq!(status, [0, 0]);
        config.read(u64::MAX, &mut status);
        assert_eq!(status, [0, 0]);
    }

    proptest! {
        #[test]
        fn every_offer_is_consistent(bits in 0u8..32) {
            prop_assert!(consistent(offered(Offloads::from_bits_truncate(bits))));
        }
    }

    #[test]
    fn segmentation_without_checksums_is_inconsistent() {
        assert!(!consistent(F_HOST_TSO4));
        assert!(!consistent(F_GUEST_ECN | F_GUEST_CSUM));
        assert!(!consistent(F_CTRL_RX));
        assert!(consistent(F_GUEST_ECN | F_GUEST_TSO6 | F_GUEST_CSUM));
    }
}
