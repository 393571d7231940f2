//! The escape key of the console.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// What a typed byte means.
///
/// ```
/// use vmm::console::{Escape, Key};
///
/// let mut escape = Escape::default();
/// escape.key(0x01);
/// assert_eq!(escape.key(b'x'), Key::Quit);
/// // Ctrl-A Ctrl-A is one Ctrl-A for the guest; behind any other key, both go there.
/// escape.key(0x01);
/// assert_eq!(escape.key(0x01).bytes(), b"\x01");
/// escape.key(0x01);
/// assert_eq!(escape.key(b'd').bytes(), b"\x01d");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Send these bytes to the guest: none, one or two.
    Send([u8; 2], usize),
    /// Stop the machine.
    Quit,
    /// Leave the machine running, and go.
    Detach,
}

impl Key {
    /// The bytes for the guest.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Send(bytes, len) => &bytes[..*len],
            Self::Quit | Self::Detach => &[],
        }
    }
}

/// Finds Ctrl-A x in what is typed, and Ctrl-A d where one can leave.
///
/// ```
/// use vmm::console::{Escape, Key};
///
/// let mut escape = Escape::attached();
/// assert_eq!(escape.key(b'l').bytes(), b"l");
/// assert_eq!(escape.key(0x01).bytes(), b""); // Ctrl-A: the next key tells
/// assert_eq!(escape.key(b'd'), Key::Detach);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Escape {
    after_prefix: bool,
    can_leave: bool,
}

impl Escape {
    /// For a console that one is attached to: Ctrl-A d leaves it.
    pub fn attached() -> Self {
        Self { can_leave: true, ..Self::default() }
    }

    /// Takes one typed byte.
    pub fn key(&mut self, byte: u8) -> Key {
        let after_prefix = std::mem::take(&mut self.after_prefix);
        match (after_prefix, byte) {
            (false, PREFIX) => {
                self.after_prefix = true;
                Key::Send([0; 2], 0)
            }
            (false, _) | (true, PREFIX) => Key::Send([byte, 0], 1),
            (true, b'x' | b'X') => Key::Quit,
            (true, b'd' | b'D') if self.can_leave => Key::Detach,
            (true, _) => Key::Send([PREFIX, byte], 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(text: &[u8]) -> (Vec<u8>, bool) {
        let mut escape = Escape::default();
        let mut sent = Vec::new();
        for byte in text {
            match escape.key(*byte) {
                Key::Quit => return (sent, true),
                key => sent.extend(key.bytes()),
            }
        }
        (sent, false)
    }

    #[test]
    fn ctrl_a_x_quits_and_what_came_before_is_sent() {
        assert_eq!(typed(b"ls\x01xyz"), (b"ls".to_vec(), true));
        assert_eq!(typed(b"\x01X"), (vec![], true));
    }

    #[test]
    fn ctrl_a_d_leaves_where_one_is_attached_and_is_typed_elsewhere() {
        let mut attached = Escape::attached();
        assert_eq!((attached.key(1), attached.key(b'd')), (Key::Send([0; 2], 0), Key::Detach));
        assert_eq!(typed(b"\x01d"), (b"\x01d".to_vec(), false));
    }

    #[test]
    fn ctrl_a_twice_sends_one() {
        assert_eq!(typed(b"\x01\x01x"), (b"\x01x".to_vec(), false));
    }

    #[test]
    fn ctrl_a_and_another_key_sends_both() {
        assert_eq!(typed(b"\x01k\x03"), (b"\x01k\x03".to_vec(), false));
    }
}
