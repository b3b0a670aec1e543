//! Manifests that pass through uncached: as one client's `Accept` wants them, or under a digest of an algorithm we do not know.

use std::sync::Arc;

use oci::{MANIFEST_LIMIT, Reference};

use super::access::denies;
use super::error::{CacheError, Thing};
use super::manifest::{Judged, ManifestAnswer, ManifestWish, Method, read_manifest};
use super::right::refusal_alone;
use super::visit::Visit;
use super::{Cache, manifest_ask};
use crate::deadline::Deadline;
use crate::upstream::{Ask, UpstreamError};
use crate::verdict::{Verdict, Why};

impl Cache {
    /// The upstream's own answer to this client's `Accept`, or to a digest that cannot be verified. It is never kept.
    pub(super) async fn pass_manifest(
        &self,
        visit: &Visit,
        reference: &Reference,
        wish: &ManifestWish,
        deadline: Deadline,
    ) -> Result<ManifestAnswer, CacheError> {
        let (cache, from, wanted) = (self.clone(), visit.clone(), reference.clone());
        let (key, accept) = (reference.to_string(), wish.accept.clone());
        let errand = self
            .inner
            .passes
            .run((visit.visitor(), key, accept.clone()), move || async move {
                cache.get_as_asked(&from, wanted, accept).await
            });
        let landed = deadline.run(errand).await;
        let landed = landed.map_err(|_late| CacheError::Late)?;
        let judged = landed.map_err(|_lost| CacheError::Stopping)?.0?;
        let foreign = match reference {
            Reference::Digest(digest) => Some(digest.clone()),
            Reference::Tag(_) => None,
        };
        let why = if foreign.is_some() {
            Why::UnknownAlgorithm
        } else {
            Why::Accept
        };
        Ok(ManifestAnswer {
            digest: foreign.unwrap_or_else(|| judged.digest.into()),
            media_type: judged.view.media_type().clone(),
            size: judged.body.len() as u64,
            body: (wish.method == Method::Get).then_some(judged.body),
            verdict: Verdict::Bypass(why),
            age: None,
            warnings: None,
        })
    }

    /// The manifest as one client wants it, by its own `Accept`. What the upstream refuses of that says nothing about the tag as others
    /// ask for it: it is neither remembered, nor does it suspend.
    async fn get_as_asked(
        &self,
        visit: &Visit,
        reference: Reference,
        accept: Option<String>,
    ) -> Result<Judged, CacheError> {
        let by_tag = matches!(reference, Reference::Tag(_));
        // A login of a client's own that is refused is refused, whatever it asked for.
        let alone = |error: &UpstreamError| by_tag && !(visit.is_personal() && denies(error));
        let name = reference.to_string();
        let ask = Ask {
            accept,
            ..manifest_ask(visit, reference, Method::Get)
        };
        let upstream = &self.origin(visit)?.upstream;
        let answered = upstream.whole(&ask, MANIFEST_LIMIT, Deadline::for_answer());
        match answered.await {
            Ok(answer) => {
                let warnings = answer.0.warnings();
                let judged = read_manifest(visit, answer, None)?;
                self.note_warnings(visit, (judged.digest.into(), Method::Get), warnings);
                Ok(judged)
            }
            Err(error) if alone(&error) => Err(refusal_alone(visit, Thing::Manifest, error)),
            Err(error) => Err(self
                .judge_refusal(visit, Thing::Manifest, name, &Arc::new(error))
                .await),
        }
    }
}
