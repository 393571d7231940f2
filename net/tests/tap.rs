//! [`net::tap::TapPort`] against the kernel: bridges, offloads, ownership, refusals.

#![cfg(test)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::{Command, Stdio};

use common::guest::{self, ACK, LINUX, MSS, Ring, Tcp, checksums_hold, pattern, recv_until, send};
use common::{Lan, exists, has_tun, ip, sys, until_forwarding, wait};
use net::tap::{TapError, TapName, TapPort};
use net::{DropReason, FramePort, GsoType, Received, Sent, VnetHdr};
use tun_tap::{Iface, Mode};

fn open(name: &str) -> Result<TapPort, TapError> {
    TapPort::open(&TapName::Exact(name.to_owned()), None)
}

fn on_bridge() -> TapPort {
    let port = TapPort::open(&TapName::default(), Some("br0")).unwrap();
    until_forwarding(port.name());
    port
}

/// The LAN's host takes one connection and reads `len` bytes.
fn sink(lan: &Lan, len: usize) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let listener = lan.run(|| TcpListener::bind("10.9.0.2:80").unwrap());
    lan.start(move || {
        let mut received = vec![0; len];
        listener.accept().unwrap().0.read_exact(&mut received).unwrap();
        received
    })
}

/// Sends 60,000 bytes as one super-segment and compares what the LAN's host reads.
fn super_segment_arrives(lan: &Lan, port: &mut TapPort) {
    let payload = pattern(60_000);
    let received = sink(lan, payload.len());
    let tcp = Tcp::connect(port, 80);
    assert_eq!(send(port, tcp.partial(MSS), &tcp.segment(ACK, &payload)), Sent::Taken);
    assert!(wait(&received) == payload);
}

/// The LAN's host sends 14,000 bytes, which its first window allows; returns the frames that carried them.
fn frames_from_the_lan(lan: &Lan, port: &mut TapPort) -> Vec<(VnetHdr, Vec<u8>)> {
    let listener = lan.run(|| TcpListener::bind("10.9.0.2:80").unwrap());
    let sender = lan.start(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(&pattern(14_000)).unwrap();
        stream
    });
    let mut tcp = Tcp::connect(port, 80);
    let _open = wait(&sender);
    data_frames(&mut tcp, port, 14_000)
}

/// The frames that carry the first `len` bytes from the peer, in order; the peer repeats what nobody acknowledges.
fn data_frames(tcp: &mut Tcp, port: &mut TapPort, len: usize) -> Vec<(VnetHdr, Vec<u8>)> {
    let (mut frames, mut payload) = (Vec::new(), Vec::new());
    while payload.len() < len {
        let (hdr, frame) =
            recv_until(port, |_, frame| tcp.is_mine(frame) && frame[38..42] == tcp.ack.to_be_bytes());
        let data = &frame[34 + usize::from(frame[46] >> 4) * 4..];
        tcp.ack = tcp.ack.wrapping_add(data.len() as u32);
        payload.extend_from_slice(data);
        if !data.is_empty() {
            frames.push((hdr, frame));
        }
    }
    assert!(payload == pattern(len));
    frames
}

