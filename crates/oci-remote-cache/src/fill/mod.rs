//! Blobs on their way in: one upstream transfer, any number of readers at any offset.
//!
//! A fill is a task of its own, keyed by upstream and digest (`task`). Every client, the first or the five-hundredth, whole or ranged,
//! only reads it through a [`Tail`]. [`Fills::find`] is the one place that answers *stored*, *filling* or *lead*. Who may read what is
//! decided above, in `cache/right`; this floor is told.

pub mod direct;
pub mod error;
pub mod find;
pub mod plan;
pub mod tail;
mod task;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci::{Digest, RangeHeader, Resolved, Slice};
use quick_cache::sync::Cache as Memory;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

pub use self::direct::Alone;
pub use self::error::FillError;
pub use self::find::{Found, Standing, Told, Wanted};
pub use self::tail::Tail;

use self::plan::{Appetite, Want};
use crate::metrics::Metrics;
use crate::names::{CredentialId, Source, UpstreamId};
use crate::store::Store;
use crate::store::pieces::{PIECE, PieceMap};
use crate::store::spool::Spool;
use crate::tasks::Tasks;
use crate::upstream::resume::{BlobAsk, Mixing};

/// How long what is known of wrong bytes of a blob decides where it is asked for.
const AVOIDED_FOR: Duration = Duration::from_mins(10);

/// Such memories kept at most.
const AVOIDED_MOST: usize = 1000;

/// How many connections fills may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    /// For one blob.
    pub per_blob: usize,
    /// For one upstream.
    pub per_upstream: usize,
}

/// What a fill is found by. Another upstream's fill of the same digest is another fill: its bytes prove nothing here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Whose bytes.
    pub upstream: UpstreamId,
    /// Which blob.
    pub digest: Digest,
}

/// All fills of this process. Clones share them.
#[derive(Clone, Debug)]
pub struct Fills {
    running: Arc<Mutex<HashMap<Key, find::Slot>>>,
    places: Arc<HashMap<UpstreamId, Places>>,
    avoided: Arc<Memory<Key, Avoided>>,
    store: Store,
    metrics: Metrics,
    tasks: Tasks,
}

/// The connections to one upstream.
#[derive(Debug)]
struct Places {
    free: Arc<Semaphore>,
    in_all: usize,
    per_blob: usize,
}

/// Wrong bytes came of a blob: where it is asked for first next time, and until when all must come from one place.
#[derive(Clone, Copy, Debug)]
struct Avoided {
    first: usize,
    until: Instant,
}

/// One blob on its way in.
#[derive(Debug)]
pub struct Fill {
    key: Key,
    source: Source,
    ask: BlobAsk,
    told: Option<Told>,
    progress: watch::Sender<Progress>,
    readers: Mutex<Readers>,
    /// The places that bytes came from: bit 0 for the upstream's URL, others for its mirrors.
    givers: AtomicU64,
    wake: Notify,
}

/// How far a fill is.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Where in its life it is.
    pub phase: Phase,
    /// The blob's size in bytes, once known.
    pub size: Option<u64>,
    spool: Option<Arc<Spool>>,
    credential: Option<CredentialId>,
    place: usize,
}

/// The life of a fill.
#[derive(Clone, Debug)]
pub enum Phase {
    /// The upstream was asked and has not answered.
    Opening,
    /// Bytes arrive.
    Filling,
    /// All bytes are here and hash to the digest.
    Verified,
    /// The cache cannot keep this blob: each reader goes on by itself, still verified.
    Alone(Arc<Alone>),
    /// It ended without the blob.
    Failed(FillError),
}

/// What a request wants of a blob, as far as the fill must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Which bytes.
    pub range: WishRange,
    /// Who asks: a second client is a reason to fetch everything.
    pub client: IpAddr,
}

/// Which bytes a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WishRange {
    /// Everything, or everything from some offset.
    Whole,
    /// Closed or suffix ranges only, of which this is the first.
    Part(oci::RangeSpec),
}

#[derive(Debug, Default)]
struct Readers {
    seats: Vec<Arc<Aim>>,
    asked: PieceMap,
    whole: bool,
    first_client: Option<IpAddr>,
    first_part: Option<oci::RangeSpec>,
    second_client: bool,
    idle_since: Option<Instant>,
    last_word: LastWord,
}

/// What the last reader said on leaving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LastWord {
    /// Nothing: the bytes are of use all the same.
    #[default]
    Nothing,
    /// That it is not what was expected.
    Unwanted,
}

