//! Which bytes of a blob have arrived: a set of disjoint ranges, and the checksums by which pieces survive a restart.
//!
//! The set knows nothing of files. A piece is [`PIECE`] bytes long (the last one shorter) and is counted after a restart only when its
//! bytes still have the checksum that was written down when it became whole.

use std::collections::BTreeMap;

use oci::Slice;

/// Length of a piece in bytes: 4 MiB.
pub const PIECE: u64 = 4 << 20;

/// The bytes that have arrived, as disjoint ranges that never touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PieceMap {
    /// start → end, both in bytes, `end` exclusive.
    runs: BTreeMap<u64, u64>,
}

impl PieceMap {
    /// Nothing has arrived.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a range, joining it with those it overlaps or touches.
    pub fn insert(&mut self, slice: Slice) {
        let (mut start, mut end) = (slice.start, slice.end);
        if start >= end {
            return;
        }
        let touched: Vec<(u64, u64)> = self
            .runs
            .range(..=end)
            .rev()
            .take_while(|&(_, &e)| e >= start)
            .map(|(&s, &e)| (s, e))
            .collect();
        for (s, e) in touched {
            self.runs.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.runs.insert(start, end);
    }

    /// Takes a range out again.
    pub fn remove(&mut self, slice: Slice) {
        if slice.start >= slice.end {
            return;
        }
        let touched: Vec<(u64, u64)> = self
            .runs
            .range(..slice.end)
            .rev()
            .take_while(|&(_, &end)| end > slice.start)
            .map(|(&start, &end)| (start, end))
            .collect();
        for (start, end) in touched {
            self.runs.remove(&start);
            if start < slice.start {
                self.runs.insert(start, slice.start);
            }
            if slice.end < end {
                self.runs.insert(slice.end, end);
            }
        }
    }

    /// The ranges, in order.
    pub fn runs(&self) -> impl Iterator<Item = Slice> {
        self.runs.iter().map(|(&start, &end)| Slice { start, end })
    }

    /// End of the unbroken run that holds `offset`; `offset` itself when that byte has not arrived.
    pub fn reach(&self, offset: u64) -> u64 {
        self.runs
            .range(..=offset)
            .next_back()
            .map_or(offset, |(_, &end)| end.max(offset))
    }

    /// Whether all of `slice` has arrived.
    pub fn holds(&self, slice: Slice) -> bool {
        slice.start >= slice.end || self.reach(slice.start) >= slice.end
    }

    /// The parts of `within` that have not arrived, in order.
    pub fn gaps(&self, within: Slice) -> Vec<Slice> {
        let mut gaps = Vec::new();
        let mut at = self.reach(within.start);
        while at < within.end {
            let next = self
                .runs
                .range(at..)
                .next()
                .map_or((within.end, within.end), |(&s, &e)| (s, e));
            gaps.push(Slice {
                start: at,
                end: next.0.min(within.end),
            });
            at = next.1;
        }
        gaps
    }

    /// How many bytes have arrived.
    pub fn total(&self) -> u64 {
        self.runs.iter().map(|(start, end)| end - start).sum()
    }
}

/// The range of piece number `index` in a blob of `size` bytes.
pub fn piece(index: u64, size: u64) -> Slice {
    let start = index.saturating_mul(PIECE).min(size);
    Slice {
        start,
        end: start.saturating_add(PIECE).min(size),
    }
}

/// The numbers of the pieces that `slice` touches.
pub fn pieces_of(slice: Slice) -> std::ops::Range<u64> {
    if slice.start >= slice.end {
        0..0
    } else {
        slice.start / PIECE..(slice.end - 1) / PIECE + 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slice(start: u64, end: u64) -> Slice {
        Slice { start, end }
    }

    fn index(at: u64) -> usize {
        usize::try_from(at).unwrap()
    }

    #[test]
    fn touching_runs_join() {
        let mut map = PieceMap::new();
        map.insert(slice(0, 10));
        map.insert(slice(20, 30));
        map.insert(slice(10, 20));
        assert_eq!(map.reach(0), 30);
        assert_eq!(map.total(), 30);
    }

    #[test]
    fn gaps_are_what_is_missing() {
        let mut map = PieceMap::new();
        map.insert(slice(5, 10));
        map.insert(slice(20, 25));
        assert_eq!(
            map.gaps(slice(0, 30)),
            [slice(0, 5), slice(10, 20), slice(25, 30)]
        );
        assert_eq!(map.gaps(slice(6, 9)), []);
        assert_eq!(map.gaps(slice(8, 22)), [slice(10, 20)]);
    }

    #[test]
    fn pieces_cover_the_blob() {
        assert_eq!(pieces_of(slice(0, 0)), 0..0);
        assert_eq!(pieces_of(slice(0, PIECE)), 0..1);
        assert_eq!(pieces_of(slice(PIECE - 1, PIECE + 1)), 0..2);
        assert_eq!(piece(1, PIECE + 7), slice(PIECE, PIECE + 7));
        assert_eq!(piece(9, PIECE), slice(PIECE, PIECE));
    }

    proptest! {
        /// The map says of each byte what a plain array of flags says.
        #[test]
        fn agrees_with_flags(changes in prop::collection::vec((0u64..200, 0u64..60, 0u8..4), 0..30), from in 0u64..260, length in 0u64..80) {
            let mut map = PieceMap::new();
            let mut flags = [false; 400];
            for (start, length, kind) in changes {
                let part = slice(start, start + length);
                if kind == 0 {
                    map.remove(part);
                } else {
                    map.insert(part);
                }
                (start..start + length).for_each(|at| flags[index(at)] = kind != 0);
            }
            for run in map.runs() {
                prop_assert!(run.start < run.end && !flags[index(run.end)]);
            }
            let reach = (from..400).find(|&at| !flags[index(at)]).unwrap_or(400);
            prop_assert_eq!(map.reach(from), reach);
            prop_assert_eq!(index(map.total()), flags.iter().filter(|&&set| set).count());
            let mut missing = vec![];
            for gap in map.gaps(slice(from, from + length)) {
                prop_assert!(gap.start < gap.end);
                missing.extend(gap.start..gap.end);
            }
            let expected: Vec<u64> = (from..from + length).filter(|&at| !flags[index(at)]).collect();
            prop_assert_eq!(missing, expected);
        }
    }
}
