//! Blobs: from the disk, from a fill under way, from a fill that starts now, or passed through.

use std::sync::Arc;

use bytes::Bytes;
use oci::{AnyDigest, Digest};

use super::error::{CacheError, Thing};
use super::right::{Claim, refused};
use super::single_flight::Role;
use super::visit::Visit;
use super::{Cache, all_of};
use crate::deadline::Deadline;
pub use crate::fill::direct::DirectReader;
use crate::fill::tail::Joined;
pub use crate::fill::tail::{Open, Part as TailPart, Release, Tail};
use crate::fill::{FillError, Found, Key, Phase, Standing, Wanted};
pub use crate::fill::{Wish, WishRange};
use crate::policy::{Grant, May};
pub use crate::store::Blob;
use crate::store::catalog::Kind;
use crate::upstream::resume::{BlobAsk, Mixing};
use crate::upstream::{Fault, Resource};
use crate::verdict::{Verdict, Why};

/// Blobs up to this many bytes are answered from memory: 64 KiB.
const SMALL_BLOB: u64 = 64 << 10;

/// Where a blob's bytes come from.
#[derive(Debug)]
pub enum BlobAnswer {
    /// The disk.
    Stored(Blob),
    /// Memory: small blobs, which an open and a read would cost more than their bytes.
    Held(Bytes),
    /// A fill, which this request leads or follows.
    Filling(Box<Open>, Verdict),
    /// The upstream, unverified and unkept: the digest's algorithm is not one we know.
    Passing {
        /// Size in bytes, if the upstream told.
        size: Option<u64>,
        /// The bytes.
        reader: Box<DirectReader>,
        /// Why they pass.
        verdict: Verdict,
    },
}

/// What is known of a blob without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobHead {
    /// Size in bytes, if anyone told.
    pub size: Option<u64>,
    /// Where that is known from.
    pub verdict: Verdict,
}

impl Cache {
    /// The blob, for a client's GET.
    pub async fn blob(
        &self,
        grant: &Grant,
        digest: &AnyDigest,
        wish: Wish,
        deadline: Deadline,
    ) -> Result<BlobAnswer, CacheError> {
        let answer = self.find_blob(grant, digest, wish, deadline).await?;
        if let AnyDigest::Known(digest) = digest {
            self.read_ahead(grant, digest, wish);
        }
        Ok(answer)
    }

    /// The blob, whoever wants it.
    pub(super) async fn find_blob(
        &self,
        grant: &Grant,
        digest: &AnyDigest,
        wish: Wish,
        deadline: Deadline,
    ) -> Result<BlobAnswer, CacheError> {
        let what = Resource::Blob(digest.clone());
        let visit = self.enter(grant, what.clone(), deadline).await?;
        let answered = self.blob_for(&visit, digest, wish, deadline).await;
        let Err(error) = answered else {
            return answered;
        };
        let again = self.enter_again(grant, (&visit, what), error, deadline);
        let own = Box::pin(again).await?;
        Box::pin(self.blob_for(&own, digest, wish, deadline)).await
    }

    async fn blob_for(
        &self,
        visit: &Visit,
        digest: &AnyDigest,
        wish: Wish,
        deadline: Deadline,
    ) -> Result<BlobAnswer, CacheError> {
        if visit.may == May::PullCached {
            return self.held_blob(visit, digest).await;
        }
        let digest = match digest {
            AnyDigest::Known(digest) => *digest,
            AnyDigest::Foreign(_) => return self.pass_through(visit, digest, deadline).await,
        };
        let mut standing = match self.claim(visit, digest, Kind::Blob, deadline).await? {
            Claim::Proven(_right) => Standing::Proven,
            Claim::Open => Standing::Unproven,
        };
        let negative = (visit.visitor(), Thing::Blob, digest.to_string());
        if standing == Standing::Unproven
            && let Some(refusal) = self.inner.negatives.find(&negative)
        {
            return Err(refused(visit, Thing::Blob, refusal));
        }
        if standing == Standing::Proven
            && let Some(body) = self.small(&digest)
        {
            return Ok(BlobAnswer::Held(body));
        }
        loop {
            let wanted = self.wanted(visit, digest, standing, wish)?;
            let (joined, role) = match self.inner.fills.find(&wanted).await {
                Found::Stored(blob) => return Ok(self.opened_small(blob).await),
                Found::Lead(joined) => (joined, Role::Lead),
                Found::Filling(joined) => (joined, Role::Joined),
                Found::Failed(error) => return Err(self.judge_fill(visit, digest, error).await),
                Found::ProveFirst => {
                    self.prove(visit, digest, Kind::Blob, deadline).await?;
                    standing = Standing::Proven;
                    continue;
                }
            };
            let opened = self.opened(visit, digest, joined, (role, deadline));
            if let Some(answer) = opened.await? {
                return Ok(answer);
            }
        }
    }

