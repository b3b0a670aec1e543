//! Manifests: by digest for ever, by tag as fresh as the rules say.
//!
//! The bytes are kept exactly as they came, beside the media type they came with. What is not a usable manifest (ambiguous, mistyped, an
//! HTML page) is refused and never kept, so that the mapping of before stays.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci::{AnyDigest, Digest, ManifestView, MediaType, Reference, Tag, Warning};

use super::error::CacheError;
use super::freshness::{Fallback, Freshness, Instead, Meanwhile};
use super::revalidate::tag_record;
use super::right::Claim;
use super::visit::Visit;
use super::{Cache, all_of};
use crate::clock::Timestamp;
use crate::deadline::Deadline;
use crate::fill::Told;
use crate::names::{CredentialId, Source};
use crate::policy::{Grant, May};
use crate::store::catalog::{
    Change, Kind, ManifestRecord, Membership, PendingRecord, Proof, TagRecord,
};
use crate::store::spool::Verified;
pub use crate::upstream::Method;
use crate::upstream::{Answer, Resource};
use crate::verdict::{Verdict, Why};

/// How a manifest is wanted.
#[derive(Clone, Debug)]
pub struct ManifestWish {
    /// With its bytes, or only what is known of it.
    pub method: Method,
    /// The client's `Accept` lines joined; `None` when it sent none.
    pub accept: Option<String>,
}

/// A manifest, or for HEAD what is known of it.
#[derive(Clone, Debug)]
pub struct ManifestAnswer {
    /// What the bytes hash to; as it was asked for, where it was asked for by digest.
    pub digest: AnyDigest,
    /// Its type.
    pub media_type: MediaType,
    /// Size in bytes.
    pub size: u64,
    /// The bytes; `None` for HEAD.
    pub body: Option<Bytes>,
    /// What the cache did.
    pub verdict: Verdict,
    /// How long ago the upstream last said so, for answers by tag that were kept.
    pub age: Option<Duration>,
    /// What the upstream wants people to read.
    pub warnings: Option<Arc<[Warning]>>,
}

/// A manifest in memory.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) body: Bytes,
    pub(super) media_type: MediaType,
}

/// What an errand to the upstream brought.
#[derive(Clone, Debug)]
pub(super) struct Fetched {
    pub(super) digest: Digest,
    pub(super) media_type: MediaType,
    pub(super) size: u64,
    pub(super) body: Option<Bytes>,
    pub(super) verdict: Verdict,
}

/// A manifest that has been read and judged.
#[derive(Clone, Debug)]
pub(super) struct Judged {
    pub(super) digest: Digest,
    pub(super) view: ManifestView,
    pub(super) body: Bytes,
    pub(super) credential: CredentialId,
}

impl Cache {
    /// The manifest.
    pub async fn manifest(
        &self,
        grant: &Grant,
        reference: &Reference,
        wish: &ManifestWish,
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        let what = Resource::Manifest(reference.clone());
        let visit = self.enter(grant, what.clone(), deadline).await?;
        let answered = self.manifest_for(&visit, reference, wish, deadline).await;
        let error = match answered {
            Ok(answer) => return Ok(self.warned(&visit, answer)),
            Err(error) => error,
        };
        let again = self.enter_again(grant, (&visit, what), error, deadline);
        let own = Box::pin(again).await?;
        let answered = Box::pin(self.manifest_for(&own, reference, wish, deadline)).await;
        answered.map(|answer| self.warned(&own, answer))
    }

    async fn manifest_for(
        &self,
        visit: &Visit,
        reference: &Reference,
        wish: &ManifestWish,
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        if visit.may == May::PullCached {
            return self.held_manifest(visit, reference, wish).await;
        }
        match reference {
            Reference::Digest(AnyDigest::Known(digest)) => {
                self.manifest_by_digest(visit, *digest, wish.method, deadline)
                    .await
            }
            Reference::Digest(AnyDigest::Foreign(_)) => {
                self.pass_manifest(visit, reference, wish, deadline).await
            }
            Reference::Tag(tag) => self.manifest_by_tag(visit, tag, wish, deadline).await,
        }
    }

