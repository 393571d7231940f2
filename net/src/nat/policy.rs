//! Which destinations guests reach: the one place that decides, for TCP, UDP, ICMP and DNS alike.
//!
//! | destination | |
//! |---|---|
//! | the gateway | its services; under `host_access` every other port is the host's loopback |
//! | the subnet, but no guest answered | host unreachable: guests reach one another on the switch in front of us |
//! | 127.0.0.0/8 | prohibited: the host's loopback (RFC 1122 §3.2.1.3) |
//! | 169.254.0.0/16 | prohibited: link-local, and with it the metadata services of clouds (RFC 3927) |
//! | 0.0.0.0/8, 240.0.0.0/4 | prohibited: not destinations (RFC 1122 §3.2.1.3, RFC 1112 §4) |
//! | 224.0.0.0/4, 255.255.255.255, the subnet's broadcast | not forwarded |
//! | everything else | open |
//!
//! The host's own addresses other than 127.0.0.0/8 are open, as they are to every machine on its LAN: what listens on
//! 0.0.0.0 there is meant to be reached. What listens on 127.0.0.1 is not.
//!
//! A refused TCP connection is answered with RST, another packet with an ICMP "administratively prohibited" (or
//! host unreachable), so that guests fail at once and say why.

use std::net::Ipv4Addr;

use super::config::NatConfig;

/// Where a packet of a guest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// To the gateway itself.
    Gateway,
    /// Out of a host socket.
    World(Ipv4Addr),
    /// Nowhere; the guest is told.
    Refused(Refusal),
    /// Nowhere, silently (RFC 1122 §3.2.2: no error about a multicast or broadcast).
    Group,
}

/// What the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// ICMP type 3 code 13.
    Prohibited,
    /// ICMP type 3 code 1.
    HostUnreachable,
}

/// Where a packet to `dst` goes.
pub(crate) fn route(config: &NatConfig, dst: Ipv4Addr) -> Route {
    let first = dst.octets()[0];
    if dst == config.gateway() {
        Route::Gateway
    } else if dst.is_multicast() || dst.is_broadcast() || dst == config.subnet.broadcast() {
        Route::Group
    } else if config.subnet.contains(dst) {
        Route::Refused(Refusal::HostUnreachable)
    } else if dst.is_loopback() || dst.is_link_local() || first == 0 || first >= 240 {
        Route::Refused(Refusal::Prohibited)
    } else {
        Route::World(dst)
    }
}

/// Where a connection or datagram to `port` of the gateway goes that none of its services takes.
pub(crate) fn gateway_port(config: &NatConfig) -> Option<Ipv4Addr> {
    config.host_access.then_some(Ipv4Addr::LOCALHOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(dst: &str) -> Route {
        route(&NatConfig::default(), dst.parse().unwrap())
    }

    #[test]
    fn loopback_and_metadata_are_closed() {
        for dst in [
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "0.0.0.0",
            "0.1.2.3",
            "240.0.0.1",
            "255.0.0.1",
        ] {
            assert_eq!(to(dst), Route::Refused(Refusal::Prohibited), "{dst}");
        }
        assert_eq!(gateway_port(&NatConfig::default()), None);
    }

    #[test]
    fn groups_are_not_forwarded() {
        for dst in ["224.0.0.251", "239.255.255.250", "255.255.255.255", "192.168.122.255"] {
            assert_eq!(to(dst), Route::Group, "{dst}");
        }
    }

    #[test]
    fn the_world_and_the_lan_of_the_host_are_open() {
        for dst in ["1.1.1.1", "10.0.0.1", "192.168.1.1", "172.17.0.1", "100.64.0.1"] {
            assert_eq!(to(dst), Route::World(dst.parse().unwrap()), "{dst}");
        }
        assert_eq!(to("192.168.122.1"), Route::Gateway);
        assert_eq!(to("192.168.122.77"), Route::Refused(Refusal::HostUnreachable));
    }
}
