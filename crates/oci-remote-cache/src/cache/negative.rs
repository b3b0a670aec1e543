//! What upstreams said they do not have, for a while: probing for missing signatures must not cost a request each time.

use std::time::Duration;

use oci::ErrorCode;
use quick_cache::Weighter;
use quick_cache::sync::Cache as Memory;
use tokio::time::Instant;

use super::error::Thing;
use super::visit::Visitor;
use crate::clock::{Clock, Timestamp};
use crate::names::Source;
use crate::upstream;

/// Answers remembered at most, or about so many where they have names.
const MOST: usize = 20_000;

/// What one of them may take in memory, on the whole: a page of a list is named by a client, at any length that a request line has.
const EACH: u64 = 512;

/// What was refused and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// 404, with what the upstream called it.
    Unknown(Option<ErrorCode>),
    /// 401 or 403, and to whom.
    Denied(upstream::Refused),
}

/// Repositories that were refused, for a while.
#[derive(Debug)]
pub(super) struct Refused {
    known: Memory<Source, Life>,
    clock: Clock,
}

/// What was asked for, and in whose name.
pub(super) type Question = (Visitor, Thing, String);

/// Remembered refusals.
#[derive(Debug)]
pub(super) struct Negatives {
    known: Memory<Question, (Refusal, Life), ByName>,
    /// What is held, and one visitor was told is not there: until the upstream tells it otherwise.
    hidden: Memory<Question, (), ByName>,
    clock: Clock,
}

/// Weighs what is remembered by the length of its name.
#[derive(Clone, Debug)]
struct ByName;

impl<V> Weighter<Question, V> for ByName {
    fn weight(&self, ((source, _), _, name): &Question, _remembered: &V) -> u64 {
        (source.repository.as_str().len() + name.len()) as u64 + EACH / 2
    }
}

/// How long a refusal is believed: by the clock by which everything ages here, and by the one that nobody can set back.
#[derive(Clone, Copy, Debug)]
struct Life {
    noted: Timestamp,
    ttl: Duration,
    until: Instant,
}

impl Life {
    /// A life that begins now; none where nothing is to be remembered.
    fn new(clock: &Clock, ttl: Duration) -> Option<Self> {
        (!ttl.is_zero()).then(|| Self {
            noted: clock.now(),
            ttl,
            until: Instant::now() + ttl,
        })
    }

    fn is_over(self, clock: &Clock) -> bool {
        self.noted.age(clock.now()) >= self.ttl || self.until <= Instant::now()
    }
}

impl Refused {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            known: Memory::new(MOST),
            clock,
        }
    }

    /// Remembers a refusal for `ttl`.
    pub(super) fn note(&self, source: Source, ttl: Duration) {
        if let Some(life) = Life::new(&self.clock, ttl) {
            self.known.insert(source, life);
        }
    }

    /// Whether a refusal still holds.
    pub(super) fn holds(&self, source: &Source) -> bool {
        self.known
            .get(source)
            .is_some_and(|life| !life.is_over(&self.clock))
    }
}

impl Negatives {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            known: Memory::with_weighter(MOST, MOST as u64 * EACH, ByName),
            hidden: Memory::with_weighter(MOST, MOST as u64 * EACH, ByName),
            clock,
        }
    }

    /// Remembers a refusal for `ttl`.
    pub(super) fn note(&self, key: Question, refusal: Refusal, ttl: Duration) {
        if let Some(life) = Life::new(&self.clock, ttl) {
            self.known.insert(key, (refusal, life));
        }
    }

    /// The refusal that still holds.
    pub(super) fn find(&self, key: &Question) -> Option<Refusal> {
        let (refusal, life) = self.known.get(key)?;
        if life.is_over(&self.clock) {
            self.known.remove(key);
            return None;
        }
        Some(refusal)
    }

    /// Forgets a refusal: the upstream has said otherwise.
    pub(super) fn forget(&self, key: &Question) {
        self.known.remove(key);
        self.hidden.remove(key);
    }

    /// What is held is hidden from a visitor, however old the refusal becomes.
    pub(super) fn hide(&self, key: Question) {
        self.hidden.insert(key, ());
    }

    pub(super) fn hides(&self, key: &Question) -> bool {
        self.hidden.get(key).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{CredentialId, UpstreamId};

    #[test]
    fn long_names_push_each_other_out() {
        let negatives = Negatives::new(Clock::system());
        let source = Source::new(UpstreamId::new("up"), "a".parse().unwrap());
        let visitor = (source, CredentialId::anonymous());
        let text = "x".repeat(30_000);
        for n in 0..2000 {
            let key = (visitor.clone(), Thing::Tags, format!("{n}{text}"));
            negatives.hide(key.clone());
            negatives.note(key, Refusal::Unknown(None), Duration::from_mins(1));
        }
        let most = MOST as u64 * EACH;
        assert!(negatives.known.weight() <= most && negatives.hidden.weight() <= most);
        assert!(negatives.known.len() < 400, "{}", negatives.known.len());
    }

    #[tokio::test(start_paused = true)]
    async fn whichever_clock_runs_out_first_ends_a_refusal() {
        let clock = Clock::system();
        let minute = Duration::from_mins(1);
        let life = || Life::new(&clock, minute).unwrap();
        let by_the_wall = life();
        assert!(!by_the_wall.is_over(&clock));
        clock.advance(minute);
        assert!(by_the_wall.is_over(&clock));
        let by_the_wait = life();
        tokio::time::advance(minute).await;
        assert!(by_the_wait.is_over(&clock));
        assert!(Life::new(&clock, Duration::ZERO).is_none());
    }
}
