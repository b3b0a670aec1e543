//! How often a broken blob is asked for again, and after what pause. Pure: the stream tells what happened, and is told what to do.
//!
//! Tries count only while no byte comes. Two things are counted besides: answers that bring next to nothing, which would otherwise be asked
//! for without end, and whether a place broke off before.

use std::time::Duration;

/// Tries in a row that may bring no byte.
const TRIES: u32 = 5;

/// Tries in a row from the beginning, after those for the rest: as many, at least, and one for each place.
const LAST_TRIES: u32 = 2;

/// Tries in a row that may bring no byte where the upstream names times to come back, each longer than [`LONG`].
const TOLD_TRIES: u32 = 2;

/// A wait that clients notice.
const LONG: Duration = Duration::from_secs(5);

/// Answers that bring less than this hardly help: 16 KiB.
const SLIGHT: u64 = 16 << 10;

/// Such answers in a row that are put up with.
const SLIGHT_TRIES: u32 = 8;

/// No longer than this many tries' pause lies between such answers.
const SLIGHT_PAUSE: u32 = 5;

/// Longest wait between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What a stream has put up with so far.
#[derive(Debug)]
pub(super) struct Patience {
    /// Failures in a row since the last byte, and how many are too many.
    failures: u32,
    tries: u32,
    /// Refusals in a row.
    refusals: u32,
    /// The question that is left when others were asked in vain, until an answer helps.
    last: bool,
    /// Failures in a row since an answer that helped, and what the present one has brought.
    slight: u32,
    came: u64,
    /// This place broke off before.
    broke_here: bool,
}

/// How a try failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// The answer was fine as long as it came.
    BrokeOff,
    /// It was a plain no.
    Refused,
    /// There was none, or none that could be used.
    Unanswered,
}

/// Who is asked next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whom {
    /// The same: it may have had an accident.
    Same,
    Next,
}

impl Patience {
    pub(super) const fn new() -> Self {
        Self {
            failures: 0,
            tries: TRIES,
            refusals: 0,
            last: false,
            slight: 0,
            came: 0,
            broke_here: false,
        }
    }

    /// So many bytes came.
    pub(super) fn note(&mut self, bytes: u64) {
        self.came += bytes;
        (self.failures, self.tries) = (0, TRIES);
        self.refusals = 0;
        if self.came >= SLIGHT {
            self.last = false;
        }
    }

    /// Counts a failed try, and says who may do better.
    pub(super) fn fail(&mut self, how: Failed) -> Whom {
        self.failures += 1;
        self.refusals = match how {
            Failed::Refused => self.refusals + 1,
            Failed::BrokeOff | Failed::Unanswered => 0,
        };
        let helped = std::mem::take(&mut self.came) >= SLIGHT;
        self.slight = if helped { 1 } else { self.slight + 1 };
        if how == Failed::BrokeOff && !self.broke_here {
            self.broke_here = true;
            return Whom::Same;
        }
        self.broke_here = false;
        Whom::Next
    }

    /// Failures in a row since the last byte.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether the same question was asked often enough.
    pub(super) fn is_over(&self) -> bool {
        self.failures > self.tries || self.slight > SLIGHT_TRIES
    }

    /// Whether it was a plain no twice in a row: once may be an accident, or a matter of how it was asked.
    pub(super) fn is_refused(&self) -> bool {
        self.refusals > 1
    }

    /// Whether there is no other question to ask.
    pub(super) fn is_at_its_last(&self) -> bool {
        self.last
    }

    /// Whether another question should be asked, given when the upstream wants to be asked again.
    pub(super) fn wears_thin(&self, retry_after: Option<Duration>) -> bool {
        let told = retry_after.is_some_and(|wait| wait > LONG);
        self.is_over() || (told && self.failures > TOLD_TRIES)
    }

    /// Another question is asked from now on, the last one, of one of so many places.
    pub(super) fn begin_again(&mut self, places: usize) {
        (self.failures, self.slight) = (1, 1);
        (self.refusals, self.last) = (1, true);
        self.tries = LAST_TRIES.max(u32::try_from(places).unwrap_or(u32::MAX));
    }

