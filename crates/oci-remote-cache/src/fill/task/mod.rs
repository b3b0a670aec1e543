//! The life of one fill, top to bottom: open, spool, fetch, hash, verify, record, publish.
//!
//! The task owns the transfer; readers only watch its progress. Fetching, writing and hashing overlap: bytes are written on the blocking
//! pool while the next ones arrive, and the hash follows the unbroken prefix there too. What to fetch next is decided in [`super::plan`].

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use oci::{RangeHeader, RangeSpec, Resolved, Slice};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use self::fetch::{Ended, Fetch};
use self::pace::Pace;
use super::plan::{self, Appetite, SMALL, Step, View};
use super::{Alone, Fill, FillError, Fills, Phase};
use crate::deadline::Deadline;
use crate::metrics::OutcomeLabel;
use crate::names::CredentialId;
use crate::store::catalog::{Change, Kind, Membership, PendingRecord, Proof};
use crate::store::spool::{PrefixHash, Spool, Verified};
use crate::store::usage::Reservation;
use crate::upstream::UpstreamError;
use crate::upstream::resume::BlobStream;
use crate::verdict::Why;

mod fetch;
mod pace;

/// How long a fill that nobody reads goes on when it is neither small nor half in.
const ABANDONED: Duration = Duration::from_secs(30);

/// How often the rate is looked at.
const TICK: Duration = Duration::from_millis(250);

/// How long requests find a fill that cannot keep its blob, and go on alone at once, before another one tries.
const ALONE: Duration = Duration::from_secs(2);

/// How a fill ended.
enum Outcome {
    Verified(Verified, Arc<Spool>, Option<Reservation>),
    Alone(Alone),
    Parked(Arc<Spool>),
    Failed(FillError, Option<Arc<Spool>>),
}

/// Runs a fill to its end.
pub(super) async fn run(fill: Arc<Fill>, fills: Fills, size_hint: Option<u64>) {
    fills.metrics.fills.inc();
    let outcome = Box::pin(fetch_all(&fill, &fills, size_hint)).await;
    let label = conclude(&fill, &fills, outcome).await;
    fills.metrics.fills.dec();
    fills.metrics.fills_ended.get_or_create(&OutcomeLabel { outcome: label }).inc();
}

async fn fetch_all(fill: &Arc<Fill>, fills: &Fills, size_hint: Option<u64>) -> Outcome {
    match open(fill, fills, size_hint).await {
        Ok(Opened::Transfer(transfer)) => transfer.drive().await,
        Ok(Opened::Alone(alone)) => Outcome::Alone(alone),
        Err(error) => Outcome::Failed(error, None),
    }
}

/// Records, publishes and tells the readers, in the order that survives a crash at any point.
async fn conclude(fill: &Arc<Fill>, fills: &Fills, outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Verified(verified, spool, room) => {
            publish(fill, fills, (verified, room), spool).await;
            "published"
        }
        Outcome::Alone(alone) => {
            fill.set(|progress| progress.phase = Phase::Alone(Arc::new(alone)));
            tokio::time::sleep(ALONE).await;
            fills.leave(fill);
            "alone"
        }
        Outcome::Parked(spool) => {
            let store = fills.store.clone();
            on_disk(fills, move || spool.park(store.layout())).await;
            fills.leave(fill);
            fill.set(|progress| progress.phase = Phase::Failed(FillError::Parked));
            "parked"
        }
        Outcome::Failed(error, spool) => {
            if let Some(spool) = spool {
                on_disk(fills, move || spool.discard()).await;
            }
            fail(fill, fills, error)
        }
    }
}

fn fail(fill: &Fill, fills: &Fills, error: FillError) -> &'static str {
    let label = match error {
        FillError::Mismatch { .. } | FillError::Pieces(_) => "mismatch",
        FillError::Upstream(_) | FillError::Parked | FillError::Stopping => "failed",
    };
    tracing::warn!(%error, source = %fill.source, digest = %fill.key.digest, "a blob was not fetched");
    if matches!(error, FillError::Pieces(_)) {
        fills.leave(fill);
    } else {
        fills.leave_failed(fill, error.clone());
    }
    fill.set(|progress| progress.phase = Phase::Failed(error));
    label
}