    async fn manifest_by_tag(
        &self,
        visit: &Visit,
        tag: &Tag,
        wish: &ManifestWish,
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        let record = self.tag_record(visit, tag);
        let answer = match (self.freshness(visit, tag, record.as_ref())?, record) {
            (Freshness::Fresh(age, _), Some(record)) => {
                let how = (wish.method, Verdict::Hit, age);
                self.by_record(visit, &record, how, deadline).await?
            }
            (Freshness::Stale(age, Instead::Offline, _), Some(record)) => {
                let how = (wish.method, Why::Offline);
                if let Some(held) = self.stale(visit, &record, how).await {
                    held
                } else {
                    // Says that the upstream is switched off, unless it is a HEAD.
                    let how = (wish.method, Verdict::Stale(Why::Offline), age);
                    self.by_record(visit, &record, how, deadline).await?
                }
            }
            (Freshness::Stale(age, instead, meanwhile), Some(record)) => {
                if meanwhile == Meanwhile::Ask {
                    self.revalidate_later(visit, tag, wish.method);
                }
                let how = (wish.method, Verdict::Stale(instead.into()), age);
                self.by_record(visit, &record, how, deadline).await?
            }
            (Freshness::Ask(fallback), record) => {
                self.asked_tag(visit, tag, (wish.method, fallback, record), deadline)
                    .await?
            }
            (Freshness::Fresh(..) | Freshness::Stale(..), None) => {
                self.asked_tag(visit, tag, (wish.method, Fallback::Nothing, None), deadline)
                    .await?
            }
        };
        if oci::accepts(wish.accept.as_deref(), &answer.media_type) {
            return Ok(answer);
        }
        let reference = Reference::Tag(tag.clone());
        self.pass_manifest(visit, &reference, wish, deadline).await
    }

