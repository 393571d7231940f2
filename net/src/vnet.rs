//! `virtio_net_hdr`: the twelve bytes that travel in front of every frame (virtio 1.3 §5.1.6).
//!
//! It is the one definition of the workspace. It says two things about the Ethernet frame behind it:
//! that a checksum is still partial (`NEEDS_CSUM`: sum everything from `csum_start` to the end and store the
//! result at `csum_start + csum_offset`), and that the frame is a super-segment that whoever puts it on a
//! real wire cuts into pieces of `gso_size` payload bytes. A TAP with `IFF_VNET_HDR`, the guest's virtqueues
//! and our NAT all speak it, so a 64 KiB TCP segment crosses the program as one frame.

use bitflags::bitflags;

/// Bytes of the header as every party of this program lays it out: `num_buffers` is always present, as it
/// is for a device with `VIRTIO_F_VERSION_1` and for a TAP after `TUNSETVNETHDRSZ(12)`.
pub const VNET_HDR_LEN: usize = 12;

bitflags! {
    /// `flags` of the header.
    ///
    /// ```
    /// use net::{VnetFlags, VnetHdr};
    ///
    /// // The frame's sender leaves the checksum to us; bit 7 means nothing, and is cleared.
    /// let hdr = VnetHdr::parse(&[0x81, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], 60)?;
    /// assert_eq!(hdr.flags, VnetFlags::NEEDS_CSUM);
    /// # Ok::<(), net::BadVnetHdr>(())
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct VnetFlags: u8 {
        /// The checksum at `csum_start + csum_offset` holds only the pseudo-header sum.
        const NEEDS_CSUM = 1;
        /// The checksums have been verified by whoever passed the frame on.
        const DATA_VALID = 2;
    }
}

/// `gso_type` of the header, without the ECN bit.
///
/// ```
/// use net::{GsoType, VnetHdr};
///
/// // 1 is TCP over IPv4 and 0x80 the ECN bit; each piece carries 0x05a8 = 1448 bytes.
/// let hdr = VnetHdr::parse(&[1, 0x81, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], 60_000)?;
/// assert_eq!((hdr.gso_type, hdr.ecn, hdr.gso_size), (GsoType::Tcp4, true, 1448));
/// # Ok::<(), net::BadVnetHdr>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GsoType {
    /// The frame fits the MTU as it stands.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// UDP fragmentation offload: the payload is one datagram, to be cut into IP fragments.
    Udp,
    /// TCP over IPv6.
    Tcp6,
    /// UDP segmentation offload: the payload is several datagrams of `gso_size` bytes.
    UdpL4,
}

const GSO_ECN: u8 = 0x80;

/// The header in host form. `Default` is a plain frame: complete checksums, no segmentation.
///
/// ```
/// use net::{VnetFlags, VnetHdr};
///
/// assert_eq!(VnetHdr::default().to_bytes(), [0; 12], "a plain frame");
/// // UDP behind Ethernet and IPv4: summed from byte 34 on, stored at 34 + 6.
/// let hdr = VnetHdr { flags: VnetFlags::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHdr::default() };
/// assert_eq!(VnetHdr::parse(&hdr.to_bytes(), 42)?, hdr, "the two bytes at 40 are just inside the frame");
/// # Ok::<(), net::BadVnetHdr>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHdr {
    /// Which fields below are meant.
    pub flags: VnetFlags,
    /// How the frame is to be cut.
    pub gso_type: GsoType,
    /// The TCP segment has CWR set (`VIRTIO_NET_HDR_GSO_ECN`).
    pub ecn: bool,
    /// Bytes of Ethernet + IP + TCP headers; a hint that must be checked before it is used.
    pub hdr_len: u16,
    /// Payload bytes of each piece (MSS), when `gso_type` is not `None`.
    pub gso_size: u16,
    /// Offset in the frame where summing starts.
    pub csum_start: u16,
    /// Offset from `csum_start` where the sum is stored.
    pub csum_offset: u16,
    /// Receive buffers that the frame occupies (`VIRTIO_NET_F_MRG_RXBUF`); set by the device, 0 elsewhere.
    pub num_buffers: u16,
}

