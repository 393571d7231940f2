//! DHCP messages (RFC 2131 §2, RFC 2132): bytes of a client → [`Request`]; an answer → bytes.
//!
//! A request is decoded here, not by `dhcproto`: that one asserts the lengths of some options in debug builds, stops
//! at the first option that it dislikes, and keeps no order. It is our second opinion in the tests.
//!
//! **In.** Options are read from the options field and, if option 52 says so, from `file` and `sname` (RFC 2131
//! §4.1); parts of a split option are joined (RFC 3396). An option of a wrong length counts as absent, an option
//! that runs out of its field ends it. Hardware types other than Ethernet are refused.
//!
//! **Out.** Options stand in the order they are given in. What finds no room in the options field, whose size
//! follows from the client's option 57 (at least 576 bytes for the whole IP packet), moves to `file` and `sname`
//! under option 52; what finds no room there either is left out: the caller puts the important ones first.
//! A message has at least 300 bytes, as BOOTP clients want it (RFC 1542 §2.1).

use std::net::Ipv4Addr;

use crate::MacAddr;

/// Length of the fixed part, magic cookie included.
const FIXED_LEN: usize = 240;
/// The magic cookie that stands before the options (RFC 2132 §2).
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Smallest IP packet that every client takes (RFC 2131 §2).
const MIN_PACKET: u16 = 576;
/// Bytes of IP and UDP header.
const IP_UDP: usize = 28;
/// Smallest message.
const MIN_MESSAGE: usize = 300;
const SNAME: std::ops::Range<usize> = 44..108;
const FILE: std::ops::Range<usize> = 108..236;

/// Option codes (RFC 2132; 119: RFC 3397; 121: RFC 3442).
#[allow(missing_docs, reason = "the names are those of the RFC's sections")]
pub(crate) mod code {
    pub(crate) const PAD: u8 = 0;
    pub(crate) const SUBNET_MASK: u8 = 1;
    pub(crate) const ROUTER: u8 = 3;
    pub(crate) const DNS: u8 = 6;
    pub(crate) const HOST_NAME: u8 = 12;
    pub(crate) const DOMAIN: u8 = 15;
    pub(crate) const MTU: u8 = 26;
    pub(crate) const BROADCAST: u8 = 28;
    pub(crate) const REQUESTED: u8 = 50;
    pub(crate) const LEASE_TIME: u8 = 51;
    pub(crate) const OVERLOAD: u8 = 52;
    pub(crate) const MESSAGE_TYPE: u8 = 53;
    pub(crate) const SERVER_ID: u8 = 54;
    pub(crate) const PARAMETERS: u8 = 55;
    pub(crate) const MESSAGE: u8 = 56;
    pub(crate) const MAX_SIZE: u8 = 57;
    pub(crate) const T1: u8 = 58;
    pub(crate) const T2: u8 = 59;
    pub(crate) const CLIENT_ID: u8 = 61;
    pub(crate) const FQDN: u8 = 81;
    pub(crate) const SEARCH: u8 = 119;
    pub(crate) const ROUTES: u8 = 121;
    pub(crate) const END: u8 = 255;
}

/// `DHCP message type` (RFC 2132 §9.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Discover,
    Offer,
    Request,
    Decline,
    Ack,
    Nak,
    Release,
    Inform,
}

impl Kind {
    fn parse(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Discover,
            2 => Self::Offer,
            3 => Self::Request,
            4 => Self::Decline,
            5 => Self::Ack,
            6 => Self::Nak,
            7 => Self::Release,
            8 => Self::Inform,
            _ => return None,
        })
    }

    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Discover => 1,
            Self::Offer => 2,
            Self::Request => 3,
            Self::Decline => 4,
            Self::Ack => 5,
            Self::Nak => 6,
            Self::Release => 7,
            Self::Inform => 8,
        }
    }
}

/// Why bytes are no request for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too short, no cookie, wrong hardware type: not DHCP over Ethernet.
    Malformed,
    /// A reply, or BOOTP without a message type.
    NotARequest,
    /// It went through a relay agent, and there is none on a link of ours.
    Relayed,
}

