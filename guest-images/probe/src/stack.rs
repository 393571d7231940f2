//! smoltcp on a NIC, and the loop that every order waits in.
//!
//! An order is a closure that looks at its sockets and answers [`Progress`]; [`Stack::until`] runs it between
//! polls, sleeps when there is nothing to do, and gives up at the deadline. The whole guest keeps answering
//! ARP and pings while it waits, because everything waits here.

use crate::nic::Nic;
use crate::pattern::Pattern;
use crate::rng::Rng;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::dhcpv4;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address, Ipv4Cidr};

/// What an order's closure wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<T> {
    /// It is done.
    Done(T),
    /// It did something: poll at once.
    Again,
    /// Nothing to do until a frame comes, or until this moment.
    Wait(Option<Instant>),
}

/// Why an order failed; `expect=` takes these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "docs/probe.md has the table")]
pub enum Reason {
    Timeout,
    Refused,
    Reset,
    Unreachable,
    TimeExceeded,
    TooBig,
    Loss,
    Mismatch,
    Short,
    BadReply,
    NoAddress,
    NoServer,
    NotFound,
    ServerFailure,
    Nak,
    Device,
    Unsupported,
    BadTarget,
    Unwanted,
}

impl Reason {
    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::Unreachable => "unreachable",
            Self::TimeExceeded => "time-exceeded",
            Self::TooBig => "too-big",
            Self::Loss => "loss",
            Self::Mismatch => "mismatch",
            Self::Short => "short",
            Self::BadReply => "bad-reply",
            Self::NoAddress => "no-address",
            Self::NoServer => "no-server",
            Self::NotFound => "not-found",
            Self::ServerFailure => "server-failure",
            Self::Nak => "nak",
            Self::Device => "device",
            Self::Unsupported => "unsupported",
            Self::BadTarget => "bad-target",
            Self::Unwanted => "unwanted",
        }
    }
}

/// smoltcp, its NIC and what DHCP told.
#[expect(missing_debug_implementations, reason = "smoltcp's interface has none")]
pub struct Stack<N: Nic> {
    /// The card.
    pub nic: N,
    /// The interface.
    pub iface: Box<Interface>,
    /// The sockets.
    pub sockets: SocketSet<'static>,
    /// The DHCP socket, once `dhcp` ran; it renews the lease while others run.
    pub dhcp: Option<SocketHandle>,
    /// Default gateway.
    pub gateway: Option<Ipv4Address>,
    /// Name servers.
    pub dns: Vec<Ipv4Address>,
    /// Search domain.
    pub domain: Option<String>,
    /// Random numbers for ports and identifiers.
    pub rng: Rng,
    /// The test pattern.
    pub pattern: Pattern,
    next_port: u16,
}

impl<N: Nic> Stack<N> {
    /// A stack without an address; `seed` makes ports and sequence numbers.
    pub fn new(mut nic: N, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(nic.facts().mac)));
        config.random_seed = rng.bits();
        let now = nic.now();
        let iface = Box::new(Interface::new(config, &mut nic, now));
        let next_port = 49152 + rng.below(8192) as u16;
        Self {
            nic,
            iface,
            sockets: SocketSet::new(Vec::new()),
            dhcp: None,
            gateway: None,
            dns: Vec::new(),
            domain: None,
            rng,
            pattern: Pattern::default(),
            next_port,
        }
    }

    /// Now.
    pub fn now(&self) -> Instant {
        self.nic.now()
    }

    /// A moment `ms` from now.
    pub fn after(&self, ms: u32) -> Instant {
        self.now() + Duration::from_millis(u64::from(ms))
    }

    /// A local port that wasn't used lately.
    pub fn port(&mut self) -> u16 {
        self.next_port = if self.next_port >= 65000 { 49152 } else { self.next_port + 1 };
        self.next_port
    }

    /// The interface's own address.
    pub fn address(&self) -> Option<Ipv4Address> {
        self.iface.ipv4_addr()
    }

    /// Sets address, gateway and name servers; `None` takes the address away.
    pub fn configure(
        &mut self,
        address: Option<Ipv4Cidr>,
        gateway: Option<Ipv4Address>,
        dns: Vec<Ipv4Address>,
    ) {
        self.iface.update_ip_addrs(|list| {
            list.clear();
            if let Some(cidr) = address {
                list.push(IpCidr::Ipv4(cidr)).expect("the list holds two");
            }
        });
        let routes = self.iface.routes_mut();
        routes.remove_default_ipv4_route();
        if let Some(gateway) = gateway {
            routes.add_default_ipv4_route(gateway).expect("the table holds two");
        }
        (self.gateway, self.dns) = (gateway, dns);
    }

    /// Lets smoltcp work once.
    pub fn poll(&mut self) {
        let now = self.nic.now();
        self.iface.poll(now, &mut self.nic, &mut self.sockets);
        let lost = self.dhcp.is_some_and(|handle| {
            matches!(self.sockets.get_mut::<dhcpv4::Socket>(handle).poll(), Some(dhcpv4::Event::Deconfigured))
        });
        if lost {
            self.configure(None, None, Vec::new());
        }
    }

    /// Runs `step` between polls until it is done (`Some`) or the deadline has passed (`None`).
    pub fn until<T>(
        &mut self,
        deadline: Instant,
        mut step: impl FnMut(&mut Self) -> Progress<T>,
    ) -> Option<T> {
        loop {
            self.poll();
            let wake = match step(self) {
                Progress::Done(value) => {
                    self.poll();
                    self.nic.flush();
                    return Some(value);
                }
                Progress::Again => {
                    if self.now() >= deadline {
                        return None;
                    }
                    continue;
                }
                Progress::Wait(wake) => wake,
            };
            let now = self.now();
            if now >= deadline {
                return None;
            }
            let due = self.iface.poll_at(now, &self.sockets);
            let wake = [Some(deadline), wake, due].into_iter().flatten().min();
            self.nic.wait(wake.unwrap_or(deadline));
        }
    }

    /// Waits, keeping the stack alive.
    pub fn idle(&mut self, ms: u32) {
        let deadline = self.after(ms);
        let _ = self.until(deadline, |_| Progress::<()>::Wait(None));
    }
}
