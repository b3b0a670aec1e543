//! Whether anything of a repository may be shown to the one who asks: settled before anyone looks what is held.
//!
//! Where the upstream's credentials are not everybody's business, they buy rate limit and speed, and nothing else: a repository is served
//! once an anonymous request (a HEAD, which Docker Hub does not count) has shown within a day that anyone may pull it. A refusal ends
//! that at once; an upstream that gives no answer does not.

use std::sync::Arc;
use std::time::Duration;

use oci::Page;

use super::error::{CacheError, Thing};
use super::listing::{PAGE_LIMIT, names_a_tag};
use super::visit::Visit;
use super::{Cache, Origin, ask};
use crate::clock::Timestamp;
use crate::deadline::Deadline;
use crate::names::Source;
use crate::policy::{Grant, May};
use crate::upstream::{Fault, Identity, Method, Mirrors, Resource, UpstreamError};

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

/// What one who knocks gets to see of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// Something: it is open.
    Open,
    /// Its list of tags, but not what was asked for.
    OthersOnly,
    /// An empty list, which says nothing.
    Nothing,
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
        let visit = Visit::new(grant, Identity::Configured);
        let mirrored = self.origin(source)?.upstream.places() > 1;
        Ok(if mirrored && self.is_closed(source)? {
            visit.without_mirrors()
        } else {
            visit
        })
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
            mirrors: Mirrors::LeftOut,
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

    /// Asks for something by HEAD, in a visit's name: an answer means that the repository is open to it. That this very thing is missing,
    /// or that HEAD is not known, says nothing about the repository, but its list of tags does, if it names any.
    pub(super) async fn knock(
        &self,
        visit: &Visit,
        resource: &Resource,
    ) -> Result<Sight, UpstreamError> {
        let Ok(origin) = self.origin(visit) else {
            return Ok(Sight::Nothing);
        };
        let first = match resource {
            // Of what they hide, some registries give everyone an empty list, which no HEAD tells from another.
            Resource::Tags(_) => None,
            Resource::Manifest(_) | Resource::Blob(_) | Resource::Referrers { .. } => {
                let head = ask(visit, resource.clone(), Method::Head);
                match origin.upstream.send(&head, Deadline::for_answer()).await {
                    Ok(_answer) => return Ok(Sight::Open),
                    Err(error) if says_nothing_of_rights(&error) => Some(error),
                    Err(error) => return Err(error),
                }
            }
        };
        // Where the list is refused or missing too, the first answer is what the client is told.
        match (list(origin, visit).await, first) {
            (Ok(Sight::Open), Some(first)) if is_missing(&first) => Ok(Sight::OthersOnly),
            (Ok(Sight::Open | Sight::OthersOnly), _) => Ok(Sight::Open),
            (Err(second), Some(_)) if denies(&second) => Err(second),
            (Ok(Sight::Nothing) | Err(_), Some(first)) => Err(first),
            (listed, None) => listed,
        }
    }

    async fn judge_opening(
        &self,
        source: &Source,
        (resource, asked): (Resource, Result<Sight, UpstreamError>),
    ) -> Result<(), CacheError> {
        let error = match asked {
            Ok(Sight::Open | Sight::OthersOnly) => {
                self.note_public(source, Some(self.inner.clock.now())).await;
                return Ok(());
            }
            Ok(Sight::Nothing) => return Err(unknown(source, &resource)),
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

/// Looks whether the repository's list of tags names any.
pub(super) async fn list(origin: &Origin, visit: &Visit) -> Result<Sight, UpstreamError> {
    let one = Page {
        n: Some(1),
        ..Page::default()
    };
    let tags = ask(visit, Resource::Tags(one), Method::Get);
    let deadline = Deadline::for_answer();
    let mut answer = origin.upstream.send(&tags, deadline).await?;
    let body = answer.read_to(PAGE_LIMIT, deadline).await?;
    Ok(if names_a_tag(&body) {
        Sight::Open
    } else {
        Sight::Nothing
    })
}

/// A time that lies ahead is none: the clock was set back, and what it said then is worth nothing.
fn is_believed(since: Timestamp, now: Timestamp) -> bool {
    since <= now && since.age(now) < PUBLIC_FOR
}

/// What a refusal that is none of rights means.
pub(super) fn no_answer(source: &Source, resource: &Resource, error: UpstreamError) -> CacheError {
    if let Fault::NotFound { code } = error.fault() {
        let thing = thing(resource);
        return CacheError::Unknown {
            thing,
            code: thing.code_told(code.as_deref()),
            source_: source.clone(),
        };
    }
    CacheError::Upstream(Arc::new(error))
}

pub(super) fn unknown(source: &Source, resource: &Resource) -> CacheError {
    CacheError::Unknown {
        thing: thing(resource),
        code: None,
        source_: source.clone(),
    }
}

pub(super) fn denies(error: &UpstreamError) -> bool {
    matches!(error.fault(), Fault::Denied { .. })
}

fn is_missing(error: &UpstreamError) -> bool {
    matches!(error.fault(), Fault::NotFound { .. })
}

fn says_nothing_of_rights(error: &UpstreamError) -> bool {
    let fault = error.fault();
    let other = matches!(
        fault,
        Fault::NotFound { .. } | Fault::Status(400..=407 | 409..=499)
    );
    other || fault.is_of_head()
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
