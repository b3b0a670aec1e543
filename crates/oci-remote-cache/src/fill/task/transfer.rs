//! The middle of a fill: fetches, the hash behind them, and what happens when something breaks.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use oci::Slice;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::extras::{Extras, InPlace, Record, TurnedAway};
use super::fetch::{Ended, Fetch, Shared, UNKNOWN};
use super::pace::Pace;
use super::{Outcome, on_disk};
use crate::fill::plan::{self, Appetite, Ranges, SMALL, Step, View};
use crate::fill::{Alone, Fill, FillError, Fills};
use crate::store::spool::{PrefixHash, Spool};
use crate::store::usage::Reservation;
use crate::upstream::UpstreamError;
use crate::upstream::resume::{BlobStream, Mixing};
use crate::verdict::Why;

/// How long a fill that nobody reads goes on when it is neither small nor half in.
const ABANDONED: Duration = Duration::from_secs(30);

/// A transfer under way.
pub(super) struct Transfer {
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
    turn: Turn,
    pace: Pace,
    ranges: Ranges,
    extras: Extras,
    shared: Arc<Shared>,
    disk_fault: DiskFault,
}

/// What is known of the blob when its transfer begins.
pub(super) struct Known {
    pub(super) size: Option<u64>,
    pub(super) validator: Option<String>,
    /// Pieces of an earlier transfer are among the bytes.
    pub(super) resumed: bool,
}

/// Whether the disk has refused before: room is made for a spool once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DiskFault {
    None,
    RoomMade,
}

/// A place in the queue for connections. Who has none at all waits there: others that wait would be before it for ever.
enum Turn {
    NotWanted,
    Waiting(Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>),
    Come(OwnedSemaphorePermit),
}

/// The hash, here or away on the blocking pool.
enum Hashing {
    Idle(Box<PrefixHash>),
    Away(JoinHandle<(Box<PrefixHash>, std::io::Result<()>)>),
    Lost,
}

/// What the transfer waits for.
enum Event {
    Fetched(Ended),
    Place(Option<OwnedSemaphorePermit>),
    Hashed(Result<(Box<PrefixHash>, std::io::Result<()>), tokio::task::JoinError>),
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
    pub(super) fn new(
        fill: &Arc<Fill>,
        fills: &Fills,
        (spool, reservation): (Arc<Spool>, Reservation),
        known: Known,
    ) -> Self {
        Self {
            fill: Arc::clone(fill),
            fills: fills.clone(),
            hash: Hashing::Idle(Box::new(PrefixHash::new(&fill.key.digest))),
            shared: Shared::new(fill, fills, &spool),
            spool,
            reservation: Some(reservation),
            size: known.size,
            validator: known.validator,
            resumed: known.resumed,
            fetches: FuturesUnordered::new(),
            turn: Turn::NotWanted,
            pace: Pace::new(Instant::now()),
            ranges: first_question(fill),
            extras: Extras::Welcome,
            disk_fault: DiskFault::None,
        }
    }

    /// Reads on from the opening answer, unless only closed ranges of a large blob are wanted: those are fetched by themselves.
    pub(super) fn begin(&mut self, stream: BlobStream, place: OwnedSemaphorePermit) {
        let all = self
            .size
            .unwrap_or(UNKNOWN)
            .min(stream.end().unwrap_or(UNKNOWN));
        let at = stream.position();
        if stream.comes_whole() {
            self.ranges = Ranges::NotGiven;
        }
        let end = match self.size.and_then(|size| self.only_wanted(size)) {
            _ if self.ranges == Ranges::NotGiven => all,
            Some(wanted) if wanted.start <= at && at < wanted.end => wanted.end.min(all),
            Some(_) => at,
            None => all,
        };
        if self.spool.reach(at) < end {
            self.fetches.push(Fetch::new(
                self.as_one_of_many(stream),
                end,
                place,
                &self.shared,
            ));
        }
    }