    /// A small blob in memory that is on disk too: what was evicted or purged is not served from memory either.
    fn small(&self, digest: &Digest) -> Option<Bytes> {
        let body = self.inner.small.get(digest)?;
        if !self.inner.store.contains(digest) {
            self.inner.small.remove(digest);
            return None;
        }
        self.inner.store.touch(digest);
        Some(body)
    }

    /// A stored blob; a small one is kept in memory from now on.
    async fn opened_small(&self, blob: Blob) -> BlobAnswer {
        if blob.size > SMALL_BLOB {
            return BlobAnswer::Stored(blob);
        }
        let span = blob.span(all_of(blob.size));
        match self.inner.tasks.spawn_blocking(move || span.read()).await {
            Ok(Ok(body)) => {
                self.inner.small.insert(blob.digest, body.clone());
                BlobAnswer::Held(body)
            }
            Ok(Err(_)) | Err(_) => BlobAnswer::Stored(blob),
        }
    }

    /// What a HEAD is told. It never starts a fill.
    pub async fn blob_head(
        &self,
        grant: &Grant,
        digest: &AnyDigest,
        deadline: Deadline,
    ) -> Result<BlobHead, CacheError> {
        let what = Resource::Blob(digest.clone());
        let visit = self.enter(grant, what.clone(), deadline).await?;
        let answered = self.blob_head_for(&visit, digest, deadline).await;
        let Err(error) = answered else {
            return answered;
        };
        let again = self.enter_again(grant, (&visit, what), error, deadline);
        let own = Box::pin(again).await?;
        Box::pin(self.blob_head_for(&own, digest, deadline)).await
    }

    async fn blob_head_for(
        &self,
        visit: &Visit,
        digest: &AnyDigest,
        deadline: Deadline,
    ) -> Result<BlobHead, CacheError> {
        if visit.may == May::PullCached {
            return self.held_blob_head(visit, digest).await;
        }
        let AnyDigest::Known(known) = *digest else {
            let probe = self
                .probe(visit, Thing::Blob, digest.clone(), deadline)
                .await?;
            return Ok(BlobHead {
                size: probe.size,
                verdict: Verdict::Bypass(Why::UnknownAlgorithm),
            });
        };
        let standing = match self.claim(visit, known, Kind::Blob, deadline).await? {
            Claim::Proven(_) => Standing::Proven,
            Claim::Open => Standing::Unproven,
        };
        if standing == Standing::Proven
            && let Some(blob) = self.inner.store.blob(&known).await
        {
            return Ok(BlobHead {
                size: Some(blob.size),
                verdict: Verdict::Hit,
            });
        }
        let key = Key {
            upstream: visit.upstream.clone(),
            digest: known,
        };
        let running = self.inner.fills.running(&key, visit, standing);
        if let Some((size, phase)) =
            running.and_then(|progress| Some((progress.size?, progress.phase)))
        {
            match phase {
                Phase::Verified => {
                    return Ok(BlobHead {
                        size: Some(size),
                        verdict: Verdict::Hit,
                    });
                }
                Phase::Filling => {
                    return Ok(BlobHead {
                        size: Some(size),
                        verdict: Verdict::Collapsed,
                    });
                }
                Phase::Opening | Phase::Alone(_) | Phase::Failed(_) => {}
            }
        }
        let probe = self
            .probe(visit, Thing::Blob, digest.clone(), deadline)
            .await?;
        Ok(BlobHead {
            size: probe.size,
            verdict: Verdict::Miss,
        })
    }

