//! Asking one place after the other: the upstream's URL, then its mirrors.

use bytes::Bytes;

use super::{Answer, Ask, Fault, Identity, Mirrors, Upstream, UpstreamError};
use crate::deadline::Deadline;

/// How often a short answer is asked for when it does not come whole.
const WHOLE_TRIES: u32 = 3;

impl Upstream {
    /// Asks, and asks the next mirror when a place gives no answer. A refusal is an answer, except a mirror's where the upstream might have
    /// known us: the first place that gives one decides.
    pub async fn ask(&self, ask: Ask, deadline: Deadline) -> Result<Answer, UpstreamError> {
        self.ask_from(ask, deadline).await.map(|(answer, _)| answer)
    }

    /// Asks and reads the whole answer, at most `limit` bytes. One that breaks off is asked for again: the oldest clients give up at
    /// the first manifest that does not come whole.
    pub async fn whole(
        &self,
        ask: &Ask,
        limit: usize,
        deadline: Deadline,
    ) -> Result<(Answer, Bytes), UpstreamError> {
        let mut tries = 1;
        loop {
            let mut answer = self.ask(ask.clone(), deadline).await?;
            match answer.read_to(limit, deadline).await {
                Ok(body) => return Ok((answer, body)),
                Err(error)
                    if tries < WHOLE_TRIES
                        && matches!(error.fault(), Fault::Broken(_) | Fault::Stalled) =>
                {
                    tracing::info!(%error, "asking again for an answer that broke off");
                }
                Err(error) => return Err(error),
            }
            tries += 1;
        }
    }

    /// Asks, beginning with the place that the question names; tells which place answered.
    pub(super) async fn ask_from(
        &self,
        mut ask: Ask,
        deadline: Deadline,
    ) -> Result<(Answer, usize), UpstreamError> {
        if ask.mirrors == Mirrors::LeftOut {
            return self
                .send(&ask, deadline)
                .await
                .map(|answer| (answer, ask.mirror));
        }
        let mut silence: Option<UpstreamError> = None;
        for left in (2..=self.places()).rev() {
            // A place that hangs must leave time for the others.
            let share = deadline.remaining() / u32::try_from(left).unwrap_or(1);
            match self.send(&ask, deadline.at_most(share)).await {
                Err(error) if error.is_outage() || self.is_to_strangers(&ask, &error) => {
                    tracing::warn!(%error, "asking the next mirror");
                    silence = silence.filter(UpstreamError::is_outage).or(Some(error));
                }
                answered => return answered.map(|answer| (answer, ask.mirror)),
            }
            ask.mirror = (ask.mirror + 1) % self.places();
        }
        match self.send(&ask, deadline).await {
            Err(error) if self.is_to_strangers(&ask, &error) => Err(silence.unwrap_or(error)),
            answered => answered.map(|answer| (answer, ask.mirror)),
        }
    }

    /// Whether a mirror, which never learns who we are, refused what the upstream itself might have given us. That it refuses strangers
    /// at all is its own affair; that it has nothing for them may be how it hides what it has.
    pub(super) fn is_to_strangers(&self, ask: &Ask, error: &UpstreamError) -> bool {
        let hides = match &ask.identity {
            Identity::Configured => !self.credential(&ask.repository).is_anonymous(),
            Identity::Client(_) => true,
            Identity::Anonymous => false,
        };
        let refused = matches!(error.fault(), Fault::Denied { .. });
        let missing = matches!(error.fault(), Fault::NotFound { .. });
        ask.mirror > 0 && (refused || (missing && hides))
    }

    /// The error for an answer that is none.
    pub fn broken(&self, ask: &Ask, what: &str) -> UpstreamError {
        UpstreamError::new(
            self.id.clone(),
            ask.describe(),
            Fault::Broken(what.to_owned()).into(),
        )
    }
}
