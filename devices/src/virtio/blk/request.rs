//! From a chain to a request (virtio 1.3 §5.2.6).
//!
//! A chain is a header of 16 bytes (type, reserved, sector) and the driver's data, all readable, then the device's data and
//! one byte of status, all writable; in any split. A chain that has no room for header and status can't be answered, so
//! it breaks the queue. Everything else is answered:
//!
//! | request | answered without touching the disk |
//! |---|---|
//! | unknown type; discard or zeroes that were not negotiated | `UNSUPP` |
//! | discard or zeroes with unknown flags, discard with the unmap flag | `UNSUPP` |
//! | data that is no whole number of sectors, or partly behind the disk's end | `IOERR` |
//! | anything but reading on a read-only disk | `IOERR` |
//! | no, too many, too long, or outlying ranges | `IOERR` |
//! | GET_ID | `OK`, with up to 20 bytes |
//!
//! The header and the ranges are copied once, and what is decided is decided on the copy.

use virtio_bindings::virtio_blk as spec;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::config::{F_DISCARD, F_FLUSH, F_WRITE_ZEROES, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS};
use super::counters::Kind;
use crate::disk::{GuestBuffers, Operation, Range, Request, SECTOR};
use crate::virtio::pieces::take_front;
use crate::virtio::{Memory, QueueError, Ring};

const HEADER_LEN: usize = 16;
const RANGE_LEN: usize = 16;
/// Bytes of GET_ID's answer.
pub(super) const ID_LEN: usize = spec::VIRTIO_BLK_ID_BYTES as usize;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = spec::VIRTIO_BLK_S_OK as u8,
    IoError = spec::VIRTIO_BLK_S_IOERR as u8,
    Unsupported = spec::VIRTIO_BLK_S_UNSUPP as u8,
}

/// What an answer needs to know of its chain.
pub(super) struct Ticket {
    pub(super) head: u16,
    /// Where the status goes: one byte.
    pub(super) status: GuestBuffers,
    /// Bytes that the device will have written to the chain.
    pub(super) written: u32,
    pub(super) kind: Kind,
}

/// What is to become of a chain.
pub(super) enum Todo {
    /// The disk is to do this.
    Begin(Request, Ticket),
    /// It is answered at once.
    Answer(Status, Ticket),
}

/// What a request is judged by.
pub(super) struct Terms<'a> {
    pub(super) features: u64,
    pub(super) bytes: u64,
    pub(super) read_only: bool,
    pub(super) id: &'a [u8; ID_LEN],
}

/// Reads one chain.
pub(super) fn parse<'m>(
    memory: &'m Memory,
    chain: DescriptorChain<&'m GuestMemoryMmap>,
    terms: &Terms<'_>,
    (readable, writable): (&mut Vec<VolatileSlice<'m>>, &mut Vec<VolatileSlice<'m>>),
) -> Result<Todo, QueueError> {
    let head = chain.head_index();
    readable.clear();
    writable.clear();
    Ring::collect_both(memory, chain, readable, writable)?;
    let too_small = |bytes| QueueError::TooSmall { head, bytes };
    let mut start = 0;
    let header: [u8; HEADER_LEN] = take(readable, &mut start).map_err(too_small)?;
    let status = take_last(writable).ok_or(too_small(0))?;
    // What a ring hands out lies in memory; only an impossible piece would not.
    let hold = |pieces: &[VolatileSlice<'_>]| GuestBuffers::new(memory, pieces).ok_or(too_small(0));
    let status = hold(&[status])?;
    let from_driver = readable.get(start..).unwrap_or_default();
    let (kind, sector) = split_header(&header);
    let mut ticket = Ticket { head, status, written: 1, kind: Kind::Trim };
    let decided = match kind {
        spec::VIRTIO_BLK_T_IN => {
            let buffers = hold(writable)?;
            ticket.written = u32::try_from(buffers.len()).unwrap_or(u32::MAX).saturating_add(1);
            ticket.kind = Kind::Read(buffers.len() as u64);
            range(sector, buffers.len() as u64, terms).map(|range| (Operation::Read, range, buffers))
        }
        spec::VIRTIO_BLK_T_OUT => {
            let buffers = hold(from_driver)?;
            ticket.kind = Kind::Write(buffers.len() as u64);
            let operation = Operation::Write { durable: terms.is_write_through() };
            let range = writable_disk(terms).and_then(|()| range(sector, buffers.len() as u64, terms));
            range.map(|range| (operation, range, buffers))
        }
        spec::VIRTIO_BLK_T_FLUSH => {
            ticket.kind = Kind::Flush;
            Ok((Operation::Flush, Range { at: 0, len: 0 }, GuestBuffers::none(memory)))
        }
        spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES => {
            let operation = trim(kind, from_driver, terms);
            operation.map(|operation| (operation, Range { at: 0, len: 0 }, GuestBuffers::none(memory)))
        }
        spec::VIRTIO_BLK_T_GET_ID => {
            ticket.written = hold(writable)?.put(terms.id) as u32 + 1;
            return Ok(Todo::Answer(Status::Ok, ticket));
        }
        _ => Err(Status::Unsupported),
    };
    Ok(match decided {
        Err(status) => {
            ticket.written = 1;
            Todo::Answer(status, ticket)
        }
        Ok((Operation::Read | Operation::Write { .. }, _, buffers)) if buffers.is_empty() => {
            Todo::Answer(Status::Ok, ticket)
        }
        Ok((operation, range, buffers)) => Todo::Begin(Request { operation, at: range.at, buffers }, ticket),
    })
}

impl Terms<'_> {
    /// A driver that can't flush is told of a write when it is on the disk (§5.2.6.2).
    fn is_write_through(&self) -> bool {
        self.features & F_FLUSH == 0
    }
}

