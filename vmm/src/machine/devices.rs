//! The virtio devices of a machine, and the order in which its guest counts them.

use std::path::PathBuf;
use std::sync::Arc;

use devices::disk::Disk;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::Balloon;
use devices::virtio::blk::Blk;
use devices::virtio::net::Net;
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{GUEST_CID, Vsock};
use event_manager::MutEventSubscriber;

use super::builder::Nic;
use super::error::BuildError;
use super::events::Worker;
use super::hardware::Hardware;
use crate::folder::PrivateFolder;
use crate::kvm::Vm;
use crate::layout::MAX_VIRTIO_DEVICES;

/// What a machine is to have, in the order of their windows and lines.
#[derive(Default)]
pub(super) struct Devices {
    pub(super) nics: Vec<Nic>,
    pub(super) disks: Vec<Disk>,
    /// The Unix socket of the virtio-vsock device.
    pub(super) vsock: Option<PathBuf>,
    /// The folder of that socket, if it is the machine's own.
    pub(super) vsock_folder: Option<Arc<PrivateFolder>>,
    pub(super) others: Vec<(Box<dyn VirtioDevice>, Worker)>,
    pub(super) balloon: bool,
    pub(super) entropy: bool,
}

impl Devices {
    /// How many there are.
    pub(super) fn count(&self) -> usize {
        let single = [self.vsock.is_some(), self.balloon, self.entropy].map(usize::from);
        self.nics.len() + self.disks.len() + self.others.len() + single.iter().sum::<usize>()
    }

    /// Makes the devices, and gives their workers.
    pub(super) fn attach(self, vm: &Vm, hardware: &mut Hardware) -> Result<Vec<Worker>, BuildError> {
        let failed = |what| move |source| BuildError::Device { what, source };
        let mut slots = Slots { vm, hardware, workers: Vec::with_capacity(MAX_VIRTIO_DEVICES) };
        for Nic { mac, port } in self.nics {
            let (device, worker) = Net::new(mac, port).map_err(failed("network interface"))?;
            slots.hardware.watch_nic(device.monitor());
            slots.put(device, worker)?;
        }
        for (index, disk) in self.disks.into_iter().enumerate() {
            let (device, worker) = Blk::new(disk, &format!("disk{index}")).map_err(failed("disk"))?;
            slots.hardware.watch_disk(device.monitor());
            slots.put(device, worker)?;
        }
        if let Some(path) = self.vsock {
            let (device, worker) = Vsock::new(GUEST_CID, &path)?;
            slots.hardware.watch_vsock(device.monitor());
            slots.put(device, worker)?;
        }
        for (device, worker) in self.others {
            slots.hardware.add_virtio(vm, device)?;
            slots.workers.push(worker);
        }
        if self.balloon {
            let (device, worker) = Balloon::new().map_err(failed("balloon"))?;
            slots.hardware.watch_balloon(device.handle());
            slots.put(device, worker)?;
        }
        if self.entropy {
            let (device, worker) = Rng::new().map_err(failed("entropy device"))?;
            slots.put(device, worker)?;
        }
        Ok(slots.workers)
    }
}

/// Where devices are put.
struct Slots<'a> {
    vm: &'a Vm,
    hardware: &'a mut Hardware,
    workers: Vec<Worker>,
}

impl Slots<'_> {
    fn put(
        &mut self,
        device: impl VirtioDevice + 'static,
        worker: impl MutEventSubscriber + Send + 'static,
    ) -> Result<(), BuildError> {
        self.hardware.add_virtio(self.vm, Box::new(device))?;
        self.workers.push(Box::new(worker));
        Ok(())
    }
}
