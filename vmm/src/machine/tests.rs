//! Whole machines on this host's KVM, with guests of a few bytes. Each test says so and passes when there is no KVM.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use super::*;
use crate::boot::Kernel;
use crate::kvm::Host;

/// An ELF whose only segment, at 1 MiB, is `code`; it starts with its first byte, at CPL0 in long mode.
fn guest(code: &[u8]) -> Kernel {
    const OFFSET: usize = 0x80;
    let mut image = vec![0; OFFSET];
    image.extend(code);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 1, 0]);
    put(64, &[1, 0, 0, 0, 7]);
    put(72, &(OFFSET as u64).to_le_bytes());
    put(88, &0x10_0000u64.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    Kernel::Bytes(image.into())
}

/// A machine with 4 MiB that runs `code`, or nothing when there is no KVM.
fn machine(code: &[u8]) -> Option<MachineBuilder> {
    let host = Host::probe();
    if !host.kind.is_usable() {
        crate::skip::skip(format_args!("needs KVM, but here it is {:?}", host.kind));
        return None;
    }
    Some(Machine::builder().kernel(guest(code)).memory(4 << 20))
}

fn run(machine: MachineBuilder) -> ExitReason {
    machine.build().unwrap().start().unwrap().wait()
}

/// A sink that the test can look into.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

/// mov al, STATUS; out 0xf4, al; hlt
const fn exit(status: u8) -> [u8; 5] {
    [0xb0, status, 0xe6, 0xf4, 0xf4]
}

#[test]
fn the_byte_written_to_the_exit_device_is_the_status() {
    let Some(machine) = machine(&exit(42)) else { return };
    assert_eq!(run(machine), ExitReason::Status(42));
}

#[test]
fn serial_output_reaches_the_sink_byte_by_byte_and_as_a_string() {
    let code = [
        &[0x66, 0xba, 0xf8, 0x03][..],               // mov dx, 0x3f8
        &[0xb0, b'h', 0xee, 0xb0, b'i', 0xee],       // out dx, al, twice
        &[0x48, 0x8d, 0x35, 0x0c, 0x00, 0x00, 0x00], // lea rsi, [rip + 12]
        &[0xb9, 0x06, 0x00, 0x00, 0x00],             // mov ecx, 6
        &[0xf3, 0x6e],                               // rep outsb
        &exit(0),
        b", you\n",
    ]
    .concat();
    let Some(machine) = machine(&code) else { return };
    let output = Output::default();
    assert_eq!(run(machine.serial_output(output.clone())), ExitReason::Status(0));
    assert_eq!(output.text(), "hi, you\n");
}

/// Reads COM1 and sends back what it reads, until it reads 'q'.
const ECHO: [u8; 25] = [
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz -5
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0x3c, b'q', // cmp al, 'q'
    0x75, 0xed, // jne -19
    0xb0, 0x00, // mov al, 0
    0xe6, 0xf4, // out 0xf4, al
    0xf4, 0x90, // hlt
];

#[test]
fn input_longer_than_the_uarts_fifo_reaches_the_guest_whole() {
    let Some(machine) = machine(&ECHO) else { return };
    let (reader, mut writer) = io::pipe().unwrap();
    let text = format!("{}q", "0123456789".repeat(30));
    writer.write_all(text.as_bytes()).unwrap();
    drop(writer);
    let output = Output::default();
    assert_eq!(run(machine.serial_output(output.clone()).serial_input(reader.into())), ExitReason::Status(0));
    assert_eq!(output.text(), text);
}

#[test]
fn input_from_a_file_reaches_the_guest_whole() {
    let Some(machine) = machine(&ECHO) else { return };
    let mut file = tempfile::tempfile().unwrap();
    let text = format!("{}q", "abcdefghij".repeat(30));
    file.write_all(text.as_bytes()).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let output = Output::default();
    assert_eq!(run(machine.serial_output(output.clone()).serial_input(file.into())), ExitReason::Status(0));
    assert_eq!(output.text(), text);
}

