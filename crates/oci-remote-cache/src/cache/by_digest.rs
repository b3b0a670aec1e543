//! A manifest from the upstream, by its digest: one errand for all who wait, and another place where one sends other bytes.

use std::sync::Arc;

use oci::{Digest, MANIFEST_LIMIT, Reference};

use super::error::{CacheError, Thing};
use super::manifest::{Fetched, read_manifest};
use super::right::refused;
use super::visit::Visit;
use super::{Cache, manifest_ask};
use crate::deadline::Deadline;
use crate::upstream::{Ask, Method, Mirrors};

impl Cache {
    /// Fetches a manifest by digest; those who ask meanwhile share the errand.
    pub(super) async fn fetch_digest(
        &self,
        visit: &Visit,
        digest: Digest,
        deadline: Deadline,
    ) -> Result<Fetched, CacheError> {
        if let Some(refusal) =
            self.inner
                .negatives
                .find(&(visit.visitor(), Thing::Manifest, digest.to_string()))
        {
            return Err(refused(visit, Thing::Manifest, refusal));
        }
        let (cache, from) = (self.clone(), visit.clone());
        let errand = self
            .inner
            .digests
            .run((visit.visitor(), digest), move || async move {
                Box::pin(cache.get_digest(&from, digest)).await
            });
        let landed = deadline
            .run(errand)
            .await
            .map_err(|_late| CacheError::Late)?;
        let (fetched, role) = landed.map_err(|_lost| CacheError::Stopping)?;
        fetched.map(|fetched| fetched.seen_by(role))
    }

    async fn get_digest(&self, visit: &Visit, digest: Digest) -> Result<Fetched, CacheError> {
        // An earlier errand may have brought it between the look that missed it and this one.
        if let Some(fetched) = self.brought(visit, digest).await {
            return Ok(fetched);
        }
        let places = match visit.mirrors {
            Mirrors::Welcome => self.origin(visit)?.upstream.places(),
            Mirrors::LeftOut => 1,
        };
        let deadline = Deadline::for_answer();
        let mut place = 0;
        loop {
            match self.get_digest_from(visit, digest, place, deadline).await {
                // Another place may hold what this one has spoiled.
                Err(error @ CacheError::WrongDigest { .. }) if place + 1 < places => {
                    tracing::warn!(source = %visit.source, %error, "asking the next mirror");
                    place += 1;
                }
                answered => return answered,
            }
        }
    }

    async fn get_digest_from(
        &self,
        visit: &Visit,
        digest: Digest,
        place: usize,
        deadline: Deadline,
    ) -> Result<Fetched, CacheError> {
        let upstream = &self.origin(visit)?.upstream;
        let reference = Reference::Digest(digest.into());
        let ask = Ask {
            mirror: place,
            ..manifest_ask(visit, reference, Method::Get)
        };
        let answer = match upstream.whole(&ask, MANIFEST_LIMIT, deadline).await {
            Ok(answer) => answer,
            Err(error) => {
                let error = Arc::new(error);
                return Err(self
                    .judge_refusal(visit, Thing::Manifest, digest.to_string(), &error)
                    .await);
            }
        };
        self.lift(visit, answer.0.allowed()).await;
        let warnings = answer.0.warnings();
        let judged = read_manifest(visit, answer, Some(digest))?;
        self.note_warnings(visit, (digest.into(), Method::Get), warnings);
        Ok(self.keep(visit, judged, None).await)
    }
}
