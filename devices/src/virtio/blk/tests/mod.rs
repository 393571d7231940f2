//! Dialogues of a driver with a disk, by io_uring and by the thread.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};

use super::{Blk, BlkMonitor};
use crate::disk::{Disk, DiskMode, GuestBuffers, Raw, Storage};
use crate::virtio::F_EVENT_IDX;
use crate::virtio::testing::{Buf, DATA, Driver, into, out};

mod faults;
mod model;
mod requests;

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const ZEROES: u32 = 13;

pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;

/// All features of a writable disk.
pub(super) const ALL: u64 = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14 | F_EVENT_IDX;
pub(super) const F_FLUSH: u64 = 1 << 9;

/// Where a request's parts are; each slot has room for 64 KiB of data.
const SLOT: u64 = 0x2_0000;
const STATUS_AT: u64 = 0x800;
const DATA_AT: u64 = 0x1000;

pub(super) struct Guest {
    pub(super) driver: Driver,
    pub(super) monitor: BlkMonitor,
}

impl Guest {
    pub(super) fn new(disk: Disk, uring: bool) -> Self {
        let (blk, worker) = Blk::with_uring(disk, "disk0", uring).unwrap();
        let monitor = blk.monitor();
        let mut driver = Driver::new(blk, worker);
        let offered = driver.offered();
        driver.start(offered & ALL);
        Self { driver, monitor }
    }

    /// Makes a request available: header, `middle`, status. Nobody is told.
    pub(super) fn add(&mut self, slot: u64, kind: u32, sector: u64, middle: &[Buf]) -> u16 {
        let base = DATA + slot * SLOT;
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.driver.fill(base, &header);
        self.driver.fill(base + STATUS_AT, &[0xff]);
        let bufs = [&[out(base, 16)], middle, &[into(base + STATUS_AT, 1)]].concat();
        self.driver.add(0, &bufs)
    }

    pub(super) fn status(&self, slot: u64) -> u8 {
        self.driver.bytes(DATA + slot * SLOT + STATUS_AT, 1)[0]
    }

    /// One request, and its status.
    pub(super) fn ask(&mut self, kind: u32, sector: u64, middle: &[Buf]) -> (u8, u32) {
        let head = self.add(0, kind, sector, middle);
        self.driver.kick(0);
        let used = self.driver.run_until_used(0, 1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, head);
        (self.status(0), used[0].1)
    }

    pub(super) fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.driver.fill(data(0), bytes);
        let (status, written) = self.ask(OUT, sector, &[out(data(0), bytes.len())]);
        assert_eq!(written, 1);
        status
    }

    /// The bytes, or the status if it isn't OK.
    pub(super) fn read(&mut self, sector: u64, len: usize) -> Result<Vec<u8>, u8> {
        self.driver.fill(data(0), &vec![0xaa; len]);
        match self.ask(IN, sector, &[into(data(0), len)]) {
            (OK, written) => {
                assert_eq!(written as usize, len + 1);
                Ok(self.driver.bytes(data(0), len))
            }
            (status, _) => Err(status),
        }
    }

    /// Discard or zeroes of (sector, sectors, flags).
    pub(super) fn trim(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, sectors, flags)| {
                [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.driver.fill(data(0), &bytes);
        self.ask(kind, 0, &[out(data(0), bytes.len())]).0
    }
}

/// Where the data of a slot is.
pub(super) fn data(slot: u64) -> u64 {
    DATA + slot * SLOT + DATA_AT
}

/// An image whose every sector begins with its number.
pub(super) fn image(sectors: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(sectors * 512).unwrap();
    for sector in 0..sectors {
        file.as_file().write_all_at(&(sector + 1).to_le_bytes(), sector * 512).unwrap();
    }
    file
}

pub(super) fn open(image: &tempfile::NamedTempFile, mode: DiskMode) -> Disk {
    Disk::open(image.path(), mode).unwrap()
}

/// What a [`Scripted`] storage does at a call instead of what it was asked.
pub(super) enum Fault {
    /// Fails with this errno.
    Errno(i32),
    /// Transfers so many bytes at most.
    Short(usize),
}

/// A file that fails as it is told, notes what it is called for, and waits while its gate is closed. Never direct.
pub(super) struct Scripted {
    raw: Raw,
    pub(super) faults: Mutex<VecDeque<Fault>>,
    pub(super) calls: Mutex<Vec<&'static str>>,
    gate: Mutex<bool>,
    opened: Condvar,
}

impl Scripted {
    pub(super) fn new(file: &File, faults: impl IntoIterator<Item = Fault>) -> Arc<Self> {
        let bytes = file.metadata().unwrap().len();
        Arc::new(Self {
            raw: Raw::new(file.try_clone().unwrap(), bytes),
            faults: Mutex::new(faults.into_iter().collect()),
            calls: Mutex::default(),
            gate: Mutex::new(true),
            opened: Condvar::new(),
        })
    }

    pub(super) fn set_gate(&self, open: bool) {
        *self.gate.lock().unwrap() = open;
        self.opened.notify_all();
    }

    pub(super) fn disk(self: &Arc<Self>) -> Disk {
        Disk::with_storage(Arc::clone(self) as Arc<dyn Storage>, false)
    }

    /// Notes the call, waits for the gate, and gives the next fault: an error, or a limit.
    fn call(&self, name: &'static str) -> io::Result<usize> {
        self.calls.lock().unwrap().push(name);
        drop(self.opened.wait_while(self.gate.lock().unwrap(), |open| !*open).unwrap());
        match self.faults.lock().unwrap().pop_front() {
            None => Ok(usize::MAX),
            Some(Fault::Short(limit)) => Ok(limit),
            Some(Fault::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Storage for Scripted {
    fn bytes(&self) -> u64 {
        self.raw.bytes()
    }

    fn read(&self, buffers: &GuestBuffers, at: u64) -> io::Result<usize> {
        let limit = self.call("read")?;
        let file = self.raw.direct(crate::disk::Access::Read, 0, 0).unwrap();
        buffers.read_from(&file, at, buffers.len().min(limit))
    }

    fn write(&self, buffers: &GuestBuffers, at: u64, durable: bool) -> io::Result<usize> {
        let limit = self.call(if durable { "durable write" } else { "write" })?;
        let file = self.raw.direct(crate::disk::Access::Write, 0, 0).unwrap();
        buffers.write_to(&file, at, buffers.len().min(limit), durable)
    }

    fn flush(&self) -> io::Result<()> {
        self.call("flush").map(drop)
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.call("discard")?;
        self.raw.discard(at, len)
    }

    fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.call("zero")?;
        self.raw.zero(at, len, unmap)
    }
}
