//! Bytes that wait, in order, in a buffer of fixed size.

use crate::wire::WINDOW;

/// At most a window's worth of bytes: the host may not send more before these are taken.
pub(crate) struct Queue {
    bytes: [u8; WINDOW],
    start: usize,
    end: usize,
}

impl Queue {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; WINDOW], start: 0, end: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Appends bytes; false if there is no room for them.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        if self.end + bytes.len() > WINDOW {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let Some(room) = self.bytes.get_mut(self.end..self.end + bytes.len()) else { return false };
        room.copy_from_slice(bytes);
        self.end += bytes.len();
        true
    }

    pub(crate) fn front(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Drops the first `count` bytes.
    pub(crate) fn take(&mut self, count: usize) {
        self.start = self.end.min(self.start + count);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Drops everything; how much it was.
    pub(crate) fn clear(&mut self) -> usize {
        let count = self.end - self.start;
        self.take(count);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_no_more_than_a_window_fits() {
        let mut queue = Box::new(Queue::new());
        assert!(queue.push(&[1; WINDOW]) && !queue.push(&[2]));
        queue.take(10);
        assert!(queue.push(&[2; 10]) && !queue.push(&[3]));
        assert_eq!(queue.front().len(), WINDOW);
        queue.take(WINDOW - 10);
        assert_eq!(queue.front(), [2; 10]);
        assert_eq!(queue.clear(), 10);
        assert!(queue.is_empty() && queue.push(&[4; WINDOW]));
    }
}
