//! The order language.
//!
//! ```text
//! orders  = order *( ";" order )
//! order   = verb [ "=" target ] *( "," key "=" value )
//! ```
//!
//! Any byte of a target or value may be written %XX. What a verb takes is a row of [`VERBS`]; anything else
//! is refused before the first order runs, with the order and the word at fault. Every verb also takes
//! `expect=` (what should happen instead of success), `timeout=` (ms) and `want.FIELD=` (what a reported
//! field should read).

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// What a key's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// A decimal number that fits 32 bits.
    Number,
}
use Kind::{Number, Text};

/// Whether a verb has a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// It must have one.
    Required,
    /// It must not have one.
    None,
    /// It must be a decimal number.
    Number,
}

type Row = (&'static str, Target, &'static [(&'static str, Kind)]);

/// Every verb, whether it has a target, and its keys.
pub const VERBS: &[Row] = &[
    ("dhcp", Target::None, &[("hostname", Text)]),
    ("static", Target::Required, &[("gw", Text), ("dns", Text)]),
    (
        "dhcp-raw",
        Target::Required,
        &[("address", Text), ("server", Text), ("client", Text), ("mac", Text), ("hostname", Text)],
    ),
    ("arp", Target::Required, &[]),
    ("ping", Target::Required, &[("count", Number), ("size", Number), ("interval", Number), ("ttl", Number)]),
    ("traceroute", Target::Required, &[("max", Number), ("method", Text), ("tries", Number)]),
    ("resolve", Target::Required, &[("type", Text), ("server", Text), ("edns", Number)]),
    ("resolve-tcp", Target::Required, &[("type", Text), ("server", Text), ("edns", Number)]),
    ("tcp-connect", Target::Required, &[("ttl", Number)]),
    ("tcp-get", Target::Required, &[]),
    ("tcp-echo", Target::Required, &[("bytes", Number), ("end", Text)]),
    ("tcp-rr", Target::Required, &[("count", Number)]),
    ("tcp-churn", Target::Required, &[("count", Number)]),
    ("tcp-hold", Target::Required, &[("count", Number), ("ms", Number)]),
    ("upload", Target::Required, &[("mb", Number), ("window", Number)]),
    ("download", Target::Required, &[("mb", Number), ("window", Number), ("pause", Number)]),
    ("listen", Target::Number, &[("count", Number), ("mode", Text), ("mb", Number)]),
    ("listen-udp", Target::Number, &[("count", Number)]),
    (
        "udp-echo",
        Target::Required,
        &[("bytes", Number), ("count", Number), ("ttl", Number), ("port", Number), ("data", Text)],
    ),
    (
        "udp-send",
        Target::Required,
        &[("bytes", Number), ("count", Number), ("pps", Number), ("port", Number)],
    ),
    ("wait", Target::Number, &[]),
    ("stats", Target::None, &[]),
    ("end", Target::Required, &[]),
    ("bad", Target::Required, &[("count", Number), ("seed", Number)]),
];

/// One order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its verb, one of [`VERBS`].
    pub verb: &'static str,
    /// Its target; empty if it has none.
    pub target: String,
    args: Vec<(String, String)>,
}

/// Why orders were refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadOrder {
    /// The order as it was written.
    pub order: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// No such verb.
    Verb(String),
    /// The verb needs a target.
    NoTarget,
    /// The verb takes no target.
    Target(String),
    /// The verb has no such key.
    Key(String),
    /// A word without `=`.
    Word(String),
    /// A value that isn't a decimal number below 2^32.
    Number(String),
    /// A broken %XX, or bytes that aren't UTF-8.
    Escape(String),
}

impl fmt::Display for BadOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Problem::Verb(verb) => write!(f, "no verb \"{verb}\""),
            Problem::NoTarget => write!(f, "the verb needs =TARGET"),
            Problem::Target(target) => write!(f, "the verb takes no target, got \"{target}\""),
            Problem::Key(key) => write!(f, "the verb has no key \"{key}\""),
            Problem::Word(word) => write!(f, "expected key=value, got \"{word}\""),
            Problem::Number(value) => write!(f, "expected a number below 2^32, got \"{value}\""),
            Problem::Escape(value) => write!(f, "expected %XX escapes of UTF-8 in \"{value}\""),
        }
    }
}

/// Parses orders.
pub fn parse(text: &str) -> Result<Vec<Order>, BadOrder> {
    let orders = text.split(';').filter(|order| !order.is_empty());
    orders.map(|order| one(order).map_err(|problem| BadOrder { order: order.to_string(), problem })).collect()
}

fn one(text: &str) -> Result<Order, Problem> {
    let mut words = text.split(',');
    let head = words.next().unwrap_or_default();
    let (verb, target) = head.split_once('=').map_or((head, None), |(verb, target)| (verb, Some(target)));
    let (verb, takes, keys) =
        VERBS.iter().find(|row| row.0 == verb).ok_or_else(|| Problem::Verb(verb.to_string()))?;
    let target = match (takes, target) {
        (Target::None, None) => String::new(),
        (Target::None, Some(target)) => return Err(Problem::Target(target.to_string())),
        (_, None | Some("")) => return Err(Problem::NoTarget),
        (Target::Number, Some(target)) => number(target).map(|n| n.to_string())?,
        (Target::Required, Some(target)) => unescape(target)?,
    };
    let mut args = Vec::new();
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| Problem::Word(word.to_string()))?;
        let kind = match key {
            "expect" => Text,
            "timeout" => Number,
            _ if key.starts_with("want.") => Text,
            _ => keys.iter().find(|row| row.0 == key).ok_or_else(|| Problem::Key(key.to_string()))?.1,
        };
        if kind == Number {
            number(value)?;
        }
        args.push((key.to_string(), unescape(value)?));
    }
    Ok(Order { verb, target, args })
}

fn number(text: &str) -> Result<u32, Problem> {
    text.parse().map_err(|_| Problem::Number(text.to_string()))
}

fn unescape(text: &str) -> Result<String, Problem> {
    let broken = || Problem::Escape(text.to_string());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = tail.get(..2).and_then(|two| core::str::from_utf8(two).ok()).ok_or_else(broken)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| broken())?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| broken())
}

impl Order {
    /// A text argument.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.args.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// A number argument, or the default.
    #[must_use]
    pub fn number(&self, key: &str, default: u32) -> u32 {
        self.text(key).and_then(|value| value.parse().ok()).unwrap_or(default)
    }

    /// What reported fields should read: names without `want.`, and values.
    pub fn wants(&self) -> impl Iterator<Item = (&str, &str)> {
        self.args.iter().filter_map(|(key, value)| Some((key.strip_prefix("want.")?, value.as_str())))
    }
}

#[cfg(test)]
mod tests;
