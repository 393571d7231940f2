//! DNS messages as far as a forwarder looks at them (RFC 1035 §4, RFC 6891).
//!
//! Questions and answers pass through as the bytes they came in; only the identifier is replaced. So nothing that this
//! code does not know (a new record type, DNSSEC, an EDNS option) gets lost. What is read: the header, the one question, and
//! the size in an OPT record. What is written: answers about our own names, errors, and truncated answers.
//! `hickory-proto` checks the bytes in the tests.
//!
//! Refused: what is shorter than a header, and answers where a question should be (silence: answering an answer makes a
//! loop); more or less than one question, names of more than 255 bytes, compressed names in a question (FORMERR);
//! operations other than QUERY (NOTIMP).

use std::net::Ipv4Addr;

/// Bytes of the header.
const HEADER: usize = 12;
/// Largest answer over UDP to a client without EDNS (RFC 1035 §4.2.1).
pub(crate) const PLAIN_SIZE: usize = 512;
/// What we say that we take over UDP, when we answer ourselves (DNS flag day 2020).
const OUR_SIZE: u16 = 1232;
/// Seconds that an answer about our own names may be kept: leases come and go.
const TTL: u32 = 10;
/// The record type of EDNS.
const OPT: u16 = 41;

/// Record types that we answer ourselves.
pub(crate) mod kind {
    pub(crate) const A: u16 = 1;
    pub(crate) const PTR: u16 = 12;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const ANY: u16 = 255;
}

/// RFC 1035 §4.1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rcode {
    NoError,
    FormErr,
    ServFail,
    NxDomain,
    NotImp,
}

impl Rcode {
    fn code(self) -> u8 {
        match self {
            Self::NoError => 0,
            Self::FormErr => 1,
            Self::ServFail => 2,
            Self::NxDomain => 3,
            Self::NotImp => 4,
        }
    }
}

/// Why a message is no question that can be forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BadQuery {
    /// It gets no answer.
    Silence,
    /// It gets this answer.
    Answer(Vec<u8>),
}

/// EDNS of a question (RFC 6891 §6.1.2, §6.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edns {
    size: u16,
    /// The client wants DNSSEC records (RFC 3225).
    dnssec_ok: bool,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Query {
    /// The identifier that the client chose.
    pub(crate) id: u16,
    /// In lower case, without the last dot; `.` is the empty text. Bytes outside ASCII and dots in labels are `?`, which
    /// no name of ours has.
    pub(crate) name: String,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    recursion_desired: bool,
    /// The question section as it came.
    question: Vec<u8>,
    edns: Option<Edns>,
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

impl Query {
    /// # Errors
    /// What to do with a message that is no good question.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, BadQuery> {
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(BadQuery::Silence)?;
        if header[2] & 0x80 != 0 {
            return Err(BadQuery::Silence);
        }
        let error = |rcode| BadQuery::Answer(bare(header, rcode));
        if header[2] & 0x78 != 0 {
            return Err(error(Rcode::NotImp));
        }
        if header[4..6] != [0, 1] {
            return Err(error(Rcode::FormErr));
        }
        let (name, end) = read_name(bytes, HEADER).ok_or_else(|| error(Rcode::FormErr))?;
        let (kind, class) =
            word(bytes, end).zip(word(bytes, end + 2)).ok_or_else(|| error(Rcode::FormErr))?;
        let edns = find_edns(bytes, end + 4).ok_or_else(|| error(Rcode::FormErr))?;
        Ok(Self {
            id: u16::from_be_bytes([header[0], header[1]]),
            name,
            kind,
            class,
            recursion_desired: header[2] & 1 != 0,
            question: bytes[HEADER..end + 4].to_vec(),
            edns,
        })
    }

    /// Bytes that the client takes in one datagram.
    pub(crate) fn max_size(&self) -> usize {
        self.edns.map_or(PLAIN_SIZE, |edns| usize::from(edns.size).max(PLAIN_SIZE))
    }

    /// Our own answer, with these records behind the question's name. `own`: we are the authority for it.
    pub(crate) fn answer(&self, rcode: Rcode, own: bool, records: &[Record]) -> Vec<u8> {
        let flags = [0x80 | u8::from(own) << 2 | u8::from(self.recursion_desired), 0x80 | rcode.code()];
        let count = u16::try_from(records.len()).unwrap_or(u16::MAX); // one or none
        let mut bytes = self.id.to_be_bytes().to_vec();
        bytes.extend(flags);
        bytes.extend([1, count, 0, u16::from(self.edns.is_some())].map(u16::to_be_bytes).concat());
        bytes.extend_from_slice(&self.question);
        for record in records {
            let data = record.data();
            bytes.extend([0xc0, 12]); // the name at the question
            bytes.extend([record.kind(), 1].map(u16::to_be_bytes).concat());
            bytes.extend(TTL.to_be_bytes());
            bytes.extend(u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes()); // at most 255
            bytes.extend(data);
        }
        bytes.extend(self.opt());
        bytes
    }

    /// An answer of an upstream server made fit for the client: its identifier, and TC with nothing behind the question if
    /// it is larger than `max` (RFC 2181 §9).
    pub(crate) fn passed_on(&self, answer: &[u8], max: usize) -> Vec<u8> {
        let mut bytes = answer.to_vec();
        bytes[..2].copy_from_slice(&self.id.to_be_bytes());
        if bytes.len() <= max {
            return bytes;
        }
        bytes.truncate(HEADER);
        bytes[2] |= 2; // TC
        bytes[4..].copy_from_slice(&[1, 0, 0, u16::from(self.edns.is_some())].map(u16::to_be_bytes).concat());
        bytes.extend_from_slice(&self.question);
        bytes.extend(self.opt());
        bytes
    }

    /// Whether `answer` is one to this question, asked under the identifier `id`.
    pub(crate) fn is_answered_by(&self, answer: &[u8], id: u16) -> bool {
        let Some(header) = answer.first_chunk::<HEADER>() else { return false };
        if header[..2] != id.to_be_bytes() || header[2] & 0xf8 != 0x80 {
            return false;
        }
        // Some servers leave the question out of an error.
        let bare_error = header[4..6] == [0, 0] && header[3] & 0xf != 0;
        let question = answer.get(HEADER..HEADER + self.question.len());
        bare_error
            || header[4..6] == [0, 1] && question.is_some_and(|q| q.eq_ignore_ascii_case(&self.question))
    }

    fn opt(&self) -> Vec<u8> {
        let Some(edns) = self.edns else { return Vec::new() };
        let mut opt = vec![0];
        opt.extend([OPT, OUR_SIZE, 0].map(u16::to_be_bytes).concat());
        opt.extend([if edns.dnssec_ok { 0x80 } else { 0 }, 0, 0, 0]);
        opt
    }
}