    fn wanted(
        &self,
        visit: &Visit,
        digest: Digest,
        standing: Standing,
        wish: Wish,
    ) -> Result<Wanted, CacheError> {
        let source = visit.source.clone();
        let upstream = Arc::clone(&self.origin(&source)?.upstream);
        let told = self.inner.told.get(&digest);
        Ok(Wanted {
            upstream,
            source,
            digest,
            identity: visit.identity.clone(),
            standing,
            wish,
            told,
        })
    }

    /// An answer with a blob broke off. If the blob is stored it is looked at, and forgotten if it is damaged, so that the next who asks is
    /// given it by the upstream.
    pub fn doubt(&self, digest: Digest) {
        if !self.inner.store.contains(&digest) {
            return;
        }
        let (cache, store) = (self.clone(), self.inner.store.clone());
        let look = move || async move {
            let health = store.check(&digest).await;
            tracing::warn!(%digest, ?health, "a stored blob could not be read to its end");
        };
        self.inner.tasks.spawn(async move {
            // Many readers of a large blob break off at once, and it is read only once for all of them.
            cache.inner.doubts.run(digest, look).await.ok();
        });
    }

    /// `None` when another client's login was refused: this one has its own.
    async fn opened(
        &self,
        visit: &Visit,
        digest: Digest,
        joined: Joined,
        (role, deadline): (Role, Deadline),
    ) -> Result<Option<BlobAnswer>, CacheError> {
        let led_by_another = role == Role::Joined && !joined.is_led_by(&visit.identity);
        match joined.open(deadline).await {
            Ok(Some(open)) => {
                // Verified means that all is here, though its file may not have its name yet.
                let verdict = match role {
                    _ if open.is_verified() => Verdict::Hit,
                    Role::Lead => Verdict::Miss,
                    Role::Joined => Verdict::Collapsed,
                };
                let verdict = open.bypass().map_or(verdict, Verdict::Bypass);
                Ok(Some(BlobAnswer::Filling(Box::new(open), verdict)))
            }
            Ok(None) => Err(CacheError::Late),
            Err(error) if led_by_another && is_refusal(&error) => Ok(None),
            Err(error) => Err(self.judge_fill(visit, digest, error).await),
        }
    }

    /// A refusal by the upstream is remembered and may suspend; everything else is the fill's own story.
    async fn judge_fill(&self, visit: &Visit, digest: Digest, error: FillError) -> CacheError {
        let FillError::Upstream(upstream) = &error else {
            return error.into();
        };
        if !is_refusal(&error) {
            return CacheError::Upstream(Arc::clone(upstream));
        }
        self.judge_refusal(visit, Thing::Blob, digest.to_string(), upstream)
            .await
    }

    async fn pass_through(
        &self,
        visit: &Visit,
        digest: &AnyDigest,
        deadline: Deadline,
    ) -> Result<BlobAnswer, CacheError> {
        if self.is_suspended(visit)? {
            // Only the upstream itself can open it again.
            self.probe(visit, Thing::Blob, digest.clone(), deadline)
                .await?;
        }
        let source = &visit.source;
        let ask = BlobAsk {
            upstream: Arc::clone(&self.origin(source)?.upstream),
            repository: source.repository.clone(),
            digest: digest.clone(),
            place: 0,
            mixing: Mixing::Allowed,
            identity: visit.identity.clone(),
        };
        match ask.open(None, deadline).await {
            Ok(stream) => {
                let verdict = Verdict::Bypass(Why::UnknownAlgorithm);
                let size = stream.total();
                Ok(BlobAnswer::Passing {
                    size,
                    reader: Box::new(DirectReader::unchecked(stream)),
                    verdict,
                })
            }
            Err(error) => Err(self
                .judge_refusal(visit, Thing::Blob, digest.to_string(), &Arc::new(error))
                .await),
        }
    }
}

fn is_refusal(error: &FillError) -> bool {
    let FillError::Upstream(error) = error else {
        return false;
    };
    matches!(error.fault(), Fault::NotFound { .. } | Fault::Denied { .. })
}
