//! Ethernet addresses. A guest's is `52:54:00:…`, the prefix that QEMU and libvirt made customary, with
//! three octets derived from its name, so that a machine keeps its address, and with it its lease.

use std::fmt;
use std::str::FromStr;

/// An Ethernet (MAC) address.
///
/// ```
/// use net::MacAddr;
///
/// let mac = MacAddr::for_name("network", "vm1");
/// assert!(mac.to_string().starts_with("52:54:00:"));
/// assert_eq!(mac.to_string().parse(), Ok(mac));
/// assert_eq!(mac, MacAddr::for_name("network", "vm1"), "stable, and so is the lease");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

/// A text that is not an Ethernet address.
///
/// ```
/// use net::{BadMac, MacAddr};
///
/// let error: BadMac = "52:54:00:12:34".parse::<MacAddr>().unwrap_err();
/// assert!(error.to_string().starts_with("'52:54:00:12:34' is not an Ethernet address; write six"));
/// assert!("52-54-00-12-34-56".parse::<MacAddr>().is_err(), "colons only");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an Ethernet address; write six hexadecimal octets, such as 52:54:00:12:34:56")]
pub struct BadMac(String);

impl MacAddr {
    /// `ff:ff:ff:ff:ff:ff`
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// The address of the machine called `name` on the network called `network`: stable, and different
    /// machines get different ones (24 bits of FNV-1a; a collision is caught by whoever plugs both in).
    pub fn for_name(network: &str, name: &str) -> Self {
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for byte in network.bytes().chain([0]).chain(name.bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let [.., a, b, c] = (hash ^ (hash >> 24) ^ (hash >> 48)).to_be_bytes();
        Self([0x52, 0x54, 0x00, a, b, c])
    }

    /// Whether it addresses a group: multicast or broadcast (IEEE 802 I/G bit).
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The six octets.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(octets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_address_and_libvirts_prefix() {
        let mac = MacAddr::for_name("default", "vm1");
        assert_eq!(mac, MacAddr::for_name("default", "vm1"));
        assert!(mac.to_string().starts_with("52:54:00:"));
        assert_ne!(mac, MacAddr::for_name("default", "vm2"));
        assert_ne!(mac, MacAddr::for_name("other", "vm1"));
        assert!(!mac.is_group());
    }

    #[test]
    fn text_is_read_back_and_nonsense_is_refused() {
        let mac = MacAddr([0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for bad in ["", "52:54:00", "52:54:00:ab:cd:ef:01", "52:54:0:ab:cd:ef", "zz:54:00:ab:cd:ef"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }
}
