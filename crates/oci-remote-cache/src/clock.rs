//! Wall-clock time for what is written down (tag ages, last use), movable in tests.
//!
//! Waits and token lifetimes use tokio's monotonic `Instant` instead: the wall clock may be set back at any moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How far a clock is set back in passing, by a time service that corrects it.
const CORRECTION_MS: i64 = 5000;

/// A moment in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

/// Tells the time. Clones share one setting.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    moved_ms: Arc<AtomicI64>,
}

impl Clock {
    /// The system's clock.
    pub fn system() -> Self {
        Self::default()
    }

    /// Now.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where the wall clock is read"
    )]
    pub fn now(&self) -> Timestamp {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let millis = i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX);
        Timestamp(millis.saturating_add(self.moved_ms.load(Ordering::Relaxed)))
    }

    /// Moves this clock and all its clones back, for tests.
    pub fn set_back(&self, by: Duration) {
        let millis = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.moved_ms.fetch_sub(millis, Ordering::Relaxed);
    }

    /// Moves this clock and all its clones forward, for tests.
    pub fn advance(&self, by: Duration) {
        let millis = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.moved_ms.fetch_add(millis, Ordering::Relaxed);
    }
}

impl Timestamp {
    /// How long before `now` this was; zero when it lies in the future (the clock was set back).
    pub fn age(self, now: Timestamp) -> Duration {
        Duration::from_millis(u64::try_from(now.0.saturating_sub(self.0)).unwrap_or(0))
    }

    /// The age to judge by: what lies further ahead of `now` than clocks are usually corrected by was written down under a clock that
    /// has been set back since. How old it is nobody knows, so it is older than anything.
    pub fn counted_age(self, now: Timestamp) -> Duration {
        if self.0 > now.0.saturating_add(CORRECTION_MS) {
            return Duration::MAX;
        }
        self.age(now)
    }

    /// Seconds since the epoch.
    pub fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// As RFC 3339 writes it, in UTC and whole seconds: `2026-08-21T00:00:00Z`.
    pub fn rfc3339(self) -> String {
        let (days, second) = (
            self.seconds().div_euclid(86_400),
            self.seconds().rem_euclid(86_400),
        );
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar. Years are counted from March, so that the leap day
/// is the last of its year; 400 of them have 146 097 days.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Timestamp;

    #[test]
    fn what_lies_ahead_is_of_no_known_age() {
        let now = Timestamp(1_000_000);
        for (then, age, counted) in [
            (990_000, 10, Duration::from_secs(10)),
            (1_005_000, 0, Duration::ZERO),
            (1_005_001, 0, Duration::MAX),
        ] {
            assert_eq!(Timestamp(then).age(now), Duration::from_secs(age));
            assert_eq!(Timestamp(then).counted_age(now), counted);
        }
    }

    #[test]
    fn moments_as_people_write_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_787_270_400, "2026-08-21T00:00:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(Timestamp(seconds * 1000).rfc3339(), text);
        }
    }
}
