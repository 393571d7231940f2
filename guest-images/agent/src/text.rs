//! Text in a buffer of fixed size: what doesn't fit is cut.

use core::ffi::CStr;

/// Up to `N` - 1 bytes, and always a NUL behind them.
#[derive(Clone, Debug)]
pub(crate) struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    /// No text.
    pub(crate) fn new() -> Self {
        Self { bytes: [0; N], length: 0 }
    }

    /// Appends bytes; false if they do not all fit, or hold a NUL. Then nothing is appended.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        let end = self.length.saturating_add(bytes.len());
        if end >= N || bytes.contains(&0) {
            return false;
        }
        let Some(room) = self.bytes.get_mut(self.length..end) else { return false };
        room.copy_from_slice(bytes);
        self.length = end;
        true
    }

    /// Appends as much as fits.
    pub(crate) fn push_cut(&mut self, bytes: &[u8]) {
        let fits = bytes.len().min((N - 1).saturating_sub(self.length));
        self.push(bytes.get(..fits).unwrap_or_default());
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::new();
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}
