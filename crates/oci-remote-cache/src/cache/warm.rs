//! Fetching an image before anyone pulls it, at the wish of a client that may.
//!
//! The work is that of a patient client: the manifest, of an index the manifests behind it, and every blob, one after the other and with
//! the same rights. It is background work: few at once, a bounded queue, and it stops first where an upstream's rate limit runs low.

use std::collections::HashSet;
use std::sync::Arc;

use oci::{
    AnyDigest, Descriptor, Digest, MANIFEST_LIMIT, ManifestView, Platform, Reference, Slice,
};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::Cache;
use super::blob::{BlobAnswer, Open, Release, Wish, WishRange};
use super::error::CacheError;
use super::manifest::{ManifestWish, Method};
use super::places::{Lack, Place, Places};
use crate::deadline::Deadline;
use crate::fill::FillError;
use crate::metrics::OutcomeLabel;
use crate::policy::{Grant, WarmLicence};

/// Images fetched at once.
const AT_ONCE: usize = 2;

/// Images that may be waiting or on their way.
const QUEUE: usize = 64;

/// The same, for one client.
const SHARE: usize = QUEUE / 4;

/// Manifests of one image: an index of more was not made for machines.
const MOST_MANIFESTS: usize = 256;

/// Manifests and blobs of one image together: it must not keep its turn for ever.
const MOST_PARTS: usize = 5000;

/// What to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmWish {
    /// The tag or digest.
    pub reference: Reference,
    /// Of an index, only what is for this; all of it otherwise.
    pub platform: Option<Platform>,
}

/// What was fetched, or was here already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Warmed {
    /// Manifests, the index among them.
    pub manifests: usize,
    /// Blobs.
    pub blobs: usize,
    /// Bytes of both.
    pub bytes: u64,
}

/// Platforms named to who asked for another one.
const SHOWN: usize = 20;

/// Why an image was not fetched to its end.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// A part of it cannot be had.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Others need what is left of the upstream's rate limit.
    #[error("the upstream's rate limit runs low, and is left to those who wait for an answer")]
    GaveWay,
    /// There is more of it than of any image.
    #[error("the image has more than {MOST_MANIFESTS} manifests, or {MOST_PARTS} parts")]
    TooMany,
    /// It is not made for the platform that is wanted.
    #[error("the image is not there for {wanted}, but for {there}")]
    NoPlatform {
        /// What was asked for.
        wanted: Box<Platform>,
        /// What there is, separated by commas.
        there: String,
    },
    /// The process is stopping.
    #[error("the cache is shutting down")]
    Stopping,
}

/// The queue is full.
#[derive(Debug, thiserror::Error)]
pub enum Full {
    /// For everybody.
    #[error("{QUEUE} images are being fetched or wait for it already")]
    Queue,
    /// For this client.
    #[error("{SHARE} images are being fetched for you or wait for it already")]
    Share,
}

/// Places for images.
#[derive(Debug)]
pub(super) struct Queue {
    places: Places,
    turns: Arc<Semaphore>,
}

/// One image on its way.
struct Work {
    cache: Cache,
    grant: Grant,
    wish: WarmWish,
    seen: HashSet<Digest>,
    done: Warmed,
}

impl From<Lack> for Full {
    fn from(lack: Lack) -> Self {
        match lack {
            Lack::Place => Self::Queue,
            Lack::Share => Self::Share,
        }
    }
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            places: Places::new(QUEUE, SHARE),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }
}

impl Cache {
    /// Begins to fetch an image in the background. Dropping the handle does not end it.
    pub fn warm(
        &self,
        licence: &WarmLicence,
        wish: WarmWish,
    ) -> Result<JoinHandle<Result<Warmed, WarmError>>, Full> {
        let client = licence.grant().client().name.as_ref();
        let place = self.inner.warming.places.take(client)?;
        let work = Work {
            cache: self.clone(),
            grant: licence.grant().clone(),
            wish,
            seen: HashSet::new(),
            done: Warmed::default(),
        };
        self.inner.metrics.warming.inc();
        Ok(self.inner.tasks.spawn(work.run(place)))
    }
}

impl Work {
    async fn run(mut self, place: Place) -> Result<Warmed, WarmError> {
        let tasks = self.cache.inner.tasks.clone();
        let ended = tokio::select! {
            () = tasks.stopping() => Err(WarmError::Stopping),
            ended = Box::pin(self.fetch()) => ended,
        };
        let (source, reference) = (self.grant.source(), &self.wish.reference);
        let Warmed {
            manifests,
            blobs,
            bytes,
        } = self.done;
        let outcome = match &ended {
            Ok(()) => "done",
            Err(WarmError::GaveWay) => "gave-way",
            Err(WarmError::Stopping) => "stopped",
            Err(WarmError::Cache(_) | WarmError::TooMany | WarmError::NoPlatform { .. }) => {
                "failed"
            }
        };
        let why = ended.as_ref().err().map(ToString::to_string);
        tracing::info!(%source, %reference, outcome, why, manifests, blobs, bytes, "warmed");
        let metrics = &self.cache.inner.metrics;
        metrics.warming.dec();
        metrics
            .warmed
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
        drop(place);
        ended.map(|()| self.done)
    }

