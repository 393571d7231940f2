//! `resolve` and `resolve-tcp`: a small DNS client (RFC 1035) that shows what smoltcp's hides: the response
//! code, the truncation bit and every answer. Also the look-up of names in targets.

use super::{Outcome, since, target, tcp, udp};
use crate::nic::Nic;
use crate::orders::Order;
use crate::report::Report;
use crate::stack::{Progress, Reason, Stack};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use smoltcp::socket::{tcp as tcp_socket, udp as udp_socket};
use smoltcp::time::Instant;
use smoltcp::wire::{
    DnsFlags, DnsPacket, DnsQueryType as Type, DnsQuestion, DnsRcode as Rcode, DnsRecord, DnsRecordData,
    Ipv4Address,
};

const PORT: u16 = 53;
/// Milliseconds between two questions over UDP.
const RETRY: u32 = 1000;
const CLASS_IN: [u8; 2] = [0, 1];

/// How the question travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// What a server said.
#[derive(Debug, Default)]
struct Answer {
    rcode: u8,
    truncated: bool,
    recursion: bool,
    answers: Vec<String>,
    addresses: Vec<Ipv4Address>,
    ttl: Option<u32>,
    bytes: usize,
}

fn query_type(name: &str) -> Option<Type> {
    Some(match name {
        "A" => Type::A,
        "AAAA" => Type::Aaaa,
        "CNAME" => Type::Cname,
        "NS" => Type::Ns,
        "SOA" => Type::Soa,
        "PTR" => Type::Unknown(12),
        "MX" => Type::Unknown(15),
        "TXT" => Type::Unknown(16),
        "SRV" => Type::Unknown(33),
        other => Type::Unknown(other.parse().ok()?),
    })
}

/// A question, with an EDNS0 OPT record (RFC 6891) if a UDP size is given; `None` for a name that has none.
fn question(id: u16, name: &str, type_: Type, edns: Option<u16>) -> Option<Vec<u8>> {
    let mut message = Vec::new();
    message.extend_from_slice(&id.to_be_bytes());
    // Recursion desired; one question; an OPT record in the additional section.
    message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    for label in name.trim_end_matches('.').split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..64).contains(len))?;
        message.push(len);
        message.extend_from_slice(label.as_bytes());
    }
    message.push(0);
    message.extend_from_slice(&u16::from(type_).to_be_bytes());
    message.extend_from_slice(&CLASS_IN);
    if let Some(size) = edns {
        message.extend_from_slice(&[0, 0, 41]);
        message.extend_from_slice(&size.to_be_bytes());
        message.extend_from_slice(&[0; 6]);
    }
    (message.len() <= 512).then_some(message)
}

/// Reads a response to question `id`; `None` if it is none.
fn answer(bytes: &[u8], id: u16, type_: Type) -> Option<Answer> {
    let packet = DnsPacket::new_checked(bytes).ok()?;
    let flags = packet.flags();
    if packet.transaction_id() != id || !flags.contains(DnsFlags::RESPONSE) {
        return None;
    }
    let mut found = Answer {
        rcode: u8::from(packet.rcode()),
        truncated: flags.contains(DnsFlags::TRUNCATED),
        recursion: flags.contains(DnsFlags::RECURSION_AVAILABLE),
        bytes: bytes.len(),
        ..Answer::default()
    };
    let mut rest = packet.payload();
    for _ in 0..packet.question_count() {
        let (tail, question) = DnsQuestion::parse(rest).ok()?;
        if question.type_ != type_ {
            return None;
        }
        rest = tail;
    }
    for _ in 0..packet.answer_record_count() {
        let Ok((tail, record)) = DnsRecord::parse(rest) else { break };
        rest = tail;
        found.ttl = Some(found.ttl.map_or(record.ttl, |ttl| ttl.min(record.ttl)));
        found.answers.push(describe(&packet, &record.data, &mut found.addresses));
    }
    Some(found)
}

