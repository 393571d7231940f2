//! What the disk offers, and its configuration space (virtio 1.3 §5.2.3, §5.2.4).

use virtio_bindings::virtio_blk as bit;

use crate::disk::SECTOR;
use crate::virtio::MAX_DESCRIPTORS;

pub(super) const F_SEG_MAX: u64 = 1 << bit::VIRTIO_BLK_F_SEG_MAX;
pub(super) const F_RO: u64 = 1 << bit::VIRTIO_BLK_F_RO;
pub(super) const F_BLK_SIZE: u64 = 1 << bit::VIRTIO_BLK_F_BLK_SIZE;
pub(super) const F_FLUSH: u64 = 1 << bit::VIRTIO_BLK_F_FLUSH;
pub(super) const F_TOPOLOGY: u64 = 1 << bit::VIRTIO_BLK_F_TOPOLOGY;
pub(super) const F_DISCARD: u64 = 1 << bit::VIRTIO_BLK_F_DISCARD;
pub(super) const F_WRITE_ZEROES: u64 = 1 << bit::VIRTIO_BLK_F_WRITE_ZEROES;

/// Most data descriptors of a request: a chain's, without the header's and the status's.
pub(super) const SEG_MAX: u32 = MAX_DESCRIPTORS as u32 - 2;
/// Most sectors of one range to discard: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most sectors of one range to zero: 128 MiB, since there are file systems on which zeros have to be written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 18;
/// Most ranges of one request.
pub(super) const MAX_RANGES: u32 = 16;
/// Sectors of what is read, written and discarded best: a page of the host, a cluster of an overlay.
const BEST: u32 = 8;

/// Bytes of the configuration space, up to where `VIRTIO_BLK_F_SECURE_ERASE` begins.
pub(super) const CONFIG_LEN: usize = 60;

/// The features of a disk.
pub(super) fn offered(read_only: bool) -> u64 {
    let always = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY;
    always | if read_only { F_RO } else { F_FLUSH | F_DISCARD | F_WRITE_ZEROES }
}

/// `struct virtio_blk_config` of a disk of `bytes` bytes.
pub(super) fn config_space(bytes: u64) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, field: &[u8]| space[at..at + field.len()].copy_from_slice(field);
    put(0, &(bytes / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: physical block as a power of two of logical ones, no offset, smallest good transfer.
    put(24, &[BEST.trailing_zeros() as u8, 0]);
    put(26, &(BEST as u16).to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &BEST.to_le_bytes());
    put(48, &MAX_ZERO_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    // Zeroing may unmap.
    put(56, &[1]);
    space
}
