//! A guest that is smoltcp: another TCP than the kernel's, in this process, without offloads, without a TAP.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;
use std::time::Instant;

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

/// The guest, 192.168.122.2, and its network.
pub(crate) struct Smol {
    pub(crate) nat: Nat,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    ring: Ring,
    start: Instant,
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
        Self { nat, wire, interface, sockets, ring, start: Instant::now() }
    }

    pub(crate) fn connect(&mut self, to: SocketAddrV4, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 200_000]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.connect(self.interface.context(), (*to.ip(), to.port()), port).unwrap();
        self.sockets.add(socket)
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn turn(&mut self) -> bool {
        let now = SmolInstant::from_micros(i64::try_from(self.start.elapsed().as_micros()).unwrap());
        let _ = self.interface.poll(now, &mut self.wire, &mut self.sockets);
        let sent = !self.wire.to_nat.is_empty();
        for mut frame in self.wire.to_nat.drain(..) {
            let parts = [VolatileSlice::from(frame.as_mut_slice())];
            let _ = self.nat.send(&TxFrame { hdr: VnetHdr::default(), parts: &parts });
        }
        self.ring.free = 256;
        let _ = self.nat.recv(&mut self.ring);
        let received = !self.ring.frames.is_empty();
        self.wire.to_guest.extend(self.ring.frames.drain(..).map(|(_, frame)| frame));
        sent || received
    }

    /// Lets things happen until `done` says so; fails after a long time without.
    pub(crate) fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for idle in 0..3000 {
            while self.turn() {
                if done(self) {
                    return;
                }
            }
            if done(self) {
                return;
            }
            assert!(idle < 2999, "nothing happens any more");
            sys::wait([self.nat.as_fd()], 10);
        }
    }
}
