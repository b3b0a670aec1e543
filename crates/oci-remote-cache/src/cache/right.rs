//! Whether a repository may give out a digest: bytes are shared, rights are not.
//!
//! Two records decide. *Membership*: this upstream delivered those bytes for that repository, or vouched for them by HEAD while the bytes
//! came from the same upstream. *Access*: the repository is open, or suspended since the upstream answered 401 or 403. A manifest that
//! mentions a digest grants nothing, and a HEAD of another upstream proves nothing. The question is settled before anyone looks whether
//! the bytes are here, so that an unauthorised answer does not tell a hit from a miss.

use std::sync::Arc;

use oci::{AnyDigest, Digest, Reference};

use super::error::{CacheError, Thing};
use super::head::{by_head, size_by_first_byte, told_size};
use super::negative::Refusal;
use super::visit::Visit;
use super::{Cache, SHARED_REFUSAL, Shown};
use crate::deadline::Deadline;
use crate::names::{CredentialId, Source};
use crate::store::catalog::{Change, Kind, Membership, Proof};
use crate::upstream::{Fault, Refused, Resource, UpstreamError};

/// This repository holds this digest. Only this file makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Right {
    digest: Digest,
}

/// How a repository stands to a digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is known to hold it.
    Proven(Right),
    /// It is not known; the bytes may only come from the upstream's own answer to this repository.
    Open,
}

/// What a HEAD told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Size in bytes, if the upstream told.
    pub size: Option<u64>,
    credential: CredentialId,
}

impl Right {
    /// The digest this is for.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }
}

impl Cache {
    /// How the granted repository stands to a digest. Asks the upstream only where the records do not tell and the bytes came from it.
    pub(super) async fn claim(
        &self,
        visit: &Visit,
        digest: Digest,
        kind: Kind,
        deadline: Deadline,
    ) -> Result<Claim, CacheError> {
        let source = &visit.source;
        if self.is_suspended(visit)? {
            self.prove(visit, digest, kind, deadline).await?;
        }
        let catalog = self.inner.store.catalog();
        match catalog.membership(source, &digest, kind) {
            Ok(Some(credential)) if self.counts(source, &credential) => {
                return Ok(Claim::Proven(Right { digest }));
            }
            // Proven with a credential that is configured no more: asked anew.
            Ok(Some(_) | None) => {}
            Err(error) => {
                self.store_fault(&error);
                return Ok(Claim::Open);
            }
        }
        let delivered = catalog
            .delivered(&source.upstream, &digest)
            .unwrap_or_default();
        if delivered.is_none() || !self.inner.store.contains(&digest) {
            return Ok(Claim::Open);
        }
        self.prove(visit, digest, kind, deadline)
            .await
            .map(Claim::Proven)
    }

    /// Whether what was proven with `credential` still counts: what anyone may see does, else only what today's credential was shown.
    pub(super) fn counts(&self, source: &Source, credential: &CredentialId) -> bool {
        // Where each client shows its own login, each was proven for the repository before it came here.
        let today = self.origin(source).map(|origin| match origin.shown {
            Shown::Proven(_) => CredentialId::clients(),
            Shown::All | Shown::Public => origin.upstream.credential(&source.repository),
        });
        credential.is_anonymous() || today.is_ok_and(|today| today == *credential)
    }

    /// Whether the repository is on record as holding the digest, for today's credential.
    pub(super) fn is_member(&self, source: &Source, digest: &Digest, kind: Kind) -> bool {
        let member = self.inner.store.catalog().membership(source, digest, kind);
        member
            .ok()
            .flatten()
            .is_some_and(|credential| self.counts(source, &credential))
    }

    /// Has the upstream vouch, by HEAD, that the repository holds the digest. The caller knows that the bytes, if they are here or on
    /// their way, come from the same upstream.
    pub(super) async fn prove(
        &self,
        visit: &Visit,
        digest: Digest,
        kind: Kind,
        deadline: Deadline,
    ) -> Result<Right, CacheError> {
        let source = &visit.source;
        let probe = self
            .probe(visit, thing(kind), digest.into(), deadline)
            .await?;
        let catalog = self.inner.store.catalog();
        if catalog
            .delivered(&source.upstream, &digest)
            .unwrap_or_default()
            .is_some()
        {
            let vouched = Membership {
                source: source.clone(),
                digest,
                kind,
                credential: probe.credential,
                proof: Proof::Vouched,
            };
            if let Err(error) = catalog.record(vec![Change::Membership(vouched)]).await {
                self.store_fault(&error);
            }
        }
        Ok(Right { digest })
    }