/// One reader's place at a fill; leaving it ends nothing but itself.
#[derive(Debug)]
pub(crate) struct Seat {
    fill: Arc<Fill>,
    aim: Arc<Aim>,
}

/// Where a reader is and how far it wants to go.
#[derive(Debug, Default)]
struct Aim {
    position: AtomicU64,
    end: AtomicU64,
}

impl Fills {
    /// No fills yet. `limits` has every upstream that can be asked.
    pub fn new(
        store: Store,
        metrics: Metrics,
        tasks: Tasks,
        limits: HashMap<UpstreamId, Connections>,
    ) -> Self {
        let place = |limit: Connections| Places {
            free: Arc::new(Semaphore::new(limit.per_upstream)),
            in_all: limit.per_upstream,
            per_blob: limit.per_blob,
        };
        let places = limits
            .into_iter()
            .map(|(id, limit)| (id, place(limit)))
            .collect();
        let avoided = Arc::new(Memory::new(AVOIDED_MOST));
        Self {
            running: Arc::default(),
            places: Arc::new(places),
            avoided,
            store,
            metrics,
            tasks,
        }
    }

    /// A place for one connection, waiting for it.
    async fn place(&self, upstream: &UpstreamId) -> Option<OwnedSemaphorePermit> {
        let free = Arc::clone(&self.places.get(upstream)?.free);
        free.acquire_owned().await.ok()
    }

    /// A place for one connection more, if there is one right now.
    fn spare_place(&self, upstream: &UpstreamId) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places.get(upstream)?.free)
            .try_acquire_owned()
            .ok()
    }

    /// Connections that nobody uses, beyond the half that is for what clients wait for.
    pub fn to_spare(&self, upstream: &UpstreamId) -> usize {
        let places = self.places.get(upstream);
        places.map_or(0, |places| {
            let kept = places.in_all.div_ceil(2);
            places.free.available_permits().saturating_sub(kept)
        })
    }

    /// Connections one blob may use.
    fn per_blob(&self, upstream: &UpstreamId) -> usize {
        self.places
            .get(upstream)
            .map_or(1, |places| places.per_blob)
    }

    /// Which of an upstream's places to ask first, and whether others may go on with what it began.
    fn first_place(&self, key: &Key) -> (usize, Mixing) {
        let avoided = self.avoided.get(key);
        let avoided = avoided.filter(|avoided| avoided.until > Instant::now());
        avoided.map_or((0, Mixing::Allowed), |avoided| {
            (avoided.first, Mixing::Refused)
        })
    }

    /// Remembers that wrong bytes came. If from one place, another is asked next, if there is one. If from several, nobody knows whose were
    /// wrong: all come from the first of them next time.
    fn avoid(&self, fill: &Fill) {
        let places = fill.ask.upstream.places().max(1);
        let place = fill.progress().place;
        let mixed = fill.givers.load(Ordering::Relaxed).count_ones() > 1;
        let first = if mixed { place } else { (place + 1) % places };
        let until = Instant::now() + AVOIDED_FOR;
        self.avoided
            .insert(fill.key.clone(), Avoided { first, until });
    }
}

impl Progress {
    /// Whether it ended without the blob.
    fn has_failed(&self) -> bool {
        matches!(self.phase, Phase::Failed(_))
    }
}

