//! Leaves a registry alone that fails every time, and looks once a second whether it is back.
//!
//! Only failures to answer count: connect errors, header timeouts, 5xx. A 4xx, a 429 or a bad body is an answer. Content hosts and
//! token endpoints are not judged here: the registry's manifests need neither to be up.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

const OPENS_AT: u32 = 5;
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Counts failures in a row. Starts closed.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// When open: from when on the next request may try.
    next_probe: Option<Instant>,
}

impl Breaker {
    /// Lets a request pass, or says how long to stay away. While open one request a second passes as a probe; a probe that never
    /// reports (its client left) blocks nothing, because the next second has its own.
    pub(super) fn enter(&self, now: Instant) -> Result<(), Duration> {
        let Ok(mut state) = self.state.lock() else {
            return Ok(());
        };
        let Some(next_probe) = state.next_probe else {
            return Ok(());
        };
        if now >= next_probe {
            state.next_probe = Some(now + PROBE_EVERY);
            return Ok(());
        }
        Err(next_probe - now)
    }

    /// The registry answered.
    pub(super) fn answered(&self) {
        if let Ok(mut state) = self.state.lock() {
            *state = State::default();
        }
    }

    /// The registry failed to answer.
    pub(super) fn failed(&self, now: Instant) {
        if let Ok(mut state) = self.state.lock() {
            state.failures = state.failures.saturating_add(1);
            if state.failures >= OPENS_AT {
                state.next_probe = Some(now + PROBE_EVERY);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::Breaker;

    #[test]
    fn opens_after_five_in_a_row_and_probes_each_second() {
        let breaker = Breaker::default();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        for _ in 0..4 {
            breaker.failed(start);
        }
        breaker.answered();
        for _ in 0..4 {
            breaker.failed(start);
        }
        assert_eq!(breaker.enter(start), Ok(()));
        breaker.failed(start);
        assert_eq!(breaker.enter(start), Err(second));

        let later = start + second;
        assert_eq!(breaker.enter(later), Ok(()), "one probe");
        assert!(breaker.enter(later).is_err(), "and no second one");
        breaker.failed(later);
        assert!(breaker.enter(later).is_err());

        let later = later + second;
        assert_eq!(breaker.enter(later), Ok(()));
        breaker.answered();
        assert_eq!(breaker.enter(later), Ok(()));
        assert_eq!(breaker.enter(later), Ok(()));
    }
}
