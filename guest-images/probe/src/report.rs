//! One JSON object per line: what an order found and whether that was what it should.
//!
//! Fields keep their order: the name first, then what was found, at last `ok` and, when it isn't, `reason`.
//! Strings are escaped by RFC 8259 §7 with everything outside printable ASCII as \u00XX of its byte, so
//! a line is one line whatever a peer sent. There are no fractions: times are microseconds.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::{Display, Write};

/// A reported value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A number.
    Number(u64),
    /// true or false.
    Flag(bool),
    /// A string.
    Text(String),
    /// A list of strings.
    List(Vec<String>),
}

impl Value {
    /// How a `want.` argument spells the value: bare text, lists joined by `+`.
    #[must_use]
    pub fn plain(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Text(text) => text.clone(),
            Self::List(items) => items.join("+"),
        }
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Text(text) => quote(out, text),
            Self::List(items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    quote(out, item);
                }
                out.push(']');
            }
            other => out.push_str(&other.plain()),
        }
    }
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => {
                out.push('\\');
                out.push(char::from(byte));
            }
            b' '..=b'~' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "\\u{byte:04x}");
            }
        }
    }
    out.push('"');
}

/// The fields of one line.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    fields: Vec<(String, Value)>,
}

impl Report {
    /// Adds a number.
    pub fn number(&mut self, name: &str, value: u64) {
        self.fields.push((name.to_string(), Value::Number(value)));
    }

    /// Adds a flag.
    pub fn flag(&mut self, name: &str, value: bool) {
        self.fields.push((name.to_string(), Value::Flag(value)));
    }

    /// Adds a string.
    pub fn text(&mut self, name: &str, value: impl Display) {
        self.fields.push((name.to_string(), Value::Text(value.to_string())));
    }

    /// Adds a hardware address.
    pub fn mac(&mut self, name: &str, mac: [u8; 6]) {
        let [a, b, c, d, e, f] = mac;
        self.text(name, format_args!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"));
    }

    /// Adds a list of strings.
    pub fn list<T: Display>(&mut self, name: &str, values: impl IntoIterator<Item = T>) {
        let items = values.into_iter().map(|value| value.to_string()).collect();
        self.fields.push((name.to_string(), Value::List(items)));
    }

    /// The value of a field.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value)
    }

    /// The line, without its end.
    #[must_use]
    pub fn line(&self) -> String {
        let mut out = String::from("{");
        for (index, (name, value)) in self.fields.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            quote(&mut out, name);
            out.push(':');
            value.write(&mut out);
        }
        out.push('}');
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_whatever_a_peer_sent() {
        let mut report = Report::default();
        report.text("banner", "a\"b\\c\r\nü");
        report.number("n", 7);
        report.flag("ok", true);
        report.list("hops", ["1", "*"]);
        assert_eq!(
            report.line(),
            r#"{"banner":"a\"b\\c\u000d\u000a\u00c3\u00bc","n":7,"ok":true,"hops":["1","*"]}"#
        );
    }
}