#[test]
fn the_end_of_input_is_not_the_end_of_the_machine() {
    // Waits for one byte, then for the end that the other descriptor brings.
    let Some(machine) = machine(&ECHO) else { return };
    let (reader, writer) = io::pipe().unwrap();
    drop(writer);
    let running = machine.serial_input(reader.into()).build().unwrap().start().unwrap();
    running.stop();
    assert_eq!(running.wait(), ExitReason::Stopped);
}

#[test]
fn ctrl_a_x_stops_the_machine() {
    let Some(machine) = machine(&ECHO) else { return };
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(b"hello\x01x").unwrap();
    assert_eq!(run(machine.serial_input(reader.into()).console_escape(true)), ExitReason::Stopped);
}

#[test]
fn a_triple_fault_ends_the_machine_and_tells_where() {
    // ud2, without an IDT.
    let Some(machine) = machine(&[0x0f, 0x0b]) else { return };
    let reason = run(machine);
    let ExitReason::TripleFault(state) = &reason else { panic!("{reason}") };
    assert_eq!((state.rip, state.cs), (0x10_0000, 0x10), "{reason}");
    assert_eq!(state.code.get(..2), Some(&[0x0f, 0x0b][..]));
}

#[test]
fn a_machine_that_sleeps_is_stopped() {
    // hlt, with interrupts off
    let Some(machine) = machine(&[0xf4, 0xeb, 0xfd]) else { return };
    let running = machine.cpus(2).build().unwrap().start().unwrap();
    let stopper = running.remote();
    let stopping = std::thread::spawn(move || stopper.stop());
    assert_eq!(running.wait(), ExitReason::Stopped);
    stopping.join().unwrap();
}

#[test]
fn a_machine_that_spins_is_stopped_by_a_drop() {
    let Some(machine) = machine(&[0xeb, 0xfe]) else { return };
    drop(machine.build().unwrap().start().unwrap());
}

#[test]
fn no_kick_is_lost_however_early_it_comes() {
    let Some(_) = machine(&[]) else { return };
    for _ in 0..50 {
        let machine = machine(&[0xeb, 0xfe]).expect("KVM was there").build().unwrap();
        assert_eq!(
            machine
                .start()
                .map(|running| {
                    running.stop();
                    running.wait()
                })
                .unwrap(),
            ExitReason::Stopped
        );
    }
}

/// Set in the process of [`nothing_is_left_of_a_machine_that_ended`].
const CHILD: &str = "PONTOON_TEST_LEFTOVERS_CHILD";

/// Descriptors of this process, and its threads that belong to a machine.
fn belongings() -> (usize, Vec<String>) {
    let open_files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let threads = std::fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        let name = std::fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        (name.starts_with("vcpu") || name == "io\n").then_some(name)
    });
    (open_files, threads.collect())
}

/// In a process of its own, since other tests have machines too.
#[test]
fn nothing_is_left_of_a_machine_that_ended() {
    let Some(first) = machine(&exit(0)) else { return };
    if std::env::var_os(CHILD).is_none() {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "machine::tests::nothing_is_left_of_a_machine_that_ended"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        return;
    }
    // The first machine opens what std keeps open.
    run(first.cpus(2));
    let before = belongings();
    assert_eq!(before.1, Vec::<String>::new());
    for _ in 0..3 {
        run(machine(&exit(0)).expect("KVM was there").cpus(2));
    }
    assert_eq!(belongings(), before);
}

#[test]
fn a_machine_that_was_never_started_leaves_nothing() {
    let Some(machine) = machine(&[0xeb, 0xfe]) else { return };
    drop(machine.build().unwrap());
}

#[test]
fn acpi_power_off_ends_the_machine() {
    // mov dx, 0x600; mov al, SLP_EN | 5 << 2; out dx, al; hlt
    let Some(machine) = machine(&[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4]) else { return };
    assert_eq!(run(machine), ExitReason::PowerOff);
}