    /// Asks the upstream about a tag, and falls back to what is held when it gives no answer.
    async fn asked_tag(
        &self,
        visit: &Visit,
        tag: &Tag,
        (method, fallback, record): (Method, Fallback, Option<TagRecord>),
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        let answered = match self.revalidate(visit, tag, method, deadline).await {
            Ok(fetched) => {
                self.with_body(visit, tag, (fetched, method), deadline)
                    .await
            }
            Err(error) => Err(error),
        };
        let error = match answered {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let gone = matches!(error, CacheError::Unknown { .. });
        let why = match fallback {
            Fallback::Held | Fallback::HeldThoughDeleted if error.is_outage() => error.why(),
            Fallback::HeldThoughDeleted if gone => Why::Deleted,
            Fallback::Held
            | Fallback::HeldThoughDeleted
            | Fallback::Nothing
            | Fallback::Gone
            | Fallback::Refused => return Err(error),
        };
        let Some(record) = record else {
            return Err(error);
        };
        tracing::warn!(source = %visit.source, %tag, %error, "serving a tag past its age");
        let stale = self.stale(visit, &record, (method, why)).await;
        stale.ok_or(error)
    }

    /// Answers with a tag's mapping, fetching the manifest by digest where only the mapping is held.
    async fn by_record(
        &self,
        visit: &Visit,
        record: &TagRecord,
        (method, verdict, age): (Method, Verdict, Duration),
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        let fetched = Fetched {
            digest: record.digest,
            media_type: record.media_type.clone(),
            size: record.size,
            body: None,
            verdict,
        };
        let answer = self
            .with_body(visit, &record.tag, (fetched, method), deadline)
            .await?;
        Ok(ManifestAnswer {
            age: Some(age),
            ..answer
        })
    }

    /// Adds the bytes, where they are wanted and did not come along. A tag that moved between the upstream's HEAD and our GET by digest
    /// is fetched by its name.
    async fn with_body(
        &self,
        visit: &Visit,
        tag: &Tag,
        (fetched, method): (Fetched, Method),
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        let head = fetched.answer(method);
        if method == Method::Head && head.body.is_none() {
            return Ok(self.as_held(visit, head).await);
        }
        if head.body.is_some() {
            return Ok(head);
        }
        let AnyDigest::Known(digest) = head.digest else {
            return Ok(head);
        };
        match self
            .manifest_by_digest(visit, digest, method, deadline)
            .await
        {
            Ok(whole) if whole.verdict == Verdict::Hit => Ok(ManifestAnswer {
                verdict: head.verdict,
                ..whole
            }),
            Ok(whole) => Ok(whole),
            Err(CacheError::Unknown { .. }) => {
                let moved = deadline.run(Box::pin(self.get_tag(visit, tag))).await;
                Ok(moved.map_err(|_late| CacheError::Late)??.answer(method))
            }
            Err(error) => Err(error),
        }
    }

    /// A HEAD's answer with the size and type of the manifest itself, where it is held: an upstream's HEAD may have told others.
    async fn as_held(&self, visit: &Visit, head: ManifestAnswer) -> ManifestAnswer {
        let AnyDigest::Known(digest) = head.digest else {
            return head;
        };
        match self.brought(visit, digest).await {
            Some(manifest) => ManifestAnswer {
                size: manifest.size,
                media_type: manifest.media_type,
                ..head
            },
            None => head,
        }
    }

    async fn manifest_by_digest(
        &self,
        visit: &Visit,
        digest: Digest,
        method: Method,
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        if let Claim::Proven(right) = self.claim(visit, digest, Kind::Manifest, deadline).await?
            && let Some(held) = self.held(right.digest()).await
        {
            return Ok(ManifestAnswer {
                digest: digest.into(),
                size: held.body.len() as u64,
                media_type: held.media_type,
                body: (method == Method::Get).then_some(held.body),
                verdict: Verdict::Hit,
                age: None,
                warnings: None,
            });
        }
        let fetched = self.fetch_digest(visit, digest, deadline).await?;
        Ok(fetched.answer(method))
    }

    /// Keeps a manifest, and the tag it came by: on disk, in the catalog, in memory. A cache fault costs the keeping, not the answer.
    pub(super) async fn keep(
        &self,
        source: &Source,
        judged: Judged,
        tag: Option<(&Tag, Timestamp)>,
    ) -> Fetched {
        self.remember_layers(&judged.view);
        self.inner.images.expect(source, judged.view.blobs());
        let judged = self.as_known(judged);
        let mut changes = judged.changes(source, tag);
        let Judged {
            digest, view, body, ..
        } = judged;
        let size = body.len() as u64;
        let written = self.write_manifest(digest, body.clone()).await;
        if let Some(verified) = &written {
            let spool_name = verified.spool_name();
            changes.push(Change::Pending(PendingRecord {
                digest,
                size,
                spool_name,
            }));
        }
        let media_type = view.media_type().clone();
        let held = Held {
            body: body.clone(),
            media_type: media_type.clone(),
        };
        self.inner.manifests.insert(digest, held);
        if let Err(error) = self.inner.store.catalog().record(changes).await {
            self.store_fault(&error);
        }
        if let Some(verified) = written {
            self.publish_later(verified);
        }
        let kept = self.inner.store.writable();
        let verdict = if kept {
            Verdict::Miss
        } else {
            Verdict::Bypass(Why::Disk)
        };
        Fetched {
            digest,
            media_type,
            size,
            body: Some(body),
            verdict,
        }
    }

    /// The same bytes may come under two types that clients know, from two places, where they do not say theirs themselves. One of them is
    /// the manifest's for everyone, whoever comes last: OCI's, for only its manifests need not say what they are.
    fn as_known(&self, judged: Judged) -> Judged {
        let known = self.inner.store.catalog().manifest(&judged.digest);
        match known.ok().flatten() {
            Some(known) if known.media_type.is_oci() => Judged {
                view: judged.view.as_type(known.media_type),
                ..judged
            },
            Some(_) | None => judged,
        }
    }

    /// What a manifest says of its layers lets a lazy client's first range be asked for by itself, before the upstream has told the size.
    fn remember_layers(&self, view: &ManifestView) {
        for blob in view.blobs() {
            if let AnyDigest::Known(layer) = blob.digest {
                let told = Told {
                    size: blob.size,
                    in_pieces: blob.in_pieces,
                };
                self.inner.told.insert(layer, told);
            }
        }
    }

    async fn write_manifest(&self, digest: Digest, body: Bytes) -> Option<Verified> {
        let store = self.inner.store.clone();
        if store.contains(&digest) || !store.writable() {
            return None;
        }
        let written = self
            .inner
            .tasks
            .spawn_blocking(move || Verified::write(store.layout(), digest, &body))
            .await
            .ok()?;
        match written {
            Ok(verified) => verified,
            Err(error) => {
                self.inner
                    .store
                    .note_failure("a manifest could not be written", &error);
                tracing::warn!(%error, %digest, "a manifest could not be written; it is served all the same");
                None
            }
        }
    }

    /// The syncs and the rename, off the client's path; what a kill leaves half done is finished at the next start.
    fn publish_later(&self, verified: Verified) {
        let cache = self.clone();
        self.inner.tasks.spawn(async move {
            let spool = verified.clone();
            if let Err(error) = cache.inner.store.admit_held(verified, None).await {
                cache.store_fault(&error);
                let discarded = cache.inner.tasks.spawn_blocking(move || spool.discard());
                // What cannot be removed is swept at the next start.
                discarded.await.ok();
            }
        });
    }

    /// The manifest's bytes, from memory or disk. The caller has the right to them.
    pub(super) async fn held(&self, digest: &Digest) -> Option<Held> {
        if let Some(held) = self.inner.manifests.get(digest) {
            self.inner.store.touch(digest);
            return Some(held);
        }
        let record = self.inner.store.catalog().manifest(digest).ok().flatten()?;
        let blob = self.inner.store.blob(digest).await?;
        let span = blob.span(all_of(blob.size));
        let body = self
            .inner
            .tasks
            .spawn_blocking(move || span.read())
            .await
            .ok()?
            .ok()?;
        let held = Held {
            body,
            media_type: record.media_type,
        };
        self.inner.manifests.insert(*digest, held.clone());
        Some(held)
    }
}

impl Judged {
    /// What to write down of it.
    fn changes(&self, source: &Source, tag: Option<(&Tag, Timestamp)>) -> Vec<Change> {
        let (digest, size) = (self.digest, self.body.len() as u64);
        let media_type = self.view.media_type().clone();
        let membership = Membership {
            source: source.clone(),
            digest,
            kind: Kind::Manifest,
            credential: self.credential.clone(),
            proof: Proof::Delivered,
        };
        let record = ManifestRecord {
            media_type: media_type.clone(),
            size,
        };
        let tag = tag.map(|(tag, checked)| {
            let record = tag_record(source, tag, (digest, media_type, size), checked);
            Change::Tag(Box::new(record))
        });
        let known = [
            Change::Membership(membership),
            Change::Manifest(digest, record),
        ];
        known.into_iter().chain(tag).collect()
    }
}

impl Fetched {
    fn answer(self, method: Method) -> ManifestAnswer {
        ManifestAnswer {
            digest: self.digest.into(),
            media_type: self.media_type,
            size: self.size,
            body: self.body.filter(|_| method == Method::Get),
            verdict: self.verdict,
            age: None,
            warnings: None,
        }
    }

