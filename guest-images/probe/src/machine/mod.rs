//! The machine that the probe runs on: from the entry to the first order, and from the last to the exit.
//!
//! [`sys`] has the CPL0 assembly and every instruction that Rust has no word for. Here: the clock, the
//! interrupt controllers (written at CPL3, which MMIO allows), the start-up sequence and the ways to die.

mod sys;

use alloc::format;
use alloc::string::String;
use core::fmt::Write;
use probe::cmdline::{self, CommandLine};
use probe::cpu::{Cpu, Crash};
use probe::nic::Nic;
use probe::report::Report;
use probe::stack::Stack;
use probe::virtio::feature;
use probe::virtio::net::VirtioNet;
use probe::virtio::sys::Window;
use probe::{orders, run};

const OK: u8 = 0;
const FAILED: u8 = 1;
const BAD_ORDERS: u8 = 2;
const NO_NIC: u8 = 3;
const CRASHED: u8 = 4;

const LAPIC: u64 = 0xfee0_0000;
const LAPIC_TASK_PRIORITY: u64 = 0x80;
const LAPIC_SPURIOUS: u64 = 0xf0;
const LAPIC_TIMER: u64 = 0x320;
const LAPIC_TIMER_INITIAL: u64 = 0x380;
const LAPIC_TIMER_CURRENT: u64 = 0x390;
const LAPIC_TIMER_DIVIDE: u64 = 0x3e0;
/// LVT timer mode 2: TSC deadline.
const TIMER_TSC_DEADLINE: u32 = 2 << 17;
const TIMER_MASKED: u32 = 1 << 16;
const IOAPIC: u64 = 0xfec0_0000;
/// boot.s has the same handler behind every vector from 32 to 254; which one counts for nothing.
const VECTOR_TIMER: u32 = 0x40;
const VECTOR_DEVICES: u32 = 0x50;
const VECTOR_SPURIOUS: u32 = 0xff;
/// CPUID.1:ECX: the LAPIC timer has the TSC-deadline mode.
const CPUID_TSC_DEADLINE: u32 = 1 << 24;
/// KVM's LAPIC timer counts at 1 GHz: the yardstick when nobody tells the TSC's frequency.
const LAPIC_TICKS_PER_MS: u32 = 1_000_000;

/// The processor as the library sees it.
#[derive(Debug, Clone, Copy)]
struct Processor {
    start: u64,
    khz: u64,
}

impl Processor {
    fn new() -> Self {
        let told = sys::cpuid_tsc_khz();
        let khz = if told == 0 { measured_khz() } else { u64::from(told) };
        Self { start: sys::ticks(), khz: khz.max(1) }
    }

    fn ticks(&self, us: u64) -> u64 {
        (u128::from(us) * u128::from(self.khz) / 1000) as u64
    }
}

impl Cpu for Processor {
    fn now(&self) -> u64 {
        (u128::from(sys::ticks().wrapping_sub(self.start)) * 1000 / u128::from(self.khz)) as u64
    }

    fn interrupts(&self) -> u64 {
        sys::interrupts()
    }

    fn sleep(&self, seen: u64, until: u64) {
        sys::sleep_ticks(seen, Some(self.start.wrapping_add(self.ticks(until))));
    }

    fn port_read(&self, port: u16, width: u8) -> u32 {
        sys::input(port, width)
    }

    fn port_write(&self, port: u16, width: u8, value: u32) {
        sys::output(port, width, value);
    }

    fn console_reset(&self) {
        sys::serial_reset();
    }

    fn crash(&self, how: Crash) {
        match how {
            #[expect(clippy::panic, reason = "this is the panic that was ordered")]
            Crash::Panic => panic!("ordered"),
            Crash::Exception => sys::invalid_instruction(),
            Crash::TripleFault => sys::triple_fault(),
            Crash::Hang => loop {
                core::hint::spin_loop();
            },
        }
    }
}

/// Measures the TSC against the LAPIC timer for four milliseconds.
fn measured_khz() -> u64 {
    const SPAN: u32 = 4 * LAPIC_TICKS_PER_MS;
    let lapic = Window::new(LAPIC, 0x1000);
    lapic.set(LAPIC_TIMER, TIMER_MASKED);
    lapic.set(LAPIC_TIMER_DIVIDE, 0b1011);
    lapic.set(LAPIC_TIMER_INITIAL, u32::MAX);
    let (first, start) = (lapic.get(LAPIC_TIMER_CURRENT), sys::ticks());
    loop {
        let (passed, ticks) = (first.wrapping_sub(lapic.get(LAPIC_TIMER_CURRENT)), sys::ticks() - start);
        if passed >= SPAN {
            return ticks * u64::from(LAPIC_TICKS_PER_MS) / u64::from(passed);
        }
    }
}

