//! The header of a packet (virtio 1.3 §5.10.6), in the words of this device.
//!
//! Its layout is `virtio_vsock`'s; the payload behind it stays where it is, in the pieces of its chain. A driver may
//! split header and payload over descriptors as it likes (§2.7.4), so the header is copied out once, and what was
//! checked is what is used.

use bitflags::bitflags;
use virtio_vsock::packet::PKT_HEADER_SIZE;

use super::sys;

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = PKT_HEADER_SIZE;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// What a packet is for (§5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Rst = 3,
    /// No more data one way or both.
    Shutdown = 4,
    /// Data.
    Rw = 5,
    /// Tells of buffer space.
    CreditUpdate = 6,
    /// Asks to be told of buffer space.
    CreditRequest = 7,
}

impl Op {
    /// The operation of this number, if it is one.
    pub(super) fn parse(number: u16) -> Option<Self> {
        let all = [
            Self::Request,
            Self::Response,
            Self::Rst,
            Self::Shutdown,
            Self::Rw,
            Self::CreditUpdate,
            Self::CreditRequest,
        ];
        all.into_iter().find(|op| *op as u16 == number)
    }
}

bitflags! {
    /// Which way no more data goes, as seen by the sender of the packet (§5.10.6.5).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Shutdown: u32 {
        /// The sender receives no more.
        const RCV = 1;
        /// The sender sends no more.
        const SEND = 2;
    }
}

/// A header, parsed; all numbers are the spec's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    /// [`STREAM`], or something that we don't have.
    pub(super) kind: u16,
    /// A number of [`Op`], or nonsense.
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub(super) fn parse(bytes: [u8; HEADER_LEN]) -> Self {
        let mut store = bytes;
        let mut packet = sys::packet(&mut store);
        packet.set_header_from_raw(&bytes).expect("it has the length of a header");
        Self {
            src_cid: packet.src_cid(),
            dst_cid: packet.dst_cid(),
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            len: packet.len(),
            kind: packet.type_(),
            op: packet.op(),
            flags: packet.flags(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        }
    }

    /// The header as the guest reads it.
    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        sys::packet(&mut bytes)
            .set_src_cid(self.src_cid)
            .set_dst_cid(self.dst_cid)
            .set_src_port(self.src_port)
            .set_dst_port(self.dst_port)
            .set_len(self.len)
            .set_type(self.kind)
            .set_op(self.op)
            .set_flags(self.flags)
            .set_buf_alloc(self.buf_alloc)
            .set_fwd_cnt(self.fwd_cnt);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_the_specs() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 2,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            kind: STREAM,
            op: Op::Rw as u16,
            flags: 0x2322_2120,
            buf_alloc: 0x2726_2524,
            fwd_cnt: 0x2b2a_2928,
        };
        let mut expected = vec![1, 2, 3, 4, 5, 6, 7, 8, 2, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 1, 0, 5, 0]);
        expected.extend(0x20..0x2c);
        assert_eq!(header.to_bytes()[..], expected);
        assert_eq!(Header::parse(header.to_bytes()), header);
    }

    #[test]
    fn only_seven_numbers_are_operations() {
        let known = (0..=u16::MAX).filter_map(Op::parse).map(|op| op as u16);
        assert_eq!(known.collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_and_back(bytes in any::<[u8; 32]>(), more in any::<[u8; 12]>()) {
            let all: [u8; HEADER_LEN] = [&bytes[..], &more[..]].concat().try_into().unwrap();
            prop_assert_eq!(Header::parse(all).to_bytes(), all);
        }
    }
}