fn describe(packet: &DnsPacket<&[u8]>, data: &DnsRecordData<'_>, addresses: &mut Vec<Ipv4Address>) -> String {
    match data {
        DnsRecordData::A(address) => {
            addresses.push(*address);
            address.to_string()
        }
        DnsRecordData::Aaaa(address) => address.to_string(),
        DnsRecordData::Cname(name) => full_name(packet, name),
        DnsRecordData::Other(type_, bytes) => match u16::from(*type_) {
            2 | 12 => full_name(packet, bytes),
            16 => bytes.get(1..).map(|text| String::from_utf8_lossy(text).into_owned()).unwrap_or_default(),
            number => format!("type{number}:{}", bytes.len()),
        },
    }
}

fn full_name(packet: &DnsPacket<&[u8]>, bytes: &[u8]) -> String {
    let labels: Vec<String> = packet
        .parse_name(bytes)
        .map_while(Result::ok)
        .map(|label| String::from_utf8_lossy(label).into_owned())
        .collect();
    labels.join(".")
}

fn ask<N: Nic>(
    stack: &mut Stack<N>,
    server: Ipv4Address,
    (message, id, type_): (&[u8], u16, Type),
    transport: Transport,
    deadline: Instant,
) -> Result<Answer, Reason> {
    match transport {
        Transport::Udp => ask_udp(stack, server, (message, id, type_), deadline),
        Transport::Tcp => ask_tcp(stack, server, (message, id, type_), deadline),
    }
}

fn ask_udp<N: Nic>(
    stack: &mut Stack<N>,
    server: Ipv4Address,
    (message, id, type_): (&[u8], u16, Type),
    deadline: Instant,
) -> Result<Answer, Reason> {
    let port = stack.port();
    let handle = udp::open(stack, port, 65536).ok_or(Reason::Unsupported)?;
    let mut next = stack.now();
    let found = stack.until(deadline, |stack| {
        if let Some(error) = stack.nic.observer().error(17, server, |e| e.ports == (port, PORT)) {
            return Progress::Done(Err(super::icmp::reason(&error)));
        }
        let now = stack.now();
        let retry = stack.after(RETRY);
        let socket = stack.sockets.get_mut::<udp_socket::Socket>(handle);
        while let Ok((bytes, _)) = socket.recv() {
            if let Some(found) = answer(bytes, id, type_) {
                return Progress::Done(Ok(found));
            }
        }
        if now < next {
            return Progress::Wait(Some(next));
        }
        next = retry;
        let _ = socket.send_slice(message, (server, PORT));
        Progress::Again
    });
    stack.sockets.remove(handle);
    found.unwrap_or(Err(Reason::Timeout))
}

fn ask_tcp<N: Nic>(
    stack: &mut Stack<N>,
    server: Ipv4Address,
    (message, id, type_): (&[u8], u16, Type),
    deadline: Instant,
) -> Result<Answer, Reason> {
    let connection =
        tcp::connect(stack, (server, PORT), &tcp::Options::default(), deadline, &mut Report::default())?;
    let mut framed = Vec::from((message.len() as u16).to_be_bytes());
    framed.extend_from_slice(message);
    let socket = stack.sockets.get_mut::<tcp_socket::Socket>(connection.handle);
    let _ = socket.send_slice(&framed);
    let mut got = Vec::new();
    let found = stack.until(deadline, |stack| {
        let socket = stack.sockets.get_mut::<tcp_socket::Socket>(connection.handle);
        let more = tcp::drain(socket, |bytes| got.extend_from_slice(bytes));
        let wanted = got.first_chunk().map(|len| 2 + usize::from(u16::from_be_bytes(*len)));
        match wanted.and_then(|wanted| got.get(2..wanted)) {
            Some(bytes) => Progress::Done(answer(bytes, id, type_).ok_or(Reason::BadReply)),
            None if !more => Progress::Done(Err(Reason::Short)),
            None => Progress::Wait(None),
        }
    });
    tcp::finish(stack, connection.handle);
    found.unwrap_or(Err(Reason::Timeout))
}