impl Fill {
    /// Whose repository leads.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// How far it is now.
    pub fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }

    /// Notes that bytes came from a place.
    fn note_giver(&self, place: usize) {
        let bit = 1_u64 << place.min(63);
        if self.givers.load(Ordering::Relaxed) & bit == 0 {
            self.givers.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// The same question, to the place that answered it.
    fn ask_again(&self) -> BlobAsk {
        BlobAsk {
            place: self.progress().place,
            ..self.ask.clone()
        }
    }

    /// Takes a seat before the size is known.
    fn join(self: &Arc<Self>, wish: Wish) -> Seat {
        let aim = Arc::new(Aim::default());
        let mut readers = self.readers();
        readers.seats.push(Arc::clone(&aim));
        readers.idle_since = None;
        readers.last_word = LastWord::Nothing;
        match wish.range {
            WishRange::Whole => readers.whole = true,
            WishRange::Part(spec) => readers.first_part = readers.first_part.or(Some(spec)),
        }
        readers.second_client |= *readers.first_client.get_or_insert(wish.client) != wish.client;
        drop(readers);
        self.wake.notify_one();
        Seat {
            fill: Arc::clone(self),
            aim,
        }
    }

    /// What readers wait for and whether all is wanted.
    fn demand(&self, size: u64, spool: &Spool) -> (Vec<Want>, Appetite) {
        let readers = self.readers();
        let wants = readers
            .seats
            .iter()
            .filter_map(|aim| aim.want(size, spool))
            .collect();
        (wants, readers.appetite(size, self.always_whole()))
    }

    /// Where one of the readers waits for a byte, another one each `turn`; where the first one will, as long as none does.
    fn waited_for(&self, size: u64, spool: &Spool, turn: usize) -> u64 {
        let (wants, _) = self.demand(size, spool);
        match turn.checked_rem(wants.len()).and_then(|nth| wants.get(nth)) {
            Some(want) => want.position,
            None => self.first_wanted(size).map_or(0, |slice| slice.start),
        }
    }

    /// Whether all of a blob of `size` bytes is wanted.
    fn appetite(&self, size: u64) -> Appetite {
        self.readers().appetite(size, self.always_whole())
    }

    /// Up to this size the blob is fetched whole, whatever ranges of it are asked for.
    fn always_whole(&self) -> u64 {
        if self.told.is_some_and(|told| told.in_pieces) {
            PIECE
        } else {
            plan::SMALL
        }
    }

    /// The closed range to begin with, in a blob of `size` bytes, when nobody wants the whole.
    fn first_wanted(&self, size: u64) -> Option<Slice> {
        let readers = self.readers();
        let part = readers.first_part.filter(|_| !readers.whole)?;
        match RangeHeader::single(part).resolve(size) {
            Resolved::Single(slice) => Some(slice),
            Resolved::Multiple(_) | Resolved::Unsatisfiable => None,
        }
    }

    /// The error for who was promised the size that a manifest gives, when the blob has another.
    fn not_as_told(&self) -> FillError {
        let what = "its size is not what a manifest says of it";
        self.ask.broken(what).into()
    }

    /// Since when nobody has been reading.
    fn idle_since(&self) -> Option<Instant> {
        self.readers().idle_since
    }

    /// Whether nobody reads, and nobody will come back for it.
    fn is_unwanted(&self) -> bool {
        let readers = self.readers();
        readers.last_word == LastWord::Unwanted && readers.seats.is_empty()
    }

    fn has_readers(&self) -> bool {
        !self.readers().seats.is_empty()
    }

    fn readers(&self) -> std::sync::MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells readers that more has arrived.
    fn announce(&self) {
        self.progress.send_modify(|_| {});
    }

    fn set(&self, change: impl FnOnce(&mut Progress)) {
        self.progress.send_modify(change);
    }
}

impl Readers {
    fn appetite(&self, size: u64, always_whole: u64) -> Appetite {
        let enough = self.asked.total() >= size / 4;
        if size <= always_whole || self.whole || self.second_client || enough {
            Appetite::Whole
        } else {
            Appetite::Asked
        }
    }
}

impl Seat {
    /// Says which bytes this reader wants, once it knows.
    fn aim(&self, slice: Slice, appetite: Appetite) {
        self.aim.position.store(slice.start, Ordering::Relaxed);
        self.aim.end.store(slice.end, Ordering::Relaxed);
        let mut readers = self.fill.readers();
        match appetite {
            Appetite::Whole => readers.whole = true,
            Appetite::Asked => readers.asked.insert(slice),
        }
        drop(readers);
        self.fill.wake.notify_one();
    }

    /// Says that the fill need not go on for this reader. Others that read are not concerned.
    fn renounce(&self) {
        let mut readers = self.fill.readers();
        if readers.seats.len() <= 1 {
            readers.last_word = LastWord::Unwanted;
        }
    }

    fn advance(&self, position: u64) {
        self.aim.position.store(position, Ordering::Relaxed);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut readers = self.fill.readers();
        readers.seats.retain(|aim| !Arc::ptr_eq(aim, &self.aim));
        if readers.seats.is_empty() {
            readers.idle_since = Some(Instant::now());
        }
        drop(readers);
        self.fill.wake.notify_one();
    }
}

impl Aim {
    /// The part of this reader's range that it still waits for.
    fn want(&self, size: u64, spool: &Spool) -> Option<Want> {
        let end = self.end.load(Ordering::Relaxed).min(size);
        let position = spool.reach(self.position.load(Ordering::Relaxed));
        (position < end).then_some(Want { position, end })
    }
}

#[cfg(test)]
mod tests;