    async fn fetch(&mut self) -> Result<(), WarmError> {
        let turns = Arc::clone(&self.cache.inner.warming.turns);
        let _turn = turns
            .acquire_owned()
            .await
            .map_err(|_closed| WarmError::Stopping)?;
        let mut ahead = vec![self.wish.reference.clone()];
        while let Some(reference) = ahead.pop() {
            let view = self.manifest(&reference).await?;
            self.check_platform(view.children())?;
            let children = view.children().iter();
            let wanted = children.filter(|child| self.wants(child));
            let digests: Vec<AnyDigest> = wanted.map(|child| child.digest.clone()).collect();
            let new = digests.into_iter().filter(|digest| self.is_new(digest));
            ahead.extend(new.map(Reference::Digest));
            if ahead.len() > MOST_MANIFESTS || self.done.manifests > MOST_MANIFESTS {
                return Err(WarmError::TooMany);
            }
            let blobs = view.blobs().iter().map(|blob| &blob.digest);
            let new: Vec<&AnyDigest> = blobs.filter(|digest| self.is_new(digest)).collect();
            if self.seen.len() > MOST_PARTS {
                return Err(WarmError::TooMany);
            }
            for digest in new {
                self.blob(digest).await?;
            }
        }
        Ok(())
    }

    fn wants(&self, child: &Descriptor) -> bool {
        let Some(wanted) = &self.wish.platform else {
            return true;
        };
        child
            .platform
            .as_ref()
            .is_some_and(|found| wanted.covers(found))
    }

    /// A platform that nothing in an index is made for is a slip of the pen, more often than not.
    fn check_platform(&self, children: &[Descriptor]) -> Result<(), WarmError> {
        let Some(wanted) = &self.wish.platform else {
            return Ok(());
        };
        if children.is_empty() || children.iter().any(|child| self.wants(child)) {
            return Ok(());
        }
        let platforms = children.iter().filter_map(|child| child.platform.as_ref());
        let there: Vec<String> = platforms.take(SHOWN).map(ToString::to_string).collect();
        Err(WarmError::NoPlatform {
            wanted: Box::new(wanted.clone()),
            there: if there.is_empty() {
                "none that it names".to_owned()
            } else {
                there.join(", ")
            },
        })
    }

    /// Whether this is something that can be kept and was not met yet.
    fn is_new(&mut self, digest: &AnyDigest) -> bool {
        match digest {
            AnyDigest::Known(digest) => self.seen.insert(*digest),
            AnyDigest::Foreign(_) => false,
        }
    }

    /// Nobody waits for this: it takes nothing of what is kept for those who do.
    fn give_way(&self) -> Result<(), WarmError> {
        let source = self.grant.source();
        let upstream = &self.cache.origin(source)?.upstream;
        if upstream.is_short(&source.repository) {
            return Err(WarmError::GaveWay);
        }
        Ok(())
    }

    async fn manifest(&mut self, reference: &Reference) -> Result<ManifestView, WarmError> {
        self.give_way()?;
        let wish = ManifestWish {
            method: Method::Get,
            accept: None,
        };
        let deadline = Deadline::for_answer();
        let found = self
            .cache
            .manifest(&self.grant, reference, &wish, deadline)
            .await?;
        let body = found.body.unwrap_or_default();
        debug_assert!(body.len() <= MANIFEST_LIMIT, "read with a limit");
        self.done.manifests += 1;
        self.done.bytes += body.len() as u64;
        let view = ManifestView::parse(&body, Some(found.media_type.as_str()));
        view.map_err(|why| {
            let source_ = self.grant.source().clone();
            CacheError::BadManifest { source_, why }.into()
        })
    }

    async fn blob(&mut self, digest: &AnyDigest) -> Result<(), WarmError> {
        self.give_way()?;
        let wish = Wish {
            range: WishRange::Whole,
            client: self.grant.client().address,
        };
        let deadline = Deadline::for_answer();
        let found = self
            .cache
            .find_blob(&self.grant, digest, wish, deadline)
            .await?;
        let size = match found {
            BlobAnswer::Stored(blob) => blob.size,
            BlobAnswer::Held(body) => body.len() as u64,
            BlobAnswer::Filling(open, _) => arrived(*open).await.map_err(CacheError::from)?,
            BlobAnswer::Passing { .. } => return Ok(()),
        };
        self.done.blobs += 1;
        self.done.bytes += size;
        Ok(())
    }
}

/// Waits at a fill until all of it is in and verified; looks at none of its bytes.
async fn arrived(open: Open) -> Result<u64, FillError> {
    if open.bypass().is_some() {
        // Nothing is kept of it, so there is nothing to wait for.
        return Ok(0);
    }
    let whole = open.size().map(|end| Slice { start: 0, end });
    let size = open.size().unwrap_or_default();
    let mut tail = open.read(whole, Release::Verified);
    tail.settled().await?;
    Ok(size)
}
