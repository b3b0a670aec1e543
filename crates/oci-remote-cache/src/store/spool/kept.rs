//! Pieces of an earlier transfer that nobody has looked at yet. Each counts once its bytes were read and have the checksum that was
//! written down for them.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use oci::Slice;

use crate::store::pieces::{PIECE, PieceMap, piece};

/// The checksums that were written down, by piece: one that was bad and came again has two.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pieces: Mutex<BTreeMap<u64, Vec<u32>>>,
}

impl Kept {
    /// What the list beside a spool says of a blob of `size` bytes, and where that lies.
    pub(super) fn new(checksums: Vec<(u64, u32)>, size: u64) -> (Self, PieceMap) {
        let mut pieces = BTreeMap::<u64, Vec<u32>>::new();
        let mut parts = PieceMap::new();
        for (index, checksum) in checksums {
            if index < size.div_ceil(PIECE) {
                pieces.entry(index).or_default().push(checksum);
                parts.insert(piece(index, size));
            }
        }
        let pieces = Mutex::new(pieces);
        (Self { pieces }, parts)
    }

    /// The next piece to look at: the one at `offset` or the first behind it, else the first of all.
    pub(super) fn take(&self, offset: u64, size: u64) -> Option<(Slice, Vec<u32>)> {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = pieces.range(offset / PIECE..).next();
        let index = *behind.or_else(|| pieces.first_key_value())?.0;
        let checksums = pieces.remove(&index)?;
        Some((piece(index, size), checksums))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_goes_first() {
        let size = 3 * PIECE + 5;
        let listed = vec![(0, 1), (3, 2), (1, 3), (1, 4), (4, 5), (9, 6)];
        let (kept, parts) = Kept::new(listed, size);
        assert_eq!(parts.total(), 2 * PIECE + 5, "what lies outside is none");
        let take = |offset| {
            let taken = kept.take(offset, size);
            taken.map(|(part, checksums)| (part.start / PIECE, checksums))
        };
        assert_eq!(take(PIECE + 7), Some((1, vec![3, 4])));
        assert_eq!(take(PIECE + 7), Some((3, vec![2])));
        assert_eq!(take(PIECE + 7), Some((0, vec![1])));
        assert_eq!(take(0), None);
    }
}