in_namespace! {
    fn frames_cross_the_bridge_both_ways() {
        if !has_tun() { return; }
        let lan = Lan::new();
        let mut port = on_bridge();
        let echo = lan.run(|| {
            let socket = UdpSocket::bind("10.9.0.2:7").unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
            socket
        });
        let server = lan.start(move || {
            let mut buf = [0; 64];
            let (n, from) = echo.recv_from(&mut buf).unwrap();
            echo.send_to(&buf[..n], from).unwrap();
        });
        assert_eq!(send(&mut port, VnetHdr::default(), &guest::udp(9, 7, b"ahoy")), Sent::Taken);
        let (_, frame) = recv_until(&mut port, |_, f| f.len() >= 46 && f[23] == 17 && f[36..38] == [0, 9]);
        assert_eq!(frame[42..46], *b"ahoy");
        wait(&server);
        let counters = port.counters();
        assert_eq!((counters.tx_frames, counters.tx_bytes), (1, 46));
        assert!(counters.rx_frames >= 1 && counters.drops().count() == 0);
    }

    fn a_plain_tap_on_the_same_bridge_sees_the_very_bytes() {
        if !has_tun() { return; }
        ip("link add br0 type bridge forward_delay 0");
        ip("link set br0 up");
        let peer = Iface::without_packet_info("peer0", Mode::Tap).unwrap();
        let mut peer = std::fs::File::from(sys::take_fd(peer));
        ip("link set peer0 master br0 up");
        until_forwarding("peer0");
        let mut port = on_bridge();
        let out = [&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 5, 0x88, 0xb5][..], &pattern(500)].concat();
        assert_eq!(send(&mut port, VnetHdr::default(), &out), Sent::Taken);
        let mut buf = [0; 2000];
        let got = loop {
            assert!(sys::wait_readable(&peer));
            let n = peer.read(&mut buf).unwrap();
            if buf[12..14] == [0x88, 0xb5] {
                break &buf[..n];
            }
        };
        assert!(got == out);
        let back = [&[2, 0, 0, 0, 0, 5, 2, 0, 0, 0, 0, 9, 0x88, 0xb5][..], &pattern(900)].concat();
        assert_eq!(peer.write(&back).unwrap(), back.len());
        let (hdr, frame) = recv_until(&mut port, |_, f| f[12..14] == [0x88, 0xb5]);
        assert_eq!(hdr, VnetHdr::default());
        assert!(frame == back);
    }

    fn a_super_segment_reaches_a_kernel_socket() {
        if !has_tun() { return; }
        let lan = Lan::new();
        super_segment_arrives(&lan, &mut on_bridge());
    }

    fn a_tap_without_vnet_header_segments_in_software() {
        if !has_tun() { return; }
        let lan = Lan::new();
        let plain = Iface::without_packet_info("plain0", Mode::Tap).unwrap();
        ip("link set plain0 master br0 up");
        until_forwarding("plain0");
        let mut port = TapPort::from_fd(sys::take_fd(plain)).unwrap();
        port.set_offloads(LINUX).unwrap();
        super_segment_arrives(&lan, &mut port);
    }

    fn a_granted_super_segment_arrives_as_one_frame() {
        if !has_tun() { return; }
        let lan = Lan::new();
        let mut port = on_bridge();
        port.set_offloads(LINUX).unwrap();
        let frames = frames_from_the_lan(&lan, &mut port);
        assert!(frames.len() < 10, "{} frames", frames.len());
        let (hdr, frame) = frames.iter().find(|(_, frame)| frame.len() > 1514).unwrap();
        assert_eq!((hdr.gso_type, hdr.gso_size, hdr.csum_start), (GsoType::Tcp4, MSS, 34));
        assert!(frame.len() > 2 * usize::from(MSS));
    }

    fn without_offloads_frames_are_small_and_complete() {
        if !has_tun() { return; }
        let lan = Lan::new();
        let mut port = on_bridge();
        for (hdr, frame) in frames_from_the_lan(&lan, &mut port) {
            assert_eq!(hdr, VnetHdr::default());
            assert!(frame.len() <= 1514 && checksums_hold(&frame));
        }
    }

    fn frames_queued_before_a_reset_are_helped() {
        if !has_tun() { return; }
        let lan = Lan::new();
        let mut port = on_bridge();
        port.set_offloads(LINUX).unwrap();
        let listener = lan.run(|| TcpListener::bind("10.9.0.2:80").unwrap());
        let mut tcp = Tcp::connect(&mut port, 80);
        let _stream = lan.run(move || {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(&pattern(14_000)).unwrap();
            stream
        });
        assert!(sys::wait_readable(&port));
        // The new driver agrees to nothing, but super-segments are in the TAP's queue.
        port.set_offloads(net::Offloads::empty()).unwrap();
        for (hdr, frame) in data_frames(&mut tcp, &mut port, 14_000) {
            assert_eq!(hdr, VnetHdr::default());
            assert!(frame.len() <= 1514 && checksums_hold(&frame));
        }
    }

    fn a_frame_longer_than_the_loan_waits_for_buffers() {
        if !has_tun() { return; }
        let _lan = Lan::new();
        let mut port = on_bridge();
        let peer = Iface::without_packet_info("peer0", Mode::Tap).unwrap();
        ip("link set peer0 mtu 9000 master br0 up");
        until_forwarding("peer0");
        ip(&format!("link set {} mtu 9000", port.name()));
        let frame = [&[2, 0, 0, 0, 0, 5, 2, 0, 0, 0, 0, 9, 0x88, 0xb5][..], &pattern(5000)].concat();
        peer.send(&frame).unwrap();
        assert!(sys::wait_readable(&port));
        // Six buffers of 512 bytes are enough for the MTU that the port knows of, not for this frame.
        let mut ring = Ring::new(16, 512);
        let mut refills = 0;
        while ring.frames.iter().all(|(_, f)| f[12..14] != [0x88, 0xb5]) {
            ring.free = if refills == 0 { 6 } else { 16 };
            refills += 1;
            if port.recv(&mut ring) == Received::Drained {
                assert!(sys::wait_readable(&port));
            }
        }
        let got = ring.frames.iter().find(|(_, f)| f[12..14] == [0x88, 0xb5]).unwrap();
        assert!(got.1 == frame);
        assert_eq!(port.counters().drops().count(), 0);
    }

    fn buffers_that_never_fit_are_a_counted_drop() {
        if !has_tun() { return; }
        ip("link add br0 type bridge forward_delay 0");
        ip("link set br0 up");
        let mut port = on_bridge();
        let peer = Iface::without_packet_info("peer0", Mode::Tap).unwrap();
        ip("link set peer0 master br0 up");
        until_forwarding("peer0");
        let mut ring = Ring::new(16, 256);
        ring.mergeable = false;
        let mut expected = Vec::new();
        for len in [1000, 100] {
            let frame = [&[2, 0, 0, 0, 0, 5, 2, 0, 0, 0, 0, 9, 0x88, 0xb5][..], &pattern(len)].concat();
            peer.send(&frame).unwrap();
            expected = frame;
        }
        while ring.frames.iter().all(|(_, f)| *f != expected) {
            ring.free = 16;
            if port.recv(&mut ring) == Received::Drained {
                assert!(sys::wait_readable(&port));
            }
        }
        assert_eq!(port.counters().dropped(DropReason::RxBufferTooSmall), 1);
    }

    fn an_empty_ring_leaves_frames_in_the_kernel() {
        if !has_tun() { return; }
        ip("link add br0 type bridge forward_delay 0");
        ip("link set br0 up");
        let mut port = on_bridge();
        let peer = Iface::without_packet_info("peer0", Mode::Tap).unwrap();
        ip("link set peer0 master br0 up");
        until_forwarding("peer0");
        let frame = [&[2, 0, 0, 0, 0, 5, 2, 0, 0, 0, 0, 9, 0x88, 0xb5][..], &pattern(100)].concat();
        peer.send(&frame).unwrap();
        assert!(sys::wait_readable(&port));
        let mut ring = Ring::new(8, 2048);
        ring.free = 0;
        assert_eq!(port.recv(&mut ring), Received::RingFull);
        assert!(sys::wait_readable(&port));
        let (_, got) = recv_until(&mut port, |_, f| f[12..14] == [0x88, 0xb5]);
        assert!(got == frame);
    }

    fn numbered_taps_get_free_numbers() {
        if !has_tun() { return; }
        let first = TapPort::open(&TapName::default(), None).unwrap();
        let second = TapPort::open(&TapName::default(), None).unwrap();
        assert_eq!((first.name(), second.name()), ("vnet0", "vnet1"));
        drop(first);
        assert_eq!(TapPort::open(&TapName::default(), None).unwrap().name(), "vnet0");
    }

    fn a_tap_in_use_is_refused() {
        if !has_tun() { return; }
        let _held = open("tap7").unwrap();
        assert!(matches!(open("tap7"), Err(TapError::InUse(_))));
    }

    fn an_interface_that_is_no_tap_is_refused() {
        if !has_tun() { return; }
        ip("link add dummy7 type bridge");
        assert!(matches!(open("dummy7"), Err(TapError::NotATap(_))));
    }

    fn a_prepared_tap_is_used_and_left_behind() {
        if !has_tun() { return; }
        ip("link add br0 type bridge forward_delay 0");
        ip("tuntap add dev tap7 mode tap vnet_hdr");
        ip("link set tap7 master br0 up");
        let port = TapPort::open(&TapName::Exact("tap7".to_owned()), Some("br0")).unwrap();
        drop(port);
        assert!(exists("tap7"));
    }

    fn a_tap_ends_with_its_port() {
        if !has_tun() { return; }
        let port = open("tap7").unwrap();
        assert!(exists("tap7"));
        drop(port);
        assert!(!exists("tap7"));
    }

    fn a_missing_bridge_leaves_no_tap_behind() {
        if !has_tun() { return; }
        let error = TapPort::open(&TapName::default(), Some("br7")).unwrap_err();
        assert!(matches!(error, TapError::Bridge(net::bridge::BridgeError::Missing(_))), "{error}");
        assert!(!exists("vnet0"));
    }

    fn a_tap_ends_with_a_killed_process() {
        if !has_tun() { return; }
        if std::env::var_os("PONTOON_TEST_HOLD").is_some() {
            let _held = open("tap7").unwrap();
            println!("\nholding");
            loop { std::thread::park(); }
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_tap_ends_with_a_killed_process", "--nocapture"])
            .env("PONTOON_TEST_HOLD", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line == "holding"));
        assert!(exists("tap7"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!exists("tap7"));
    }

    fn a_downed_tap_drops_and_recovers() {
        if !has_tun() { return; }
        let mut port = open("tap7").unwrap();
        ip("link set tap7 down");
        let frame = guest::udp(1, 2, b"x");
        assert_eq!(send(&mut port, VnetHdr::default(), &frame), Sent::Dropped(DropReason::TapError));
        assert!(!port.link_up());
        assert_eq!(port.counters().dropped(DropReason::TapError), 1);
        ip("link set tap7 up");
        assert_eq!(send(&mut port, VnetHdr::default(), &frame), Sent::Taken);
        assert!(port.link_up());
    }

    fn a_deleted_tap_drops_for_ever() {
        if !has_tun() { return; }
        let mut port = open("tap7").unwrap();
        ip("link del tap7");
        let frame = guest::udp(1, 2, b"x");
        assert_eq!(send(&mut port, VnetHdr::default(), &frame), Sent::Dropped(DropReason::TapError));
        assert_eq!(port.recv(&mut Ring::new(8, 2048)), Received::Drained);
        assert!(!port.link_up());
        assert!(port.set_offloads(LINUX).is_err());
    }

    fn a_header_that_the_kernel_refuses_is_a_counted_drop() {
        if !has_tun() { return; }
        let mut port = open("tap7").unwrap();
        let frame = guest::udp(1, 2, b"long enough for a TCP checksum");
        // A header that our parser accepts, but hdr_len is beyond the frame.
        let hdr = VnetHdr { hdr_len: 5000, ..Tcp::connectionless().partial(MSS) };
        assert!(matches!(send(&mut port, hdr, &frame), Sent::Dropped(_)));
        assert_eq!(port.counters().drops().map(|(_, n)| n).sum::<u64>(), 1);
        let ufo = VnetHdr { gso_type: GsoType::Udp, ..hdr };
        assert_eq!(send(&mut port, ufo, &frame), Sent::Dropped(DropReason::BadVnetHdr));
    }

    fn the_bridges_mtu_becomes_the_ports() {
        if !has_tun() { return; }
        ip("link add br0 type bridge forward_delay 0");
        ip("link set br0 mtu 1400 up");
        assert_eq!(on_bridge().mtu(), 1400);
        assert_eq!(open("tap7").unwrap().mtu(), 1500);
    }

    fn more_than_was_offered_is_refused() {
        if !has_tun() { return; }
        let mut port = open("tap7").unwrap();
        assert!(port.offloads().contains(LINUX));
        let all = net::Offloads::all();
        assert_eq!(port.set_offloads(all).is_ok(), port.offloads() == all);
    }

    fn a_frame_in_very_many_pieces_is_gathered() {
        if !has_tun() { return; }
        let lan = Lan::new();
        let mut port = on_bridge();
        let socket = lan.run(|| UdpSocket::bind("10.9.0.2:7").unwrap());
        let receive = lan.start(move || {
            let mut buf = [0; 2000];
            let n = socket.recv(&mut buf).unwrap();
            buf[..n].to_vec()
        });
        let mut frame = guest::udp(9, 7, &pattern(1000));
        let parts: Vec<_> = frame.chunks_mut(3).map(vm_memory::VolatileSlice::from).collect();
        let sent = port.send(&net::TxFrame { hdr: VnetHdr::default(), parts: &parts });
        assert_eq!(sent, Sent::Taken);
        assert!(wait(&receive) == pattern(1000));
    }
}
