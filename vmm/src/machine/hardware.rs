//! The devices of a machine, put on its buses.

use std::sync::{Arc, Mutex, PoisonError};

use devices::acpi::{ACPI_BASE, ACPI_LEN, AcpiPower};
use devices::cmos::{CMOS_BASE, CMOS_LEN, Rtc};
use devices::exit::{EXIT_PORT, ExitDevice};
use devices::i8042::{I8042, I8042_BASE, I8042_LEN};
use devices::serial::{COM1_BASE, COM1_GSI, SERIAL_LEN, Serial, Sink, SinkWorker};
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::blk::BlkMonitor;
use devices::virtio::mmio::{MMIO_LEN, MmioTransport, QUEUE_NOTIFY};
use devices::virtio::net::NetMonitor;
use devices::virtio::vsock::VsockMonitor;
use devices::{Bus, BusDevice, IrqLine};

use super::error::BuildError;
use super::running::{Counters, NicCounters};
use crate::kvm::Vm;
use crate::layout::{POWER_BUTTON_GSI, virtio_gsi, virtio_mmio_base};
use crate::vcpu::Buses;

/// What the vCPUs access and what is counted of it.
pub(super) struct Hardware {
    pub(super) buses: Buses,
    pub(super) serial: Arc<Mutex<Serial>>,
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
    nics: Vec<NetMonitor>,
    disks: Vec<BlkMonitor>,
    balloon: Option<BalloonHandle>,
    vsock: Option<VsockMonitor>,
    power_button: Arc<dyn IrqLine>,
}

impl Hardware {
    /// Makes the devices that every machine has; `serial_output` takes what the guest writes to COM1, with the help of the
    /// worker if there is one.
    pub(super) fn new(vm: &Vm, serial_output: Sink) -> Result<(Self, Option<SinkWorker>), BuildError> {
        let (serial, worker) = Serial::new(vm.irq_line(COM1_GSI)?, serial_output)
            .map_err(|source| BuildError::Device { what: "serial console", source })?;
        let serial = Arc::new(Mutex::new(serial));
        let mut buses = Buses::default();
        let com1: Arc<Mutex<dyn BusDevice>> = serial.clone();
        buses.ports.insert(COM1_BASE.into(), SERIAL_LEN.into(), com1)?;
        let ports = &mut buses.ports;
        put(ports, EXIT_PORT, 1, ExitDevice)?;
        put(ports, ACPI_BASE, ACPI_LEN, AcpiPower)?;
        put(ports, I8042_BASE, I8042_LEN, I8042::default())?;
        put(ports, CMOS_BASE, CMOS_LEN, Rtc::host())?;
        let power_button = vm.irq_line(POWER_BUTTON_GSI)?;
        let hardware = Self {
            buses,
            serial,
            virtio: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            balloon: None,
            vsock: None,
            power_button,
        };
        Ok((hardware, worker))
    }

    /// Puts `device` behind the next virtio-mmio window, with its interrupt line and its doorbell.
    pub(super) fn add_virtio(&mut self, vm: &Vm, device: Box<dyn VirtioDevice>) -> Result<(), BuildError> {
        let index = self.virtio.len();
        let base = virtio_mmio_base(index);
        let memory = Arc::new(vm.memory().clone());
        let transport = MmioTransport::new(device, memory, vm.irq_line(virtio_gsi(index))?);
        vm.doorbell(transport.doorbell(), base + QUEUE_NOTIFY)?;
        let transport = Arc::new(Mutex::new(transport));
        let registers: Arc<Mutex<dyn BusDevice>> = transport.clone();
        self.buses.mmio.insert(base, MMIO_LEN, registers)?;
        self.virtio.push(transport);
        Ok(())
    }

    /// Lets [`Counters`] tell of a NIC.
    pub(super) fn watch_nic(&mut self, nic: NetMonitor) {
        self.nics.push(nic);
    }

    /// Lets [`Counters`] tell of a disk.
    pub(super) fn watch_disk(&mut self, disk: BlkMonitor) {
        self.disks.push(disk);
    }

    /// Lets [`Self::balloon`] and [`Counters`] tell of the balloon.
    pub(super) fn watch_balloon(&mut self, balloon: BalloonHandle) {
        self.balloon = Some(balloon);
    }

    /// The balloon, if there is one.
    pub(super) fn balloon(&self) -> Option<BalloonHandle> {
        self.balloon.clone()
    }

    /// Lets [`Counters`] tell of the vsock device.
    pub(super) fn watch_vsock(&mut self, vsock: VsockMonitor) {
        self.vsock = Some(vsock);
    }

    /// Presses the power button.
    pub(super) fn power_button(&self) {
        self.power_button.raise();
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            unclaimed_ports: self.buses.ports.unclaimed(),
            unclaimed_mmio: self.buses.mmio.unclaimed(),
            serial_lost: self.serial.lock().unwrap_or_else(PoisonError::into_inner).output_lost(),
            virtio_interrupts: self
                .virtio
                .iter()
                .map(|device| device.lock().unwrap_or_else(PoisonError::into_inner).interrupts())
                .collect(),
            nics: self
                .nics
                .iter()
                .map(|nic| NicCounters { device: nic.totals(), port: nic.port() })
                .collect(),
            disks: self.disks.iter().map(BlkMonitor::totals).collect(),
            balloon: self.balloon.as_ref().map(BalloonHandle::totals).unwrap_or_default(),
            vsock: self.vsock.as_ref().map(VsockMonitor::totals),
        }
    }
}

fn put<D: BusDevice + 'static>(ports: &mut Bus, base: u16, len: u16, device: D) -> Result<(), BuildError> {
    Ok(ports.insert(base.into(), len.into(), Arc::new(Mutex::new(device)))?)
}