/// Whether an answer says that another server might know better: SERVFAIL, NOTIMP or REFUSED.
pub(crate) fn is_failure(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|flags| matches!(flags & 0xf, 2 | 4 | 5))
}

/// A question of the client under another identifier.
pub(crate) fn with_id(query: &[u8], id: u16) -> Vec<u8> {
    let mut bytes = query.to_vec();
    if let Some(place) = bytes.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
    bytes
}

/// What we know ourselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    A(Ipv4Addr),
    /// A name of ours: labels of at most 63 bytes, at most 253 in all.
    Ptr(String),
}

impl Record {
    fn kind(&self) -> u16 {
        match self {
            Self::A(_) => kind::A,
            Self::Ptr(_) => kind::PTR,
        }
    }

    fn data(&self) -> Vec<u8> {
        match self {
            Self::A(addr) => addr.octets().to_vec(),
            Self::Ptr(name) => {
                let labels = name.split('.').filter(|label| !label.is_empty());
                let length = |label: &str| u8::try_from(label.len()).unwrap_or(63); // a label of ours is short
                labels.flat_map(|l| [&[length(l)], l.as_bytes()].concat()).chain([0]).collect()
            }
        }
    }
}

/// An error without a question.
fn bare(header: &[u8; HEADER], rcode: Rcode) -> Vec<u8> {
    let mut bytes = vec![header[0], header[1], 0x80 | header[2] & 0x79, 0x80 | rcode.code()];
    bytes.resize(HEADER, 0);
    bytes
}

/// Reads an uncompressed name and says where it ends.
fn read_name(bytes: &[u8], start: usize) -> Option<(String, usize)> {
    let (mut name, mut at) = (String::new(), start);
    loop {
        let len = usize::from(*bytes.get(at)?);
        if len > 63 || at + 1 + len - start > 255 {
            return None;
        }
        if len == 0 {
            return Some((name, at + 1));
        }
        let label = bytes.get(at + 1..at + 1 + len)?;
        if !name.is_empty() {
            name.push('.');
        }
        let plain = |b: u8| if b.is_ascii_graphic() && b != b'.' { b.to_ascii_lowercase() } else { b'?' };
        name.extend(label.iter().map(|b| char::from(plain(*b))));
        at += 1 + len;
    }
}

/// Skips a name, which may end in a pointer.
fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            len @ 1..64 => at += 1 + usize::from(len),
            192.. => return Some(at + 2),
            64..192 => return None,
        }
    }
}

/// Looks for OPT in the records from `at` on; `None` when they are broken.
#[allow(clippy::option_option, reason = "broken, absent and present are three things")]
fn find_edns(bytes: &[u8], mut at: usize) -> Option<Option<Edns>> {
    let count: usize = [6, 8, 10].into_iter().map(|field| word(bytes, field).map_or(0, usize::from)).sum();
    let mut edns = None;
    for _ in 0..count {
        let end = skip_name(bytes, at)?;
        let root = end == at + 1;
        let (kind, size, len) = (word(bytes, end)?, word(bytes, end + 2)?, word(bytes, end + 8)?);
        if kind == OPT && root {
            edns = Some(Edns { size, dnssec_ok: bytes.get(end + 6)? & 0x80 != 0 });
        }
        at = end + 10 + usize::from(len);
        if at > bytes.len() {
            return None;
        }
    }
    Some(edns)
}
