//! Rate limits: what `Retry-After` says, and the gate that keeps every request away until the time has come.
//!
//! A gate belongs to one place with its one credential; all requests to it share it, so that a 429 is asked for once. Token endpoints
//! have theirs, for each credential shown there. What is left before that is `meter.rs`'s.

use std::sync::Mutex;
use std::time::Duration;

use quick_cache::sync::Cache as Memory;
use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::names::CredentialId;

/// How long a gate stays closed when a 429 does not say (or not readably).
pub(super) const UNSAID: Duration = Duration::from_secs(10);

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_mins(5);

/// Docker Hub has sent the moment itself, in Unix seconds, where a count of seconds belongs (hub-feedback 2459).
const EPOCH_FROM: i64 = 1_000_000_000;

/// Gates of token endpoints held at most.
const GATES: usize = 1024;

/// Closed until a moment. Starts open.
#[derive(Debug, Default)]
pub(super) struct Gate {
    until: Mutex<Option<Instant>>,
}

impl Gate {
    /// How long the gate stays closed; nothing when it is open.
    pub(super) fn closed_for(&self, now: Instant) -> Option<Duration> {
        let until = *self.until.lock().ok()?;
        let left = until?.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// Closes the gate for `time`; never opens it earlier than another 429 said.
    pub(super) fn close(&self, time: Duration, now: Instant) {
        let until = now + time;
        if let Ok(mut held) = self.until.lock() {
            *held = Some(held.map_or(until, |held| held.max(until)));
        }
    }
}

/// The gates of token endpoints: what one login used up keeps no other out, nor those who show none.
#[derive(Debug)]
pub(super) struct RealmGates {
    until: Memory<(CredentialId, String), Instant>,
}

impl Default for RealmGates {
    fn default() -> Self {
        Self {
            until: Memory::new(GATES),
        }
    }
}

impl RealmGates {
    /// How long the endpoint stays closed to a credential; nothing when it is open.
    pub(super) fn closed_for(
        &self,
        whose: &(CredentialId, String),
        now: Instant,
    ) -> Option<Duration> {
        let left = self.until.get(whose)?.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// Closes it for `time`.
    pub(super) fn close(&self, whose: (CredentialId, String), time: Duration, now: Instant) {
        self.until.insert(whose, now + time);
    }
}

/// Reads `Retry-After`: seconds, an HTTP-date, or a Unix time. Kept between one second and five minutes.
pub(super) fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    let seconds = match value.parse::<i64>() {
        Ok(number) if number >= EPOCH_FROM => number.saturating_sub(now.seconds()),
        Ok(number) => number,
        Err(_not_a_number) => {
            let date = httpdate::parse_http_date(value).ok()?;
            let since = date.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
            i64::try_from(since).ok()?.saturating_sub(now.seconds())
        }
    };
    let wait = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    Some(wait.clamp(SHORTEST, LONGEST))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::{Gate, retry_after};
    use crate::clock::Timestamp;

    #[test]
    fn retry_after_in_all_forms() {
        // 2026-08-21 00:00:00 UTC
        let now = Timestamp(1_787_270_400_000);
        for (value, seconds) in [
            ("1", Some(1)),
            (" 120 ", Some(120)),
            ("0", Some(1)),
            ("-5", Some(1)),
            ("100000", Some(300)),
            ("1787270460", Some(60)),
            ("1787270300", Some(1)),
            ("Fri, 21 Aug 2026 00:02:00 GMT", Some(120)),
            ("Thu, 20 Aug 2026 00:02:00 GMT", Some(1)),
            ("Sat, 21 Aug 2027 00:02:00 GMT", Some(300)),
            ("99999999999999999999999", None),
            ("soon", None),
            ("", None),
        ] {
            let read = retry_after(value, now).map(|wait| wait.as_secs());
            assert_eq!(read, seconds, "{value:?}");
        }
    }

    #[test]
    fn a_gate_keeps_to_the_longest_wait() {
        let gate = Gate::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(gate.closed_for(start), None);
        gate.close(Duration::from_secs(10), start);
        gate.close(Duration::from_secs(2), start);
        assert_eq!(gate.closed_for(at(3)), Some(Duration::from_secs(7)));
        assert_eq!(gate.closed_for(at(10)), None);
    }
}