    /// Asks the upstream by HEAD; those who ask meanwhile share the answer. Its 200 lifts a suspension, its 401 or 403 makes one.
    pub(super) async fn probe(
        &self,
        visit: &Visit,
        thing: Thing,
        digest: AnyDigest,
        deadline: Deadline,
    ) -> Result<Probe, CacheError> {
        if let Some(refusal) =
            self.inner
                .negatives
                .find(&(visit.visitor(), thing, digest.to_string()))
        {
            return Err(refused(visit, thing, refusal));
        }
        let (cache, from, wanted) = (self.clone(), visit.clone(), digest.clone());
        let errand = self
            .inner
            .probes
            .run((visit.visitor(), thing, digest), move || async move {
                cache.ask_for(&from, thing, wanted).await
            });
        let landed = deadline
            .run(errand)
            .await
            .map_err(|_late| CacheError::Late)?;
        landed.map_err(|_lost| CacheError::Stopping)?.0
    }

    async fn ask_for(
        &self,
        visit: &Visit,
        thing: Thing,
        digest: AnyDigest,
    ) -> Result<Probe, CacheError> {
        let upstream = &self.origin(visit)?.upstream;
        let name = digest.to_string();
        let resource = match thing {
            Thing::Manifest => Resource::Manifest(Reference::Digest(digest)),
            Thing::Blob | Thing::Tags | Thing::Referrers => Resource::Blob(digest),
        };
        match by_head(upstream, visit, &resource).await {
            Ok(answer) => {
                self.lift(visit, answer.allowed()).await;
                let mut probe = Probe {
                    size: told_size(&answer, &resource),
                    credential: answer.credential().clone(),
                };
                if probe.size.is_none() && thing == Thing::Blob {
                    probe.size = size_by_first_byte(upstream, visit, resource).await;
                }
                Ok(probe)
            }
            Err(error) => Err(self
                .judge_refusal(visit, thing, name, &Arc::new(error))
                .await),
        }
    }

    /// Whether the repository is suspended for who asks. A client that uses its own login was proven, or is not here.
    pub(super) fn is_suspended(&self, visit: &Visit) -> Result<bool, CacheError> {
        Ok(!visit.is_personal() && self.is_closed(visit)?)
    }

    /// Whether the repository is suspended for the credential we would use.
    pub(super) fn is_closed(&self, source: &Source) -> Result<bool, CacheError> {
        let upstream = &self.origin(source)?.upstream;
        let credential = upstream.credential(&source.repository);
        Ok(self.inner.store.catalog().is_suspended(source, &credential))
    }

    /// The upstream itself, and no mirror, has answered 200 for this repository to the credential `allowed`: it is open again, and nothing
    /// needs to be fetched anew.
    pub(super) async fn lift(&self, visit: &Visit, allowed: Option<&CredentialId>) {
        let source = &visit.source;
        let Some(credential) = allowed.filter(|_| !visit.is_personal()) else {
            return;
        };
        self.inner.logins.accepted(source, credential);
        let Ok(true) = self.is_closed(source) else {
            return;
        };
        let Ok(origin) = self.origin(source) else {
            return;
        };
        tracing::info!(source = %source, "the upstream allows this repository again");
        if let Err(error) = self
            .inner
            .store
            .catalog()
            .lift(source, &origin.upstream.credential(&source.repository))
            .await
        {
            self.store_fault(&error);
        }
    }

    /// The upstream refuses a repository of which something is held: nothing of it is served until it allows it again. Nothing is
    /// deleted: registries have answered 401 for public images for hours.
    async fn suspend(&self, source: &Source, error: &UpstreamError) {
        let catalog = self.inner.store.catalog();
        if !catalog.knows(source).unwrap_or(false) {
            return;
        }
        let Ok(origin) = self.origin(source) else {
            return;
        };
        tracing::warn!(source = %source, credential = %origin.upstream.credential(&source.repository), %error,
            "the upstream refuses this repository; what is held of it is suspended");
        let now = self.inner.clock.now();
        if let Err(error) = catalog
            .suspend(source, &origin.upstream.credential(&source.repository), now)
            .await
        {
            self.store_fault(&error);
        }
    }

