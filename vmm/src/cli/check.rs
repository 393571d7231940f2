//! `pontoon check`: the built-in probe guest against a world on this host's loopback, and a table of what worked.
//!
//! Everything that `run` needs is exercised on the way: KVM, boot, interrupts, doorbells, DHCP, DNS, ICMP,
//! TCP and UDP through the NAT. It needs no image, no root and no internet. Exit status 1 if a row failed; each
//! failed row has a hint.

use std::io::{self, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use net::MacAddr;
use net::nat::{self, NatConfig};
use serde_json::{Value, json};
use vmm::kvm::{self, Host, KvmKind};
use vmm::machine::{ExitReason, Guest, Machine};
use vmm::network::Network;
use vmm::world::{WORLD_NAME, World};

use super::args::CheckArgs;
use super::signals::{Signals, Wake};
use super::{Failure, output};

/// The whole check takes less than two seconds on a slow host; a guest that hangs is stopped.
const TIMEOUT: Duration = Duration::from_secs(40);
const MEMORY: u64 = 64 << 20;
/// Bytes echoed by the TCP row.
const TCP_BYTES: u64 = 16 << 20;

/// A line of the table.
struct Row {
    name: &'static str,
    outcome: Result<String, Problem>,
}

struct Problem {
    what: String,
    hint: String,
}

pub(crate) fn check(args: &CheckArgs) -> Result<u8, Failure> {
    let host = Host::probe();
    let mut rows = vec![Row { name: "KVM", outcome: kvm_row(&host) }];
    if rows[0].outcome.is_ok() {
        probe_rows(&mut rows)?;
    }
    let ok = rows.iter().all(|row| row.outcome.is_ok());
    if args.json {
        output::json(&as_json(&host, &rows, ok));
    } else {
        print(&rows);
    }
    Ok(u8::from(!ok))
}

fn kvm_row(host: &Host) -> Result<String, Problem> {
    let problem = |what: &str, hint: &str| Err(Problem { what: what.to_owned(), hint: hint.to_owned() });
    match &host.kind {
        KvmKind::Absent(hint) => return problem("there is no /dev/kvm", hint),
        KvmKind::Forbidden(hint) => return problem("/dev/kvm may not be opened", hint),
        KvmKind::Hardware(_) | KvmKind::Software(_) if host.missing.is_empty() => {}
        KvmKind::Hardware(_) | KvmKind::Software(_) => {
            return problem(
                &format!("/dev/kvm lacks {}", host.missing.join(", ")),
                "update this host's kernel",
            );
        }
    }
    Ok(format!("{}{}", kind(&host.kind), if host.nested { ", nested" } else { "" }))
}

fn kind(kind: &KvmKind) -> &'static str {
    match kind {
        KvmKind::Hardware(kvm::Accel::Vmx) => "VT-x",
        KvmKind::Hardware(kvm::Accel::Svm) => "AMD-V",
        KvmKind::Software(_) => "software only: Linux guests run in the lab",
        KvmKind::Absent(_) => "absent",
        KvmKind::Forbidden(_) => "forbidden",
    }
}

/// The guest's serial output, with the moment of its first byte.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<(Option<Instant>, Vec<u8>)>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.0.get_or_insert_with(Instant::now);
        inner.1.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Boots the probe with its orders and turns each report into a row.
fn probe_rows(rows: &mut Vec<Row>) -> Result<(), Failure> {
    let subnet = nat::choose(&nat::taken_by_host()).map_err(Failure::usage)?.subnet;
    let gateway = subnet.host(1);
    // Before there is any thread that would not know of it.
    let signals = Signals::catch().context("catching signals").map_err(Failure::machine)?;
    let world =
        World::start(gateway).context("starting the check's own servers").map_err(Failure::machine)?;
    let orders = orders(&world);
    let console = Console::default();
    let began = Instant::now();
    let end = boot(signals, &world, subnet, &orders, console.clone())?;
    drop(world);
    let (first_byte, bytes) = std::mem::take(&mut *console.0.lock().unwrap_or_else(PoisonError::into_inner));
    let text = String::from_utf8_lossy(&bytes);
    let reports: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    rows.push(boot_row(first_byte.map(|at| at - began), &end, &text));
    for order in &orders {
        let report = reports.iter().find(|r| r["order"] == order.verb() && r["target"] == order.target());
        rows.push(Row { name: order.name, outcome: judge(order, report) });
    }
    Ok(())
}

fn boot_row(first_byte: Option<Duration>, end: &str, console: &str) -> Row {
    let outcome = match first_byte {
        Some(took) => Ok(format!("{:.1} ms to the guest's first byte", took.as_secs_f64() * 1e3)),
        None => Err(Problem {
            what: format!("the guest said nothing ({end}) {console}"),
            hint: "run it by hand to see more: pontoon -vv run probe".to_owned(),
        }),
    };
    Row { name: "boot", outcome }
}

/// One order to the probe and how its report reads as a figure.
struct Order {
    name: &'static str,
    text: String,
    figure: fn(&Value) -> String,
    hint: &'static str,
}

impl Order {
    fn verb(&self) -> &str {
        self.text.split(['=', ',']).next().unwrap_or_default()
    }

    /// What the report calls the target; absent (null) for a verb without one.
    fn target(&self) -> Value {
        let head = self.text.split(',').next().unwrap_or_default();
        head.split_once('=').map_or(Value::Null, |(_, target)| target.into())
    }
}