/// Membership is on disk before the last bytes leave, so that what a client finished pulling before a kill -9 is a hit after it;
/// the syncs and the rename come after, off the readers' path.
async fn publish(
    fill: &Arc<Fill>,
    fills: &Fills,
    (verified, room): (Verified, Option<Reservation>),
    spool: Arc<Spool>,
) {
    let credential = fill.progress().credential.unwrap_or_else(CredentialId::anonymous);
    let membership = Membership {
        source: fill.source.clone(),
        digest: fill.key.digest,
        kind: Kind::Blob,
        credential,
        proof: Proof::Delivered,
    };
    let pending = Change::Pending(PendingRecord { digest: fill.key.digest, size: verified.size(), spool_name: spool.name() });
    if let Err(error) = fills.store.catalog().record(vec![Change::Membership(membership), pending]).await {
        tracing::warn!(%error, "a finished blob could not be recorded; it is served all the same");
    }
    let size = verified.size();
    fill.set(|progress| {
        progress.size = Some(size);
        progress.phase = Phase::Verified;
    });
    if let Err(error) = fills.store.admit(verified, room).await {
        tracing::warn!(%error, digest = %fill.key.digest, "a finished blob could not be published");
    }
    on_disk(fills, move || spool.drop_list()).await;
    fills.leave(fill);
}

async fn on_disk(fills: &Fills, work: impl FnOnce() -> std::io::Result<()> + Send + 'static) {
    match fills.tasks.spawn_blocking(work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            fills.metrics.store_faults.inc();
            tracing::warn!(%error, "a spool could not be moved or removed");
        }
        Err(error) => tracing::error!(%error, "a task of the disk ended early"),
    }
}

enum Opened {
    Transfer(Box<Transfer>),
    Alone(Alone),
}

/// Asks the upstream, and makes the spool once it has answered.
async fn open(fill: &Arc<Fill>, fills: &Fills, size_hint: Option<u64>) -> Result<Opened, FillError> {
    let deadline = Deadline::for_answer();
    let kept = resume_kept(fill, fills).await;
    let range = first_range(fill, kept.as_deref(), size_hint);
    let Ok(Some(place)) = deadline.run(fills.place(&fill.key.upstream)).await else {
        return Err(FillError::Stopping);
    };
    let stream = fill.ask.clone().open(range, deadline).await?;
    fill.set(|progress| progress.credential = Some(stream.credential().clone()));
    let size = stream.total();
    let alone = |why, stream, place| {
        fill.set(|progress| progress.size = size);
        Ok(Opened::Alone(Alone::from_start(why, stream, place)))
    };
    if size.is_some_and(|size| size > fills.store.max_blob()) {
        return alone(Why::TooLarge, stream, place);
    }
    let resumed = kept.is_some();
    let Some((spool, reservation)) = make_spool(fill, fills, kept, size).await else {
        return alone(Why::Disk, stream, place);
    };
    fill.set(|progress| {
        progress.size = size;
        progress.spool = Some(Arc::clone(&spool));
        progress.phase = Phase::Filling;
    });
    let validator = stream.validator().map(str::to_owned);
    let mut transfer = Transfer {
        fill: Arc::clone(fill),
        fills: fills.clone(),
        hash: Hashing::Idle(PrefixHash::new(&fill.key.digest)),
        spool,
        reservation: Some(reservation),
        size,
        validator,
        resumed,
        fetches: FuturesUnordered::new(),
        pace: Pace::new(Instant::now()),
        disk_fault: DiskFault::None,
    };
    transfer.begin(stream, place);
    Ok(Opened::Transfer(Box::new(transfer)))
}

async fn resume_kept(fill: &Arc<Fill>, fills: &Fills) -> Option<Arc<Spool>> {
    let store = fills.store.clone();
    if !store.writable() {
        return None;
    }
    let key = fill.key.clone();
    let kept = fills.tasks.spawn_blocking(move || Spool::resume(store.layout(), key.digest, &key.upstream)).await;
    match kept {
        Ok(Ok(kept)) => kept.map(Arc::new),
        Ok(Err(error)) => {
            tracing::warn!(%error, "pieces kept from an earlier transfer cannot be used");
            None
        }
        Err(_) => None,
    }
}

