//! A driver that misuses its device on purpose.
//!
//! Each round does one wrong thing, gives the device a moment and then resets it and brings it up again, so
//! whatever the device did with the nonsense, the next order starts from a working card or fails. What is
//! never written: a ring or buffer address that lies in the probe's own RAM but isn't a ring or a buffer,
//! since a correct device would write there; and the bytes to the console or to ports that end the VM.

use super::net::VirtioNet;
use super::queue::DESC_WRITE;
use super::sys::Window;
use super::{Refused, register, status};
use crate::cpu::Cpu;
use crate::nic::Nic;
use crate::rng::Rng;
use core::sync::atomic::Ordering;

const DESC_NEXT: u16 = 1;
const DESC_INDIRECT: u16 = 4;
/// How long the device has for each piece of nonsense, in microseconds.
const PAUSE: u64 = 300;
/// The end of the registers that are scribbled over.
const SCRIBBLE_END: u64 = 0x140;

/// What to do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abuse {
    /// Nonsense in the rings.
    Rings {
        /// Seed of the random choices.
        seed: u64,
        /// Rounds.
        count: u64,
    },
    /// Random accesses to registers of all virtio devices and to ports.
    Registers {
        /// Seed of the random choices.
        seed: u64,
        /// Accesses.
        count: u64,
    },
    /// Resets with frames in flight.
    Reset {
        /// Resets.
        count: u64,
    },
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Damage {
    /// Rounds or accesses done.
    pub rounds: u64,
    /// How often the device then asked for a reset (DEVICE_NEEDS_RESET).
    pub needs_reset: u64,
}

/// Carries out the abuse and leaves the card working, if the device lets it.
pub fn run<C: Cpu>(nic: &mut VirtioNet<C>, abuse: Abuse) -> Result<Damage, Refused> {
    match abuse {
        Abuse::Rings { seed, count } => rings(nic, &mut Rng::new(seed), count),
        Abuse::Registers { seed, count } => registers(nic, &mut Rng::new(seed), count),
        Abuse::Reset { count } => resets(nic, count),
    }
}

fn pause<C: Cpu>(nic: &VirtioNet<C>) {
    let until = nic.cpu.now() + PAUSE;
    while nic.cpu.now() < until {
        nic.cpu.sleep(nic.cpu.interrupts(), until);
    }
}

fn rings<C: Cpu>(nic: &mut VirtioNet<C>, rng: &mut Rng, count: u64) -> Result<Damage, Refused> {
    let mut damage = Damage::default();
    for _ in 0..count {
        let index = rng.below(2) as u32;
        if rng.below(8) == 0 {
            misplace_ring(nic, rng, index);
        } else {
            corrupt_ring(nic, rng, index);
        }
        for doorbell in [index, rng.pick(&[0, 1, 2, 0xffff, u32::MAX])] {
            nic.transport.notify(doorbell);
        }
        pause(nic);
        damage.rounds += 1;
        damage.needs_reset +=
            u64::from(nic.transport.registers().get(register::STATUS) & status::NEEDS_RESET != 0);
        nic.restart()?;
    }
    Ok(damage)
}

/// An address without RAM behind it: the MMIO hole, beyond any RAM, or so high that adding to it wraps.
fn nowhere(rng: &mut Rng) -> u64 {
    let anywhere = rng.bits();
    rng.pick(&[0xc000_0000, 0xd000_0000, 0xfee0_0000, 1 << 45, u64::MAX - 4096, u64::MAX, anywhere | 1 << 50])
}

/// Tells the device that the ring lies nowhere, or has no legal size, and starts it.
fn misplace_ring<C: Cpu>(nic: &mut VirtioNet<C>, rng: &mut Rng, index: u32) {
    let registers = nic.transport.registers();
    registers.set(register::STATUS, 0);
    for bit in [status::ACKNOWLEDGE, status::DRIVER] {
        nic.transport.add_status(bit);
    }
    registers.set(register::DRIVER_FEATURES_SEL, 1);
    registers.set(register::DRIVER_FEATURES, 1);
    nic.transport.add_status(status::FEATURES_OK);
    registers.set(register::QUEUE_SEL, index);
    registers.set(register::QUEUE_NUM, rng.pick(&[0, 1, 3, 256, 32768, 65535, u32::MAX]));
    for place in [register::QUEUE_DESC, register::QUEUE_DRIVER, register::QUEUE_DEVICE] {
        let address = nowhere(rng);
        registers.set(place, address as u32);
        registers.set(place + 4, (address >> 32) as u32);
    }
    registers.set(register::QUEUE_READY, 1);
    nic.transport.add_status(status::DRIVER_OK);
}

