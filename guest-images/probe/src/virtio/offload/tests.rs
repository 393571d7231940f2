use super::*;
use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket,
    UdpRepr,
};

const FROM: Ipv4Address = Ipv4Address::new(192, 168, 122, 50);
const TO: Ipv4Address = Ipv4Address::new(198, 51, 100, 7);

fn ip(protocol: IpProtocol, len: usize) -> Vec<u8> {
    let mut frame = vec![0; 34 + len];
    frame[12..14].copy_from_slice(&[8, 0]);
    let repr =
        Ipv4Repr { src_addr: FROM, dst_addr: TO, next_header: protocol, payload_len: len, hop_limit: 64 };
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut frame[14..]), &ChecksumCapabilities::default());
    frame
}

/// A frame with the checksum that smoltcp computes.
fn tcp(payload: &[u8]) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: 40000,
        dst_port: 80,
        control: TcpControl::Psh,
        seq_number: TcpSeqNumber(1),
        ack_number: Some(TcpSeqNumber(2)),
        window_len: 1000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let mut frame = ip(IpProtocol::Tcp, repr.buffer_len());
    let caps = ChecksumCapabilities::default();
    repr.emit(&mut TcpPacket::new_unchecked(&mut frame[34..]), &FROM.into(), &TO.into(), &caps);
    frame
}

fn udp(payload: &[u8]) -> Vec<u8> {
    let mut frame = ip(IpProtocol::Udp, 8 + payload.len());
    let caps = ChecksumCapabilities::default();
    let repr = UdpRepr { src_port: 40000, dst_port: 53 };
    let fill = |space: &mut [u8]| space.copy_from_slice(payload);
    let packet = &mut UdpPacket::new_unchecked(&mut frame[34..]);
    repr.emit(packet, &FROM.into(), &TO.into(), payload.len(), fill, &caps);
    frame
}

/// What a device does with NEEDS_CSUM (virtio 1.3 §5.1.6.2.1).
fn complete(frame: &mut [u8], header: &[u8; HEADER]) {
    let start = usize::from(u16::from_le_bytes([header[6], header[7]]));
    let offset = usize::from(u16::from_le_bytes([header[8], header[9]]));
    let full = !sum(&frame[start..], 0);
    frame[start + offset..start + offset + 2].copy_from_slice(&full.to_be_bytes());
}

proptest! {
    #[test]
    fn a_completed_partial_checksum_is_the_full_one(payload in proptest::collection::vec(any::<u8>(), 0..1400), is_tcp: bool) {
        let whole = if is_tcp { tcp(&payload) } else { udp(&payload) };
        let mut frame = whole.clone();
        let header = fill(&mut frame, None);
        prop_assert_eq!(header[0], NEEDS_CSUM);
        prop_assert!(partial_is_right(&header, &frame));
        complete(&mut frame, &header);
        prop_assert_eq!(frame, whole);
    }

    #[test]
    fn a_flipped_bit_is_found_unless_the_device_vouches(payload in proptest::collection::vec(any::<u8>(), 1..200), bit: u16) {
        let mut frame = tcp(&payload);
        prop_assert!(verify(0, &frame));
        let at = 34 + usize::from(bit / 8) % (frame.len() - 34);
        // The data offset is left alone: with another one the frame is another frame.
        prop_assume!(at != 46);
        frame[at] ^= 1 << (bit % 8);
        prop_assert!(!verify(0, &frame));
        prop_assert!(verify(DATA_VALID, &frame));
        prop_assert!(verify(NEEDS_CSUM, &frame));
    }

    #[test]
    fn no_bytes_make_it_panic(mut frame in proptest::collection::vec(any::<u8>(), 0..200), flags: u8) {
        let _ = verify(flags, &frame);
        let _ = fill(&mut frame, Some(1460));
    }
}

#[test]
fn a_long_segment_names_its_headers_and_its_size() {
    let mut frame = tcp(&[7; 4000]);
    let header = fill(&mut frame, Some(1460));
    assert_eq!((header[0], header[1]), (NEEDS_CSUM, GSO_TCPV4));
    assert_eq!(u16::from_le_bytes([header[2], header[3]]), 54);
    assert_eq!(u16::from_le_bytes([header[4], header[5]]), 1460);
}

#[test]
fn a_partial_checksum_elsewhere_or_of_something_else_is_found() {
    let mut frame = tcp(b"data");
    let mut header = fill(&mut frame, None);
    header[6] += 2;
    assert!(!partial_is_right(&header, &frame));
    header[6] -= 2;
    frame[51] ^= 1;
    assert!(!partial_is_right(&header, &frame));
    assert!(!partial_is_right(&header, &frame[..20]));
}

#[test]
fn fragments_and_absent_udp_checksums_are_not_judged() {
    let mut absent = udp(b"x");
    absent[40..42].fill(0);
    assert!(verify(0, &absent));
    let mut fragment = udp(b"x");
    fragment[20] = 0x20;
    fragment[42] ^= 1;
    assert!(verify(0, &fragment));
}

#[test]
fn ethernet_padding_is_not_summed() {
    let mut frame = udp(b"x");
    frame.resize(60, 0xee);
    assert!(verify(0, &frame));
}
