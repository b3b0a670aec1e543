//! Leaves a registry alone that fails every time, and looks once a second whether it is back.
//!
//! Only failures to answer count: connect errors, header timeouts, 5xx. A 4xx, a 429 or a bad body is an answer. Content hosts and
//! token endpoints are not judged here: the registry's manifests need neither to be up.
//!
//! That a registry cannot be reached is everybody's trouble. That it answers 5xx may have to do with who asks: what clients provoke
//! with a login of their own, or with none, closes it to that login or to strangers, and to nobody else.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use quick_cache::sync::Cache as Memory;
use tokio::time::Instant;

use crate::names::CredentialId;

const OPENS_AT: u32 = 5;
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Clients' logins whose failures are counted at a time.
const LOGINS: usize = 4096;

/// Who asks, as far as failures are told apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asker {
    /// We ourselves, with what the operator configured.
    Us,
    /// One login of a client, or nobody's.
    One(CredentialId),
}

/// How a place fails: all who ask, and each.
#[derive(Debug)]
pub(super) struct Breakers {
    reach: Breaker,
    us: Breaker,
    others: Memory<CredentialId, Arc<Breaker>>,
}

/// Counts failures in a row. Starts closed.
#[derive(Debug, Default)]
struct Breaker {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// When open: from when on the next request may try.
    next_probe: Option<Instant>,
}

impl Default for Breakers {
    fn default() -> Self {
        Self {
            reach: Breaker::default(),
            us: Breaker::default(),
            others: Memory::new(LOGINS),
        }
    }
}

impl Breakers {
    /// Lets a request pass, or says how long to stay away.
    pub(super) fn enter(&self, asker: &Asker, now: Instant) -> Result<(), Duration> {
        match asker {
            Asker::Us => self.us.enter(now),
            Asker::One(login) => match self.others.get(login) {
                Some(breaker) => breaker.enter(now),
                None => Ok(()),
            },
        }?;
        self.reach.enter(now)
    }

    /// The registry answered.
    pub(super) fn answered(&self, asker: &Asker) {
        self.reach.answered();
        match asker {
            Asker::Us => self.us.answered(),
            Asker::One(login) => drop(self.others.remove(login)),
        }
    }

    /// The registry answered that it failed.
    pub(super) fn failed(&self, asker: &Asker, now: Instant) {
        self.reach.answered();
        self.count(asker, now);
    }

    /// There was no answer.
    pub(super) fn silent(&self, asker: &Asker, now: Instant) {
        self.reach.failed(now);
        self.count(asker, now);
    }

    fn count(&self, asker: &Asker, now: Instant) {
        match asker {
            Asker::Us => self.us.failed(now),
            Asker::One(login) => {
                let breaker = self.others.get_or_insert_with(login, || {
                    Ok::<_, std::convert::Infallible>(Arc::default())
                });
                match breaker {
                    Ok(breaker) => breaker.failed(now),
                    Err(never) => match never {},
                }
            }
        }
    }
}

impl Breaker {
    /// Lets a request pass, or says how long to stay away. While open one request a second passes as a probe; a probe that never
    /// reports (its client left) blocks nothing, because the next second has its own.
    fn enter(&self, now: Instant) -> Result<(), Duration> {
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
    fn answered(&self) {
        if let Ok(mut state) = self.state.lock() {
            *state = State::default();
        }
    }

    /// The registry failed to answer.
    fn failed(&self, now: Instant) {
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

    use oci::{Algorithm, Digest};

    use super::{Asker, Breaker, Breakers, OPENS_AT};
    use crate::names::CredentialId;

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

    #[test]
    fn a_failure_is_the_askers_and_silence_is_everybodys() {
        let breakers = Breakers::default();
        let now = Instant::now();
        let one = |name: &str| {
            let mark = Digest::of(Algorithm::Sha256, name.as_bytes());
            Asker::One(CredentialId::client(&mark))
        };
        let (alice, carol) = (one("alice"), one("carol"));
        let nobody = Asker::One(CredentialId::anonymous());
        for _ in 0..OPENS_AT {
            breakers.failed(&alice, now);
        }
        assert!(breakers.enter(&alice, now).is_err());
        for other in [&carol, &nobody, &Asker::Us] {
            assert_eq!(breakers.enter(other, now), Ok(()));
        }
        for _ in 0..OPENS_AT {
            breakers.silent(&carol, now);
        }
        for asker in [&alice, &carol, &nobody, &Asker::Us] {
            assert!(breakers.enter(asker, now).is_err());
        }
        breakers.answered(&carol);
        assert!(breakers.enter(&alice, now).is_err(), "her own");
        for other in [&carol, &nobody, &Asker::Us] {
            assert_eq!(breakers.enter(other, now), Ok(()));
        }
        breakers.answered(&alice);
        assert_eq!(breakers.enter(&alice, now), Ok(()));
    }
}