    /// Whether what was refused is something that the repository has shown us before.
    fn is_on_record(&self, source: &Source, thing: Thing, name: &str) -> bool {
        let kind = match thing {
            Thing::Manifest => Kind::Manifest,
            Thing::Blob => Kind::Blob,
            Thing::Tags | Thing::Referrers => return false,
        };
        match name.parse::<Reference>() {
            Ok(Reference::Tag(tag)) => self.tag_record(source, &tag).is_some(),
            Ok(Reference::Digest(AnyDigest::Known(digest))) => {
                self.is_member(source, &digest, kind)
            }
            Ok(Reference::Digest(AnyDigest::Foreign(_))) | Err(_) => false,
        }
    }

    /// Whether a manifest that the repository did show is refused as well. That something else is refused says little: ghcr.io answers 403
    /// for what does not exist, and lists may need other rights than pulls.
    async fn is_refused_too(&self, visit: &Visit) -> bool {
        let latest = self.inner.store.catalog().latest_tag(visit);
        let (Ok(Some(latest)), Ok(origin)) = (latest, self.origin(visit)) else {
            return true;
        };
        let reference = Reference::Digest(latest.digest.into());
        let latest = Resource::Manifest(reference);
        match by_head(&origin.upstream, visit, &latest).await {
            Ok(answer) => {
                self.lift(visit, answer.allowed()).await;
                false
            }
            Err(error) => !matches!(error.fault(), Fault::NotFound { .. }),
        }
    }

    fn note_login(&self, source: &Source, refused: Option<Refused>) {
        let Ok(origin) = self.origin(source) else {
            return;
        };
        if refused == Some(Refused::Login) {
            let credential = origin.upstream.credential(&source.repository);
            let now = self.inner.clock.now();
            self.inner.logins.note(source, &credential, now);
        }
    }

    /// Turns an upstream's error into ours, remembering refusals and suspending where access was refused.
    pub(super) async fn judge_refusal(
        &self,
        visit: &Visit,
        thing: Thing,
        name: String,
        error: &Arc<UpstreamError>,
    ) -> CacheError {
        let source = &visit.source;
        let Some((refusal, refused_)) = refusal_in(thing, error.fault()) else {
            return CacheError::Upstream(Arc::clone(error));
        };
        let ttl = match refusal {
            Refusal::Unknown(_) => self
                .origin(source)
                .map(|origin| origin.rules.negative_ttl)
                .unwrap_or_default(),
            // One client's login is refused, or nobody's: that says nothing about the others.
            Refusal::Denied(_) if visit.is_personal() => {
                return self.deny(visit, refused_);
            }
            Refusal::Denied(_) => {
                self.note_login(source, refused_);
                if self.is_on_record(source, thing, &name) || self.is_refused_too(visit).await {
                    self.suspend(source, error).await;
                }
                SHARED_REFUSAL
            }
        };
        self.inner
            .negatives
            .note((visit.visitor(), thing, name), refusal, ttl);
        refused(source, thing, refusal)
    }
}

/// What of an upstream's answer is a refusal.
fn refusal_in(thing: Thing, fault: &Fault) -> Option<(Refusal, Option<Refused>)> {
    match fault {
        Fault::NotFound { code } => {
            Some((Refusal::Unknown(thing.code_told(code.as_deref())), None))
        }
        Fault::Denied { refused, .. } => Some((Refusal::Denied(*refused), Some(*refused))),
        Fault::Connect(_)
        | Fault::Late
        | Fault::Broken(_)
        | Fault::Stalled
        | Fault::Status(_)
        | Fault::RateLimited { .. }
        | Fault::BreakerOpen { .. }
        | Fault::RangeRefused
        | Fault::Expired
        | Fault::BadRedirect(_)
        | Fault::Forbidden(_)
        | Fault::TokenFailed(_)
        | Fault::TooLarge
        | Fault::Encoded(_)
        | Fault::Offline => None,
    }
}

/// An upstream's refusal as one client's answer, of which nothing is remembered.
pub(super) fn refusal_alone(source: &Source, thing: Thing, error: UpstreamError) -> CacheError {
    match refusal_in(thing, error.fault()) {
        Some((refusal, _)) => refused(source, thing, refusal),
        None => CacheError::Upstream(Arc::new(error)),
    }
}

/// The error that a remembered refusal means.
pub(super) fn refused(source: &Source, thing: Thing, refusal: Refusal) -> CacheError {
    match refusal {
        Refusal::Unknown(code) => CacheError::Unknown {
            thing,
            code,
            source_: source.clone(),
        },
        Refusal::Denied(refused) => CacheError::Denied {
            source_: source.clone(),
            refused: Some(refused),
        },
    }
}

fn thing(kind: Kind) -> Thing {
    match kind {
        Kind::Manifest => Thing::Manifest,
        Kind::Blob => Thing::Blob,
    }
}
