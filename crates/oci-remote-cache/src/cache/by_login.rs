//! Upstreams whose clients show their own logins: each is let in to what its login, or nobody's, was shown to open lately.
//!
//! A repository is first asked for without any login: what anyone may pull needs none, and none is shown to an upstream that did not
//! refuse. A proof is for one login and one repository and ends after the time that the operator allows; a refusal ends it at once. An
//! upstream that gives no answer lets nobody in whose proof is over, for it may have been revoked.

use std::sync::Arc;
use std::time::Duration;

use oci::Reference;

use super::access::{Sight, denies, list, no_answer, unknown};
use super::error::CacheError;
use super::proofs::Denial;
use super::revalidate::of_tag;
use super::visit::Visit;
use super::{Cache, Shown};
use crate::deadline::Deadline;
use crate::names::{CredentialId, Source};
use crate::policy::{Client, ClientLogin, Grant};
use crate::upstream::{Credentials, Fault, Identity, Refused, Resource, UpstreamError};

impl Cache {
    pub(super) async fn enter_by_login(
        &self,
        grant: &Grant,
        resource: Resource,
        (ttl, deadline): (Duration, Deadline),
    ) -> Result<Visit, CacheError> {
        let nobody = Visit::new(grant, Identity::Anonymous);
        let proofs = &self.inner.proofs;
        if proofs.is_open(&nobody.visitor()) {
            return Ok(nobody);
        }
        let login = grant.client().login.as_ref();
        let own = login.map(|login| Visit::new(grant, Identity::Client(credentials(login))));
        if let Some(own) = own.as_ref().filter(|own| proofs.is_open(&own.visitor())) {
            return Ok(own.clone());
        }
        let refused_for = self.origin(&nobody)?.rules.negative_ttl;
        // To one who has a login it makes no difference that strangers may have been let in meanwhile.
        let believed = own.as_ref().map_or(refused_for, |_| ttl);
        if proofs.denial(&nobody.visitor(), believed).is_none() {
            let question = (resource.clone(), ttl, deadline);
            match self.show(&nobody, question).await {
                Ok(()) => return Ok(nobody),
                Err(error) if own.is_some() && is_for_strangers(&error) => {}
                Err(error) => return Err(error),
            }
        }
        match own {
            Some(own) => self.enter_as(own, (resource, ttl, deadline)).await,
            None => Err(denied(&nobody, Denial::Login)),
        }
    }

    async fn enter_as(
        &self,
        own: Visit,
        (resource, ttl, deadline): (Resource, Duration, Deadline),
    ) -> Result<Visit, CacheError> {
        let (proofs, visitor) = (&self.inner.proofs, own.visitor());
        if proofs.is_open(&visitor) {
            return Ok(own);
        }
        let refused_for = self.origin(&own)?.rules.negative_ttl;
        if let Some(denial) = proofs.denial(&visitor, refused_for) {
            return Err(denied(&own, denial));
        }
        self.show(&own, (resource, ttl, deadline)).await?;
        Ok(own)
    }

    /// Lets one in with its own login who had been let in as anyone may be, and for whom that was not enough after all: the repository
    /// was closed to strangers meanwhile, or has nothing for them at the moment. Anybody else gets `error` back.
    pub(super) async fn enter_again(
        &self,
        grant: &Grant,
        (visit, resource): (&Visit, Resource),
        error: CacheError,
        deadline: Deadline,
    ) -> Result<Visit, CacheError> {
        let Shown::Proven(ttl) = self.origin(visit)?.shown else {
            return Err(error);
        };
        let login = grant.client().login.as_ref();
        let Some(login) = login.filter(|_| visit.is_anonymous()) else {
            return Err(error);
        };
        let no_answer = matches!(error, CacheError::Upstream(_));
        let closed = !self.inner.proofs.is_open(&visit.visitor());
        if !is_for_strangers(&error) || !(no_answer || closed) {
            return Err(error);
        }
        let own = Visit::new(grant, Identity::Client(credentials(login)));
        let entered = self.enter_as(own, (resource, ttl, deadline)).await;
        // A login that is none here does not hide why strangers get nothing.
        entered.map_err(|refusal| if no_answer { error } else { refusal })
    }

    /// Has the upstream say whether it lets this visit in; those who ask meanwhile share the answer.
    async fn show(
        &self,
        visit: &Visit,
        (resource, ttl, deadline): (Resource, Duration, Deadline),
    ) -> Result<(), CacheError> {
        let (cache, from, what) = (self.clone(), visit.clone(), resource.clone());
        let errand = self
            .inner
            .proofs
            .questions
            .run((visit.visitor(), resource), move || async move {
                Box::pin(cache.ask_at_the_door(&from, &what, ttl)).await
            });
        let landed = deadline
            .run(errand)
            .await
            .map_err(|_late| CacheError::Late)?;
        landed.map_err(|_lost| CacheError::Stopping)?.0
    }

