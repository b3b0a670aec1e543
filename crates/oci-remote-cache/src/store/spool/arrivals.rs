//! What of a blob has arrived, and who writes what: each byte is written once, by one writer.
//!
//! A range may be on its way twice, where one connection took over from another. Bytes that have arrived may be hashed already, sent, or
//! published: were they written again, the file could hold others than were verified.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci::Slice;

use crate::store::pieces::{PieceMap, piece, pieces_of};

/// The bytes of one spool.
#[derive(Debug)]
pub(super) struct Arrivals {
    state: Mutex<State>,
    /// Rung when something was written, or could not be.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    here: PieceMap,
    /// Left by an earlier transfer, and perhaps right: nobody's to write or to read until that is known.
    unsure: PieceMap,
    /// Being written: disjoint, and none of it is here.
    writing: Vec<Slice>,
    /// Nobody begins to write any more.
    closed: bool,
}

impl Arrivals {
    /// Nothing is here to begin with; so much may turn out to be.
    pub(super) fn new(unsure: PieceMap) -> Self {
        Self {
            state: Mutex::new(State {
                here: PieceMap::new(),
                unsure,
                writing: Vec::new(),
                closed: false,
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn reach(&self, offset: u64) -> u64 {
        self.state().here.reach(offset)
    }

    /// What of `within` must come from elsewhere.
    pub(super) fn gaps(&self, within: Slice) -> Vec<Slice> {
        self.state().free(&[], within)
    }

    /// How much is here, with what may turn out to be.
    pub(super) fn total(&self) -> u64 {
        let state = self.state();
        state.here.total() + state.unsure.total()
    }

    /// What was left is right: it is here. Says whether anyone still wants to know.
    pub(super) fn found_right(&self, part: Slice) -> bool {
        let mut state = self.state();
        if state.closed {
            return false;
        }
        state.unsure.remove(part);
        state.here.insert(part);
        drop(state);
        self.changed.notify_all();
        true
    }

    /// What was left is wrong: it is as if it had never come. Says whether anyone still wants to know.
    pub(super) fn found_wrong(&self, part: Slice) -> bool {
        let mut state = self.state();
        state.unsure.remove(part);
        !state.closed
    }

    /// Lets nobody begin to write any more, nor look at what was left. Waits for nobody.
    pub(super) fn give_up(&self) {
        self.state().closed = true;
    }

    /// The parts of `within` that are nobody's yet. They are the caller's to write, until it counts them or lets them go.
    pub(super) fn claim(&self, within: Slice) -> Vec<Slice> {
        let mut state = self.state();
        if state.closed {
            return Vec::new();
        }
        let free = state.free(&state.writing, within);
        state.writing.extend(&free);
        free
    }

    /// Counts what was claimed and is written. Of the pieces that it touches, in a blob of `size` bytes, returns those that are whole now.
    pub(super) fn count(&self, claimed: &[Slice], size: Option<u64>) -> Vec<(u64, Slice)> {
        let mut state = self.state();
        state.end(claimed);
        for slice in claimed {
            state.here.insert(*slice);
        }
        let whole = size.map_or_else(Vec::new, |size| state.whole(claimed, size));
        drop(state);
        self.changed.notify_all();
        whole
    }

    /// Gives back what was claimed and could not be written.
    pub(super) fn let_go(&self, claimed: &[Slice]) {
        self.state().end(claimed);
        self.changed.notify_all();
    }

    /// Lets nobody begin to write any more, and waits for those who are writing.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        let still = |state: &mut State| !state.writing.is_empty();
        let written = self.changed.wait_while(state, still);
        drop(written.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until more than the first `position` bytes are here without a gap, at most for `limit`; says whether they are.
    pub(super) fn wait_beyond(&self, position: u64, limit: Duration) -> bool {
        let still = |state: &mut State| state.here.reach(0) <= position;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), limit, still)
            .unwrap_or_else(PoisonError::into_inner);
        state.here.reach(0) > position
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What of `within` is neither here, perhaps or surely, nor in one of `taken`.
    fn free(&self, taken: &[Slice], within: Slice) -> Vec<Slice> {
        let mut unsure = self.unsure.runs().peekable();
        if taken.is_empty() && unsure.peek().is_none() {
            return self.here.gaps(within);
        }
        let mut not_free = self.here.clone();
        for slice in taken.iter().copied().chain(unsure) {
            not_free.insert(slice);
        }
        not_free.gaps(within)
    }

    fn end(&mut self, claimed: &[Slice]) {
        self.writing.retain(|slice| !claimed.contains(slice));
    }

    fn whole(&self, written: &[Slice], size: u64) -> Vec<(u64, Slice)> {
        let touched = written.iter().flat_map(|slice| pieces_of(*slice));
        let mut whole: Vec<_> = touched
            .map(|index| (index, piece(index, size)))
            .filter(|&(_, part)| self.here.holds(part))
            .collect();
        whole.dedup();
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(start: u64, end: u64) -> Slice {
        Slice { start, end }
    }

    #[test]
    fn what_is_written_or_here_is_nobody_elses() {
        let arrivals = Arrivals::new(PieceMap::new());
        let first = arrivals.claim(slice(10, 20));
        assert_eq!(first, [slice(10, 20)]);
        let second = arrivals.claim(slice(0, 30));
        assert_eq!(second, [slice(0, 10), slice(20, 30)]);
        assert_eq!(arrivals.reach(0), 0, "claimed is not here");
        arrivals.let_go(&first);
        assert_eq!(arrivals.claim(slice(5, 15)), [slice(10, 15)]);
        arrivals.count(&second, None);
        assert_eq!(arrivals.gaps(slice(0, 30)), [slice(10, 20)]);
        assert_eq!(arrivals.claim(slice(0, 30)), [slice(15, 20)]);
    }

    #[test]
    fn what_is_unsure_is_neither_here_nor_missing() {
        let mut left = PieceMap::new();
        left.insert(slice(0, 20));
        let arrivals = Arrivals::new(left);
        assert_eq!((arrivals.reach(0), arrivals.total()), (0, 20));
        assert_eq!(arrivals.gaps(slice(0, 30)), [slice(20, 30)]);
        assert_eq!(arrivals.claim(slice(5, 25)), [slice(20, 25)]);
        assert!(arrivals.found_right(slice(0, 10)));
        assert!(arrivals.found_wrong(slice(10, 20)));
        assert_eq!((arrivals.reach(0), arrivals.total()), (10, 10));
        assert_eq!(arrivals.gaps(slice(0, 30)), [slice(10, 30)]);
        assert_eq!(arrivals.claim(slice(0, 30)), [slice(10, 20), slice(25, 30)]);
        arrivals.give_up();
        assert!(!arrivals.found_right(slice(40, 50)));
        assert_eq!(arrivals.reach(40), 40);
    }

    #[test]
    fn closing_waits_for_who_writes() {
        let arrivals = Arrivals::new(PieceMap::new());
        let claimed = arrivals.claim(slice(0, 8));
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| arrivals.close());
            while !arrivals.claim(slice(8, 9)).is_empty() {
                arrivals.let_go(&[slice(8, 9)]);
            }
            assert!(!closing.is_finished(), "it did not wait");
            arrivals.count(&claimed, None);
        });
        assert_eq!(arrivals.claim(slice(8, 16)), []);
        assert_eq!(arrivals.total(), 8);
    }
}