    /// A stream that others may work beside, unless the blob is too small for that, or not known to be large, or there is nothing else to
    /// do.
    fn as_one_of_many(&self, stream: BlobStream) -> BlobStream {
        let large = self.size.is_some_and(|size| size > SMALL);
        match self.ranges {
            Ranges::Given if large => stream.part(),
            Ranges::Given | Ranges::NotGiven => stream,
        }
    }

    /// The one range that is wanted of a large blob, when that is all.
    fn only_wanted(&self, size: u64) -> Option<Slice> {
        let lazy = self.appetite(size) == Appetite::Asked;
        if lazy {
            self.fill.first_wanted(size)
        } else {
            None
        }
    }

    pub(super) async fn drive(mut self: Box<Self>) -> Outcome {
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
        let tick = self.pace.next_look();
        let turn = async {
            match &mut self.turn {
                Turn::Waiting(place) => place.await,
                Turn::NotWanted | Turn::Come(_) => std::future::pending().await,
            }
        };
        let hashing = async {
            match &mut self.hash {
                Hashing::Away(job) => job.await,
                Hashing::Idle(_) | Hashing::Lost => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(ended) = self.fetches.next() => Event::Fetched(ended),
            place = turn => Event::Place(place),
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
            Event::Place(place) => {
                self.turn = place.map_or(Turn::NotWanted, Turn::Come);
                Flow::On
            }
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
                Flow::End(Outcome::Failed(
                    FillError::Stopping,
                    Some(Arc::clone(&self.spool)),
                ))
            }
            Event::Tick => {
                self.measure();
                if self.is_too_large() {
                    return self.go_alone(Why::TooLarge).await;
                }
                self.when_abandoned()
            }
            Event::Stopping => self.park(),
        }
    }

    fn appetite(&self, size: u64) -> Appetite {
        self.fill.appetite(size)
    }

    /// Starts what the plan says, as far as there are connections.
    fn launch(&mut self) {
        let Some(size) = self.size else { return };
        while let Some(step) = self.step(size) {
            let (Step::Fetch(slice) | Step::TakeOver { slice, .. }) = step;
            let beside = self.fetches.iter().any(Fetch::is_answered);
            if !self.fetches.is_empty() && !self.takes_one_more() {
                break;
            }
            let Some(place) = self.spare_place() else {
                return;
            };
            let ask = self.fill.ask_again();
            let stream = ask.later(slice, size, self.validator.clone());
            let stream = match self.ranges {
                Ranges::Given if beside => stream.on_trial(),
                Ranges::Given if self.extras.rest() => self.as_one_of_many(stream).hurried(),
                Ranges::Given => self.as_one_of_many(stream),
                Ranges::NotGiven => stream.from_the_beginning(),
            };
            let slower = match step {
                Step::TakeOver { from, .. } => self.fetches.iter().nth(from),
                Step::Fetch(_) => None,
            };
            let fetch = match slower {
                Some(slower) => {
                    Fetch::taking_over(slower, (stream, slice.end), place, &self.shared)
                }
                None => Fetch::new(stream, slice.end, place, &self.shared),
            };
            self.fetches.push(fetch);
        }
        self.turn = Turn::NotWanted;
    }

    /// Whether the upstream may be asked on another connection. While it has no time for more, as many as it had time for may go on.
    fn takes_one_more(&self) -> bool {
        let replaced = self.fetches.len() < self.pace.share();
        self.extras.are_welcome(Instant::now()) || (replaced && self.extras != Extras::Unwelcome)
    }

    /// A place for one connection more. Without any connection the transfer queues for one.
    fn spare_place(&mut self) -> Option<OwnedSemaphorePermit> {
        match std::mem::replace(&mut self.turn, Turn::NotWanted) {
            Turn::Come(place) => return Some(place),
            waiting @ (Turn::NotWanted | Turn::Waiting(_)) => self.turn = waiting,
        }
        let spare = self.fills.spare_place(&self.fill.key.upstream);
        let queues = matches!(self.turn, Turn::Waiting(_));
        if spare.is_none() && self.fetches.is_empty() && !queues {
            let (fills, upstream) = (self.fills.clone(), self.fill.key.upstream.clone());
            self.turn = Turn::Waiting(Box::pin(async move { fills.place(&upstream).await }));
        }
        spare
    }

