//! Whether an upstream takes connections beside the one that brings the blob.

use std::time::Duration;

use tokio::time::Instant;

use crate::upstream::{Fault, UpstreamError};

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

impl Extras {
    pub(super) fn are_welcome(self, now: Instant) -> bool {
        match self {
            Self::Welcome => true,
            Self::Resting { until, .. } => until <= now,
            Self::Unwelcome => false,
        }
    }

    /// After one was turned away (by `error`), or came too late. Who has no time now may have some later, at longer and longer intervals;
    /// so may who has given ranges before, whatever it says now.
    pub(super) fn after(self, error: Option<&UpstreamError>, record: Record, now: Instant) -> Self {
        let had_no_time = error.is_none_or(|error| is_passing(error.fault()));
        let times = match self {
            Self::Unwelcome => return self,
            // Several that were tried at once count once.
            Self::Resting { until, times } if now < until => times,
            Self::Resting { times, .. } => times + 1,
            Self::Welcome => 0,
        };
        let times = match record {
            _ if had_no_time => times,
            Record::HasGiven => times.max(REFUSED),
            Record::Clean => return Self::Unwelcome,
        };
        let asked = error.and_then(UpstreamError::retry_after);
        let rest = REST * 2_u32.saturating_pow(times.min(DOUBLINGS));
        let until = now + rest.max(asked.unwrap_or_default());
        Self::Resting { until, times }
    }
}

fn is_passing(fault: &Fault) -> bool {
    fault.is_outage() && !matches!(fault, Fault::Broken(_))
}
