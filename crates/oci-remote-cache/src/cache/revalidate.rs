//! Asking the upstream about a tag: as little as possible, once for all who wait.
//!
//! Docker Hub counts manifest GETs and not HEADs, so a known tag is asked about by HEAD, and its manifest is fetched by digest only when
//! the digest is new. A tag nobody has asked for before is one GET; or one HEAD, when the client sent a HEAD.

use std::sync::Arc;

use oci::{AnyDigest, Digest, MANIFEST_LIMIT, MediaType, Reference, Tag};

use super::error::{CacheError, Thing};
use super::freshness::{Circumstances, Freshness, Known, Reach, Word, judge};
use super::manifest::{Fetched, read_manifest};
use super::negative::Question;
use super::right::refused;
use super::visit::Visit;
use super::{Cache, manifest_ask};
use crate::clock::Timestamp;
use crate::deadline::Deadline;
use crate::names::Source;
use crate::store::catalog::{Change, TagRecord};
use crate::upstream::{Answer, Fault, Method, UpstreamError};
use crate::verdict::Verdict;

/// What a HEAD told about a tag.
struct Mapping {
    digest: Digest,
    media_type: MediaType,
    size: u64,
}

impl Cache {
    /// What is recorded of a tag.
    pub(super) fn tag_record(&self, source: &Source, tag: &Tag) -> Option<TagRecord> {
        self.inner
            .store
            .catalog()
            .tag(source, tag)
            .unwrap_or_else(|error| {
                self.store_fault(&error);
                None
            })
    }

    /// What is to be done about a tag of which this is recorded.
    pub(super) fn freshness(
        &self,
        visit: &Visit,
        tag: &Tag,
        record: Option<&TagRecord>,
    ) -> Result<Freshness, CacheError> {
        let source = &visit.source;
        let refused = self.is_suspended(visit)?;
        let hidden = visit.is_personal() && self.inner.negatives.hides(&of_tag(visit, tag));
        let known = record.map(|record| Known {
            checked: record.checked,
            word: match (refused, record.suspended || hidden) {
                (true, _) => Word::Refused,
                (false, true) => Word::Deleted,
                (false, false) => Word::Holds,
            },
            held: self.holding(record),
        });
        let origin = self.origin(source)?;
        let circumstances = Circumstances {
            reach: if origin.upstream.offline().is_on() {
                Reach::Offline
            } else {
                Reach::Online
            },
            strain: origin.upstream.strain(&source.repository),
        };
        let now = self.inner.clock.now();
        let freshness = judge(origin.rules.of(tag.as_str()), known, circumstances, now);
        tracing::debug!(%source, %tag, ?freshness, "judged");
        Ok(freshness)
    }

    /// Has the upstream asked behind the client's back. What comes of it is in the catalog, where the next request finds it.
    pub(super) fn revalidate_later(&self, visit: &Visit, tag: &Tag, method: Method) {
        let (cache, visit, tag) = (self.clone(), visit.clone(), tag.clone());
        self.inner.tasks.spawn(async move {
            let asked = cache
                .revalidate(&visit, &tag, method, Deadline::for_answer())
                .await;
            if let Err(error) = asked {
                tracing::info!(source = %visit.source, %tag, %error, "could not be asked about meanwhile");
            }
        });
    }

    /// Has the upstream say what a tag is now; those who ask meanwhile share the errand.
    pub(super) async fn revalidate(
        &self,
        visit: &Visit,
        tag: &Tag,
        method: Method,
        deadline: Deadline,
    ) -> Result<Fetched, CacheError> {
        if let Some(refusal) = self.inner.negatives.find(&of_tag(visit, tag)) {
            return Err(refused(visit, Thing::Manifest, refusal));
        }
        let (cache, from, name) = (self.clone(), visit.clone(), tag.clone());
        let errand = self
            .inner
            .tags
            .run((visit.visitor(), tag.clone()), move || async move {
                Box::pin(cache.ask_tag(&from, &name, method)).await
            });
        let landed = deadline
            .run(errand)
            .await
            .map_err(|_late| CacheError::Late)?;
        let (fetched, role) = landed.map_err(|_lost| CacheError::Stopping)?;
        fetched.map(|fetched| fetched.seen_by(role))
    }

    async fn ask_tag(
        &self,
        visit: &Visit,
        tag: &Tag,
        method: Method,
    ) -> Result<Fetched, CacheError> {
        let record = self.tag_record(visit, tag);
        if record.is_none() && method == Method::Get {
            return self.get_tag(visit, tag).await;
        }
        let ask = manifest_ask(visit, Reference::Tag(tag.clone()), Method::Head);
        match self
            .origin(visit)?
            .upstream
            .ask(ask, Deadline::for_answer())
            .await
        {
            Ok(answer) => match mapping(&answer) {
                Some(mapping) => {
                    self.lift(visit, answer.allowed()).await;
                    let whose = (mapping.digest.into(), Method::Head);
                    self.note_warnings(visit, whose, answer.warnings());
                    self.mapped(visit, tag, (mapping, record, method)).await
                }
                None => self.get_tag(visit, tag).await,
            },
            Err(error) if head_is_not_final(&error) => self.get_tag(visit, tag).await,
            Err(error) => Err(self.tag_refused(visit, tag, error).await),
        }
    }

