//! The one place that answers *stored*, *filling* or *lead*, under one lock.
//!
//! A blob is entered in the store's index before its fill leaves the table, so between two looks it is always in one or the other, and
//! no digest is fetched twice because it was published in between.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use oci::Digest;
use tokio::sync::watch;
use tokio::time::Instant;

use super::tail::Joined;
use super::{Fill, FillError, Fills, Key, Phase, Progress, Readers, Wish, task};
use crate::names::Source;
use crate::store::Blob;
use crate::upstream::resume::BlobAsk;
use crate::upstream::{Identity, Upstream};

/// How long requests of the same repository share a failure, so that a storm on a bad blob is no storm on the upstream.
const SHARED_FAILURE: Duration = Duration::from_millis(500);

/// How often a stored blob is tried to be opened before its upstream is asked.
const OPENINGS: usize = 2;

/// How a request stands to the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its repository is known to hold the blob: it may be given what is stored or filling.
    Proven,
    /// Not known: it may only lead a fetch of its own, whose answer is the proof, or follow one that its own repository leads.
    Unproven,
}

/// A blob that a request wants.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where to ask for it.
    pub upstream: Arc<Upstream>,
    /// For which repository.
    pub source: Source,
    /// Which blob.
    pub digest: Digest,
    /// Whose rights are used, should this request lead.
    pub identity: Identity,
    /// What may be given.
    pub standing: Standing,
    /// Which bytes.
    pub wish: Wish,
    /// What a manifest told of it.
    pub told: Option<Told>,
}

/// What a manifest tells of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its size in bytes.
    pub size: u64,
    /// It was made to be read in pieces (zstd:chunked, eStargz, nydus).
    pub in_pieces: bool,
}

/// What was found.
#[derive(Debug)]
pub enum Found {
    /// On disk.
    Stored(Blob),
    /// On its way: here is a place to read it from.
    Filling(Joined),
    /// Nobody was fetching it; now a fill does, and here is its first reader.
    Lead(Joined),
    /// It failed just now.
    Failed(FillError),
    /// On its way for another repository: this one must be proven first.
    ProveFirst,
}

#[derive(Debug)]
pub(super) enum Slot {
    Running(Arc<Fill>),
    /// Being set aside: its files are moving, so the next fill must wait for them.
    Ending(watch::Receiver<Progress>),
    Failed {
        source: Source,
        error: FillError,
        until: Instant,
    },
}

/// Whether the store's index counts: not when what it names cannot be opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Index {
    Asked,
    PassedOver,
}

enum Look {
    Stored,
    Ending(watch::Receiver<Progress>),
    Is(Box<Found>),
}

impl Fills {
    /// Finds the blob or starts fetching it.
    pub async fn find(&self, wanted: &Wanted) -> Found {
        let mut index = Index::Asked;
        let mut openings = 0;
        loop {
            let opened = match self.look(wanted, index) {
                Look::Is(found) => return *found,
                Look::Ending(ending) => {
                    self.wait_for_end(wanted, ending).await;
                    continue;
                }
                Look::Stored => self.store.blob(&wanted.digest).await,
            };
            if let Some(blob) = opened {
                return Found::Stored(blob);
            }
            // It was damaged or evicted between the look and the opening; the store has forgotten it, so the next look leads. Or it
            // cannot be opened (out of descriptors, say): the upstream still has it too.
            openings += 1;
            if openings == OPENINGS {
                index = Index::PassedOver;
            }
        }
    }

    /// The running fill of this digest that `source` may follow, for requests that only look (HEAD).
    pub fn running(&self, key: &Key, source: &Source, standing: Standing) -> Option<Progress> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        match running.get(key) {
            Some(Slot::Running(fill)) if standing == Standing::Proven || fill.source == *source => {
                Some(fill.progress())
            }
            _ => None,
        }
    }

    fn look(&self, wanted: &Wanted, index: Index) -> Look {
        let key = Key {
            upstream: wanted.source.upstream.clone(),
            digest: wanted.digest,
        };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = index == Index::Asked && wanted.standing == Standing::Proven;
        if asked && self.store.contains(&wanted.digest) {
            return Look::Stored;
        }
        match running.get(&key) {
            Some(Slot::Running(fill))
                if wanted.standing == Standing::Proven || fill.source == wanted.source =>
            {
                return Look::Is(Box::new(Found::Filling(Joined::new(
                    self,
                    fill,
                    wanted.wish,
                ))));
            }
            Some(Slot::Running(_)) => return Look::Is(Box::new(Found::ProveFirst)),
            Some(Slot::Failed {
                source,
                error,
                until,
            }) if *source == wanted.source && Instant::now() < *until => {
                return Look::Is(Box::new(Found::Failed(error.clone())));
            }
            Some(Slot::Ending(ending)) => return Look::Ending(ending.clone()),
            Some(Slot::Failed { .. }) | None => {}
        }
        let fill = Arc::new(self.begin(&key, wanted));
        running.insert(key, Slot::Running(Arc::clone(&fill)));
        let joined = Joined::new(self, &fill, wanted.wish);
        self.tasks.spawn(task::run(fill, self.clone()));
        Look::Is(Box::new(Found::Lead(joined)))
    }

    fn begin(&self, key: &Key, wanted: &Wanted) -> Fill {
        let (progress, _) = watch::channel(Progress {
            phase: Phase::Opening,
            size: None,
            spool: None,
            credential: None,
            place: 0,
        });
        let (place, mixing) = self.first_place(key);
        Fill {
            key: key.clone(),
            source: wanted.source.clone(),
            ask: BlobAsk {
                upstream: Arc::clone(&wanted.upstream),
                repository: wanted.source.repository.clone(),
                digest: wanted.digest.into(),
                place,
                mixing,
                identity: wanted.identity.clone(),
            },
            told: wanted.told,
            progress,
            readers: Readers::default().into(),
            givers: 0.into(),
            wake: tokio::sync::Notify::new(),
        }
    }

    /// Waits until a fill that is being set aside has left the table. One whose task ended without leaving is taken off it.
    async fn wait_for_end(&self, wanted: &Wanted, mut ending: watch::Receiver<Progress>) {
        if ending.wait_for(Progress::has_failed).await.is_ok() {
            return;
        }
        let key = Key {
            upstream: wanted.source.upstream.clone(),
            digest: wanted.digest,
        };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(running.get(&key), Some(Slot::Ending(_))) {
            running.remove(&key);
        }
    }

    /// Takes a fill that has ended off the table.
    pub(super) fn leave(&self, fill: &Fill) {
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&fill.key);
    }

    /// Closes a fill unless somebody reads it: nobody can join it afterwards, and who asks waits until it has ended.
    pub(super) fn close_idle(&self, fill: &Fill) -> bool {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = !fill.has_readers();
        if idle {
            running.insert(fill.key.clone(), Slot::Ending(fill.progress.subscribe()));
        }
        idle
    }

    /// Takes a failed fill off the table, leaving its error for those who ask within [`SHARED_FAILURE`].
    pub(super) fn leave_failed(&self, fill: &Fill, error: FillError) {
        let until = Instant::now() + SHARED_FAILURE;
        let slot = Slot::Failed {
            source: fill.source.clone(),
            error,
            until,
        };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(
            |_, slot| !matches!(slot, Slot::Failed { until, .. } if *until <= Instant::now()),
        );
        running.insert(fill.key.clone(), slot);
    }
}
