//! Two scripted ports, back to back.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::Offloads;
use crate::testing::{Script, ScriptedPort};

const FRAME: [u8; 60] = [7; 60];

struct Pair {
    guest: ScriptedPort,
    at_guest: Script,
    network: ScriptedPort,
    at_network: Script,
}

impl Pair {
    fn new() -> Self {
        let (guest, at_guest) = ScriptedPort::new(Offloads::CSUM | Offloads::TSO4 | Offloads::USO).unwrap();
        let (network, at_network) =
            ScriptedPort::new(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6).unwrap();
        let mut pair = Self { guest, at_guest, network, at_network };
        agree(&mut pair.guest, &mut pair.network).unwrap();
        pair
    }

    fn turn(&mut self, up: &mut Lane<'_>, down: &mut Lane<'_>) {
        up.pass(&mut self.guest, &mut self.network);
        down.pass(&mut self.network, &mut self.guest);
    }
}

#[test]
fn each_side_is_told_what_the_other_one_takes() {
    let pair = Pair::new();
    let both = Offloads::CSUM | Offloads::TSO4;
    assert_eq!((pair.at_guest.guest_offloads(), pair.at_network.guest_offloads()), (vec![both], vec![both]));
}

#[test]
fn a_side_that_breaks_its_offer_is_named() {
    let (mut guest, _) = ScriptedPort::new(Offloads::CSUM).unwrap();
    let (mut network, script) = ScriptedPort::new(Offloads::CSUM).unwrap();
    script.refuse_offloads();
    let error = agree(&mut guest, &mut network).unwrap_err();
    assert!(matches!(error, AttachError::Offloads { side: "network", .. }), "{error}");
}

#[test]
fn frames_cross_both_ways_and_an_answer_on_the_spot_comes_at_once() {
    let mut pair = Pair::new();
    let (mut above, mut below) = (vec![0; MAX_FRAME], vec![0; MAX_FRAME]);
    let (mut up, mut down) = (Lane::new(&mut above), Lane::new(&mut below));
    pair.at_guest.deliver(&FRAME);
    pair.at_network.reply(&[9; 42]);
    pair.turn(&mut up, &mut down);
    assert_eq!(pair.at_network.take_sent(), [(VnetHdr::default(), FRAME.to_vec())]);
    assert_eq!(pair.at_guest.take_sent(), [(VnetHdr::default(), vec![9; 42])]);
}

#[test]
fn a_full_side_holds_the_other_one_back_and_nothing_is_lost() {
    let mut pair = Pair::new();
    let (mut above, mut below) = (vec![0; MAX_FRAME], vec![0; MAX_FRAME]);
    let (mut up, mut down) = (Lane::new(&mut above), Lane::new(&mut below));
    pair.at_guest.fill();
    for n in 1..=5 {
        pair.at_network.deliver(&[n; 60]);
    }
    pair.turn(&mut up, &mut down);
    pair.turn(&mut up, &mut down);
    assert_eq!(pair.at_network.pending(), 4, "one frame is held, the others are left where they are");
    assert_eq!(interest(&up, &down), wait::INPUT | wait::OUTPUT, "at the guest");
    assert_eq!(interest(&down, &up), EventFlags::empty(), "at the network");
    // The other direction goes on.
    pair.at_guest.deliver(&FRAME);
    pair.turn(&mut up, &mut down);
    assert_eq!(pair.at_network.take_sent().len(), 1);
    pair.at_guest.make_room();
    pair.turn(&mut up, &mut down);
    let got: Vec<u8> = pair.at_guest.take_sent().iter().map(|(_, frame)| frame[0]).collect();
    assert_eq!(got, [1, 2, 3, 4, 5]);
}

#[test]
fn the_callers_descriptor_stops_it_after_what_was_there_has_crossed() {
    let mut pair = Pair::new();
    let (silent, _other) = UnixStream::pair().unwrap();
    let (stop, mut stopper) = UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut stopper, &[0]).unwrap();
    pair.at_guest.deliver(&FRAME);
    let ended = run(&mut pair.guest, &mut pair.network, &[silent.as_fd(), stop.as_fd()]).unwrap();
    assert_eq!(ended, Ended::Stopped(1));
    assert_eq!(pair.at_network.take_sent().len(), 1);
}

#[test]
fn a_descriptor_that_was_not_inherited_is_said_to_be_so() {
    assert_eq!(inherited_fd(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
    let file = tempfile::tempfile().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    assert_ne!(std::os::fd::AsRawFd::as_raw_fd(&inherited_fd(number).unwrap()), number);
}
