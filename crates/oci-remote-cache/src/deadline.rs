//! One bound for everything that happens on behalf of a request.
//!
//! containerd gives up when response headers take 30 s, so every answer, good or bad, leaves within [`ANSWER`]: all hops, token
//! exchanges and retries share the one deadline that was set when the request arrived.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// Longest time from a request's arrival to its answer's headers.
pub const ANSWER: Duration = Duration::from_secs(25);

/// The moment by which an answer must have been given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

/// The deadline passed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no answer in time")]
pub struct Late;

impl Deadline {
    /// `limit` from now.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit)
    }

    /// The deadline of a request that arrives now.
    pub fn for_answer() -> Self {
        Self::after(ANSWER)
    }

    /// The earlier of this deadline and `limit` from now.
    #[must_use]
    pub fn at_most(self, limit: Duration) -> Self {
        self.min(Self::after(limit))
    }

    /// Time left; zero when it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Runs `work`, but not past the deadline.
    pub async fn run<T>(self, work: impl Future<Output = T>) -> Result<T, Late> {
        tokio::time::timeout_at(self.0, work)
            .await
            .map_err(|_elapsed| Late)
    }
}
