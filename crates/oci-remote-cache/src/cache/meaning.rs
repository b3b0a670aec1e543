//! What of a tag's meanings is held here: the one of today, or only one from before.
//!
//! A HEAD tells that a tag has moved without bringing the new manifest. Until that is fetched, only an earlier one can be given when the
//! upstream goes silent; the tag's history in the catalog knows which, also after a restart.

use oci::Digest;

use super::Cache;
use super::freshness::{Held, Past, stand_in};
use super::manifest::{ManifestAnswer, Method};
use super::visit::Visit;
use crate::clock::Timestamp;
use crate::names::Source;
use crate::store::catalog::{Kind, TagRecord};
use crate::verdict::{Verdict, Why};

/// What a tag means as far as it can be given without the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meaning {
    /// The manifest.
    pub(super) digest: Digest,
    /// When the upstream last said so.
    pub(super) seen: Timestamp,
}

impl Cache {
    /// What is held of a tag.
    pub(super) fn holding(&self, record: &TagRecord) -> Held {
        if self.is_held(&record.source, &record.digest) {
            return Held::Meant;
        }
        self.earlier(record)
            .map_or(Held::Nothing, |_earlier| Held::Earlier)
    }

    /// What a tag means, or the last that it meant, of which the manifest is held.
    pub(super) fn held_meaning(&self, record: &TagRecord) -> Option<Meaning> {
        if self.is_held(&record.source, &record.digest) {
            return Some(Meaning {
                digest: record.digest,
                seen: record.checked,
            });
        }
        self.earlier(record)
    }

    /// What is held for a tag whose upstream does not answer, of what it means or else meant before; `None` when that is nothing.
    pub(super) async fn stale(
        &self,
        visit: &Visit,
        record: &TagRecord,
        (method, why): (Method, Why),
    ) -> Option<ManifestAnswer> {
        let meaning = self.held_meaning(record)?;
        let held = self.held(&meaning.digest).await?;
        if meaning.digest != record.digest {
            tracing::info!(source = %visit.source, tag = %record.tag, new = %record.digest, held = %meaning.digest,
                "the tag has moved, but its new manifest is not held: serving the one before");
        }
        Some(ManifestAnswer {
            digest: meaning.digest.into(),
            media_type: held.media_type,
            size: held.body.len() as u64,
            body: (method == Method::Get).then_some(held.body),
            verdict: Verdict::Stale(why),
            age: Some(meaning.seen.age(self.inner.clock.now())),
            warnings: None,
        })
    }

    fn earlier(&self, record: &TagRecord) -> Option<Meaning> {
        let catalog = self.inner.store.catalog();
        let history = catalog.tag_history(&record.source, &record.tag);
        let eras = history.unwrap_or_else(|error| {
            self.store_fault(&error);
            Vec::new()
        });
        let era = stand_in(eras, |era| {
            if era.deleted {
                Past::Deleted
            } else if self.is_held(&record.source, &era.digest) {
                Past::Held
            } else {
                Past::NotHeld
            }
        })?;
        Some(Meaning {
            digest: era.digest,
            seen: era.last_seen,
        })
    }

    /// Whether the repository holds the manifest, and it is here.
    fn is_held(&self, source: &Source, digest: &Digest) -> bool {
        self.is_member(source, digest, Kind::Manifest)
            && (self.inner.store.contains(digest) || self.inner.manifests.get(digest).is_some())
    }
}
