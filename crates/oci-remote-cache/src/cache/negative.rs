//! What upstreams said they do not have, for a while: probing for missing signatures must not cost a request each time.

use std::time::Duration;

use quick_cache::sync::Cache as Memory;
use tokio::time::Instant;

use super::error::Thing;
use super::visit::Visitor;
use crate::names::Source;

/// Answers remembered at most.
const MOST: usize = 20_000;

/// What was refused and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// 404.
    Unknown,
    /// 401 or 403.
    Denied,
}

/// Repositories that were refused, for a while.
#[derive(Debug)]
pub(super) struct Refused {
    known: Memory<Source, Instant>,
}

/// Remembered refusals.
#[derive(Debug)]
pub(super) struct Negatives {
    known: Memory<(Visitor, Thing, String), (Refusal, Instant)>,
}

impl Refused {
    pub(super) fn new() -> Self {
        Self {
            known: Memory::new(MOST),
        }
    }

    /// Remembers a refusal for `ttl`.
    pub(super) fn note(&self, source: Source, ttl: Duration) {
        if !ttl.is_zero() {
            self.known.insert(source, Instant::now() + ttl);
        }
    }

    /// Whether a refusal still holds.
    pub(super) fn holds(&self, source: &Source) -> bool {
        self.known
            .get(source)
            .is_some_and(|until| until > Instant::now())
    }
}

impl Negatives {
    pub(super) fn new() -> Self {
        Self {
            known: Memory::new(MOST),
        }
    }

    /// Remembers a refusal for `ttl`.
    pub(super) fn note(&self, key: (Visitor, Thing, String), refusal: Refusal, ttl: Duration) {
        if !ttl.is_zero() {
            self.known.insert(key, (refusal, Instant::now() + ttl));
        }
    }

    /// The refusal that still holds.
    pub(super) fn find(&self, key: &(Visitor, Thing, String)) -> Option<Refusal> {
        let (refusal, until) = self.known.get(key)?;
        if until > Instant::now() {
            return Some(refusal);
        }
        self.known.remove(key);
        None
    }

    /// Forgets a refusal: the upstream has said otherwise.
    pub(super) fn forget(&self, key: &(Visitor, Thing, String)) {
        self.known.remove(key);
    }
}
