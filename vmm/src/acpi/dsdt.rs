//! The differentiated system description table (ACPI 6.5 §5.2.11.1): a namespace with the devices that cannot be found
//! otherwise.
//!
//! `_UID` of a processor is its MADT uid; `_UID` of a virtio device is its index, and the order of the nodes is the order
//! in which Linux names the devices. Interrupts are edge-triggered, active-high, exclusive: an irqfd pulse is an edge.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use devices::{acpi as power, cmos, serial};

use super::Hardware;
use crate::layout::{COM1_GSI, COM1_PORT, POWER_BUTTON_GSI, VIRTIO_MMIO_SIZE, virtio_gsi, virtio_mmio_base};

const HEADER_LEN: u32 = 36;
/// Revision 2: integers have 64 bits.
const REVISION: u8 = 2;

pub(super) fn build(hardware: Hardware) -> Vec<u8> {
    let mut aml = Vec::new();
    s5(&mut aml);
    let processors: Vec<Processor> = (0..hardware.cpus).map(Processor).collect();
    let virtio: Vec<Virtio> = (0..hardware.virtio_devices).map(Virtio).collect();
    let mut nodes: Vec<&dyn Aml> = vec![&Com1, &Rtc, &PowerButton, &Events];
    nodes.extend(processors.iter().map(|node| node as &dyn Aml));
    nodes.extend(virtio.iter().map(|node| node as &dyn Aml));
    Scope::new(Path::new("\\_SB_"), nodes).to_aml_bytes(&mut aml);

    let mut table =
        Sdt::new(*b"DSDT", HEADER_LEN, REVISION, super::OEM_ID, super::OEM_TABLE_ID, super::OEM_REVISION);
    table.append_slice(&aml);
    table.as_slice().to_vec()
}

/// `\_S5`: what to write to the sleep control register to power off.
fn s5(sink: &mut dyn AmlSink) {
    let sleep_type = power::S5_SLEEP_TYPE;
    Name::new(Path::new("\\_S5_"), &Package::new(vec![&sleep_type])).to_aml_bytes(sink);
}

fn edge(gsi: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, gsi)
}

fn ports(first: u16, count: u16) -> IO {
    IO::new(first, first, 1, u8::try_from(count).expect("our devices have a few ports"))
}

struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&ports(COM1_PORT, serial::SERIAL_LEN), &edge(COM1_GSI)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Without an interrupt: the clock has no alarm.
struct Rtc;

impl Aml for Rtc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports = ports(cmos::CMOS_BASE, cmos::CMOS_LEN);
        Device::new(
            Path::new("RTC_"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The power button (ACPI 6.5 §4.8.3.2.1), which [`Events`] says was pressed.
struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            Path::new("PWRB"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
                &Name::new(Path::new("_UID"), &0u8),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The generic event device (ACPI 6.5 §5.6.9): how a hardware-reduced platform, which has no SCI, tells of events. Its
/// one interrupt means that the power button was pressed.
struct Events;

impl Aml for Events {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        /// §5.6.6, table 5.185: "S0 power button pressed".
        const PRESSED: u8 = 0x80;
        let button = Path::new("PWRB");
        Device::new(
            Path::new("GED_"),
            vec![
                &Name::new(Path::new("_HID"), &"ACPI0013"),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&edge(POWER_BUTTON_GSI)])),
                &Method::new(Path::new("_EVT"), 1, true, vec![&Notify::new(&button, &PRESSED)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Processor(u8);

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            Path::new(&format!("C{:03X}", self.0)),
            vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &self.0)],
        )
        .to_aml_bytes(sink);
    }
}

struct Virtio(usize);

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let below_4g = "the MMIO hole is below 4 GiB";
        let base = u32::try_from(virtio_mmio_base(self.0)).expect(below_4g);
        let size = u32::try_from(VIRTIO_MMIO_SIZE).expect(below_4g);
        let window = Memory32Fixed::new(true, base, size);
        Device::new(
            Path::new(&format!("V{:03X}", self.0)),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &self.0),
                &Name::new(Path::new("_CCA"), &1u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&window, &edge(virtio_gsi(self.0))]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}
