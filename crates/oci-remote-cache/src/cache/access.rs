//! Whether anything of a repository may be shown to the one who asks: settled before anyone looks what is held.
//!
//! Where the upstream's credentials are not everybody's business, they buy rate limit and speed, and nothing else: a repository is served
//! once an anonymous request (a HEAD, which Docker Hub does not count) has shown within a day that anyone may pull it. A refusal ends
//! that at once; an upstream that gives no answer does not.

use std::sync::Arc;
use std::time::Duration;

use oci::Page;

use super::error::{CacheError, Thing};
use super::visit::Visit;
use super::{Cache, Origin, ask};
use crate::clock::Timestamp;
use crate::deadline::Deadline;
use crate::names::Source;
use crate::policy::{Grant, May};
use crate::upstream::{Ask, Fault, Identity, Method, Resource, UpstreamError};

/// How long it is believed that anyone may pull from a repository.
const PUBLIC_FOR: Duration = Duration::from_hours(24);

/// What is served of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// All that its credentials, if it has any, open.
    All,
    /// Only what anyone may pull there.
    Public,
    /// To each client what its own login was shown to open within so long, and what anyone may pull.
    Proven(Duration),
}

impl Cache {
    /// Lets the request for `resource` in, or says why not. Whoever is let in may still have no right to what is asked for.
    pub(super) async fn enter(
        &self,
        grant: &Grant,
        resource: Resource,
        deadline: Deadline,
    ) -> Result<Visit, CacheError> {
        let source = grant.source();
        match self.origin(source)?.shown {
            Shown::Proven(ttl) => {
                return self.enter_by_login(grant, resource, (ttl, deadline)).await;
            }
            // Without credentials there is nothing that they could open.
            _ if self.is_anonymous(source) => {}
            Shown::All => {}
            Shown::Public => self.enter_public(source, resource, deadline).await?,
        }
        Ok(Visit::new(grant, Identity::Configured))
    }

    /// Whether a request would be let in without asking the upstream.
    pub(super) fn is_let_in(&self, source: &Source) -> bool {
        let Ok(origin) = self.origin(source) else {
            return false;
        };
        origin.shown == Shown::All || self.is_anonymous(source) || {
            let since = self.inner.store.catalog().public_since(source);
            since.is_some_and(|since| is_believed(since, self.inner.clock.now()))
        }
    }

    fn is_anonymous(&self, source: &Source) -> bool {
        self.origin(source).is_ok_and(|origin| {
            origin
                .upstream
                .credential(&source.repository)
                .is_anonymous()
        })
    }

    async fn enter_public(
        &self,
        source: &Source,
        resource: Resource,
        deadline: Deadline,
    ) -> Result<(), CacheError> {
        let since = self.inner.store.catalog().public_since(source);
        if since.is_some_and(|since| is_believed(since, self.inner.clock.now())) {
            return Ok(());
        }
        if self.inner.not_public.holds(source) {
            return Err(not_public(source));
        }
        let nobody = Visit {
            source: source.clone(),
            identity: Identity::Anonymous,
            may: May::PullCached,
        };
        let (cache, what) = (self.clone(), resource.clone());
        let errand = self
            .inner
            .openings
            .run((source.clone(), resource), move || async move {
                let asked = Box::pin(cache.knock(&nobody, &what)).await;
                cache.judge_opening(&nobody, (what, asked)).await
            });
        let landed = deadline
            .run(errand)
            .await
            .map_err(|_late| CacheError::Late)?;
        match landed.map_err(|_lost| CacheError::Stopping)?.0 {
            // It was public when it was last seen, and nobody has said otherwise.
            Err(error) if since.is_some() && error.is_outage() => Ok(()),
            outcome => outcome,
        }
    }

    /// Asks for something by HEAD, in a visit's name: an answer means that the repository is open to it.
    pub(super) async fn knock(
        &self,
        visit: &Visit,
        resource: &Resource,
    ) -> Result<(), UpstreamError> {
        let Ok(origin) = self.origin(visit) else {
            return Ok(());
        };
        let first = ask(visit, resource.clone(), Method::Head);
        match send(origin, first).await {
            Err(error) if says_nothing_of_rights(&error) => {
                // This very thing is missing, or HEAD is not known: that says nothing about the repository, but its list of tags does.
                let tags = Resource::Tags(Page {
                    n: Some(1),
                    ..Page::default()
                });
                let second = ask(visit, tags, Method::Get);
                // Where the list is refused or missing too, the first answer is what the client is told.
                send(origin, second)
                    .await
                    .map_err(|second| if denies(&second) { second } else { error })
            }
            asked => asked,
        }
    }

    async fn judge_opening(
        &self,
        source: &Source,
        (resource, asked): (Resource, Result<(), UpstreamError>),
    ) -> Result<(), CacheError> {
        let error = match asked {
            Ok(()) => {
                self.note_public(source, Some(self.inner.clock.now())).await;
                return Ok(());
            }
            Err(error) => error,
        };
        if denies(&error) {
            tracing::info!(source = %source, "not served: this repository is not public, and serve is \"public\"");
            self.note_public(source, None).await;
            let ttl = self.origin(source)?.rules.negative_ttl;
            self.inner.not_public.note(source.clone(), ttl);
            return Err(not_public(source));
        }
        Err(no_answer(source, &resource, error))
    }

    async fn note_public(&self, source: &Source, seen: Option<Timestamp>) {
        let catalog = self.inner.store.catalog();
        if let Err(error) = catalog.record_public(source, seen).await {
            self.store_fault(&error);
        }
    }
}

async fn send(origin: &Origin, ask: Ask) -> Result<(), UpstreamError> {
    let sent = origin.upstream.send(&ask, Deadline::for_answer()).await;
    sent.map(drop)
}

/// A time that lies ahead is none: the clock was set back, and what it said then is worth nothing.
fn is_believed(since: Timestamp, now: Timestamp) -> bool {
    since <= now && since.age(now) < PUBLIC_FOR
}

/// What a refusal that is none of rights means.
pub(super) fn no_answer(source: &Source, resource: &Resource, error: UpstreamError) -> CacheError {
    if matches!(error.fault(), Fault::NotFound { .. }) {
        return CacheError::Unknown {
            thing: thing(resource),
            source_: source.clone(),
        };
    }
    CacheError::Upstream(Arc::new(error))
}

pub(super) fn denies(error: &UpstreamError) -> bool {
    matches!(error.fault(), Fault::Denied { .. })
}

fn says_nothing_of_rights(error: &UpstreamError) -> bool {
    matches!(
        error.fault(),
        Fault::NotFound { .. } | Fault::Status(400..=407 | 409..=499)
    )
}

fn not_public(source: &Source) -> CacheError {
    CacheError::NotPublic {
        source_: source.clone(),
    }
}

fn thing(resource: &Resource) -> Thing {
    match resource {
        Resource::Manifest(_) => Thing::Manifest,
        Resource::Blob(_) => Thing::Blob,
        Resource::Tags(_) => Thing::Tags,
        Resource::Referrers { .. } => Thing::Referrers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_lasts_a_day_and_no_clock_lengthens_it() {
        let day = i64::try_from(PUBLIC_FOR.as_millis()).unwrap();
        assert!(is_believed(Timestamp(5), Timestamp(5)));
        assert!(is_believed(Timestamp(5), Timestamp(4 + day)));
        assert!(!is_believed(Timestamp(5), Timestamp(5 + day)));
        assert!(!is_believed(Timestamp(5), Timestamp(4)));
    }
}
