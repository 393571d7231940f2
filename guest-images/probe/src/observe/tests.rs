use super::*;
use proptest::prelude::*;

const GATEWAY: Ipv4Address = Ipv4Address::new(192, 168, 122, 1);
const SELF: Ipv4Address = Ipv4Address::new(192, 168, 122, 50);
const WORLD: Ipv4Address = Ipv4Address::new(198, 51, 100, 7);

fn packet(from: Ipv4Address, to: Ipv4Address, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 61, protocol, 0, 0];
    ip.extend_from_slice(&from.octets());
    ip.extend_from_slice(&to.octets());
    ip.extend_from_slice(body);
    ip
}

fn frame(ip: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 14];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame.extend_from_slice(ip);
    frame
}

fn seen(frame: &[u8]) -> Observer {
    let mut observer = Observer::default();
    observer.frame(99, frame);
    observer
}

#[test]
fn an_echo_reply_shows_its_ttl_and_time() {
    let observer = seen(&frame(&packet(WORLD, SELF, 1, &[0, 0, 0, 0, 0x12, 0x34, 0, 7])));
    assert_eq!(observer.replies, [EchoReply { from: WORLD, ident: 0x1234, seq: 7, ttl: 61, at: 99 }]);
}

#[test]
fn an_icmp_error_names_the_packet_that_caused_it() {
    let cause = packet(SELF, WORLD, 17, &[0xc0, 0x00, 0, 53, 0, 8, 0, 0]);
    let body = [&[3, 4, 0, 0, 0, 0, 0x05, 0x14][..], &cause].concat();
    let observer = seen(&frame(&packet(GATEWAY, SELF, 1, &body)));
    let error = observer.error(17, WORLD, |e| e.ports == (0xc000, 53)).unwrap();
    assert_eq!((error.from, error.kind, error.code, error.mtu), (GATEWAY, 3, 4, 1300));
    assert!(observer.error(6, WORLD, |_| true).is_none());
}

#[test]
fn resets_neighbours_and_dhcp_payloads_are_kept() {
    let mut observer =
        seen(&frame(&packet(WORLD, SELF, 6, &[0, 80, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x14])));
    assert_eq!(observer.resets, [Reset { from: (WORLD, 80), to: 0xc000 }]);
    let mut arp = vec![0; 42];
    arp[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    arp[22..28].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    arp[28..32].copy_from_slice(&GATEWAY.octets());
    observer.frame(1, &arp);
    assert_eq!(observer.neighbours, [(GATEWAY, [2, 0, 0, 0, 0, 9])]);
    observer.frame(1, &frame(&packet(GATEWAY, SELF, 17, &[0, 67, 0, 68, 0, 11, 0, 0, 1, 2, 3, 0xee])));
    assert_eq!(observer.dhcp, [[1, 2, 3]]);
}

#[test]
fn later_fragments_are_not_taken_for_headers() {
    let mut ip = packet(WORLD, SELF, 1, &[0, 0, 0, 0, 0, 1, 0, 1]);
    ip[6..8].copy_from_slice(&[0x20, 0]);
    assert_eq!(seen(&frame(&ip)).replies.len(), 1);
    ip[6..8].copy_from_slice(&[0, 185]);
    assert_eq!(seen(&frame(&ip)).replies.len(), 0);
}

#[test]
fn only_the_last_events_are_kept() {
    let mut observer = Observer::default();
    for seq in 0..200 {
        observer.frame(0, &frame(&packet(WORLD, SELF, 1, &[0, 0, 0, 0, 0, 1, 0, seq])));
    }
    assert_eq!(observer.replies.len(), KEEP);
    assert_eq!(observer.replies.back().unwrap().seq, 199);
}

proptest! {
    #[test]
    fn no_frame_makes_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), kind in 0..3u8) {
        if bytes.len() > 24 {
            bytes[12..14].copy_from_slice(&[8, if kind == 2 { 6 } else { 0 }]);
            bytes[14] = 0x45;
            bytes[23] = [1, 6, 17][usize::from(kind)];
        }
        let _ = seen(&bytes);
    }
}
