//! Dialogues between a driver and a NIC whose port is a script.

use super::config::{F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_HOST_TSO4, F_MRG_RXBUF};
use super::*;
use crate::virtio::testing::{DATA, Driver, MEMORY_END, NEEDS_RESET, SEAM, STATUS, into, out};
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use net::testing::{Script, ScriptedPort};
use net::{MAX_FRAME, Offloads, VNET_HDR_LEN, VnetHdr};

mod ctrl;
mod fuzz;
mod life;
mod rx;
mod tx;

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);

/// A guest with its NIC, the network's script, and the NIC's counters.
struct Lab {
    guest: Driver,
    script: Script,
    monitor: NetMonitor,
}

impl Lab {
    /// Powered on, no driver yet.
    fn new(offloads: Offloads) -> Self {
        let (port, script) = ScriptedPort::new(offloads).unwrap();
        let (nic, worker) = Net::new(MAC, Box::new(port)).unwrap();
        let monitor = nic.monitor();
        Self { guest: Driver::new(nic, worker), script, monitor }
    }

    /// With a running driver that has accepted `features` of a port with every ability.
    fn started(features: u64) -> Self {
        let mut lab = Self::new(Offloads::all());
        lab.guest.start(features);
        lab
    }

    /// Both ways of telling each other about rings: flags and event indices.
    fn both(features: u64) -> [Self; 2] {
        [Self::started(features), Self::started(features | F_EVENT_IDX)]
    }

    /// Makes a frame available for sending, header and all, in one buffer at `addr`.
    fn offer_frame(&mut self, addr: u64, hdr: VnetHdr, frame: &[u8]) -> u16 {
        self.guest.fill(addr, &hdr.to_bytes());
        self.guest.fill(addr + VNET_HDR_LEN as u64, frame);
        self.guest.add(TX, &[out(addr, VNET_HDR_LEN + frame.len())])
    }

    /// Posts a receive buffer.
    fn post(&mut self, addr: u64, len: usize) -> u16 {
        self.guest.add(RX, &[into(addr, len)])
    }

    /// The header that the NIC wrote at `addr`.
    fn header(&self, addr: u64, frame_len: usize) -> VnetHdr {
        let bytes = self.guest.bytes(addr, VNET_HDR_LEN).try_into().unwrap();
        VnetHdr::parse(&bytes, frame_len).unwrap()
    }
}

/// A frame whose bytes tell which frame and where in it they are.
fn frame(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|n| seed.wrapping_add(n as u8).wrapping_mul(31)).collect()
}
