//! Gives the machine behind a TAP a NAT network, without a virtual machine: for containers, and to measure.
//!
//! ```text
//! attach [--tap-fd N] [--mtu BYTES] [--host-access] [-p [ADDR:]HOST:GUEST[/udp]]…
//! ```
//!
//! The TAP is descriptor 3 unless said otherwise. Two ports stand back to back: what one receives, the other
//! sends. Frames pass through a buffer of ours, which is the one copy more than a virtual machine's NIC makes.

mod sys;

use std::os::fd::AsFd;

use net::nat::{Nat, NatConfig};
use net::tap::TapPort;
use net::{FramePort, Lent, MAX_FRAME, Offloads, Received, RxRing, Sent, TxFrame, VnetHdr};
use vm_memory::VolatileSlice;

/// A ring whose frames are sent to another port at once.
struct Forward<'a> {
    to: &'a mut dyn FramePort,
    lane: &'a mut Lane,
}

/// One direction's buffer, and the frame in it that could not be sent yet.
struct Lane {
    held: Option<(VnetHdr, usize)>,
    lent: Vec<VolatileSlice<'static>>,
}

impl Lane {
    fn new() -> Self {
        // It is needed for as long as the program runs.
        let buffer: &'static mut [u8] = Box::leak(vec![0; MAX_FRAME].into_boxed_slice());
        Self { held: None, lent: vec![VolatileSlice::from(buffer)] }
    }

    fn send(&mut self, to: &mut dyn FramePort, hdr: VnetHdr, len: usize) {
        let Ok(part) = self.lent[0].subslice(0, len) else { return };
        let sent = to.send(&TxFrame { hdr, parts: &[part] });
        self.held = (sent == Sent::Full).then_some((hdr, len));
    }

    /// Offers the held frame again. Says whether the lane is free.
    fn retry(&mut self, to: &mut dyn FramePort) -> bool {
        if let Some((hdr, len)) = self.held {
            self.send(to, hdr, len);
        }
        self.held.is_none()
    }
}

impl RxRing for Forward<'_> {
    fn lend(&mut self, _min: usize, _max: usize) -> Lent<'_> {
        if self.lane.held.is_some() {
            return Lent::Empty;
        }
        Lent::Buffers(&self.lane.lent)
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        self.lane.send(self.to, hdr, len);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (fd, config) = arguments()?;
    let mut tap = TapPort::from_fd(sys::take_fd(fd)?)?;
    let mut nat = Nat::new(config)?;
    let offloads = tap.offloads() & (Offloads::CSUM | Offloads::TSO4);
    tap.set_offloads(offloads & nat.offloads())?;
    nat.set_offloads(offloads & nat.offloads())?;
    let (mut up, mut down) = (Lane::new(), Lane::new());
    loop {
        let blocked = down.held.is_some();
        sys::wait([tap.as_fd(), nat.as_fd()], [true, !blocked], blocked)?;
        let more = tap.recv(&mut Forward { to: &mut nat, lane: &mut up });
        if down.retry(&mut tap) {
            let _ = nat.recv(&mut Forward { to: &mut tap, lane: &mut down });
        }
        if more != Received::Again && !tap.link_up() {
            return Err("the TAP is gone".into());
        }
    }
}

fn arguments() -> Result<(i32, NatConfig), Box<dyn std::error::Error>> {
    let (mut fd, mut config) = (3, NatConfig::default());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--tap-fd" => fd = value()?.parse()?,
            "--mtu" => config.mtu = value()?.parse()?,
            "--host-access" => config.host_access = true,
            "-p" => config.publish.push(value()?.parse()?),
            _ => return Err(format!("unknown argument '{arg}'").into()),
        }
    }
    Ok((fd, config))
}