fn interrupt_controllers(line: &CommandLine) {
    let lapic = Window::new(LAPIC, 0x1000);
    lapic.set(LAPIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS);
    lapic.set(LAPIC_TASK_PRIORITY, 0);
    lapic.set(LAPIC_TIMER, TIMER_TSC_DEADLINE | VECTOR_TIMER);
    let ioapic = Window::new(IOAPIC, 0x20);
    for device in &line.devices {
        // Redirection entry: edge, active high, fixed, to LAPIC 0.
        for (register, value) in [(0x11, 0), (0x10, VECTOR_DEVICES + device.irq)] {
            ioapic.set(0x00, register + 2 * device.irq);
            ioapic.set(0x10, value);
        }
    }
}

fn print(report: &Report) {
    let mut line = report.line();
    line.push_str("\r\n");
    sys::serial(line.as_bytes());
}

/// Ends the VM with an `exit` line.
fn finish(status: u8, fields: impl FnOnce(&mut Report)) -> ! {
    let mut report = Report::default();
    report.text("event", "exit");
    report.number("status", u64::from(status));
    fields(&mut report);
    print(&report);
    sys::exit(status)
}

fn refuse(status: u8, reason: &str, detail: impl core::fmt::Display) -> ! {
    finish(status, |report| {
        report.text("reason", reason);
        report.text("detail", detail);
    })
}

/// Everything between the entry and the exit.
fn start(command_line: &[u8]) -> ! {
    let entered = sys::ticks();
    let text = String::from_utf8_lossy(command_line);
    let line = cmdline::parse(&text).unwrap_or_else(|word| refuse(BAD_ORDERS, "bad-setting", word.0));
    let text = line.orders.as_deref().unwrap_or(cmdline::DEFAULT_ORDERS);
    let orders = orders::parse(text)
        .unwrap_or_else(|bad| refuse(BAD_ORDERS, "bad-order", format!("{}: {bad}", bad.order)));
    interrupt_controllers(&line);
    let cpu = Processor::new();
    if sys::cpuid1_ecx() & CPUID_TSC_DEADLINE == 0 {
        refuse(NO_NIC, "no-timer", "CPUID offers no TSC-deadline timer, and the probe has no other");
    }
    let mut stack = Stack::new(find_nic(&line, cpu), entered);
    announce(cpu, &stack.nic.facts(), entered);
    let mut failed = 0;
    for order in &orders {
        let (report, ok) = run::run(&mut stack, order);
        failed += u64::from(!ok);
        print(&report);
    }
    finish(if failed == 0 { OK } else { FAILED }, |report| {
        report.number("orders", orders.len() as u64);
        report.number("failed", failed);
        report.number("us", cpu.now());
    })
}

fn find_nic(line: &CommandLine, cpu: Processor) -> VirtioNet<Processor> {
    let mut nth = 0;
    let mut seen = String::new();
    for device in &line.devices {
        let found = match VirtioNet::new(Window::new(device.base, device.size), cpu, line.settings) {
            Ok(found) => found,
            Err(refused) => {
                let _ = write!(seen, "{:#x}: {refused}; ", device.base);
                continue;
            }
        };
        let Some(mut nic) = found else { continue };
        if nth == line.nic {
            let others = line.devices.iter().filter(|other| other.base != device.base);
            nic.set_others(others.map(|other| Window::new(other.base, other.size)).collect());
            return nic;
        }
        nth += 1;
    }
    let count = line.devices.len();
    refuse(
        NO_NIC,
        "no-nic",
        format!("{nth} NICs on {count} virtio_mmio.device= entries, wanted number {}; {seen}", line.nic),
    )
}

fn announce(cpu: Processor, facts: &probe::nic::Facts, entered: u64) {
    let mut report = Report::default();
    report.text("event", "boot");
    report.text("tsc", if sys::cpuid_tsc_khz() == 0 { "measured" } else { "told" });
    report.number("tsc_khz", cpu.khz);
    report.mac("mac", facts.mac);
    report.number("mtu", u64::from(facts.mtu));
    report.flag("link", facts.link_up);
    report.list(
        "features",
        feature::KNOWN.iter().filter(|known| facts.features & known.1 != 0).map(|known| known.0),
    );
    report.number("rx_queue", u64::from(facts.queue_sizes[0]));
    report.number("tx_queue", u64::from(facts.queue_sizes[1]));
    report.number("us", (sys::ticks() - entered) * 1000 / cpu.khz);
    print(&report);
}

fn exception(vector: u64, error: u64, rip: u64, rsp: u64, address: u64) -> ! {
    sys::serial_reset();
    refuse(
        CRASHED,
        "exception",
        format!("vector {vector} error {error:#x} rip {rip:#x} rsp {rsp:#x} cr2 {address:#x}"),
    )
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    sys::serial_reset();
    refuse(CRASHED, "panic", info)
}
