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

    /// The moment that RFC 3339 writes so, in whole seconds; `None` when it is none, or before 1970.
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        let (date, rest) = text.trim().split_once(['T', 't', ' '])?;
        let (time, offset) = if let Some(time) = rest.strip_suffix(['Z', 'z']) {
            (time, 0)
        } else {
            let (time, offset) = rest.split_at_checked(rest.rfind(['+', '-'])?)?;
            (time, offset_minutes(offset)?)
        };
        let (time, _fraction) = time.split_once('.').unwrap_or((time, ""));
        let [year, month, day] = numbers(date, '-')?;
        let [hour, minute, second] = numbers(time, ':')?;
        let possible = (1..=12).contains(&month) && (1..=31).contains(&day);
        if !possible || hour > 23 || minute > 59 || second > 60 {
            return None;
        }
        let of_day = hour * 3600 + (minute - offset) * 60 + second;
        let seconds = day_number(year, month, day) * 86_400 + of_day;
        (seconds >= 0).then_some(Self(seconds * 1000))
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

/// `+02:00` in minutes.
fn offset_minutes(text: &str) -> Option<i64> {
    let (sign, text) = match text.strip_prefix('-') {
        Some(text) => (-1, text),
        None => (1, text.strip_prefix('+')?),
    };
    let [hours, minutes] = numbers(text, ':')?;
    (hours < 24 && minutes < 60).then_some(sign * (hours * 60 + minutes))
}

/// Exactly so many numbers of at most four digits.
fn numbers<const N: usize>(text: &str, between: char) -> Option<[i64; N]> {
    let number = |part: &str| {
        let digits =
            !part.is_empty() && part.len() <= 4 && part.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| part.parse().ok()).flatten()
    };
    let parts: Option<Vec<i64>> = text.split(between).map(number).collect();
    parts?.try_into().ok()
}

/// The inverse of [`civil`].
fn day_number(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let from_march = (month + 9) % 12;
    let of_year = (153 * from_march + 2) / 5 + day - 1;
    let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
    era * 146_097 + of_era - 719_468
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

    #[test]
    fn rfc3339_is_read_as_it_is_written() {
        for text in [
            "1970-01-01T00:00:00Z",
            "2000-02-29T23:59:59Z",
            "2026-08-21T00:00:00Z",
            "2100-03-01T12:30:05Z",
        ] {
            let read = Timestamp::parse_rfc3339(text).unwrap();
            assert_eq!(read.rfc3339(), text);
        }
        let same = Timestamp::parse_rfc3339("2026-08-21T10:00:00Z");
        for text in [
            "2026-08-21T12:00:00+02:00",
            "2026-08-21t04:30:00.999-05:30",
            " 2026-08-21 10:00:00z ",
        ] {
            assert_eq!(Timestamp::parse_rfc3339(text), same, "{text}");
        }
        for text in [
            "",
            "now",
            "2026-08-21",
            "2026-08-21T10:00:00",
            "2026-13-01T00:00:00Z",
            "2026-08-21T25:00:00Z",
            "2026-08-21T10:00Z",
            "+026-08-21T10:00:00Z",
            "2026-08-21T10:00:00+99:00",
            "0001-01-01T00:00:00Z",
            "20260-08-21T10:00:00Z",
            "2026-08-21T10:00:00+é",
        ] {
            assert_eq!(Timestamp::parse_rfc3339(text), None, "{text}");
        }
    }
}