const NETWORK_HINT: &str = "run `pontoon -vv check` to see what the network refuses, and please report it";
const PING_HINT: &str = "unprivileged ping is off: sudo sysctl -w net.ipv4.ping_group_range='0 2147483647'";

fn orders(world: &World) -> Vec<Order> {
    let order = |name, text: String, figure| Order { name, text, figure, hint: NETWORK_HINT };
    let mut orders = vec![
        order("DHCP", "dhcp".into(), |r| format!("{} in {}", text(r, "address"), micros(r, "us"))),
        order("DNS", format!("resolve={WORLD_NAME}"), |r| format!("answered in {}", micros(r, "us"))),
        order("ping gateway", "ping=gw,count=3,interval=1".into(), ping_figure),
    ];
    if let Some(address) = own_address() {
        let ping = order("ping this host", format!("ping={address},count=3,interval=1"), ping_figure);
        orders.push(Order { hint: PING_HINT, ..ping });
    }
    let (tcp, udp) = (world.tcp_echo.port(), world.udp_echo.port());
    orders.extend([
        order("TCP round trip", format!("tcp-rr=gw:{tcp},count=200"), |r| {
            format!("{} median of {}", micros(r, "p50_us"), r["count"])
        }),
        order("TCP echo", format!("tcp-echo=gw:{tcp},bytes={TCP_BYTES}"), |r| {
            let rate = r["bytes"].as_f64().unwrap_or(0.0) / r["us"].as_f64().unwrap_or(f64::INFINITY);
            format!("{} MiB intact, {rate:.0} MB/s each way", TCP_BYTES >> 20)
        }),
        order("UDP echo", format!("udp-echo=gw:{udp},bytes=1400,count=10"), |r| {
            format!("{} of {} back, {}", r["received"], r["sent"], micros(r, "rtt_min_us"))
        }),
    ]);
    orders
}

fn text<'a>(report: &'a Value, field: &str) -> &'a str {
    report[field].as_str().unwrap_or("?")
}

fn micros(report: &Value, field: &str) -> String {
    match report[field].as_u64() {
        Some(us) if us >= 10_000 => format!("{} ms", us / 1000),
        Some(us) => format!("{us} us"),
        None => "?".to_owned(),
    }
}

fn ping_figure(report: &Value) -> String {
    format!("{} of {} back, {}", report["received"], report["sent"], micros(report, "rtt_min_us"))
}

fn judge(order: &Order, report: Option<&Value>) -> Result<String, Problem> {
    let problem = |what: String| Err(Problem { what, hint: order.hint.to_owned() });
    match report {
        Some(report) if report["ok"] == true => Ok((order.figure)(report)),
        Some(report) => problem(format!("failed: {}", text(report, "reason"))),
        None => problem("the guest did not get that far".to_owned()),
    }
}

/// This host's own address as the world sees it: what the kernel would send from. No packet is sent.
fn own_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // TEST-NET-1 (RFC 5737) is nobody's.
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        std::net::IpAddr::V4(ip) if !ip.is_loopback() && !ip.is_unspecified() => Some(ip),
        _ => None,
    }
}

/// Runs the probe to its end; the text says how it ended.
fn boot(
    signals: Signals,
    world: &World,
    subnet: net::nat::Subnet,
    orders: &[Order],
    console: Console,
) -> Result<String, Failure> {
    let std::net::SocketAddr::V4(dns) = world.dns else {
        return Err(Failure::machine(anyhow!("the check's own servers have IPv4 addresses")));
    };
    let config = NatConfig { subnet, host_access: true, dns: vec![dns], ..NatConfig::default() };
    let (_, nic) = Network::private(config, MacAddr::for_name("check", "probe")).map_err(Failure::machine)?;
    let script: Vec<&str> = orders.iter().map(|order| order.text.as_str()).collect();
    let builder = Machine::builder()
        .guest(Guest::probe().words(format!("probe.do={}", script.join(";"))))
        .map_err(Failure::machine)?
        .memory(MEMORY)
        .nic(nic)
        .serial_output(console);
    let (builder, watch) = signals.watch(builder, Some(Instant::now() + TIMEOUT))?;
    let machine = builder.build().map_err(Failure::machine)?;
    let wake = watch.wait(machine.start_here().map_err(Failure::machine)?);
    Ok(match wake {
        Wake::Ended(ExitReason::Status(status)) => format!("status {status}"),
        Wake::Ended(other) => other.to_string(),
        Wake::Deadline => "stopped after a time-out".to_owned(),
        Wake::Signal(number) => return Err(Failure::machine(anyhow!("ended by signal {number}"))),
    })
}

fn print(rows: &[Row]) {
    let mut hints = Vec::new();
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| match &row.outcome {
            Ok(figure) => vec![row.name.to_owned(), "ok".to_owned(), figure.clone()],
            Err(problem) => {
                hints.push(format!("{}: {}", row.name, problem.hint));
                vec![row.name.to_owned(), "FAILED".to_owned(), problem.what.clone()]
            }
        })
        .collect();
    output::table(&["CHECK", "", "FIGURE"], &cells);
    for hint in hints {
        output::line(&format!("hint: {hint}"));
    }
}

fn as_json(host: &Host, rows: &[Row], ok: bool) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| match &row.outcome {
            Ok(figure) => json!({ "check": row.name, "ok": true, "figure": figure }),
            Err(p) => json!({ "check": row.name, "ok": false, "problem": p.what, "hint": p.hint }),
        })
        .collect();
    json!({ "ok": ok, "kvm": kind(&host.kind), "runs_linux": host.kind.runs_linux(), "checks": rows })
}