/// The range to open with; `None` is a plain GET of everything, which also tells the size.
fn first_range(fill: &Fill, kept: Option<&Spool>, size_hint: Option<u64>) -> Option<Slice> {
    if let Some(size) = kept.and_then(Spool::size) {
        let all = Slice { start: 0, end: size };
        // Even when nothing is missing the upstream is asked, for its answer is what proves that this repository holds the blob.
        let last = Slice { start: size.saturating_sub(1), end: size };
        return kept.and_then(|spool| spool.gaps(all).first().copied()).or(Some(last));
    }
    let size = size_hint.filter(|&size| size > SMALL)?;
    slice_of(fill.first_part()?, size)
}

fn slice_of(spec: RangeSpec, size: u64) -> Option<Slice> {
    match RangeHeader::single(spec).resolve(size) {
        Resolved::Single(slice) => Some(slice),
        Resolved::Multiple(_) | Resolved::Unsatisfiable => None,
    }
}

/// The spool with room reserved for it; `None` when the disk does not take it.
async fn make_spool(
    fill: &Arc<Fill>,
    fills: &Fills,
    kept: Option<Arc<Spool>>,
    size: Option<u64>,
) -> Option<(Arc<Spool>, Reservation)> {
    let store = fills.store.clone();
    if !store.writable() {
        return None;
    }
    let reservation = store.usage().reserve(size.unwrap_or(0));
    let key = fill.key.clone();
    let made = fills.tasks.spawn_blocking(move || {
        let fits = |spool: &Arc<Spool>| size.is_none() || spool.size() == size;
        let spool = match kept.filter(fits) {
            Some(spool) => spool,
            None => Arc::new(Spool::create(store.layout(), key.digest, &key.upstream)?),
        };
        size.map_or(Ok(()), |size| spool.settle_size(size))?;
        Ok::<_, std::io::Error>(spool)
    });
    match made.await.ok()? {
        Ok(spool) => Some((spool, reservation)),
        Err(error) => {
            fills.metrics.store_faults.inc();
            tracing::warn!(%error, "no spool can be made; the blob passes through uncached");
            None
        }
    }
}

/// A transfer under way.
struct Transfer {
    fill: Arc<Fill>,
    fills: Fills,
    hash: Hashing,
    spool: Arc<Spool>,
    reservation: Option<Reservation>,
    size: Option<u64>,
    validator: Option<String>,
    /// Pieces of an earlier transfer are among the bytes.
    resumed: bool,
    fetches: FuturesUnordered<Fetch>,
    pace: Pace,
    disk_fault: DiskFault,
}

/// Whether the disk has refused before: room is made for a spool once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DiskFault {
    None,
    RoomMade,
}

/// The hash, here or away on the blocking pool.
enum Hashing {
    Idle(PrefixHash),
    Away(JoinHandle<(PrefixHash, std::io::Result<()>)>),
    Lost,
}

/// What the transfer waits for.
enum Event {
    Fetched(Ended),
    Hashed(Result<(PrefixHash, std::io::Result<()>), tokio::task::JoinError>),
    Woken,
    Tick,
    Stopping,
}

/// What goes on after an event.
enum Flow {
    On,
    End(Outcome),
}

impl Transfer {
    /// Reads on from the opening answer, unless only closed ranges of a large blob are wanted: those are fetched by themselves.
    fn begin(&mut self, stream: BlobStream, place: tokio::sync::OwnedSemaphorePermit) {
        let lazy = self.size.is_some_and(|size| self.appetite(size) == Appetite::Asked);
        let unasked = lazy && self.fill.first_part().is_some() && stream.position() == 0;
        let end = self.size.unwrap_or(u64::MAX).min(stream.end().unwrap_or(u64::MAX));
        if !unasked && self.spool.reach(stream.position()) < end {
            self.fetches.push(Fetch::new(stream, end, place, &self.fill, (&self.fills, &self.spool)));
        }
    }

