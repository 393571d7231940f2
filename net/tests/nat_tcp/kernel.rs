//! A guest that is a network namespace of this kernel behind a TAP: a TCP that nobody here wrote, with super-segments,
//! window scales and everything.

use std::io::Write;
use std::net::SocketAddrV4;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use net::nat::{Nat, NatConfig};
use net::tap::{TapName, TapPort};
use net::{FramePort, Lent, MAX_FRAME, Offloads, RxRing, Sent, TxFrame, VnetHdr};
use vm_memory::VolatileSlice;

use super::sys;
use crate::common::{self, ip};

type GuestJob = Box<dyn FnOnce() + Send>;
type NatJob = Box<dyn FnOnce(&mut Nat) + Send>;

/// The guest, and the NAT that serves it in a thread of the test's namespace.
pub(crate) struct Network {
    guest: mpsc::Sender<GuestJob>,
    nat: mpsc::Sender<NatJob>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
    /// Where the published ports are.
    pub(crate) published: Vec<SocketAddrV4>,
}

impl Network {
    pub(crate) fn new(config: NatConfig, offloads: Offloads) -> Self {
        Self::lossy(config, offloads, u64::MAX)
    }

    /// One whose wire loses every `nth` frame with data and every `nth` without, in each direction.
    pub(crate) fn lossy(config: NatConfig, offloads: Offloads, nth: u64) -> Self {
        let (guest, inbox) = mpsc::channel::<GuestJob>();
        let (ready, tap) = mpsc::channel();
        let mtu = config.mtu;
        thread::spawn(move || {
            common::sys::new_namespace().unwrap();
            ip("link set lo up");
            let tap = TapPort::open(&"tap0".parse::<TapName>().unwrap(), None).unwrap();
            ip(&format!("link set tap0 mtu {mtu} up"));
            ip("address add 192.168.122.2/24 dev tap0");
            ip("route add default via 192.168.122.1");
            ready.send(tap).unwrap();
            inbox.into_iter().for_each(|job| job());
        });
        let tap = tap.recv().unwrap();
        let mut nat = Nat::new(config).unwrap();
        let published = nat.published().into_iter().map(|(_, addr)| addr).collect();
        let (jobs, requests) = mpsc::channel();
        let (wake, woken) = UnixStream::pair().unwrap();
        woken.set_nonblocking(true).unwrap();
        let thread = thread::spawn(move || serve(tap, nat, (offloads, nth), &requests, &woken));
        let network = Self { guest, nat: jobs, wake, thread: Some(thread), published };
        // The guest is known from its first packet on.
        let _ = network.guest(|| std::net::TcpStream::connect("192.168.122.1:1"));
        network
    }

    /// Runs `job` in the guest and waits for it.
    pub(crate) fn guest<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(job).recv().expect("the job in the guest panicked")
    }

    /// Runs `job` in the guest, on a thread of its own.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> mpsc::Receiver<T> {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || {
            thread::spawn(move || drop(done.send(job())));
        });
        self.guest.send(job).unwrap();
        result
    }

    /// Asks the NAT.
    pub(crate) fn nat<T: Send + 'static>(&self, job: impl FnOnce(&mut Nat) -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.nat.send(Box::new(move |nat| drop(done.send(job(nat))))).unwrap();
        (&self.wake).write_all(&[0]).unwrap();
        result.recv().expect("the NAT's thread panicked")
    }

    /// Waits until the NAT has no connection any more.
    pub(crate) fn until_no_flows(&self) {
        // A bound for a test that fails; the last ACKs are on their way.
        for _ in 0..1000 {
            if self.nat(|nat| nat.tcp_flows().is_empty()) {
                return;
            }
            thread::yield_now();
            self.guest(|| drop(std::net::TcpStream::connect("192.168.122.1:1")));
        }
        panic!("connections are left: {:?}", self.nat(|nat| nat.tcp_flows()));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let (dead, _) = mpsc::channel();
        drop(std::mem::replace(&mut self.nat, dead));
        let _ = (&self.wake).write_all(&[0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One direction of a wire that loses every `nth` frame with data, and every `nth` without.
struct Loss {
    nth: u64,
    frames: [u64; 2],
}

impl Loss {
    fn strikes(&mut self, len: usize) -> bool {
        const HEADERS: usize = 100;
        let frames = &mut self.frames[usize::from(len > HEADERS)];
        *frames += 1;
        frames.is_multiple_of(self.nth)
    }
}

/// A ring whose frames are sent to another port at once.
struct Forward<'a> {
    to: &'a mut dyn FramePort,
    lent: &'a [VolatileSlice<'static>],
    loss: &'a mut Loss,
}

impl RxRing for Forward<'_> {
    fn lend(&mut self, _min: usize, max: usize) -> Lent<'_> {
        Lent::Buffers(&self.lent[..max.div_ceil(4096)])
    }

    fn commit(&mut self, hdr: VnetHdr, len: usize) {
        if self.loss.strikes(len) {
            return;
        }
        let mut left = len;
        let mut parts = Vec::new();
        for part in self.lent {
            let take = part.len().min(left);
            left -= take;
            parts.extend(part.subslice(0, take).ok().filter(|p| !p.is_empty()));
        }
        assert_ne!(self.to.send(&TxFrame { hdr, parts: &parts }), Sent::Full);
    }
}

fn serve(
    mut tap: TapPort,
    mut nat: Nat,
    (offloads, nth): (Offloads, u64),
    jobs: &mpsc::Receiver<NatJob>,
    woken: &UnixStream,
) {
    let offloads = offloads & nat.offloads() & tap.offloads();
    tap.set_offloads(offloads).unwrap();
    nat.set_offloads(offloads).unwrap();
    let memory: &'static mut [u8] = vec![0; MAX_FRAME].leak();
    let lent: Vec<_> = memory.chunks_mut(4096).map(VolatileSlice::from).collect();
    let [mut up, mut down] = [(); 2].map(|()| Loss { nth, frames: [0; 2] });
    loop {
        sys::wait([tap.as_fd(), nat.as_fd(), woken.as_fd()], -1);
        let _ = std::io::Read::read(&mut &*woken, &mut [0; 64]);
        let _ = tap.recv(&mut Forward { to: &mut nat, lent: &lent, loss: &mut up });
        let _ = nat.recv(&mut Forward { to: &mut tap, lent: &lent, loss: &mut down });
        loop {
            match jobs.try_recv() {
                Ok(job) => job(&mut nat),
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
    }
}