fn split_header(header: &[u8; HEADER_LEN]) -> (u32, u64) {
    let [a, b, c, d, _, _, _, _, sector @ ..] = *header;
    (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector))
}

fn writable_disk(terms: &Terms<'_>) -> Result<(), Status> {
    if terms.read_only { Err(Status::IoError) } else { Ok(()) }
}

/// `len` bytes from `sector` on, if they are whole sectors of the disk.
fn range(sector: u64, len: u64, terms: &Terms<'_>) -> Result<Range, Status> {
    let at = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = at.checked_add(len).ok_or(Status::IoError)?;
    if end <= terms.bytes && len.is_multiple_of(SECTOR) {
        Ok(Range { at, len })
    } else {
        Err(Status::IoError)
    }
}

/// Discard or zeroes: `struct virtio_blk_discard_write_zeroes`, up to [`MAX_RANGES`] times.
fn trim(kind: u32, data: &[VolatileSlice<'_>], terms: &Terms<'_>) -> Result<Operation, Status> {
    let discard = kind == spec::VIRTIO_BLK_T_DISCARD;
    let (feature, most, flags) = if discard {
        (F_DISCARD, MAX_DISCARD_SECTORS, 0)
    } else {
        (F_WRITE_ZEROES, MAX_ZERO_SECTORS, spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
    };
    writable_disk(terms)?;
    if terms.features & feature == 0 {
        return Err(Status::Unsupported);
    }
    let mut rest = data.to_vec();
    let total: usize = rest.iter().map(VolatileSlice::len).sum();
    if total == 0 || !total.is_multiple_of(RANGE_LEN) || total > RANGE_LEN * MAX_RANGES as usize {
        return Err(Status::IoError);
    }
    let (mut start, mut unmap) = (0, true);
    let mut ranges = Vec::with_capacity(total / RANGE_LEN);
    for _ in 0..total / RANGE_LEN {
        let bytes: [u8; RANGE_LEN] = take(&mut rest, &mut start).map_err(|_| Status::IoError)?;
        let [sector @ .., a, b, c, d, e, f, g, h] = bytes;
        let (sectors, asked) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        if asked & !flags != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > most {
            return Err(Status::IoError);
        }
        unmap &= asked != 0;
        ranges.push(range(u64::from_le_bytes(sector), u64::from(sectors) * SECTOR, terms)?);
    }
    let durable = terms.is_write_through();
    Ok(if discard {
        Operation::Discard { ranges, durable }
    } else {
        Operation::Zero { ranges, unmap, durable }
    })
}

/// Takes `N` bytes off the front; how many there are, if they are not enough.
fn take<const N: usize>(pieces: &mut [VolatileSlice<'_>], start: &mut usize) -> Result<[u8; N], usize> {
    let (mut bytes, mut filled) = ([0; N], 0);
    take_front(pieces, start, N, |piece| {
        filled += piece.copy_to(bytes.get_mut(filled..).unwrap_or_default());
    });
    if filled == N { Ok(bytes) } else { Err(filled) }
}

/// Takes the last byte off.
fn take_last<'m>(pieces: &mut Vec<VolatileSlice<'m>>) -> Option<VolatileSlice<'m>> {
    let last = pieces.pop()?;
    let (front, byte) = last.split_at(last.len() - 1).ok()?;
    if !front.is_empty() {
        pieces.push(front);
    }
    Some(byte)
}