/// Why a header that came from a guest or a peer was refused.
///
/// ```
/// use net::{BadVnetHdr, VnetHdr};
///
/// let partial = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
/// assert!(VnetHdr::parse(&partial, 52).is_ok());
/// let error = VnetHdr::parse(&partial, 51).unwrap_err();
/// assert_eq!(error, BadVnetHdr::Checksum { start: 34, offset: 16, len: 51 });
/// assert_eq!(VnetHdr::parse(&[0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 60), Err(BadVnetHdr::GsoType(2)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadVnetHdr {
    /// Unknown `gso_type`.
    #[error("gso_type {0:#x} is not defined")]
    GsoType(u8),
    /// `gso_type` without a `gso_size`, or without the partial checksum that each piece needs.
    #[error("gso_type is set but gso_size is {0} and NEEDS_CSUM is {1}")]
    GsoWithout(u16, bool),
    /// The checksum field lies outside the frame.
    #[error("checksum at {start}+{offset} lies outside a frame of {len} bytes")]
    Checksum {
        /// `csum_start`
        start: u16,
        /// `csum_offset`
        offset: u16,
        /// Bytes of the frame.
        len: usize,
    },
}

impl VnetHdr {
    /// Decodes the wire form, refusing values that have no meaning for a frame of `frame_len` bytes.
    ///
    /// Unknown flag bits are cleared, as the spec asks of a device (virtio 1.3 §5.1.6.2).
    pub fn parse(bytes: &[u8; VNET_HDR_LEN], frame_len: usize) -> Result<Self, BadVnetHdr> {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let gso_type = match bytes[1] & !GSO_ECN {
            0 => GsoType::None,
            1 => GsoType::Tcp4,
            3 => GsoType::Udp,
            4 => GsoType::Tcp6,
            5 => GsoType::UdpL4,
            other => return Err(BadVnetHdr::GsoType(other)),
        };
        let hdr = Self {
            flags: VnetFlags::from_bits_truncate(bytes[0]),
            gso_type,
            ecn: bytes[1] & GSO_ECN != 0,
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        };
        let needs_csum = hdr.flags.contains(VnetFlags::NEEDS_CSUM);
        if gso_type != GsoType::None && (hdr.gso_size == 0 || !needs_csum) {
            return Err(BadVnetHdr::GsoWithout(hdr.gso_size, needs_csum));
        }
        let end = usize::from(hdr.csum_start) + usize::from(hdr.csum_offset) + 2;
        if needs_csum && end > frame_len {
            return Err(BadVnetHdr::Checksum {
                start: hdr.csum_start,
                offset: hdr.csum_offset,
                len: frame_len,
            });
        }
        Ok(hdr)
    }

    /// Encodes the wire form.
    pub fn to_bytes(self) -> [u8; VNET_HDR_LEN] {
        let gso = match self.gso_type {
            GsoType::None => 0,
            GsoType::Tcp4 => 1,
            GsoType::Udp => 3,
            GsoType::Tcp6 => 4,
            GsoType::UdpL4 => 5,
        };
        let mut bytes = [0; VNET_HDR_LEN];
        bytes[0] = self.flags.bits();
        bytes[1] = gso | if self.ecn { GSO_ECN } else { 0 };
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (slot, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_tso_frame_keeps_every_field() {
        let hdr = VnetHdr {
            flags: VnetFlags::NEEDS_CSUM,
            gso_type: GsoType::Tcp4,
            ecn: true,
            hdr_len: 66,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 3,
        };
        assert_eq!(hdr.to_bytes(), [1, 0x81, 66, 0, 0xa8, 5, 34, 0, 16, 0, 3, 0]);
        assert_eq!(VnetHdr::parse(&hdr.to_bytes(), 60_000), Ok(hdr));
    }

    #[test]
    fn a_checksum_outside_the_frame_is_refused() {
        let bytes = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        assert!(VnetHdr::parse(&bytes, 52).is_ok());
        assert_eq!(VnetHdr::parse(&bytes, 51), Err(BadVnetHdr::Checksum { start: 34, offset: 16, len: 51 }));
    }

    #[test]
    fn segmentation_without_a_size_is_refused() {
        let bytes = [1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        assert_eq!(VnetHdr::parse(&bytes, 1500), Err(BadVnetHdr::GsoWithout(0, true)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_survive_a_round_trip(bytes in any::<[u8; 12]>(), len in 0usize..70_000) {
            if let Ok(hdr) = VnetHdr::parse(&bytes, len) {
                prop_assert_eq!(VnetHdr::parse(&hdr.to_bytes(), len), Ok(hdr));
            }
        }
    }
}
