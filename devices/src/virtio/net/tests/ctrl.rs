use super::super::config::{F_CTRL_GUEST_OFFLOADS, F_CTRL_RX, F_CTRL_RX_EXTRA, F_CTRL_VQ};
use super::*;

const ACK_AT: u64 = DATA + 0x1000;

/// Sends a command in two buffers, as Linux does, and returns the acknowledgement.
fn command(lab: &mut Lab, class: u8, cmd: u8, data: &[u8]) -> u8 {
    lab.guest.fill(DATA, &[class, cmd]);
    lab.guest.fill(DATA + 0x100, data);
    lab.guest.fill(ACK_AT, &[0xee]);
    let head = lab.guest.add(CTRL, &[out(DATA, 2), out(DATA + 0x100, data.len()), into(ACK_AT, 1)]);
    lab.guest.kick_and_run(CTRL);
    assert_eq!(lab.guest.used(CTRL), [(head, 1)]);
    lab.guest.bytes(ACK_AT, 1)[0]
}

#[test]
fn receive_modes_are_acknowledged_when_negotiated() {
    let mut lab = Lab::started(F_CTRL_VQ | F_CTRL_RX);
    assert_eq!(command(&mut lab, 0, 0, &[1]), 0, "promiscuous");
    assert_eq!(command(&mut lab, 0, 1, &[0]), 0, "not all multicast");
    assert_eq!(command(&mut lab, 0, 2, &[1]), 1, "CTRL_RX_EXTRA was not negotiated");
    let mut lab = Lab::started(F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA);
    assert_eq!(command(&mut lab, 0, 5, &[1]), 0, "no broadcast");
}

#[test]
fn unknown_commands_and_wrong_lengths_are_errors_not_breakage() {
    let mut lab = Lab::started(F_CTRL_VQ | F_CTRL_RX);
    for (class, cmd, data) in [
        (0, 6, &[1][..]),
        (0, 0, &[]),
        (0, 0, &[2]),
        (1, 0, &[0; 7]),
        (1, 1, &[0; 6]),
        (4, 0, &[1, 0]),
        (255, 255, &[0; 4000]),
    ] {
        assert_eq!(command(&mut lab, class, cmd, data), 1, "{class} {cmd}");
    }
    lab.guest.assert_healthy();
}

#[test]
fn a_mac_table_of_any_length_is_acknowledged() {
    let mut lab = Lab::started(F_CTRL_VQ | F_CTRL_RX);
    for len in [8, 8 + 6, 8 + 64 * 6] {
        assert_eq!(command(&mut lab, 1, 0, &vec![0; len]), 0, "{len} bytes");
    }
    let mut without = Lab::started(F_CTRL_VQ);
    assert_eq!(command(&mut without, 1, 0, &[0; 8]), 1);
    lab.guest.assert_healthy();
}

#[test]
fn guest_offloads_reach_the_port() {
    let features = F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS | F_GUEST_CSUM | F_GUEST_TSO4;
    let mut lab = Lab::started(features);
    assert_eq!(lab.script.guest_offloads(), [Offloads::CSUM | Offloads::TSO4]);
    assert_eq!(command(&mut lab, 5, 0, &F_GUEST_CSUM.to_le_bytes()), 0);
    assert_eq!(command(&mut lab, 5, 0, &0u64.to_le_bytes()), 0);
    assert_eq!(command(&mut lab, 5, 0, &F_GUEST_TSO4.to_le_bytes()), 1, "segments without checksums");
    assert_eq!(command(&mut lab, 5, 0, &(F_GUEST_CSUM | F_CSUM << 1 | 1 << 8).to_le_bytes()), 1);
    assert_eq!(command(&mut lab, 5, 0, &(F_GUEST_CSUM | F_GUEST_TSO4).to_le_bytes()), 0);
    let full = Offloads::CSUM | Offloads::TSO4;
    assert_eq!(lab.script.guest_offloads(), [full, Offloads::CSUM, Offloads::empty(), full]);
    lab.script.refuse_offloads();
    assert_eq!(command(&mut lab, 5, 0, &0u64.to_le_bytes()), 1);
    lab.guest.assert_healthy();
}

#[test]
fn a_command_without_room_for_its_answer_breaks_the_queue() {
    let mut lab = Lab::started(F_CTRL_VQ | F_CTRL_RX);
    lab.guest.fill(DATA, &[0, 0, 1]);
    lab.guest.add(CTRL, &[out(DATA, 3)]);
    lab.guest.kick_and_run(CTRL);
    lab.guest.assert_broken();
}

#[test]
fn a_readable_buffer_after_a_writable_one_breaks_the_queue() {
    let mut lab = Lab::started(F_CTRL_VQ | F_CTRL_RX);
    lab.guest.add(CTRL, &[out(DATA, 2), into(ACK_AT, 1), out(DATA, 1)]);
    lab.guest.kick_and_run(CTRL);
    lab.guest.assert_broken();
}

#[test]
fn more_commands_than_the_budget_are_all_served() {
    let mut lab = Lab::started(F_CTRL_VQ | F_CTRL_RX);
    lab.guest.fill(DATA, &[0, 0, 1]);
    for _ in 0..CTRL_BUDGET + 4 {
        lab.guest.add(CTRL, &[out(DATA, 3), into(ACK_AT, 1)]);
    }
    lab.guest.kick_and_run(CTRL);
    assert_eq!(lab.guest.used(CTRL).len(), CTRL_BUDGET + 4);
}
