use etherparse::{LinkExtSlice, NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
struct Shape {
    v6: bool,
    udp: bool,
    tag: bool,
    options: bool,
    payload: usize,
    size: u16,
    seq: u32,
    ecn: bool,
}

const PLAIN: Shape = Shape {
    v6: false,
    udp: false,
    tag: false,
    options: false,
    payload: 3000,
    size: 1460,
    seq: u32::MAX - 100,
    ecn: true,
};

fn shape() -> impl Strategy<Value = Shape> {
    let flags = any::<(bool, bool, bool, bool, bool)>();
    (flags, 1usize..64_000, 48u16..9000, any::<u32>()).prop_map(
        |((v6, udp, tag, options, ecn), payload, size, seq)| Shape {
            v6,
            udp,
            tag,
            options: options && !udp,
            payload,
            size,
            seq,
            ecn: ecn && !udp,
        },
    )
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// A super-segment as a guest's kernel makes it, with rubbish where the checksums will be.
fn super_segment(s: Shape) -> (VnetHdr, Vec<u8>) {
    let mut frame = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]].concat();
    if s.tag {
        frame.extend_from_slice(&[0x81, 0, 0, 7]);
    }
    let header = if s.udp { 8 } else { 20 + if s.options { 12 } else { 0 } };
    let len = header + s.payload;
    let protocol = if s.udp { UDP } else { TCP };
    if s.v6 {
        frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend_from_slice(&(len as u16).to_be_bytes());
        frame.extend_from_slice(&[protocol, 64]);
        frame.extend_from_slice(&[[0xfe; 16], [0xfd; 16]].concat());
    } else {
        frame.extend_from_slice(&[8, 0, 0x45, 0]);
        frame.extend_from_slice(&((len + 20) as u16).to_be_bytes());
        frame.extend_from_slice(&[0xff, 0xff, 0x40, 0, 64, protocol, 0xab, 0xcd, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let transport = frame.len();
    frame.extend_from_slice(&[3, 232, 7, 208]);
    if s.udp {
        frame.extend_from_slice(&(len as u16).to_be_bytes());
        frame.extend_from_slice(&[0x12, 0x34]);
    } else {
        frame.extend_from_slice(&s.seq.to_be_bytes());
        let flags = FIN | PSH | 0x10 | if s.ecn { CWR } else { 0 };
        frame.extend_from_slice(&[0, 0, 0, 5, ((header / 4) as u8) << 4, flags, 1, 0, 0x12, 0x34, 0, 0]);
        if s.options {
            frame.extend_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        }
    }
    frame.extend_from_slice(&pattern(s.payload));
    let hdr = VnetHdr {
        flags: VnetFlags::NEEDS_CSUM,
        gso_type: match (s.udp, s.v6) {
            (true, _) => GsoType::UdpL4,
            (false, true) => GsoType::Tcp6,
            (false, false) => GsoType::Tcp4,
        },
        ecn: s.ecn,
        gso_size: s.size,
        csum_start: transport as u16,
        csum_offset: if s.udp { 6 } else { 16 },
        ..VnetHdr::default()
    };
    (hdr, frame)
}

fn cut(hdr: &VnetHdr, frame: &[u8]) -> Vec<Vec<u8>> {
    let plan = Plan::new(hdr, frame).unwrap();
    let piece = |i| {
        let mut out = Vec::new();
        plan.piece(frame, i, &mut out);
        out
    };
    (0..plan.count()).map(piece).collect()
}

/// What an independent parser makes of a piece, all of whose lengths and checksums it found right.
struct Seen {
    tcp: Option<etherparse::TcpHeader>,
    ip_id: u16,
    payload: Vec<u8>,
}

fn read_back(piece: &[u8]) -> Seen {
    let sliced = SlicedPacket::from_ethernet(piece).unwrap();
    assert!(
        sliced
            .link_exts
            .iter()
            .all(|e| matches!(e, LinkExtSlice::Vlan(v) if v.to_header().vlan_id.value() == 7))
    );
    let (v4, v6) = match sliced.net.unwrap() {
        NetSlice::Ipv4(ip) => (Some(ip.header().to_header()), None),
        NetSlice::Ipv6(ip) => (None, Some(ip.header().to_header())),
        NetSlice::Arp(_) => panic!("not IP"),
    };
    if let Some(ip) = &v4 {
        assert_eq!(ip.header_checksum, ip.calc_header_checksum());
    }
    match sliced.transport.unwrap() {
        TransportSlice::Tcp(t) => {
            let header = t.to_header();
            let sum = match (&v4, &v6) {
                (Some(ip), _) => header.calc_checksum_ipv4(ip, t.payload()),
                (_, Some(ip)) => header.calc_checksum_ipv6(ip, t.payload()),
                _ => unreachable!(),
            };
            assert_eq!(header.checksum, sum.unwrap());
            Seen {
                tcp: Some(header),
                ip_id: v4.map_or(0, |ip| ip.identification),
                payload: t.payload().to_vec(),
            }
        }
        TransportSlice::Udp(u) => {
            let header = u.to_header();
            let sum = match (&v4, &v6) {
                (Some(ip), _) => header.calc_checksum_ipv4(ip, u.payload()),
                (_, Some(ip)) => header.calc_checksum_ipv6(ip, u.payload()),
                _ => unreachable!(),
            };
            assert_eq!(header.checksum, sum.unwrap());
            assert_eq!(usize::from(header.length), 8 + u.payload().len());
            Seen { tcp: None, ip_id: v4.map_or(0, |ip| ip.identification), payload: u.payload().to_vec() }
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn flags_sequence_and_identification_go_where_they_belong() {
    let (hdr, frame) = super_segment(PLAIN);
    let seen: Vec<Seen> = cut(&hdr, &frame).iter().map(|p| read_back(p)).collect();
    let tcp: Vec<_> = seen.iter().map(|s| s.tcp.clone().unwrap()).collect();
    assert_eq!(tcp.iter().map(|t| t.cwr).collect::<Vec<_>>(), [true, false, false]);
    assert_eq!(tcp.iter().map(|t| t.fin && t.psh).collect::<Vec<_>>(), [false, false, true]);
    assert!(tcp[..2].iter().all(|t| !t.fin && !t.psh && t.ack));
    assert_eq!(tcp.iter().map(|t| t.sequence_number).collect::<Vec<_>>(), [u32::MAX - 100, 1359, 2819]);
    assert_eq!(seen.iter().map(|s| s.ip_id).collect::<Vec<_>>(), [0xffff, 0, 1]);
    assert_eq!(seen.iter().map(|s| s.payload.len()).collect::<Vec<_>>(), [1460, 1460, 80]);
}

#[test]
fn what_is_no_super_segment_is_refused() {
    let (hdr, good) = super_segment(PLAIN);
    let refused = |hdr: VnetHdr, change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        Plan::new(&hdr, &frame).unwrap_err()
    };
    let same = |_: &mut Vec<u8>| {};
    assert_eq!(refused(hdr, &|f| f[14 + 6] |= 0x20), Malformed::NotData, "more fragments");
    assert_eq!(refused(hdr, &|f| f[34 + TCP_FLAGS] |= SYN), Malformed::NotData);
    assert_eq!(refused(hdr, &|f| f[34 + TCP_FLAGS] |= RST), Malformed::NotData);
    assert_eq!(refused(hdr, &|f| f[23] = 17), Malformed::Type(GsoType::Tcp4));
    assert_eq!(refused(hdr, &|f| f[34 + 12] = 0xf0 - 0xc0), Malformed::Header("TCP"));
    assert_eq!(refused(hdr, &|f| f.truncate(40)), Malformed::Header("IPv4"));
    assert_eq!(refused(hdr, &|f| f.push(0)), Malformed::Header("IPv4"), "the IP length is not the frame's");
    let moved = VnetHdr { csum_start: 33, ..hdr };
    assert_eq!(refused(moved, &same), Malformed::Checksum { start: 33, offset: 16 });
    let tiny = VnetHdr { gso_size: 1, ..hdr };
    assert_eq!(refused(tiny, &same), Malformed::Pieces { payload: 3000, gso_size: 1 });
    let ufo = VnetHdr { gso_type: GsoType::Udp, ..hdr };
    assert_eq!(refused(ufo, &same), Malformed::Type(GsoType::Udp));
    let v6 = VnetHdr { gso_type: GsoType::Tcp6, ..hdr };
    assert_eq!(refused(v6, &same), Malformed::Type(GsoType::Tcp6));
}

#[test]
fn extension_headers_are_looked_through_and_a_pending_route_is_not() {
    let (mut hdr, mut frame) = super_segment(Shape { v6: true, ..PLAIN });
    let len = get(&frame, 18) + 16;
    put(&mut frame, 18, len);
    frame[20] = 0;
    frame.splice(54..54, [43, 0, 1, 4, 0, 0, 0, 0, TCP, 0, 4, 0, 0, 0, 0, 0]);
    hdr.csum_start += 16;
    assert_eq!(cut(&hdr, &frame).len(), 3);
    frame[54 + 8 + 3] = 1;
    assert_eq!(Plan::new(&hdr, &frame).unwrap_err(), Malformed::Header("IPv6"));
}

#[test]
fn help_is_needed_for_exactly_what_was_not_granted() {
    let (hdr, _) = super_segment(PLAIN);
    let all = Offloads::CSUM | Offloads::TSO4 | Offloads::ECN;
    assert!(!needs_help(&hdr, all));
    for missing in all {
        assert!(needs_help(&hdr, all - missing), "{missing:?}");
    }
    assert!(!needs_help(&VnetHdr::default(), Offloads::empty()));
    let valid = VnetHdr { flags: VnetFlags::DATA_VALID, ..VnetHdr::default() };
    assert_eq!(visible_hdr(valid, Offloads::empty()), VnetHdr::default());
    assert_eq!(visible_hdr(valid, Offloads::CSUM), valid);
}

proptest! {
    #[test]
    fn pieces_carry_the_payload_with_every_checksum_right(s in shape()) {
        let (hdr, frame) = super_segment(s);
        prop_assume!(s.payload.div_ceil(usize::from(s.size)) <= MAX_PIECES);
        let mut payload = Vec::new();
        for piece in cut(&hdr, &frame) {
            prop_assert!(piece.len() <= usize::from(hdr.csum_start) + 32 + usize::from(s.size));
            let seen = read_back(&piece);
            if let Some(tcp) = &seen.tcp {
                prop_assert_eq!(tcp.sequence_number, s.seq.wrapping_add(payload.len() as u32));
            }
            payload.extend_from_slice(&seen.payload);
        }
        prop_assert_eq!(payload, pattern(s.payload));
    }

    #[test]
    fn a_completed_checksum_is_the_one_that_a_parser_computes(s in shape()) {
        let (hdr, mut frame) = super_segment(Shape { payload: s.payload % 1400 + 1, ..s });
        let transport = usize::from(hdr.csum_start);
        let len = frame.len() - transport;
        let protocol = if s.udp { UDP } else { TCP };
        let partial = if s.v6 {
            Sum::pseudo_v6([0xfe; 16].into(), [0xfd; 16].into(), protocol, len as u32)
        } else {
            Sum::pseudo_v4([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), protocol, len as u16)
        };
        put(&mut frame, transport + usize::from(hdr.csum_offset), partial.fold());
        if !s.v6 {
            put(&mut frame, transport - 10, 0);
            let sum = checksum::checksum(&frame[transport - 20..transport]);
            put(&mut frame, transport - 10, sum);
        }
        complete_checksum(&hdr, &mut frame).unwrap();
        read_back(&frame);
    }

    #[test]
    fn damaged_super_segments_are_refused_or_cut_but_never_panic(
        s in shape(), hits in proptest::collection::vec((0usize..120, any::<u8>()), 0..6),
        cut_at in any::<proptest::sample::Index>(), start in any::<u16>(), offset in any::<u16>(), shift in any::<bool>(),
    ) {
        let (mut hdr, mut frame) = super_segment(Shape { payload: s.payload % 4000 + 1, ..s });
        for (at, byte) in hits {
            if let Some(slot) = frame.get_mut(at) {
                *slot = byte;
            }
        }
        if shift {
            (hdr.csum_start, hdr.csum_offset) = (start, offset);
            frame.truncate(cut_at.index(frame.len() + 1));
        }
        if let Ok(plan) = Plan::new(&hdr, &frame) {
            let mut out = Vec::new();
            for i in 0..plan.count() {
                plan.piece(&frame, i, &mut out);
            }
        }
        let _ = complete_checksum(&hdr, &mut frame);
        let _ = Parked::new(hdr, frame, Offloads::empty());
    }
}
