//! A guest that is smoltcp: another TCP than the kernel's, in this process, without offloads, without a TAP.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use net::FramePort;
use net::nat::Nat;
use net::{TxFrame, VnetHdr};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};
use vm_memory::VolatileSlice;

use super::sys;
use crate::common::guest::Ring;

/// Frames on their way.
#[derive(Default)]
struct Wire {
    to_guest: VecDeque<Vec<u8>>,
    to_nat: Vec<Vec<u8>>,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _now: SmolInstant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Rx(frame), Tx(&mut self.to_nat)))
    }

    fn transmit(&mut self, _now: SmolInstant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.to_nat))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// One direction of a bad wire: of a hundred frames one is lost, one comes twice, one comes behind the next one, and
/// one has a bit wrong. The same seed does the same to the same frames.
pub(crate) struct Faults {
    state: u64,
    late: Option<Vec<u8>>,
}

impl Faults {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed, late: None }
    }

    /// A number below `bound`, of a linear congruential generator.
    fn below(&mut self, bound: usize) -> usize {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as usize % bound
    }

    /// What comes out when `frame` goes in.
    fn pass(&mut self, mut frame: Vec<u8>) -> Vec<Vec<u8>> {
        match self.below(100) {
            0 => return Vec::new(),
            1 => return vec![frame.clone(), frame],
            2 => return self.late.replace(frame).into_iter().collect(),
            // ARP has no checksum: nobody could know.
            3 if frame[12..14] == [8, 0] => {
                let at = 14 + self.below(frame.len() - 14);
                frame[at] ^= 1 << self.below(8);
            }
            _ => {}
        }
        [Some(frame), self.late.take()].into_iter().flatten().collect()
    }
}

/// The guest, 192.168.122.2, and its network.
pub(crate) struct Smol {
    pub(crate) nat: Nat,
    /// Towards the NAT, and towards the guest.
    faults: Option<[Faults; 2]>,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    ring: Ring,
    start: Instant,
    /// By how much the guest's clock is ahead.
    ahead: Duration,
}

impl Smol {
    pub(crate) fn new(nat: Nat) -> Self {
        let mut wire = Wire::default();
        let mac = HardwareAddress::Ethernet(EthernetAddress([0x52, 0x54, 0, 1, 2, 3]));
        let mut interface = Interface::new(Config::new(mac), &mut wire, SmolInstant::ZERO);
        interface.update_ip_addrs(|addrs| {
            addrs.push(IpCidr::new(IpAddress::v4(192, 168, 122, 2), 24)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(192, 168, 122, 1)).unwrap();
        let (sockets, ring) = (SocketSet::new(Vec::new()), Ring::new(256, 2048));
        Self {
            nat,
            faults: None,
            wire,
            interface,
            sockets,
            ring,
            start: Instant::now(),
            ahead: Duration::ZERO,
        }
    }

    pub(crate) fn connect(&mut self, to: SocketAddrV4, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 200_000]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.connect(self.interface.context(), (*to.ip(), to.port()), port).unwrap();
        self.sockets.add(socket)
    }

    /// Makes the wire bad, or good again.
    pub(crate) fn faults(&mut self, faults: Option<[Faults; 2]>) {
        self.faults = faults;
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn now(&self) -> SmolInstant {
        let elapsed = self.start.elapsed() + self.ahead;
        SmolInstant::from_micros(i64::try_from(elapsed.as_micros()).unwrap())
    }

    fn turn(&mut self) -> bool {
        let now = self.now();
        let _ = self.interface.poll(now, &mut self.wire, &mut self.sockets);
        let sent = !self.wire.to_nat.is_empty();
        let mut frames: Vec<_> = self.wire.to_nat.drain(..).collect();
        if let Some([faults, _]) = &mut self.faults {
            frames = frames.into_iter().flat_map(|frame| faults.pass(frame)).collect();
        }
        for mut frame in frames {
            let parts = [VolatileSlice::from(frame.as_mut_slice())];
            let _ = self.nat.send(&TxFrame { hdr: VnetHdr::default(), parts: &parts });
        }
        self.ring.free = 256;
        let _ = self.nat.recv(&mut self.ring);
        let received = !self.ring.frames.is_empty();
        for (_, frame) in self.ring.frames.drain(..) {
            match &mut self.faults {
                Some([_, faults]) => self.wire.to_guest.extend(faults.pass(frame)),
                None => self.wire.to_guest.push_back(frame),
            }
        }
        sent || received
    }

    /// Lets things happen until `done` says so; fails after a long time without.
    pub(crate) fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let mut idle = 0;
        loop {
            while self.turn() {
                idle = 0;
                if done(self) {
                    return;
                }
            }
            if done(self) {
                return;
            }
            idle += 1;
            assert!(idle < 3000, "nothing happens any more");
            let [readable] = sys::wait([self.nat.as_fd()], if self.faults.is_some() { 2 } else { 10 });
            // smoltcp retransmits after whole seconds: on a bad wire its clock jumps there when nothing else is to come.
            if self.faults.is_some() && !readable {
                let delay = self.interface.poll_delay(self.now(), &self.sockets);
                self.ahead += delay.map_or(Duration::ZERO, Duration::from);
            }
        }
    }
}