#[test]
fn the_keyboard_controllers_reset_ends_the_machine() {
    let Some(machine) = machine(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4]) else { return };
    assert_eq!(run(machine), ExitReason::Reset);
}

#[test]
fn the_reset_vector_resets() {
    // In long mode the stub's first bytes mean something else, so go to real mode the short way: as a second CPU.
    let code = [
        &[0xc7, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0xea, 0xf0, 0xff, 0x00][..], // mov [0x8000], ljmp f000:fff0
        &[0xc6, 0x04, 0x25, 0x04, 0x80, 0x00, 0x00, 0xf0],                       // its last byte
        &START_SECOND_CPU,
    ]
    .concat();
    let Some(machine) = machine(&code) else { return };
    assert_eq!(run(machine.cpus(2)), ExitReason::Reset);
}

#[test]
fn an_address_without_a_device_reads_all_ones_and_is_counted() {
    let code = [
        &[0xbb, 0x00, 0x70, 0x00, 0xd0][..], // mov ebx, 0xd0007000
        &[0x8b, 0x03],                       // mov eax, [rbx]
        &[0xff, 0xc0],                       // inc eax
        &[0xe6, 0x99],                       // out 0x99, al
        &[0xe6, 0xf4, 0xf4],                 // out 0xf4, al; hlt
    ]
    .concat();
    let Some(machine) = machine(&code) else { return };
    let running = machine.build().unwrap().start().unwrap();
    let counters = loop {
        if running.exit_reason().is_some() {
            break running.counters();
        }
        std::thread::yield_now();
    };
    assert_eq!(running.wait(), ExitReason::Status(0));
    assert_eq!((counters.unclaimed_mmio, counters.unclaimed_ports), (1, 1));
}

#[test]
fn the_guest_is_told_the_tsc_frequency() {
    // mov eax, 0x40000010; cpuid; test eax, eax; setz al; out 0xf4, al; hlt
    let code = [0xb8, 0x10, 0x00, 0x00, 0x40, 0x0f, 0xa2, 0x85, 0xc0, 0x0f, 0x94, 0xc0, 0xe6, 0xf4, 0xf4];
    let Some(machine) = machine(&code) else { return };
    assert_eq!(run(machine), ExitReason::Status(0));
}

/// Lets the CPU with APIC id 1 start at 0x8000, in real mode, and sleeps.
#[rustfmt::skip]
const START_SECOND_CPU: [u8; 48] = [
    0xbb, 0x00, 0x00, 0xe0, 0xfe,                               // mov ebx, LAPIC
    0xc7, 0x83, 0xf0, 0x00, 0x00, 0x00, 0xff, 0x01, 0x00, 0x00, // SVR: enable
    0xc7, 0x83, 0x10, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, // ICR high: APIC id 1
    0xc7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x00, 0x45, 0x00, 0x00, // ICR low: INIT
    0xc7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x08, 0x46, 0x00, 0x00, // ICR low: SIPI at 0x8000
    0xf4, 0xeb, 0xfd,                                           // hlt, for ever
];

#[test]
fn a_second_cpu_starts_by_sipi() {
    // mov [0x8000], exit(7)
    let code =
        [&[0xc7, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0xb0, 0x07, 0xe6, 0xf4][..], &START_SECOND_CPU].concat();
    let Some(machine) = machine(&code) else { return };
    assert_eq!(run(machine.cpus(2)), ExitReason::Status(7));
}

#[test]
fn what_cannot_be_built_is_told() {
    let Some(machine) = machine(&exit(0)) else { return };
    let Err(refused) = machine.cpus(0).build() else { panic!("a machine without vCPUs") };
    assert!(refused.to_string().starts_with("0 vCPUs is not between 1 and "), "{refused}");
    let Err(refused) = Machine::builder().build() else { panic!("a machine without a kernel") };
    assert!(matches!(refused, BuildError::NoKernel));
}
