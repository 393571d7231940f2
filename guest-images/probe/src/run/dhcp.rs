//! `dhcp` and `static`: getting an address.

use super::{Outcome, since};
use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::dhcpv4;
use smoltcp::wire::{DhcpOption, DhcpPacket, Ipv4Address, Ipv4Cidr};

/// What is asked for: mask, router, DNS, host name, domain, MTU, broadcast, static routes, lease, server,
/// T1, T2, search list, classless routes.
const PARAMETERS: &[u8] = &[1, 3, 6, 12, 15, 26, 28, 33, 51, 54, 58, 59, 119, 121];
/// Milliseconds between two DISCOVERs or two REQUESTs.
const RETRY: u64 = 1000;

struct Lease {
    address: Ipv4Cidr,
    gateway: Option<Ipv4Address>,
    dns: Vec<Ipv4Address>,
    server: Ipv4Address,
    packet: Vec<u8>,
}

/// `dhcp`: DISCOVER to ACK by smoltcp's client, which then keeps the lease.
pub(super) fn dhcp<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    if let Some(old) = stack.dhcp.take() {
        stack.sockets.remove(old);
        stack.configure(None, None, Vec::new());
    }
    let mut socket = dhcpv4::Socket::new();
    socket.set_parameter_request_list(PARAMETERS);
    socket.set_receive_packet_buffer(vec![0; 2048].leak());
    if let Some(name) = order.text("hostname") {
        let data: &'static [u8] = Vec::from(name.as_bytes()).leak();
        socket.set_outgoing_options(Box::leak(Box::new([DhcpOption { kind: 12, data }])));
    }
    let mut retry = dhcpv4::RetryConfig::default();
    retry.discover_timeout = smoltcp::time::Duration::from_millis(RETRY);
    retry.initial_request_timeout = smoltcp::time::Duration::from_millis(RETRY);
    socket.set_retry_config(retry);
    let handle = stack.sockets.add(socket);
    let start = stack.now();
    let deadline = stack.after(order.number("timeout", 10_000));
    let lease = stack.until(deadline, |stack| match lease(stack, handle) {
        Some(lease) => Progress::Done(lease),
        None => Progress::Wait(None),
    });
    let Some(lease) = lease else {
        stack.sockets.remove(handle);
        return Err(Reason::Timeout);
    };
    let took = since(stack, start);
    stack.dhcp = Some(handle);
    stack.configure(Some(lease.address), lease.gateway, lease.dns.clone());
    describe(stack, &lease, report);
    report.number("us", took);
    Ok(())
}

fn lease<N: Nic>(stack: &mut Stack<N>, handle: SocketHandle) -> Option<Lease> {
    match stack.sockets.get_mut::<dhcpv4::Socket>(handle).poll()? {
        dhcpv4::Event::Deconfigured => None,
        dhcpv4::Event::Configured(config) => Some(Lease {
            address: config.address,
            gateway: config.router,
            dns: config.dns_servers.to_vec(),
            server: config.server.identifier,
            packet: config.packet.map(|packet| packet.into_inner().to_vec()).unwrap_or_default(),
        }),
    }
}

fn describe<N: Nic>(stack: &mut Stack<N>, lease: &Lease, report: &mut Report) {
    report.text("address", lease.address.address());
    report.number("prefix", u64::from(lease.address.prefix_len()));
    if let Some(gateway) = lease.gateway {
        report.text("gateway", gateway);
    }
    report.list("dns", &lease.dns);
    report.text("server", lease.server);
    if let Ok(packet) = DhcpPacket::new_checked(&lease.packet[..]) {
        stack.domain = options(&packet, report);
    }
}

/// Reports the options that have a name here and the numbers of all; returns the domain.
pub(super) fn options(packet: &DhcpPacket<&[u8]>, report: &mut Report) -> Option<String> {
    let mut domain = None;
    let mut kinds = Vec::new();
    for option in packet.options() {
        kinds.push(option.kind);
        let number = || option.data.iter().take(8).fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        let text = || String::from_utf8_lossy(option.data).into_owned();
        let address =
            || <[u8; 4]>::try_from(option.data).map(Ipv4Address::from).unwrap_or(Ipv4Address::UNSPECIFIED);
        match option.kind {
            12 => report.text("hostname", text()),
            15 => {
                report.text("domain", text());
                domain = Some(text());
            }
            26 => report.number("mtu", number()),
            28 => report.text("broadcast", address()),
            51 => report.number("lease_s", number()),
            56 => report.text("message", text()),
            58 => report.number("t1_s", number()),
            59 => report.number("t2_s", number()),
            119 => report.text("search", name(option.data)),
            _ => {}
        }
    }
    report.list("options", kinds);
    domain
}

/// The first name of an option 119 (RFC 3397), uncompressed as the first always is.
fn name(mut data: &[u8]) -> String {
    let mut labels = Vec::new();
    while let [len, rest @ ..] = data
        && *len != 0
        && let Some((label, rest)) = rest.split_at_checked(usize::from(*len))
    {
        labels.push(String::from_utf8_lossy(label).into_owned());
        data = rest;
    }
    labels.join(".")
}

/// `static=ADDRESS/PREFIX,gw=ADDRESS,dns=ADDRESS`.
pub(super) fn fixed<N: Nic>(stack: &mut Stack<N>, order: &Order, _: &mut Report) -> Outcome {
    let address: Ipv4Cidr = order.target.parse().map_err(|()| Reason::BadTarget)?;
    let parse = |key| {
        order.text(key).map(|text| text.parse::<Ipv4Address>().map_err(|_| Reason::BadTarget)).transpose()
    };
    let (gateway, dns) = (parse("gw")?, parse("dns")?);
    if let Some(old) = stack.dhcp.take() {
        stack.sockets.remove(old);
    }
    stack.configure(Some(address), gateway, dns.into_iter().collect());
    Ok(())
}
