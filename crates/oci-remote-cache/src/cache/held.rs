//! Answers for clients that may have only what is held: the upstream is not asked about content, and nothing comes in for them.

use std::sync::Arc;

use oci::{AnyDigest, Digest, Reference};

use super::Cache;
use super::blob::{BlobAnswer, BlobHead};
use super::error::{CacheError, Thing};
use super::freshness::{Fallback, Freshness, Instead};
use super::listing::{List, Listing};
use super::manifest::{Fetched, ManifestAnswer, ManifestWish, Method};
use super::visit::Visit;
use crate::names::Source;
use crate::store::Blob;
use crate::store::catalog::Kind;
use crate::verdict::{Verdict, Why};

impl Cache {
    pub(super) async fn held_blob(
        &self,
        visit: &Visit,
        digest: &AnyDigest,
    ) -> Result<BlobAnswer, CacheError> {
        let blob = self.stored_blob(visit, digest).await?;
        Ok(BlobAnswer::Stored(blob))
    }

    pub(super) async fn held_blob_head(
        &self,
        visit: &Visit,
        digest: &AnyDigest,
    ) -> Result<BlobHead, CacheError> {
        let blob = self.stored_blob(visit, digest).await?;
        Ok(BlobHead {
            size: Some(blob.size),
            verdict: Verdict::Hit,
        })
    }

    /// A tag is what the upstream said last; past its age it is served as stale, and says so.
    pub(super) async fn held_manifest(
        &self,
        visit: &Visit,
        reference: &Reference,
        wish: &ManifestWish,
    ) -> Result<ManifestAnswer, CacheError> {
        let source = &visit.source;
        let none = || not_held(source, Thing::Manifest);
        let (digest, age, verdict) = match reference {
            Reference::Digest(AnyDigest::Known(digest)) => (*digest, None, Verdict::Hit),
            Reference::Digest(AnyDigest::Foreign(_)) => return Err(none()),
            Reference::Tag(tag) => {
                let record = self.tag_record(source, tag).ok_or_else(none)?;
                let verdict = match self.freshness(visit, tag, Some(&record))? {
                    Freshness::Fresh(..) => Verdict::Hit,
                    Freshness::Stale(_, Instead::Window, _)
                    | Freshness::Ask(Fallback::Held | Fallback::HeldThoughDeleted) => {
                        Verdict::Stale(Why::OnlyHeld)
                    }
                    Freshness::Stale(_, instead, _) => Verdict::Stale(instead.into()),
                    Freshness::Ask(Fallback::Nothing | Fallback::Gone | Fallback::Refused) => {
                        return Err(none());
                    }
                };
                let meaning = self.held_meaning(&record).ok_or_else(none)?;
                let age = meaning.seen.age(self.inner.clock.now());
                (meaning.digest, Some(age), verdict)
            }
        };
        self.has_right(visit, &digest, Kind::Manifest)?;
        let held = self.held(&digest).await.ok_or_else(none)?;
        Ok(ManifestAnswer {
            digest: digest.into(),
            media_type: held.media_type,
            size: held.body.len() as u64,
            body: (wish.method == Method::Get).then_some(held.body),
            verdict,
            age,
            warnings: None,
        })
    }

    pub(super) fn held_listing(
        &self,
        visit: &Visit,
        list: List,
    ) -> Result<(Arc<Listing>, Verdict), CacheError> {
        let source = &visit.source;
        let thing = list.thing();
        self.is_open(visit)?;
        let held = self.known_page(visit, list);
        let listing = held.ok_or_else(|| not_held(source, thing))?;
        let fresh = self.age(&listing) < self.origin(source)?.rules.tag_ttl;
        let verdict = if fresh {
            Verdict::Hit
        } else {
            Verdict::Stale(Why::OnlyHeld)
        };
        Ok((listing, verdict))
    }

    async fn stored_blob(&self, visit: &Visit, digest: &AnyDigest) -> Result<Blob, CacheError> {
        let none = || not_held(visit, Thing::Blob);
        let AnyDigest::Known(digest) = digest else {
            return Err(none());
        };
        self.has_right(visit, digest, Kind::Blob)?;
        self.inner.store.blob(digest).await.ok_or_else(none)
    }

    /// Whether the records show that the granted repository holds the digest; nobody else is asked.
    fn has_right(&self, visit: &Visit, digest: &Digest, kind: Kind) -> Result<(), CacheError> {
        let source = &visit.source;
        self.is_open(visit)?;
        let thing = match kind {
            Kind::Blob => Thing::Blob,
            Kind::Manifest => Thing::Manifest,
        };
        if self.is_member(source, digest, kind) {
            Ok(())
        } else {
            Err(not_held(source, thing))
        }
    }

    fn is_open(&self, visit: &Visit) -> Result<(), CacheError> {
        if self.is_suspended(visit)? {
            return Err(CacheError::Denied {
                source_: visit.source.clone(),
                refused: None,
            });
        }
        Ok(())
    }

    /// A manifest that its repository is on record as holding, as an errand would bring it.
    pub(super) async fn brought(&self, visit: &Visit, digest: Digest) -> Option<Fetched> {
        if !self.is_member(visit, &digest, Kind::Manifest) {
            return None;
        }
        let held = self.held(&digest).await?;
        Some(Fetched {
            digest,
            media_type: held.media_type,
            size: held.body.len() as u64,
            body: Some(held.body),
            verdict: Verdict::Hit,
        })
    }
}

fn not_held(source: &Source, thing: Thing) -> CacheError {
    CacheError::NotHeld {
        thing,
        source_: source.clone(),
    }
}
