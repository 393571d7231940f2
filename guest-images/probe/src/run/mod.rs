//! Carrying out orders.
//!
//! [`run`] takes one order, dispatches it to its module and turns what came of it into a line: the fields
//! that the order reported, then `ok`. `ok` is the assertion's result, not the network's: an order with
//! `expect=refused` is ok when it was refused, and one whose `want.` fields read otherwise is not.

mod bad;
mod bulk;
mod dhcp;
mod dhcp_raw;
mod dns;
mod end;
mod icmp;
mod listen;
mod target;
mod tcp;
mod udp;

use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Reason, Stack};
use smoltcp::time::{Duration, Instant};

/// What an order came to.
pub type Outcome = Result<(), Reason>;

/// Runs one order; returns its line and whether it was as it should be.
pub fn run<N: Nic>(stack: &mut Stack<N>, order: &Order) -> (Report, bool) {
    let mut report = Report::default();
    report.text("order", order.verb);
    if !order.target.is_empty() {
        report.text("target", &order.target);
    }
    stack.nic.observer().clear();
    let started = stack.now();
    let outcome = dispatch(stack, order, &mut report);
    if report.get("us").is_none() {
        report.number("us", micros(stack.now() - started));
    }
    let unwanted =
        order.wants().find(|(field, wanted)| report.get(field).is_none_or(|value| value.plain() != *wanted));
    let unwanted = unwanted.map(|(field, _)| alloc::string::String::from(field));
    let expected = order.text("expect");
    let as_expected = match (outcome, expected) {
        (Ok(()), None | Some("ok")) => true,
        (Err(_), Some("fail")) => true,
        (Err(reason), Some(name)) => reason.name() == name,
        _ => false,
    };
    if let Some(name) = expected {
        report.text("expect", name);
    }
    let ok = as_expected && unwanted.is_none();
    report.flag("ok", ok);
    match (outcome, unwanted) {
        (Err(reason), _) => report.text("reason", reason.name()),
        (Ok(()), Some(field)) => {
            report.text("reason", Reason::Unwanted.name());
            report.text("field", field);
        }
        (Ok(()), None) if !ok => report.text("reason", "ok"),
        (Ok(()), None) => {}
    }
    (report, ok)
}

fn dispatch<N: Nic>(stack: &mut Stack<N>, order: &Order, report: &mut Report) -> Outcome {
    match order.verb {
        "dhcp" => dhcp::dhcp(stack, order, report),
        "static" => dhcp::fixed(stack, order, report),
        "dhcp-raw" => dhcp_raw::exchange(stack, order, report),
        "arp" => icmp::arp(stack, order, report),
        "ping" => icmp::ping(stack, order, report),
        "traceroute" => icmp::traceroute(stack, order, report),
        "resolve" => dns::resolve(stack, order, report, dns::Transport::Udp),
        "resolve-tcp" => dns::resolve(stack, order, report, dns::Transport::Tcp),
        "tcp-connect" => tcp::connect_only(stack, order, report),
        "tcp-get" => tcp::get(stack, order, report),
        "tcp-echo" => tcp::echo(stack, order, report),
        "tcp-rr" => tcp::round_trips(stack, order, report),
        "tcp-churn" => tcp::churn(stack, order, report),
        "tcp-hold" => tcp::hold(stack, order, report),
        "upload" => bulk::upload(stack, order, report),
        "download" => bulk::download(stack, order, report),
        "listen" => listen::tcp(stack, order, report),
        "listen-udp" => listen::udp(stack, order, report),
        "udp-echo" => udp::echo(stack, order, report),
        "udp-send" => udp::send(stack, order, report),
        "wait" => {
            stack.idle(order.target.parse().unwrap_or(0));
            Ok(())
        }
        "stats" => stats(stack, report),
        "end" => end::end(stack, order),
        "bad" => bad::bad(stack, order, report),
        _ => Err(Reason::Unsupported),
    }
}

/// The card's counters; fails if the device was caught at something that it must not do.
fn stats<N: Nic>(stack: &mut Stack<N>, report: &mut Report) -> Outcome {
    let facts = stack.nic.facts();
    report.number("sent", facts.sent);
    report.number("received", facts.received);
    report.number("received_long", facts.received_long);
    report.number("bad_checksums", facts.bad_checksums);
    report.number("bad_partial", facts.bad_partial);
    report.number("short_frames", facts.short_frames);
    report.number("refused_ids", facts.refused_ids);
    report.flag("needs_reset", facts.needs_reset);
    let clean = facts.bad_checksums + facts.bad_partial + facts.short_frames + facts.refused_ids == 0
        && !facts.needs_reset;
    if clean { Ok(()) } else { Err(Reason::Device) }
}

/// A duration for a report.
fn micros(duration: Duration) -> u64 {
    duration.total_micros()
}

/// Time since `start` for a report.
fn since<N: Nic>(stack: &Stack<N>, start: Instant) -> u64 {
    micros(stack.now() - start)
}

#[cfg(test)]
mod tests;
