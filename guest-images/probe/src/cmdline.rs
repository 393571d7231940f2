//! What the probe reads from the kernel command line.
//!
//! `virtio_mmio.device=SIZE@BASE:IRQ[:ID]` (once per device, Linux's syntax), `probe.do=ORDERS` (repeatable,
//! joined in order) and the settings `probe.nic=N`, `probe.without=FEATURE+FEATURE`, `probe.rxbuf=BYTES`,
//! `probe.mtu=N`, `probe.ack=1`. Words of others are left alone; a `probe.` word that isn't known or doesn't
//! parse is an error.

use crate::virtio::feature;
use crate::virtio::net::Settings;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// What runs when the command line has no `probe.do`.
pub const DEFAULT_ORDERS: &str = "dhcp;ping=gw,count=3";

/// A virtio-mmio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceWindow {
    /// Physical address of its registers.
    pub base: u64,
    /// Size of the register window.
    pub size: u64,
    /// Global system interrupt, here an IOAPIC pin.
    pub irq: u32,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommandLine {
    /// The devices, in order.
    pub devices: Vec<DeviceWindow>,
    /// Which of the NICs to use.
    pub nic: usize,
    /// The NIC's settings.
    pub settings: Settings,
    /// The orders, unparsed.
    pub orders: Option<String>,
}

/// A word that doesn't parse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadWord(pub String);

/// Parses a command line.
pub fn parse(text: &str) -> Result<CommandLine, BadWord> {
    let mut line = CommandLine::default();
    for word in text.split_ascii_whitespace() {
        let bad = || BadWord(word.to_string());
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match key {
            "virtio_mmio.device" => line.devices.push(device(value).ok_or_else(bad)?),
            "probe.do" => match &mut line.orders {
                Some(orders) => {
                    orders.push(';');
                    orders.push_str(value);
                }
                None => line.orders = Some(value.to_string()),
            },
            "probe.nic" => line.nic = value.parse().map_err(|_| bad())?,
            "probe.rxbuf" => line.settings.receive_buffer = value.parse().map_err(|_| bad())?,
            "probe.mtu" => {
                line.settings.mtu = Some(value.parse().ok().filter(|mtu| *mtu >= 576).ok_or_else(bad)?)
            }
            "probe.ack" => line.settings.acknowledge = value == "1",
            "probe.without" => line.settings.without = without(value).ok_or_else(bad)?,
            _ if key.starts_with("probe.") => return Err(bad()),
            _ => {}
        }
    }
    Ok(line)
}

fn without(names: &str) -> Option<u64> {
    names.split('+').try_fold(0, |bits, name| {
        let known = feature::KNOWN.iter().find(|(known, _)| *known == name)?;
        Some(bits | known.1)
    })
}

fn device(text: &str) -> Option<DeviceWindow> {
    let (size, rest) = text.split_once('@')?;
    let mut parts = rest.split(':');
    let base = integer(parts.next()?)?;
    let irq = parts.next()?.parse().ok()?;
    let size = integer(size)?;
    // The registers must lie where boot.s maps, and hold at least the configuration space.
    let fits = (0x200..=0x1_0000).contains(&size) && base.checked_add(size)? <= 1 << 32;
    (fits && irq < 24).then_some(DeviceWindow { base, size, irq })
}

/// Decimal or 0x hexadecimal, with an optional K, M or G.
fn integer(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_orders_and_settings_are_found_among_strangers() {
        let line = parse(
            "console=ttyS0 virtio_mmio.device=4K@0xd0000000:16 probe.do=dhcp virtio_mmio.device=0x1000@3489665024:17:1 \
             probe.do=ping=gw,count=2 probe.without=mrg+event-idx probe.mtu=9000 panic=-1",
        )
        .unwrap();
        assert_eq!(line.devices[0], DeviceWindow { base: 0xd000_0000, size: 4096, irq: 16 });
        assert_eq!(line.devices[1], DeviceWindow { base: 0xd000_1000, size: 4096, irq: 17 });
        assert_eq!(line.orders.as_deref(), Some("dhcp;ping=gw,count=2"));
        assert_eq!(line.settings.without, feature::MRG_RXBUF | feature::EVENT_IDX);
        assert_eq!(line.settings.mtu, Some(9000));
    }

    #[test]
    fn words_that_do_not_parse_are_named() {
        for word in [
            "virtio_mmio.device=4K@0xd0000000",
            "virtio_mmio.device=4K@0x1d0000000:16",
            "virtio_mmio.device=4K@0xd0000000:24",
            "virtio_mmio.device=16@0xd0000000:16",
            "virtio_mmio.device=99999999999999G@0:1",
            "probe.without=speed",
            "probe.mtu=12",
            "probe.od=dhcp",
        ] {
            assert_eq!(parse(word), Err(BadWord(word.to_string())));
        }
    }
}