    /// How long to wait before the next try.
    pub(super) fn pause(&self, retry_after: Option<Duration>) -> Duration {
        pause(
            self.failures.max(self.slight.min(SLIGHT_PAUSE)),
            retry_after,
        )
    }
}

/// How long to wait before try number `failures` without progress: none before the first, then doubling from 100 ms.
pub(super) fn pause(failures: u32, retry_after: Option<Duration>) -> Duration {
    let doubling = match failures {
        0 | 1 => Duration::ZERO,
        more => Duration::from_millis(100 << more.min(8)),
    };
    doubling
        .max(retry_after.unwrap_or_default())
        .min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_first_try_does_not_wait() {
        assert_eq!(pause(1, None), Duration::ZERO);
        assert!(pause(2, None) > pause(1, None));
        assert_eq!(
            pause(1, Some(Duration::from_secs(2))),
            Duration::from_secs(2)
        );
        assert_eq!(pause(5, Some(Duration::from_mins(15))), LONGEST_PAUSE);
    }

    #[test]
    fn tries_count_while_nothing_comes() {
        let mut patience = Patience::new();
        for _ in 0..100 {
            patience.note(MIB);
            patience.fail(Failed::BrokeOff);
            assert!(!patience.is_over());
            assert_eq!(patience.pause(None), Duration::ZERO);
        }
        for _ in 1..TRIES {
            patience.fail(Failed::Unanswered);
            assert!(!patience.is_over());
        }
        patience.fail(Failed::Unanswered);
        assert!(patience.is_over());
    }

    #[test]
    fn who_brings_next_to_nothing_is_not_asked_without_end() {
        let mut patience = Patience::new();
        let mut answers = 0;
        while !patience.is_over() {
            patience.note(1);
            patience.fail(Failed::BrokeOff);
            answers += 1;
        }
        assert_eq!(answers, SLIGHT_TRIES + 1);
        assert_eq!(patience.pause(None), pause(SLIGHT_PAUSE, None));
    }

    #[test]
    fn next_to_nothing_buys_no_other_last_question() {
        let mut patience = Patience::new();
        patience.begin_again(1);
        patience.note(SLIGHT - 1);
        assert!(patience.is_at_its_last());
        patience.note(1);
        assert!(!patience.is_at_its_last());
    }

    #[test]
    fn a_place_may_break_off_once() {
        let mut patience = Patience::new();
        assert_eq!(patience.fail(Failed::BrokeOff), Whom::Same);
        assert_eq!(patience.fail(Failed::BrokeOff), Whom::Next);
        assert_eq!(patience.fail(Failed::BrokeOff), Whom::Same, "another place");
        assert_eq!(patience.fail(Failed::Unanswered), Whom::Next);
        assert_eq!(patience.fail(Failed::Unanswered), Whom::Next);
    }

    #[test]
    fn a_plain_no_counts_the_second_time() {
        let mut patience = Patience::new();
        patience.fail(Failed::BrokeOff);
        patience.fail(Failed::Refused);
        assert!(!patience.is_refused());
        patience.note(1);
        patience.fail(Failed::Refused);
        assert!(!patience.is_refused(), "bytes came in between");
        patience.fail(Failed::Refused);
        assert!(patience.is_refused());
    }

    #[test]
    fn long_waits_wear_it_thin() {
        let mut patience = Patience::new();
        let long = Some(Duration::from_secs(20));
        for thin in [false, false, true] {
            patience.fail(Failed::Unanswered);
            assert_eq!(patience.wears_thin(long), thin);
            assert!(!patience.wears_thin(Some(Duration::from_secs(1))));
        }
    }

    #[test]
    fn the_last_question_is_asked_of_every_place() {
        for (places, tries) in [(1, 2), (2, 2), (5, 5)] {
            let mut patience = Patience::new();
            while !patience.is_over() {
                patience.fail(Failed::Unanswered);
            }
            patience.begin_again(places);
            assert_eq!(patience.pause(None), Duration::ZERO);
            let asked = (1..).take_while(|_| {
                let asked = !patience.is_over();
                patience.fail(Failed::Unanswered);
                asked
            });
            assert_eq!(asked.count(), tries);
        }
    }
}