/// Writes one kind of nonsense into a ring that is otherwise in order.
fn corrupt_ring<C: Cpu>(nic: &mut VirtioNet<C>, rng: &mut Rng, index: u32) {
    let queue = if index == 0 { &mut nic.rx.queue } else { &mut nic.tx.queue };
    let size = queue.size();
    let [table, avail, _] = queue.addresses();
    let write = if index == 0 { DESC_WRITE } else { 0 };
    let id = rng.below(u64::from(size)) as u16;
    let address = nowhere(rng);
    let mut advance = 1;
    let mut entry = id;
    match rng.below(12) {
        0 => queue.write_descriptor(id, address, 1514, write, 0),
        1 => queue.write_descriptor(id, table, u32::MAX, if index == 0 { 0 } else { write }, 0),
        2 => {
            // A loop of two, and a loop of one.
            let other = (id + 1) % size;
            queue.write_descriptor(id, address, 16, write | DESC_NEXT, other);
            queue.write_descriptor(other, address, 16, write | DESC_NEXT, rng.pick(&[id, other]));
        }
        3 => queue.write_descriptor(id, address, rng.pick(&[0, 15, 16, 4096]), DESC_INDIRECT, 0),
        4 => queue.write_descriptor(id, table, u32::from(size) * 16, DESC_INDIRECT | DESC_NEXT, id),
        5 => advance = rng.pick(&[size + 1, 0x7fff, 0x8000, 0xffff]),
        6 => entry = rng.pick(&[size, size + 1, 0xffff]),
        7 => queue.write_descriptor(id, address, 16, write | DESC_NEXT, rng.pick(&[size, 0xffff])),
        // The wrong direction: the device would read from a receive buffer, or write into a frame to send.
        8 => queue.write_descriptor(id, address, 64, write ^ DESC_WRITE, 0),
        9 => queue.write_descriptor(id, table, 0, write, 0),
        // Shorter than a virtio_net_hdr; on the receive side nothing is written into the table, as no
        // frame fits.
        10 => queue.write_descriptor(id, address, rng.below(12) as u32, write, 0),
        _ => {
            for id in 0..size {
                let flags = (rng.bits() as u16) & !DESC_INDIRECT;
                queue.write_descriptor(id, nowhere(rng), rng.bits() as u32, flags, rng.bits() as u16);
            }
        }
    }
    let offset = (avail - table) as usize;
    let ring = queue.memory();
    let now = ring.u16(offset + 2).load(Ordering::Relaxed);
    ring.u16(offset + 4 + 2 * usize::from(now % size)).store(entry, Ordering::Relaxed);
    ring.u16(offset + 2).store(now.wrapping_add(advance), Ordering::Release);
}

fn registers<C: Cpu>(nic: &mut VirtioNet<C>, rng: &mut Rng, count: u64) -> Result<Damage, Refused> {
    let mut damage = Damage::default();
    for _ in 0..count {
        match rng.below(4) {
            0 => scribble_port(nic, rng),
            _ => scribble_register(&window(nic, rng), rng),
        }
        damage.rounds += 1;
    }
    nic.cpu.console_reset();
    for other in &nic.others {
        other.set(register::STATUS, 0);
    }
    damage.needs_reset =
        u64::from(nic.transport.registers().get(register::STATUS) & status::NEEDS_RESET != 0);
    nic.restart()?;
    Ok(damage)
}

/// The NIC's registers half of the time, else some other device's.
fn window<C: Cpu>(nic: &VirtioNet<C>, rng: &mut Rng) -> Window {
    let own = *nic.transport.registers();
    if nic.others.is_empty() || rng.below(2) == 0 { own } else { rng.pick(&nic.others) }
}

fn scribble_register(registers: &Window, rng: &mut Rng) {
    let width = rng.pick(&[1, 2, 4, 4, 4, 8]);
    let end = if rng.below(8) == 0 { registers.len() } else { SCRIBBLE_END };
    let offset = rng.below(end - u64::from(width));
    let offset = if rng.below(4) == 0 { offset } else { offset & !3 };
    if rng.below(2) == 0 {
        let _ = registers.read(offset, width);
        return;
    }
    let value = rng.bits();
    // Ring addresses stay between 3 and 4 GiB, where there is no RAM, or far above all of it.
    let near_address =
        offset + u64::from(width) > register::QUEUE_DESC && offset < register::QUEUE_DEVICE + 8;
    let value = match (near_address, offset % 8) {
        (false, _) if offset < SCRIBBLE_END && rng.below(2) == 0 => value % 4,
        (false, _) => value,
        (true, 0) if width <= 4 => value | 0xc000_0000,
        (true, 4) if width == 4 => value | 0x8000_0000,
        (true, _) => return,
    };
    registers.write(offset, width, value);
}

fn scribble_port<C: Cpu>(nic: &VirtioNet<C>, rng: &mut Rng) {
    // The UART behind its data register, the keyboard controller, the clock.
    let port = rng.pick(&[0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x60, 0x61, 0x64, 0x70, 0x71]);
    let width = rng.pick(&[1, 1, 2, 4]);
    if rng.below(2) == 0 {
        let _ = nic.cpu.port_read(port, width);
        return;
    }
    let value = rng.bits() as u32;
    match port {
        // Pulses of the reset line, and commands whose data byte would hold it.
        0x60 | 0x61 | 0x64 => nic.cpu.port_write(0x64, 1, rng.pick(&[0x20, 0x60, 0xaa, 0xab, 0xad, 0xae])),
        _ => nic.cpu.port_write(port, width, value),
    }
}

fn resets<C: Cpu>(nic: &mut VirtioNet<C>, count: u64) -> Result<Damage, Refused> {
    let mut damage = Damage::default();
    let mut frame = [0u8; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&nic.facts().mac);
    // An EtherType for local experiments: load that nobody answers.
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    for _ in 0..count {
        for _ in 0..32 {
            if !nic.send_raw([0; super::offload::HEADER], &frame) {
                break;
            }
        }
        nic.flush();
        nic.restart()?;
        damage.rounds += 1;
    }
    Ok(damage)
}
