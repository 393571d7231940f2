//! Lists of pieces of guest memory, reused from turn to turn.

use vm_memory::VolatileSlice;

/// The allocation of a list that is empty between turns. A list borrows from guest memory for one turn only, yet
/// its allocation is to survive the turn, and to move to the worker's thread, which pointers may not.
#[derive(Default)]
pub(in crate::virtio) struct Spare(Vec<[usize; PIECE_WORDS]>);

/// Words of a piece: an allocation is reused only for elements of the same size.
const PIECE_WORDS: usize = size_of::<VolatileSlice<'static>>() / size_of::<usize>();

impl Spare {
    /// The list, for pieces that live for one turn.
    pub(in crate::virtio) fn take<'m>(&mut self) -> Vec<VolatileSlice<'m>> {
        // Collecting a vector's own iterator reuses its allocation; the test holds it to that.
        std::mem::take(&mut self.0).into_iter().map_while(|_| None).collect()
    }

    /// Gives the list back, emptied.
    pub(in crate::virtio) fn put(&mut self, pieces: Vec<VolatileSlice<'_>>) {
        self.0 = pieces.into_iter().map_while(|_| None).collect();
    }
}

/// Takes the first `len` bytes off `pieces[*start..]` and passes them to `taken`; moves `start` past the pieces
/// that are used up. There must be as many bytes.
pub(in crate::virtio) fn take_front<'m>(
    pieces: &mut [VolatileSlice<'m>],
    start: &mut usize,
    mut len: usize,
    mut taken: impl FnMut(VolatileSlice<'m>),
) {
    while let Some(piece) = pieces.get_mut(*start).filter(|_| len > 0) {
        match piece.split_at(len) {
            Ok((front, rest)) if !rest.is_empty() => {
                taken(front);
                *piece = rest;
                return;
            }
            _ => {
                len -= piece.len();
                taken(*piece);
                *start += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_list_keeps_its_allocation() {
        let mut bytes = [0u8; 4];
        let mut list = Vec::with_capacity(100);
        list.push(VolatileSlice::from(&mut bytes[..]));
        let before = list.as_ptr().addr();
        let mut spare = Spare::default();
        spare.put(list);
        let again = spare.take();
        assert_eq!((again.len(), again.capacity(), again.as_ptr().addr()), (0, 100, before));
    }

    #[test]
    fn a_header_may_span_pieces() {
        let (mut a, mut b, mut c) = ([1u8, 2], [3u8, 4, 5], [6u8]);
        let mut pieces = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
            VolatileSlice::from(&mut c[..]),
        ];
        let mut start = 0;
        let mut got = Vec::<u8>::new();
        let mut take = |start: &mut usize, len| {
            got.clear();
            take_front(&mut pieces, start, len, |piece| {
                let mut bytes = vec![0u8; piece.len()];
                piece.copy_to(&mut bytes);
                got.extend(bytes);
            });
            got.clone()
        };
        assert_eq!(take(&mut start, 3), [1, 2, 3]);
        assert_eq!(start, 1);
        assert_eq!(take(&mut start, 2), [4, 5]);
        assert_eq!(start, 2);
        assert_eq!(take(&mut start, 1), [6]);
        assert_eq!(start, 3);
    }
}