/// `resolve=NAME,type=A,server=HOST,edns=BYTES` over either transport.
pub(super) fn resolve<N: Nic>(
    stack: &mut Stack<N>,
    order: &Order,
    report: &mut Report,
    transport: Transport,
) -> Outcome {
    let server = target::host(stack, order.text("server").unwrap_or("dns"), &mut Report::default())?;
    report.text("server", server);
    let type_ = query_type(order.text("type").unwrap_or("A")).ok_or(Reason::BadTarget)?;
    let edns = order.text("edns").map(|_| order.number("edns", 1232).min(65535) as u16);
    let id = stack.rng.bits() as u16;
    let message = question(id, &order.target, type_, edns).ok_or(Reason::BadTarget)?;
    let start = stack.now();
    let deadline = stack.after(order.number("timeout", 5000));
    let found = ask(stack, server, (&message, id, type_), transport, deadline)?;
    report.number("us", since(stack, start));
    report.number("rcode", u64::from(found.rcode));
    report.flag("truncated", found.truncated);
    report.flag("recursion", found.recursion);
    report.number("bytes", found.bytes as u64);
    report.list("answers", &found.answers);
    if let Some(ttl) = found.ttl {
        report.number("ttl_s", u64::from(ttl));
    }
    outcome(&found)
}

fn outcome(found: &Answer) -> Outcome {
    match Rcode::from(found.rcode) {
        Rcode::NoError if found.answers.is_empty() && !found.truncated => Err(Reason::NotFound),
        Rcode::NoError => Ok(()),
        Rcode::NXDomain => Err(Reason::NotFound),
        Rcode::Refused => Err(Reason::Refused),
        _ => Err(Reason::ServerFailure),
    }
}

/// The address of a name in a target, asked of the first name server; a name without a dot gets the domain.
pub(super) fn lookup<N: Nic>(stack: &mut Stack<N>, name: &str) -> Result<Ipv4Address, Reason> {
    let server = *stack.dns.first().ok_or(Reason::NoServer)?;
    let name = match &stack.domain {
        Some(domain) if !name.contains('.') => format!("{name}.{domain}"),
        _ => name.to_string(),
    };
    let id = stack.rng.bits() as u16;
    let message = question(id, &name, Type::A, None).ok_or(Reason::BadTarget)?;
    let deadline = stack.after(5000);
    let found = ask_udp(stack, server, (&message, id, Type::A), deadline)?;
    outcome(&found)?;
    found.addresses.first().copied().ok_or(Reason::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A response with a compressed CNAME and an A record behind it.
    fn response(id: u16) -> Vec<u8> {
        let mut message = question(id, "www.example.test", Type::A, None).unwrap();
        message[2..4].copy_from_slice(&[0x81, 0x80]);
        message[7] = 2;
        message.extend_from_slice(&[0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 4, 1, b'a', 0xc0, 16]);
        message.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 192, 0, 2, 7]);
        message
    }

    #[test]
    fn answers_are_read_through_compression() {
        let found = answer(&response(7), 7, Type::A).unwrap();
        assert_eq!(found.answers, ["a.example.test", "192.0.2.7"]);
        assert_eq!((found.ttl, found.rcode, found.truncated), (Some(30), 0, false));
        assert_eq!(outcome(&found), Ok(()));
    }

    #[test]
    fn someone_elses_answer_is_no_answer() {
        assert!(answer(&response(7), 8, Type::A).is_none());
        assert!(answer(&response(7), 7, Type::Aaaa).is_none());
        assert!(answer(&question(7, "a.test", Type::A, None).unwrap(), 7, Type::A).is_none());
    }

    #[test]
    fn names_that_dns_cannot_hold_are_refused() {
        assert!(question(1, "a..b", Type::A, None).is_none());
        assert!(question(1, &"x".repeat(64), Type::A, None).is_none());
        assert!(question(1, &"x.".repeat(300), Type::A, None).is_none());
    }
}
