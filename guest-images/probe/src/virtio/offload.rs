//! virtio_net_hdr (virtio 1.3 §5.1.6) and the checksums behind its flags.
//!
//! Outgoing: [`fill`] turns a complete frame whose TCP or UDP checksum is not computed into one with the
//! pseudo-header's sum and NEEDS_CSUM, or with a GSO type as well. Incoming: [`verify`] recomputes the
//! TCP/UDP checksum of a frame that the device vouched for in no way. IPv4 only; fragments and frames that
//! aren't TCP or UDP pass untouched and count as right.

/// Bytes of virtio_net_hdr_v1.
pub const HEADER: usize = 12;
/// Flag: the checksum is partial; compute it from csum_start.
pub const NEEDS_CSUM: u8 = 1;
/// Flag: the device has checked the checksum.
pub const DATA_VALID: u8 = 2;
/// GSO type: none.
pub const GSO_NONE: u8 = 0;
/// GSO type: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;

const ETHERNET: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Where the transport header of an unfragmented IPv4 TCP or UDP frame lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset of the TCP or UDP header.
    pub start: usize,
    /// Offset of the byte behind the IP packet: what follows is Ethernet padding.
    pub end: usize,
    /// Offset of the checksum field.
    pub checksum: usize,
    /// 6 or 17.
    pub protocol: u8,
}

/// Finds the transport segment; `None` for everything else.
#[must_use]
pub fn segment(frame: &[u8]) -> Option<Segment> {
    let ip = frame.get(ETHERNET..)?;
    if frame[12..14] != [8, 0] || ip.len() < 20 || ip[0] >> 4 != 4 {
        return None;
    }
    let header = usize::from(ip[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    // smoltcp writes a length of 0 when a segment is too long for the field.
    let total = if total == 0 { ip.len() } else { total };
    let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0;
    let (minimum, field) = match ip[9] {
        TCP => (20, 16),
        UDP => (8, 6),
        _ => return None,
    };
    if fragment || header < 20 || total > ip.len() || total < header + minimum {
        return None;
    }
    let start = ETHERNET + header;
    Some(Segment { start, end: ETHERNET + total, checksum: start + field, protocol: ip[9] })
}

/// One's complement sum of 16-bit big-endian words, folded.
#[must_use]
pub fn sum(bytes: &[u8], initial: u32) -> u16 {
    let mut total = u64::from(initial);
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        total += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    let tail = words.remainder();
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    total += u64::from(u32::from_be_bytes(last));
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn pseudo_sum(frame: &[u8], at: Segment) -> u16 {
    let length = (at.end - at.start) as u32;
    sum(&frame[ETHERNET + 12..ETHERNET + 20], length + u32::from(at.protocol))
}

/// Prepares an outgoing frame: returns its header. `segment_size` is the GSO size, if the frame needs any.
#[must_use]
pub fn fill(frame: &mut [u8], segment_size: Option<u16>) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let Some(at) = segment(frame) else { return header };
    let partial = pseudo_sum(frame, at);
    frame[at.checksum..at.checksum + 2].copy_from_slice(&partial.to_be_bytes());
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&(at.start as u16).to_le_bytes());
    header[8..10].copy_from_slice(&((at.checksum - at.start) as u16).to_le_bytes());
    if let (Some(size), TCP) = (segment_size, at.protocol) {
        let headers = at.start + usize::from(frame[at.start + 12] >> 4) * 4;
        header[1] = GSO_TCPV4;
        header[2..4].copy_from_slice(&(headers as u16).to_le_bytes());
        header[4..6].copy_from_slice(&size.to_le_bytes());
    }
    header
}

/// Whether an incoming frame's TCP/UDP checksum is right, or is covered by the device's flags.
#[must_use]
pub fn verify(flags: u8, frame: &[u8]) -> bool {
    let Some(at) = segment(frame) else { return true };
    let absent = at.protocol == UDP && frame[at.checksum..at.checksum + 2] == [0, 0];
    if flags & (NEEDS_CSUM | DATA_VALID) != 0 || absent {
        return true;
    }
    sum(&frame[at.start..at.end], u32::from(pseudo_sum(frame, at))) == 0xffff
}

/// Whether a header with NEEDS_CSUM tells where the checksum of the frame lies, and the frame holds the
/// pseudo-header's sum there. An end host needs neither, but a guest that forwards the frame does.
#[must_use]
pub fn partial_is_right(header: &[u8], frame: &[u8]) -> bool {
    let Some(at) = segment(frame) else { return false };
    let start = usize::from(u16::from_le_bytes([header[6], header[7]]));
    let offset = usize::from(u16::from_le_bytes([header[8], header[9]]));
    (start, offset) == (at.start, at.checksum - at.start)
        && frame[at.checksum..at.checksum + 2] == pseudo_sum(frame, at).to_be_bytes()
}

#[cfg(test)]
mod tests;