    /// The same, as seen by one who started the errand or joined it.
    pub(super) fn seen_by(self, role: super::single_flight::Role) -> Self {
        let verdict = match (role, self.verdict) {
            (super::single_flight::Role::Joined, Verdict::Miss) => Verdict::Collapsed,
            (_, verdict) => verdict,
        };
        Self { verdict, ..self }
    }
}

/// Reads and judges a manifest answer: its size, its type, and that it hashes to what it should.
pub(super) fn read_manifest(
    source: &Source,
    (answer, body): (Answer, Bytes),
    wanted: Option<Digest>,
) -> Result<Judged, CacheError> {
    let announced = match answer.digest() {
        Some(AnyDigest::Known(digest)) => Some(digest),
        Some(AnyDigest::Foreign(_)) | None => None,
    };
    let credential = answer.credential().clone();
    let bad = |why| CacheError::BadManifest {
        source_: source.clone(),
        why,
    };
    // The upstream may announce another algorithm than the one asked for: what was asked for decides.
    let expected = wanted.or(announced);
    let algorithm = expected.map_or(oci::Algorithm::Sha256, |digest| digest.algorithm());
    let digest = Digest::of(algorithm, &body);
    let wrong = |expected: Digest| CacheError::WrongDigest {
        source_: source.clone(),
        wanted: Box::new(expected.into()),
    };
    if let Some(wanted) = wanted.filter(|wanted| *wanted != digest) {
        return Err(wrong(wanted));
    }
    let view = ManifestView::parse(&body, answer.content_type()).map_err(bad)?;
    if let Some(expected) = expected.filter(|expected| *expected != digest) {
        return Err(wrong(expected));
    }
    Ok(Judged {
        digest,
        view,
        body,
        credential,
    })
}