    async fn drive(mut self: Box<Self>) -> Outcome {
        loop {
            self.launch();
            self.hash_on();
            if let Some(outcome) = self.finished() {
                return outcome;
            }
            let event = self.event().await;
            match self.handle(event).await {
                Flow::On => {}
                Flow::End(outcome) => return outcome,
            }
        }
    }

    async fn event(&mut self) -> Event {
        let fill = Arc::clone(&self.fill);
        let tasks = self.fills.tasks.clone();
        let tick = self.pace.next_tick(TICK);
        let hashing = async {
            match &mut self.hash {
                Hashing::Away(job) => job.await,
                Hashing::Idle(_) | Hashing::Lost => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(ended) = self.fetches.next() => Event::Fetched(ended),
            hashed = hashing => Event::Hashed(hashed),
            () = fill.wake.notified() => Event::Woken,
            () = sleep_until(tick) => Event::Tick,
            () = tasks.stopping(), if !fill.has_readers() => Event::Stopping,
        }
    }

    async fn handle(&mut self, event: Event) -> Flow {
        match event {
            Event::Woken => self.when_abandoned(),
            Event::Fetched(ended) => Box::pin(self.fetched(ended)).await,
            Event::Hashed(Ok((hash, Ok(())))) => {
                self.hash = Hashing::Idle(hash);
                Flow::On
            }
            Event::Hashed(Ok((hash, Err(error)))) => {
                self.hash = Hashing::Idle(hash);
                self.broke(&error).await
            }
            Event::Hashed(Err(_)) => {
                self.hash = Hashing::Lost;
                Flow::End(Outcome::Failed(FillError::Stopping, Some(Arc::clone(&self.spool))))
            }
            Event::Tick => {
                self.measure();
                self.when_abandoned()
            }
            Event::Stopping => Flow::End(Outcome::Parked(Arc::clone(&self.spool))),
        }
    }

    fn appetite(&self, size: u64) -> Appetite {
        self.fill.demand(size, &self.spool).1
    }

    /// Starts what the plan says, as far as there are connections.
    fn launch(&mut self) {
        let Some(size) = self.size else { return };
        while let Some(step) = self.step(size) {
            let slice = match step {
                Step::Fetch(slice) => slice,
                Step::TakeOver { slice, .. } => slice,
            };
            let Some(place) = self.fills.spare_place(&self.fill.key.upstream) else { return };
            if let Step::TakeOver { from, slice } = step
                && let Some(slower) = self.fetches.iter().nth(from)
            {
                slower.stop_at(slice.start);
            }
            let stream = self.fill.ask.clone().later(slice, size, self.validator.clone());
            self.fetches.push(Fetch::new(stream, slice.end, place, &self.fill, (&self.fills, &self.spool)));
        }
    }

    fn step(&self, size: u64) -> Option<Step> {
        let gaps = self.spool.gaps(Slice { start: 0, end: size });
        let active: Vec<_> = self.fetches.iter().map(Fetch::active).collect();
        let (wants, appetite) = self.fill.demand(size, &self.spool);
        let most = self.fills.limits.per_blob;
        let share = self.pace.share().min(most);
        plan::next(&View { size, gaps: &gaps, active: &active, wants: &wants, appetite, share, most })
    }

    /// Sends the hash after the bytes that have arrived since it last looked.
    fn hash_on(&mut self) {
        let reach = self.spool.reach(0);
        let Hashing::Idle(hash) = &self.hash else { return };
        if hash.position() >= reach {
            return;
        }
        let Hashing::Idle(mut hash) = std::mem::replace(&mut self.hash, Hashing::Lost) else { return };
        let spool = Arc::clone(&self.spool);
        self.hash = Hashing::Away(self.fills.tasks.spawn_blocking(move || {
            let done = hash.follow(&spool, reach);
            (hash, done)
        }));
    }

    /// The verdict, once every byte is here and hashed.
    fn finished(&mut self) -> Option<Outcome> {
        let size = self.size?;
        let whole = matches!(&self.hash, Hashing::Idle(hash) if hash.position() == size);
        if !whole {
            return None;
        }
        let Hashing::Idle(hash) = std::mem::replace(&mut self.hash, Hashing::Lost) else { return None };
        let spool = Arc::clone(&self.spool);
        Some(match spool.verify(hash) {
            Ok(verified) => Outcome::Verified(verified, spool, self.reservation.take()),
            Err(mismatch) if self.resumed => Outcome::Failed(FillError::Pieces(mismatch), Some(spool)),
            Err(mismatch) => {
                let upstream = self.fill.key.upstream.clone();
                Outcome::Failed(FillError::Mismatch { upstream, mismatch }, Some(spool))
            }
        })
    }

    async fn fetched(&mut self, ended: Ended) -> Flow {
        match ended {
            Ended::Complete { position, last } => {
                if self.size.is_none() && last {
                    self.size = Some(position);
                }
                Flow::On
            }
            Ended::Refused(error) => self.refused(error),
            Ended::Disk(error) => self.broke(&error).await,
        }
    }

    /// A connection gave up. While others bring bytes the blob goes on with those.
    fn refused(&mut self, error: UpstreamError) -> Flow {
        if self.fetches.is_empty() {
            let keep = self.spool.total() > 0 && error.is_outage() && self.size.is_some_and(|size| size > SMALL);
            let spool = Arc::clone(&self.spool);
            if keep && !self.fill.has_readers() {
                return Flow::End(Outcome::Parked(spool));
            }
            return Flow::End(Outcome::Failed(error.into(), Some(spool)));
        }
        tracing::info!(%error, "an extra connection failed; going on with fewer");
        self.pace.shrink(self.fetches.len());
        Flow::On
    }

    /// The disk refused. Room is made once; then the readers go on alone.
    async fn broke(&mut self, error: &std::io::Error) -> Flow {
        self.fills.metrics.store_faults.inc();
        tracing::warn!(%error, digest = %self.fill.key.digest, "the spool broke");
        self.fetches.clear();
        let missing = self.size.map_or(SMALL, |size| size.saturating_sub(self.spool.total()));
        if self.disk_fault == DiskFault::None && self.size.is_some() && self.fills.store.make_room(missing).await {
            self.disk_fault = DiskFault::RoomMade;
            return Flow::On;
        }
        let hash = match std::mem::replace(&mut self.hash, Hashing::Lost) {
            Hashing::Idle(hash) => hash,
            Hashing::Away(job) => match job.await {
                Ok((hash, _)) => hash,
                Err(_) => PrefixHash::new(&self.fill.key.digest),
            },
            Hashing::Lost => PrefixHash::new(&self.fill.key.digest),
        };
        let spool = Arc::clone(&self.spool);
        let discarded = Arc::clone(&spool);
        on_disk(&self.fills, move || discarded.discard()).await;
        Flow::End(Outcome::Alone(Alone::midway(self.size, self.validator.clone(), spool, hash)))
    }

    fn measure(&mut self) {
        let now = Instant::now();
        for fetch in &self.fetches {
            fetch.measure(now);
        }
        let missing = self.size.map_or(0, |size| size.saturating_sub(self.spool.total()));
        if let Some(reservation) = self.reservation.as_mut() {
            let needed = self.size.unwrap_or_else(|| self.spool.total());
            reservation.grow(needed.saturating_sub(reservation.bytes()));
        }
        self.pace.measure(now, self.spool.total(), missing);
    }

    /// A fill that nobody reads finishes if it is small or half in; else it is parked after a while.
    fn when_abandoned(&mut self) -> Flow {
        let Some(since) = self.fill.idle_since().filter(|_| !self.fill.has_readers()) else { return Flow::On };
        let worth = self.size.is_some_and(|size| {
            let whole = self.appetite(size) == Appetite::Whole;
            size <= SMALL || (whole && self.spool.total() >= size / 2)
        });
        if worth || self.size.is_none() || since.elapsed() < ABANDONED {
            return Flow::On;
        }
        Flow::End(Outcome::Parked(Arc::clone(&self.spool)))
    }
}
