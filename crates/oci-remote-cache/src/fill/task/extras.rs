//! Whether an upstream takes connections beside the one that brings the blob.

use std::time::Duration;

use tokio::time::Instant;

use crate::upstream::UpstreamError;

/// How long an upstream is left alone that had no time for an extra connection; twice that after the next, and so on.
const REST: Duration = Duration::from_millis(500);

/// The longest rest is this many times doubled: about two minutes.
const DOUBLINGS: u32 = 8;

/// The rest after a range was refused by an upstream that has given others begins with so many doublings: 2 seconds.
const REFUSED: u32 = 2;

/// What an upstream has shown of itself to extra connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extras {
    Welcome,
    /// It had no time for the last ones, so many times in a row.
    Resting {
        until: Instant,
        times: u32,
    },
    /// It refuses them, or does not answer with the range that was asked for.
    Unwelcome,
}

/// Whether an upstream has answered any extra connection of this transfer with its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Clean,
    HasGiven,
}

/// How an extra connection was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TurnedAway {
    /// Not now; perhaps the upstream says when.
    Busy(Option<Duration>),
    Refused,
}

/// What there was in place of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InPlace {
    /// An answer that is not of that range.
    Unfit,
    /// An error, or nothing.
    Failure,
}

impl TurnedAway {
    pub(super) fn by(error: &UpstreamError, in_place: InPlace) -> Self {
        match in_place {
            InPlace::Failure if error.is_outage() => Self::Busy(error.retry_after()),
            InPlace::Failure | InPlace::Unfit => Self::Refused,
        }
    }
}

impl Extras {
    pub(super) fn are_welcome(self, now: Instant) -> bool {
        match self {
            Self::Welcome => true,
            Self::Resting { until, .. } => until <= now,
            Self::Unwelcome => false,
        }
    }

    /// Whether the upstream had no time for the last one that was tried.
    pub(super) fn rest(self) -> bool {
        matches!(self, Self::Resting { .. })
    }

    /// After one was turned away. Who has no time now may have some later, at longer and longer intervals; so may who has given ranges
    /// before, whatever it says now.
    pub(super) fn after(self, turned: TurnedAway, record: Record, now: Instant) -> Self {
        let times = match self {
            Self::Unwelcome => return self,
            // Several that were tried at once count once.
            Self::Resting { until, times } if now < until => times,
            Self::Resting { times, .. } => times + 1,
            Self::Welcome => 0,
        };
        let (times, asked) = match (turned, record) {
            (TurnedAway::Busy(asked), _) => (times, asked.unwrap_or_default()),
            (TurnedAway::Refused, Record::HasGiven) => (times.max(REFUSED), Duration::ZERO),
            (TurnedAway::Refused, Record::Clean) => return Self::Unwelcome,
        };
        let rest = REST * 2_u32.saturating_pow(times.min(DOUBLINGS));
        let until = now + rest.max(asked);
        Self::Resting { until, times }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE: TurnedAway = TurnedAway::Busy(None);
    const SECOND: Duration = Duration::from_secs(1);

    fn rest(extras: Extras, now: Instant) -> Option<Duration> {
        match extras {
            Extras::Resting { until, .. } => Some(until - now),
            Extras::Welcome | Extras::Unwelcome => None,
        }
    }

    #[test]
    fn who_came_too_late_rests_longer_and_longer() {
        let mut now = Instant::now();
        let mut extras = Extras::Welcome;
        for halves in [1, 2, 4, 8, 16] {
            extras = extras.after(LATE, Record::Clean, now);
            assert_eq!(rest(extras, now), Some(REST * halves));
            assert!(!extras.are_welcome(now));
            now += REST * halves;
            assert!(extras.are_welcome(now));
        }
    }

    #[test]
    fn several_at_once_count_once() {
        let now = Instant::now();
        let first = Extras::Welcome.after(LATE, Record::HasGiven, now);
        let third = first
            .after(LATE, Record::HasGiven, now)
            .after(LATE, Record::HasGiven, now);
        assert_eq!(rest(third, now), Some(REST));
    }

    #[test]
    fn a_refusal_is_final_where_nothing_was_given() {
        let now = Instant::now();
        let never = Extras::Welcome.after(TurnedAway::Refused, Record::Clean, now);
        assert_eq!(never, Extras::Unwelcome);
        assert!(!never.are_welcome(now + 1000 * SECOND));
        let later = Extras::Welcome.after(TurnedAway::Refused, Record::HasGiven, now);
        assert_eq!(rest(later, now), Some(2 * SECOND));
    }

    #[test]
    fn what_the_upstream_asks_for_is_kept_to() {
        let now = Instant::now();
        let busy = TurnedAway::Busy(Some(20 * SECOND));
        let resting = Extras::Welcome.after(busy, Record::HasGiven, now);
        assert_eq!(rest(resting, now), Some(20 * SECOND));
    }
}
