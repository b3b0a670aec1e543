//! Whether and when to try again.
//!
//! The decision is a function of what failed, how often, and the time left; `mod.rs` does the waiting. A body that broke off is no
//! matter of this file: whoever collects it asks for the rest.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Duration;

use super::error::{Failure, Fault};

/// Most times one request is tried.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// The longest `Retry-After` of a failing upstream that is waited for while the client waits.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same for a rate limit: containers start late, but not that late.
pub(super) const RATE_PATIENCE: Duration = Duration::from_secs(2);

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Report it.
    GiveUp,
    /// Try once more after this pause.
    Again(Duration),
}

/// The tries of one request so far.
#[derive(Debug)]
pub(super) struct Tries {
    made: u32,
    rate_limited: u32,
    jitter: Jitter,
}

/// Fractions that differ between processes and requests, so that a herd does not come back in step (not for secrets).
#[derive(Debug)]
pub(super) struct Jitter(u64);

impl Tries {
    pub(super) fn new() -> Self {
        Self {
            made: 0,
            rate_limited: 0,
            jitter: Jitter::new(),
        }
    }

    /// Records `failure` and says what to do, with `left` until the request's deadline.
    pub(super) fn after(&mut self, failure: &Failure, left: Duration) -> Decision {
        self.made += 1;
        if let Fault::RateLimited { retry_after } = failure.fault {
            self.rate_limited += 1;
            return rate_limited(self.rate_limited, retry_after, left);
        }
        let fraction = self.jitter.next();
        failed(self.made, failure, left, fraction)
    }
}

impl Jitter {
    pub(super) fn new() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }

    /// The next number in 0..1024 (splitmix64).
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((mixed ^ (mixed >> 31)) >> 54).unwrap_or(0)
    }
}

/// One more try, if the wait is short. Any other answer would cost the client more than asking again itself.
fn rate_limited(times: u32, retry_after: Duration, left: Duration) -> Decision {
    if times > 1 || retry_after > RATE_PATIENCE || retry_after >= left {
        return Decision::GiveUp;
    }
    Decision::Again(retry_after)
}

/// Full jitter: any pause between nothing and twice the last limit. `fraction` is in 1024ths.
fn failed(made: u32, failure: &Failure, left: Duration, fraction: u32) -> Decision {
    if made >= TRIES || !is_passing(&failure.fault) {
        return Decision::GiveUp;
    }
    let pause = match failure.retry_after {
        Some(asked) if asked > PATIENCE => return Decision::GiveUp,
        Some(asked) => asked,
        None => {
            let limit = FIRST_PAUSE * 2_u32.saturating_pow(made);
            limit.min(LONGEST_PAUSE) * fraction / 1024
        }
    };
    if pause >= left {
        return Decision::GiveUp;
    }
    Decision::Again(pause)
}

/// Whether the same request may well succeed in a moment.
fn is_passing(fault: &Fault) -> bool {
    match fault {
        Fault::Connect(_) | Fault::Broken(_) => true,
        Fault::Status(status) => matches!(status, 408 | 500 | 502 | 503 | 504 | 522),
        Fault::Late
        | Fault::Stalled
        | Fault::RateLimited { .. }
        | Fault::BreakerOpen { .. }
        | Fault::Denied { .. }
        | Fault::NotFound { .. }
        | Fault::RangeRefused
        | Fault::Expired
        | Fault::BadRedirect(_)
        | Fault::Forbidden(_)
        | Fault::TokenFailed(_)
        | Fault::TooLarge
        | Fault::Encoded(_)
        | Fault::Offline => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Decision, Failure, Fault, Jitter, Tries, failed, rate_limited};

    const LEFT: Duration = Duration::from_secs(20);

    fn failure(fault: Fault, retry_after: Option<u64>) -> Failure {
        Failure {
            fault,
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    #[test]
    fn what_is_tried_again() {
        for (fault, again) in [
            (Fault::Connect("refused".into()), true),
            (Fault::Broken("reset".into()), true),
            (Fault::Status(500), true),
            (Fault::Status(503), true),
            (Fault::Status(522), true),
            (Fault::Status(408), true),
            (Fault::Status(501), false),
            (Fault::Status(418), false),
            (Fault::Late, false),
            (Fault::NotFound { code: None }, false),
            (Fault::Forbidden("no".into()), false),
            (Fault::TokenFailed("no".into()), false),
        ] {
            let decision = failed(1, &failure(fault.clone(), None), LEFT, 512);
            assert_eq!(decision != Decision::GiveUp, again, "{fault:?}");
        }
    }

    #[test]
    fn pauses_grow_and_keep_to_the_time_left() {
        let reset = failure(Fault::Broken("reset".into()), None);
        assert_eq!(
            failed(1, &reset, LEFT, 512),
            Decision::Again(Duration::from_millis(100))
        );
        assert_eq!(
            failed(2, &reset, LEFT, 512),
            Decision::Again(Duration::from_millis(200))
        );
        assert_eq!(failed(1, &reset, LEFT, 0), Decision::Again(Duration::ZERO));
        assert_eq!(failed(3, &reset, LEFT, 512), Decision::GiveUp);
        assert_eq!(
            failed(2, &reset, Duration::from_millis(150), 512),
            Decision::GiveUp
        );
    }

    #[test]
    fn retry_after_is_obeyed_up_to_five_seconds() {
        let asked = |seconds| failure(Fault::Status(503), Some(seconds));
        assert_eq!(
            failed(1, &asked(5), LEFT, 0),
            Decision::Again(Duration::from_secs(5))
        );
        assert_eq!(failed(1, &asked(6), LEFT, 0), Decision::GiveUp);
        assert_eq!(
            failed(1, &asked(5), Duration::from_secs(5), 0),
            Decision::GiveUp
        );
    }

    #[test]
    fn a_rate_limit_is_waited_for_once_and_briefly() {
        let second = Duration::from_secs(1);
        assert_eq!(rate_limited(1, second, LEFT), Decision::Again(second));
        assert_eq!(rate_limited(2, second, LEFT), Decision::GiveUp);
        assert_eq!(rate_limited(1, 3 * second, LEFT), Decision::GiveUp);
        assert_eq!(rate_limited(1, second, second), Decision::GiveUp);
    }

    #[test]
    fn three_tries_and_no_more() {
        let mut tries = Tries::new();
        let reset = failure(Fault::Broken("reset".into()), None);
        assert_ne!(tries.after(&reset, LEFT), Decision::GiveUp);
        assert_ne!(tries.after(&reset, LEFT), Decision::GiveUp);
        assert_eq!(tries.after(&reset, LEFT), Decision::GiveUp);
    }

    #[test]
    fn jitter_spreads_within_its_bounds() {
        let mut jitter = Jitter::new();
        let drawn: Vec<u32> = (0..200).map(|_| jitter.next()).collect();
        assert!(drawn.iter().all(|&n| n < 1024));
        let mut distinct = drawn.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() > 50, "{drawn:?}");
    }
}