    /// The upstream said by HEAD what the tag is.
    async fn mapped(
        &self,
        visit: &Visit,
        tag: &Tag,
        (mapping, before, method): (Mapping, Option<TagRecord>, Method),
    ) -> Result<Fetched, CacheError> {
        let source = &visit.source;
        let same = before
            .as_ref()
            .is_some_and(|record| record.digest == mapping.digest);
        if !same && method == Method::Get {
            return self.get_moved(visit, tag, mapping.digest).await;
        }
        let now = self.inner.clock.now();
        let mut record = tag_record(
            source,
            tag,
            (mapping.digest, mapping.media_type, mapping.size),
            now,
        );
        if let Some(before) = before.filter(|_| same) {
            // What was kept with the manifest is surer than a HEAD's headers.
            record = TagRecord {
                checked: now,
                suspended: false,
                ..before
            };
        }
        let fetched = Fetched {
            digest: record.digest,
            media_type: record.media_type.clone(),
            size: record.size,
            body: None,
            verdict: if same {
                Verdict::Revalidated
            } else {
                Verdict::Miss
            },
        };
        self.record_tag(visit, record).await;
        Ok(fetched)
    }

    /// The tag has moved: the new manifest is fetched by digest, which pins what the HEAD promised.
    async fn get_moved(
        &self,
        visit: &Visit,
        tag: &Tag,
        digest: Digest,
    ) -> Result<Fetched, CacheError> {
        match self
            .fetch_digest(visit, digest, Deadline::for_answer())
            .await
        {
            Ok(fetched) => {
                let mapping = (digest, fetched.media_type.clone(), fetched.size);
                let record = tag_record(visit, tag, mapping, self.inner.clock.now());
                self.record_tag(visit, record).await;
                Ok(fetched)
            }
            Err(CacheError::Unknown { .. }) => self.get_tag(visit, tag).await,
            Err(error) => Err(error),
        }
    }

    pub(super) async fn get_tag(&self, visit: &Visit, tag: &Tag) -> Result<Fetched, CacheError> {
        let ask = manifest_ask(visit, Reference::Tag(tag.clone()), Method::Get);
        let deadline = Deadline::for_answer();
        let upstream = &self.origin(visit)?.upstream;
        let answer = match upstream.whole(&ask, MANIFEST_LIMIT, deadline).await {
            Ok(answer) => answer,
            Err(error) => return Err(self.tag_refused(visit, tag, error).await),
        };
        self.lift(visit, answer.0.allowed()).await;
        let warnings = answer.0.warnings();
        let judged = read_manifest(visit, answer, None)?;
        self.note_warnings(visit, (judged.digest.into(), Method::Get), warnings);
        self.inner.negatives.forget(&of_tag(visit, tag));
        Ok(self
            .keep(visit, judged, Some((tag, self.inner.clock.now())))
            .await)
    }

    /// The upstream refused a tag. A 404 suspends the tag, a 401 or 403 the repository; neither deletes anything. What one login, or
    /// nobody, is not shown may be hidden from it alone: then the tag is gone for it, and for others when they are told so themselves. A
    /// mirror's 404 is no word on what the upstream had.
    async fn tag_refused(&self, visit: &Visit, tag: &Tag, error: UpstreamError) -> CacheError {
        let source = &visit.source;
        let gone = matches!(error.fault(), Fault::NotFound { .. });
        let held = self.tag_record(source, tag).filter(|_| gone);
        if held.is_some() && error.is_gap_of_mirror() {
            return CacheError::Upstream(Arc::new(error));
        }
        if held.is_some() && visit.is_personal() {
            self.inner.negatives.hide(of_tag(visit, tag));
            if let Some(refusal) = self.doubt_proof(visit).await {
                return refusal;
            }
        } else if let Some(record) = held {
            if !record.suspended {
                tracing::info!(source = %source, %tag, "the upstream no longer has this tag");
            }
            let checked = self.inner.clock.now();
            let record = TagRecord {
                suspended: true,
                checked,
                ..record
            };
            self.record_tag(visit, record).await;
        }
        self.judge_refusal(visit, Thing::Manifest, tag.to_string(), &Arc::new(error))
            .await
    }

    async fn record_tag(&self, visit: &Visit, record: TagRecord) {
        self.inner.negatives.forget(&of_tag(visit, &record.tag));
        if !record.suspended {
            // What the tag names is there, whatever was said of it before it was pushed.
            let named = record.digest.to_string();
            let named = (visit.visitor(), Thing::Manifest, named);
            self.inner.negatives.forget(&named);
        }
        if let Err(error) = self
            .inner
            .store
            .catalog()
            .record(vec![Change::Tag(Box::new(record))])
            .await
        {
            self.store_fault(&error);
        }
    }
}

/// A tag's mapping as seen now.
pub(super) fn tag_record(
    source: &Source,
    tag: &Tag,
    (digest, media_type, size): (Digest, MediaType, u64),
    checked: Timestamp,
) -> TagRecord {
    TagRecord {
        source: source.clone(),
        tag: tag.clone(),
        digest,
        media_type,
        size,
        checked,
        first_seen: checked,
        suspended: false,
    }
}

/// A visitor's question for a tag.
pub(super) fn of_tag(visit: &Visit, tag: &Tag) -> Question {
    (visit.visitor(), Thing::Manifest, tag.to_string())
}

/// Some registries refuse HEAD where they would answer GET.
fn head_is_not_final(error: &UpstreamError) -> bool {
    error.fault().is_of_head() || matches!(error.fault(), Fault::Denied { status: 403, .. })
}

/// What a HEAD's headers tell, if they tell enough: containerd and Docker need digest, type and length.
fn mapping(answer: &Answer) -> Option<Mapping> {
    let Some(AnyDigest::Known(digest)) = answer.digest() else {
        return None;
    };
    let size = answer.content_length().filter(|&size| size > 0)?;
    let media_type = MediaType::parse(answer.content_type()?).ok()?;
    let usable = media_type.is_json() && media_type.kind() != oci::Kind::Schema1;
    usable.then_some(Mapping {
        digest,
        media_type,
        size,
    })
}