/// A client's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) xid: u32,
    /// The client asks for broadcast answers.
    pub(crate) broadcast: bool,
    /// The address that the client uses; 0.0.0.0 for none.
    pub(crate) ciaddr: Ipv4Addr,
    pub(crate) mac: MacAddr,
    /// Option 50.
    pub(crate) requested: Option<Ipv4Addr>,
    /// Option 54.
    pub(crate) server: Option<Ipv4Addr>,
    /// Option 51, seconds.
    pub(crate) lease_time: Option<u32>,
    /// Option 57.
    pub(crate) max_size: Option<u16>,
    /// Option 61 as it came, if it has at least two bytes.
    pub(crate) client_id: Option<Vec<u8>>,
    /// Option 12, or the name of option 81; not yet sanitised.
    pub(crate) host_name: Option<Vec<u8>>,
    /// Option 55.
    pub(crate) parameters: Option<Vec<u8>>,
}

impl Request {
    /// Decodes the payload of a datagram to port 67.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Refused> {
        let fixed: &[u8; FIXED_LEN] = bytes.first_chunk().ok_or(Refused::Malformed)?;
        let word = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let (op, htype, hlen) = (fixed[0], fixed[1], fixed[2]);
        if fixed[236..] != COOKIE || htype != 1 || hlen != 6 {
            return Err(Refused::Malformed);
        }
        let options = Options::collect(bytes);
        let kind = options.byte(code::MESSAGE_TYPE).and_then(Kind::parse).ok_or(Refused::NotARequest)?;
        if op != 1 || matches!(kind, Kind::Offer | Kind::Ack | Kind::Nak) {
            return Err(Refused::NotARequest);
        }
        if word(24) != 0 {
            return Err(Refused::Relayed);
        }
        let mac = MacAddr([fixed[28], fixed[29], fixed[30], fixed[31], fixed[32], fixed[33]]);
        if mac.is_group() || mac.octets() == [0; 6] {
            return Err(Refused::Malformed);
        }
        let fqdn = || options.get(code::FQDN).and_then(fqdn_label);
        Ok(Self {
            kind,
            xid: word(4),
            broadcast: fixed[10] & 0x80 != 0,
            ciaddr: Ipv4Addr::from_bits(word(12)),
            mac,
            requested: options.address(code::REQUESTED),
            server: options.address(code::SERVER_ID),
            lease_time: options.array(code::LEASE_TIME).map(u32::from_be_bytes),
            max_size: options.array(code::MAX_SIZE).map(u16::from_be_bytes),
            client_id: options.get(code::CLIENT_ID).filter(|id| id.len() >= 2).map(<[u8]>::to_vec),
            host_name: options.get(code::HOST_NAME).map(<[u8]>::to_vec).or_else(fqdn),
            parameters: options.get(code::PARAMETERS).map(<[u8]>::to_vec),
        })
    }
}

/// The first label of the name in option 81 (RFC 4702 §2.3: flags, two obsolete bytes, then a name in DNS form if
/// flag E is set, in ASCII otherwise).
fn fqdn_label(option: &[u8]) -> Option<Vec<u8>> {
    let (&[flags, _, _], name) = option.split_first_chunk()?;
    if flags & 4 == 0 {
        return Some(name.to_vec());
    }
    let (&len, rest) = name.split_first()?;
    rest.get(..usize::from(len)).map(<[u8]>::to_vec)
}

/// The options of a message, joined; the first occurrence decides the place, which does not matter here.
struct Options(Vec<(u8, Vec<u8>)>);

impl Options {
    fn collect(bytes: &[u8]) -> Self {
        let mut options = Self(Vec::new());
        options.read(bytes.get(FIXED_LEN..).unwrap_or_default());
        // RFC 2131 §4.1: file before sname; neither may say again where to look.
        let overload = options.byte(code::OVERLOAD).unwrap_or(0);
        for (bit, field) in [(1, FILE), (2, SNAME)] {
            if overload & bit != 0 {
                options.read(bytes.get(field).unwrap_or_default());
            }
        }
        options
    }