    async fn ask_at_the_door(
        &self,
        visit: &Visit,
        resource: &Resource,
        ttl: Duration,
    ) -> Result<(), CacheError> {
        let proofs = &self.inner.proofs;
        let Some(turns) = proofs.turns(&visit.upstream) else {
            return Err(CacheError::Stopping);
        };
        let turn = Deadline::for_answer().run(turns.acquire_owned()).await;
        let _turn = turn.map_err(|_late| CacheError::Late)?;
        // Others may have had an answer while this question waited.
        let visitor = visit.visitor();
        if proofs.is_open(&visitor) {
            return Ok(());
        }
        if let Some(denial) = proofs.denial(&visitor, Duration::ZERO) {
            return Err(denied(visit, denial));
        }
        let asked = self.knock(visit, resource).await;
        match asked {
            Ok(sight @ (Sight::Open | Sight::OthersOnly)) => {
                if sight == Sight::OthersOnly {
                    self.hide(visit, resource);
                }
                proofs.prove(visitor, ttl);
                Ok(())
            }
            Ok(Sight::Nothing) => Err(unknown(visit, resource)),
            Err(error) if denies(&error) => Err(self.deny(visit, refused(&error))),
            Err(error) => Err(no_answer(visit, resource, error)),
        }
    }

    /// The upstream refuses a visit: its proof is over, and nobody else's.
    pub(super) fn deny(&self, visit: &Visit, refused: Option<Refused>) -> CacheError {
        let denial = match (&visit.identity, refused) {
            (Identity::Client(_), Some(Refused::Rights | Refused::Anonymous) | None) => {
                Denial::Rights
            }
            (_, Some(Refused::Login)) | (Identity::Anonymous | Identity::Configured, _) => {
                Denial::Login
            }
        };
        let proofs = &self.inner.proofs;
        if proofs.is_open(&visit.visitor()) {
            tracing::info!(source = %visit.source, "what was open to a client is refused to it now");
        }
        proofs.refuse(visit.visitor(), denial);
        denied(visit, denial)
    }

    /// A visitor is told that something is not there which is held. Registries hide a whole repository so: the visitor's proof for it is
    /// over, unless its list of tags is still shown. Returns the refusal, where there is one.
    pub(super) async fn doubt_proof(&self, visit: &Visit) -> Option<CacheError> {
        let origin = self.origin(visit).ok()?;
        match list(origin, visit).await {
            Ok(Sight::Open | Sight::OthersOnly) => None,
            Err(error) if denies(&error) => Some(self.deny(visit, refused(&error))),
            Ok(Sight::Nothing) | Err(_) => {
                tracing::info!(source = %visit.source, "a client is no longer shown what was open to it");
                self.inner.proofs.end(&visit.visitor());
                None
            }
        }
    }

    /// The tag was not shown to this visitor at the door: one that is held is none for it.
    fn hide(&self, visit: &Visit, resource: &Resource) {
        if let Resource::Manifest(Reference::Tag(tag)) = resource
            && self.tag_record(visit, tag).is_some()
        {
            self.inner.negatives.hide(of_tag(visit, tag));
        }
    }

    /// Whether the repository was shown to be open to this client, or to anyone. Nobody is asked.
    pub(super) fn is_proven(&self, source: &Source, client: &Client) -> bool {
        let mut names = vec![CredentialId::anonymous()];
        names.extend(client.login.as_ref().map(id));
        let proofs = &self.inner.proofs;
        names
            .into_iter()
            .any(|name| proofs.is_open(&(source.clone(), name)))
    }
}

/// Whether the upstream may say something else to one whom it knows: it refuses strangers, hides from them that a repository is there,
/// has given them all that it gives in a while, or fails when they ask.
fn is_for_strangers(error: &CacheError) -> bool {
    if let CacheError::Upstream(error) = error {
        return matches!(
            error.fault(),
            Fault::RateLimited { .. } | Fault::BreakerOpen { .. } | Fault::Status(500..)
        );
    }
    matches!(
        error,
        CacheError::LogIn { .. } | CacheError::Denied { .. } | CacheError::Unknown { .. }
    )
}

fn credentials(login: &ClientLogin) -> Arc<Credentials> {
    Arc::new(Credentials {
        id: id(login),
        username: login.username.clone(),
        password: login.password.clone(),
    })
}

fn id(login: &ClientLogin) -> CredentialId {
    CredentialId::client(&login.mark)
}

fn denied(visit: &Visit, denial: Denial) -> CacheError {
    let source_ = visit.source.clone();
    match denial {
        Denial::Login => CacheError::LogIn { source_ },
        Denial::Rights => CacheError::Denied {
            source_,
            refused: None,
        },
    }
}

fn refused(error: &UpstreamError) -> Option<Refused> {
    if let Fault::Denied { refused, .. } = error.fault() {
        Some(*refused)
    } else {
        None
    }
}