    fn step(&self, size: u64) -> Option<Step> {
        let gaps = self.spool.gaps(Slice {
            start: 0,
            end: size,
        });
        let active: Vec<_> = self.fetches.iter().map(Fetch::active).collect();
        let (wants, appetite) = self.fill.demand(size, &self.spool);
        let most = self.fills.per_blob(&self.fill.key.upstream);
        let share = if self.pace.is_late() {
            active.len().max(1)
        } else {
            self.pace.share()
        };
        let share = share.min(most);
        plan::next(&View {
            size,
            gaps: &gaps,
            active: &active,
            wants: &wants,
            appetite,
            ranges: self.ranges,
            share,
            most,
        })
    }

    /// Sends the hash after the bytes that have arrived since it last looked.
    fn hash_on(&mut self) {
        let Hashing::Idle(hash) = &self.hash else {
            return;
        };
        self.shared.hash_waits();
        if hash.position() >= self.spool.reach(0) {
            return;
        }
        let Hashing::Idle(mut hash) = std::mem::replace(&mut self.hash, Hashing::Lost) else {
            return;
        };
        let spool = Arc::clone(&self.spool);
        self.hash = Hashing::Away(self.fills.tasks.spawn_blocking(move || {
            let done = hash.follow(&spool);
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
        let Hashing::Idle(hash) = std::mem::replace(&mut self.hash, Hashing::Lost) else {
            return None;
        };
        let spool = Arc::clone(&self.spool);
        Some(match spool.verify(*hash) {
            Ok(verified) => Outcome::Verified(verified, spool, self.reservation.take()),
            Err(mismatch) if self.resumed => {
                Outcome::Failed(FillError::Pieces(mismatch), Some(spool))
            }
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
            Ended::Refused(error) | Ended::Exhausted(error) if !self.fetches.is_empty() => {
                tracing::info!(%error, "a connection failed; going on with fewer");
                self.with_fewer(TurnedAway::by(&error, InPlace::Failure));
                Flow::On
            }
            Ended::Refused(error) if self.size.is_some() && error.may_be_of_a_range() => {
                tracing::info!(%error, "no more ranges come; asking for everything");
                self.ranges = Ranges::NotGiven;
                Flow::On
            }
            Ended::Refused(error) | Ended::Exhausted(error) => self.gave_up(error),
            Ended::Unwelcome(error, in_place) => {
                tracing::info!(%error, "an extra connection is not welcome; going on without");
                self.with_fewer(TurnedAway::by(&error, in_place));
                Flow::On
            }
            Ended::TooLate => {
                self.with_fewer(TurnedAway::Busy(None));
                Flow::On
            }
            Ended::Disk(error) => self.broke(&error).await,
        }
    }

    /// The upstream gives no more.
    fn gave_up(&self, error: UpstreamError) -> Flow {
        let worth = self.spool.total() > 0 && self.size.is_some_and(|size| size > SMALL);
        let spool = Arc::clone(&self.spool);
        // What one client's login no longer opens, the next reader's may.
        let personal = !self.fill.ask.identity.is_configured();
        if worth && (personal || error.is_outage()) {
            return Flow::End(Outcome::Broken(error.into(), spool));
        }
        Flow::End(Outcome::Failed(error.into(), Some(spool)))
    }

    /// What a connection beside the others was to bring comes by them, or when they have ended.
    fn with_fewer(&mut self, turned: TurnedAway) {
        let record = if self.shared.has_given_ranges() {
            Record::HasGiven
        } else {
            Record::Clean
        };
        self.extras = self.extras.after(turned, record, Instant::now());
        for fetch in &self.fetches {
            fetch.keep_all();
        }
        for fetch in &self.fetches {
            fetch.take_over_still();
        }
        self.pace.shrink(self.working());
    }

    /// Connections that have been answered.
    fn working(&self) -> usize {
        let answered = self.fetches.iter().filter(|fetch| fetch.is_answered());
        answered.count()
    }

    /// The disk refused. Room is made once; then the readers go on alone.
    async fn broke(&mut self, error: &std::io::Error) -> Flow {
        self.fills.store.note_failure("a spool broke", error);
        tracing::warn!(%error, digest = %self.fill.key.digest, "the spool broke");
        self.fetches.clear();
        let missing = self
            .size
            .map_or(SMALL, |size| size.saturating_sub(self.spool.total()));
        if self.disk_fault == DiskFault::None
            && self.size.is_some()
            && self.fills.store.make_room(missing).await
        {
            self.disk_fault = DiskFault::RoomMade;
            return Flow::On;
        }
        self.go_alone(Why::Disk).await
    }

    /// The cache stops keeping the blob; its readers go on from the upstream by themselves.
    async fn go_alone(&mut self, why: Why) -> Flow {
        self.fetches.clear();
        let hash = match std::mem::replace(&mut self.hash, Hashing::Lost) {
            Hashing::Idle(hash) => hash,
            Hashing::Away(job) => match job.await {
                Ok((hash, _)) => hash,
                Err(_) => Box::new(PrefixHash::new(&self.fill.key.digest)),
            },
            Hashing::Lost => Box::new(PrefixHash::new(&self.fill.key.digest)),
        };
        let spool = Arc::clone(&self.spool);
        let discarded = Arc::clone(&spool);
        on_disk(&self.fills, move || discarded.discard()).await;
        Flow::End(Outcome::Alone(Box::new(Alone::midway(
            why,
            (self.size, self.validator.clone()),
            spool,
            *hash,
        ))))
    }

    fn measure(&mut self) {
        let now = Instant::now();
        for fetch in &self.fetches {
            fetch.measure(now);
        }
        let each =
            self.shared.take_waited() / u32::try_from(self.fetches.len().max(1)).unwrap_or(1);
        let missing = self
            .size
            .map_or(0, |size| size.saturating_sub(self.spool.total()));
        let needed = match self.size {
            Some(size) if self.appetite(size) == Appetite::Whole => size,
            // A sparse file takes the room of what is in it.
            Some(_) | None => self.spool.total(),
        };
        if let Some(reservation) = self.reservation.as_mut() {
            reservation.grow(needed.saturating_sub(reservation.bytes()));
        }
        self.pace.measure(now, (self.spool.total(), missing), each);
        self.pace
            .note_working(self.working(), now, self.spool.total());
        if self.extras.are_welcome(now) {
            self.pace.regrow();
        }
    }

    /// A fill that nobody reads finishes if it is small or half in; else it is parked after a while.
    fn when_abandoned(&mut self) -> Flow {
        if self.fill.is_unwanted() {
            return self.park();
        }
        let Some(since) = self.fill.idle_since().filter(|_| !self.fill.has_readers()) else {
            return Flow::On;
        };
        let worth = self.size.is_some_and(|size| {
            let whole = self.appetite(size) == Appetite::Whole;
            whole && (size <= SMALL || self.spool.total() >= size / 2)
        });
        if worth || self.size.is_none() || since.elapsed() < ABANDONED {
            return Flow::On;
        }
        self.park()
    }

    /// Sets the pieces aside, unless somebody has come to read after all.
    fn park(&self) -> Flow {
        if self.fills.close_idle(&self.fill) {
            return Flow::End(Outcome::Parked(Arc::clone(&self.spool)));
        }
        Flow::On
    }

    /// A blob whose size nobody told has grown past what is kept.
    fn is_too_large(&self) -> bool {
        self.size.is_none() && self.spool.total() > self.fills.store.max_blob()
    }
}

/// Where wrong bytes came before, all are asked for in the plainest way: some upstreams answer that one right, and ranges wrong.
fn first_question(fill: &Fill) -> Ranges {
    match fill.ask.mixing {
        Mixing::Allowed => Ranges::Given,
        Mixing::Refused => Ranges::NotGiven,
    }
}