    fn read(&mut self, mut field: &[u8]) {
        while let Some((&code, rest)) = field.split_first() {
            match code {
                code::PAD => field = rest,
                code::END => return,
                _ => {
                    let Some((&len, rest)) = rest.split_first() else { return };
                    let Some((value, rest)) = rest.split_at_checked(usize::from(len)) else { return };
                    match self.0.iter_mut().find(|(known, _)| *known == code) {
                        Some((_, joined)) => joined.extend_from_slice(value),
                        None => self.0.push((code, value.to_vec())),
                    }
                    field = rest;
                }
            }
        }
    }

    fn get(&self, code: u8) -> Option<&[u8]> {
        self.0.iter().find(|(known, _)| *known == code).map(|(_, value)| value.as_slice())
    }

    fn array<const N: usize>(&self, code: u8) -> Option<[u8; N]> {
        self.get(code)?.try_into().ok()
    }

    fn byte(&self, code: u8) -> Option<u8> {
        self.array(code).map(|[byte]| byte)
    }

    fn address(&self, code: u8) -> Option<Ipv4Addr> {
        self.array::<4>(code).map(Ipv4Addr::from)
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) xid: u32,
    pub(crate) broadcast: bool,
    pub(crate) ciaddr: Ipv4Addr,
    pub(crate) yiaddr: Ipv4Addr,
    pub(crate) mac: MacAddr,
    /// In the order in which they are to stand; each at most once, of any length.
    pub(crate) options: Vec<(u8, Vec<u8>)>,
}

impl Answer {
    /// Encodes the answer for a client that takes IP packets of `max_size` bytes; less than 576 means 576, and it
    /// is no more than `mtu`.
    pub(crate) fn to_bytes(&self, max_size: Option<u16>, mtu: u16) -> Vec<u8> {
        let limit = max_size.unwrap_or(MIN_PACKET).min(mtu).max(MIN_PACKET);
        let mut message = vec![0; FIXED_LEN];
        message[..3].copy_from_slice(&[2, 1, 6]);
        message[4..8].copy_from_slice(&self.xid.to_be_bytes());
        message[10] = if self.broadcast { 0x80 } else { 0 };
        message[12..16].copy_from_slice(&self.ciaddr.octets());
        message[16..20].copy_from_slice(&self.yiaddr.octets());
        message[28..34].copy_from_slice(&self.mac.octets());
        message[236..].copy_from_slice(&COOKIE);
        let room = usize::from(limit) - IP_UDP - FIXED_LEN;
        let [options, file, sname] = self.lay_out(room);
        message[FILE][..file.len()].copy_from_slice(&file);
        message[SNAME][..sname.len()].copy_from_slice(&sname);
        message.extend_from_slice(&options);
        if message.len() < MIN_MESSAGE {
            message.resize(MIN_MESSAGE, code::PAD);
        }
        message
    }

    /// Distributes the options over the options field of at most `room` bytes, `file` and `sname`.
    fn lay_out(&self, room: usize) -> [Vec<u8>; 3] {
        // Three bytes for option 52 and one for END are kept free; the other fields need their END only.
        let limits = [room - 4, FILE.len() - 1, SNAME.len() - 1];
        let mut fields: [Vec<u8>; 3] = Default::default();
        for (code, value) in &self.options {
            let needed = value.len() + 2 * value.len().div_ceil(255).max(1);
            let home = fields.iter_mut().zip(limits).find(|(field, limit)| field.len() + needed <= *limit);
            if let Some((field, _)) = home {
                encode_option(field, *code, value);
            }
        }
        let overload = u8::from(!fields[1].is_empty()) | u8::from(!fields[2].is_empty()) << 1;
        if overload != 0 {
            encode_option(&mut fields[0], code::OVERLOAD, &[overload]);
        }
        for field in fields.iter_mut().filter(|field| !field.is_empty()) {
            field.push(code::END);
        }
        fields
    }
}

/// RFC 3396 §5: an option of more than 255 bytes is split.
fn encode_option(field: &mut Vec<u8>, code: u8, value: &[u8]) {
    let mut rest = value;
    loop {
        let (part, behind) = rest.split_at(rest.len().min(255));
        field.push(code);
        field.push(u8::try_from(part.len()).unwrap_or(u8::MAX)); // at most 255
        field.extend_from_slice(part);
        rest = behind;
        if rest.is_empty() {
            return;
        }
    }
}
