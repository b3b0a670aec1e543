//! One range on its way from an upstream into a spool.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use oci::Slice;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::extras::InPlace;
use super::outbox::{MOST as BATCH, Outbox};
use crate::fill::plan::Active;
use crate::fill::{Fill, Fills};
use crate::store::spool::Spool;
use crate::tasks::Tasks;
use crate::upstream::UpstreamError;
use crate::upstream::resume::BlobStream;

/// A rate is told over no less than this, in milliseconds.
const SETTLED: u64 = 200;

/// No upstream that is slower than this machine brings so much between two looks at the socket: 128 KiB.
const GULP: usize = 128 << 10;

/// The end of a range that goes on until the upstream says that the blob is over.
pub(super) const UNKNOWN: u64 = u64::MAX;

/// How a fetch ended.
pub(super) enum Ended {
    /// Its range is in; `last` when the upstream ended the blob there.
    Complete { position: u64, last: bool },
    /// The upstream gave no more of the range, however often it was asked.
    Refused(UpstreamError),
    /// It gave no more in any way it can be asked.
    Exhausted(UpstreamError),
    /// The upstream did not answer an extra connection as it should, so nothing was taken over.
    Unwelcome(UpstreamError, InPlace),
    /// It answered an extra connection when most of what that was to bring had come.
    TooLate,
    /// The disk took no more.
    Disk(std::io::Error),
}

/// A running fetch, seen from the transfer that owns it.
pub(super) struct Fetch {
    work: Pin<Box<dyn Future<Output = Ended> + Send>>,
    range: Arc<Range>,
    take_over: Option<TakeOver>,
}

/// How far a fetch is and where it stops; the transfer may move the stop nearer.
#[derive(Debug)]
pub(super) struct Range {
    pub(super) position: AtomicU64,
    /// Next byte to arrive: what is before it may still wait to be written.
    received: AtomicU64,
    end: AtomicU64,
    /// Where it will stop once those who are to take over from it have been answered.
    planned_end: AtomicU64,
    /// The upstream has sent some of it.
    answered: AtomicBool,
    measured: Mutex<Measured>,
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    at: Instant,
    position: u64,
    rate: Option<u64>,
}

/// What the connections of one transfer share.
#[derive(Debug)]
pub(super) struct Shared {
    fill: Arc<Fill>,
    spool: Arc<Spool>,
    tasks: Tasks,
    /// Microseconds that connections have waited for the upstream; the transfer takes them out.
    waited: AtomicU64,
    /// A range that was asked for beside another has come as asked.
    ranges_given: AtomicBool,
    /// The hash has come to the end of what is here, and the transfer wants to know when more is.
    hash_waits: AtomicBool,
}

/// A part of another fetch's range that this one brings, once it is answered.
#[derive(Clone)]
struct TakeOver {
    from: Arc<Range>,
    at: u64,
}

/// The work of one fetch.
struct Worker {
    take_over: Option<TakeOver>,
    stream: BlobStream,
    range: Arc<Range>,
    outbox: Arc<Outbox>,
    shared: Arc<Shared>,
    _place: OwnedSemaphorePermit,
}

impl Shared {
    pub(super) fn new(fill: &Arc<Fill>, fills: &Fills, spool: &Arc<Spool>) -> Arc<Self> {
        Arc::new(Self {
            fill: Arc::clone(fill),
            spool: Arc::clone(spool),
            tasks: fills.tasks.clone(),
            waited: AtomicU64::new(0),
            ranges_given: AtomicBool::new(false),
            hash_waits: AtomicBool::new(false),
        })
    }

    /// How long connections have waited for the upstream since the last time this was asked.
    pub(super) fn take_waited(&self) -> Duration {
        Duration::from_micros(self.waited.swap(0, Ordering::Relaxed))
    }

    /// Whether a range came as asked that was asked for beside another.
    pub(super) fn has_given_ranges(&self) -> bool {
        self.ranges_given.load(Ordering::Relaxed)
    }

    /// Asks for a word to the transfer when more has arrived. What has arrived must be looked at after this.
    pub(super) fn hash_waits(&self) {
        self.hash_waits.store(true, Ordering::Relaxed);
    }

    /// Tells whoever waits for bytes that more have arrived. Nobody is woken for each batch but the readers.
    pub(super) fn tell(&self) {
        self.fill.announce();
        if self.hash_waits.swap(false, Ordering::Relaxed) {
            self.fill.wake.notify_one();
        }
    }
}

impl Fetch {
    pub(super) fn new(
        stream: BlobStream,
        end: u64,
        place: OwnedSemaphorePermit,
        shared: &Arc<Shared>,
    ) -> Self {
        Self::begin(stream, (end, None), place, shared)
    }

    /// A fetch of what `slower` was to bring from here on. Until the upstream has answered, that one goes on.
    pub(super) fn taking_over(
        slower: &Self,
        (stream, end): (BlobStream, u64),
        place: OwnedSemaphorePermit,
        shared: &Arc<Shared>,
    ) -> Self {
        let at = stream.position();
        let from = Arc::clone(&slower.range);
        let fetch = Self::begin(stream, (end, Some(TakeOver { from, at })), place, shared);
        fetch.take_over_still();
        fetch
    }

    fn begin(
        stream: BlobStream,
        (end, take_over): (u64, Option<TakeOver>),
        place: OwnedSemaphorePermit,
        shared: &Arc<Shared>,
    ) -> Self {
        let position = stream.position();
        let measured = Mutex::new(Measured {
            at: Instant::now(),
            position,
            rate: None,
        });
        let range = Arc::new(Range {
            position: position.into(),
            received: position.into(),
            end: end.into(),
            planned_end: end.into(),
            answered: false.into(),
            measured,
        });
        let worker = Worker {
            take_over: take_over.clone(),
            outbox: Outbox::new(shared.spool.writer(position), &range, shared),
            stream,
            range: Arc::clone(&range),
            shared: Arc::clone(shared),
            _place: place,
        };
        Self {
            work: Box::pin(worker.run()),
            range,
            take_over,
        }
    }

    pub(super) fn active(&self) -> Active {
        let rate = self
            .range
            .measured
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .rate;
        let end = self.range.end.load(Ordering::Relaxed);
        let end = end.min(self.range.planned_end.load(Ordering::Relaxed));
        Active {
            position: self.range.position.load(Ordering::Relaxed).min(end),
            end,
            rate,
        }
    }

    /// Nobody takes over from it who has not done so.
    pub(super) fn keep_all(&self) {
        let end = self.range.end.load(Ordering::Relaxed);
        self.range.planned_end.store(end, Ordering::Relaxed);
    }

    /// Plans again to take over what it has not yet.
    pub(super) fn take_over_still(&self) {
        if let Some(TakeOver { from, at }) = &self.take_over
            && !self.is_answered()
        {
            from.planned_end.fetch_min(*at, Ordering::Relaxed);
        }
    }

    /// Whether the upstream has sent some of its range.
    pub(super) fn is_answered(&self) -> bool {
        self.range.answered.load(Ordering::Relaxed)
    }

    /// Notes the rate since the last look.
    pub(super) fn measure(&self, now: Instant) {
        let position = self.range.received.load(Ordering::Relaxed);
        let mut measured = self
            .range
            .measured
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let millis = u64::try_from(now.saturating_duration_since(measured.at).as_millis())
            .unwrap_or(u64::MAX);
        if millis >= SETTLED {
            let came = position
                .saturating_sub(measured.position)
                .saturating_mul(1000);
            *measured = Measured {
                at: now,
                position,
                rate: Some(came / millis),
            };
        }
    }
}

impl Future for Fetch {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Ended> {
        self.work.as_mut().poll(context)
    }
}

impl Worker {
    /// Reads what comes; it is written on the blocking pool meanwhile.
    async fn run(mut self) -> Ended {
        loop {
            let end = self.range.end.load(Ordering::Relaxed);
            if end != UNKNOWN {
                self.stream.stop_at(end);
            }
            let on_trial = self.stream.is_on_trial();
            let batch = match self.batch().await {
                Ok(batch) => batch,
                Err(error) => return self.refused(error).await,
            };
            if !self.is_still_needed() {
                return Ended::TooLate;
            }
            self.range.answered.store(true, Ordering::Relaxed);
            if on_trial {
                self.shared.ranges_given.store(true, Ordering::Relaxed);
            }
            self.shared.fill.note_giver(self.stream.place());
            if batch.is_empty() {
                return self
                    .outbox
                    .written()
                    .await
                    .map_or_else(Ended::Disk, |()| self.complete());
            }
            if let Err(error) = self.outbox.put(batch, &self.shared.tasks).await {
                return Ended::Disk(error);
            }
        }
    }

    /// Once an extra connection is answered: takes over, unless what it was to bring has come meanwhile, most of it.
    fn is_still_needed(&mut self) -> bool {
        let Some(TakeOver { from, at }) = self.take_over.take() else {
            return true;
        };
        let end = self.range.end.load(Ordering::Relaxed);
        let gaps = self.shared.spool.gaps(Slice { start: at, end });
        let missing: u64 = gaps.into_iter().map(Slice::len).sum();
        let needed = missing > end.saturating_sub(at) / 2;
        if needed {
            from.end.fetch_min(at, Ordering::Relaxed);
        }
        needed
    }

    async fn refused(&self, error: UpstreamError) -> Ended {
        match self.outbox.written().await {
            Err(error) => Ended::Disk(error),
            Ok(()) if self.stream.is_on_trial() => {
                let in_place = if self.stream.is_unfit() {
                    InPlace::Unfit
                } else {
                    InPlace::Failure
                };
                Ended::Unwelcome(error, in_place)
            }
            Ok(()) if self.stream.is_sole() => Ended::Exhausted(error),
            Ok(()) => Ended::Refused(error),
        }
    }

    fn complete(&self) -> Ended {
        let position = self.stream.position();
        Ended::Complete {
            position,
            last: self.stream.total() == Some(position),
        }
    }

    /// What has arrived, at least one part unless the range is complete.
    async fn batch(&mut self) -> Result<Vec<Bytes>, UpstreamError> {
        let asked = Instant::now();
        let first = self.stream.next().await?;
        let waited = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
        let Some(first) = first else {
            return Ok(Vec::new());
        };
        let mut size = first.len();
        let mut batch = vec![first];
        while size < BATCH {
            let Some(more) = self.stream.ready() else {
                break;
            };
            size += more.len();
            batch.push(more);
        }
        self.range
            .received
            .store(self.stream.position(), Ordering::Relaxed);
        // What is there in one gulp waited for us, not we for it: the machine is busy.
        if size < GULP {
            self.shared.waited.fetch_add(waited, Ordering::Relaxed);
        }
        Ok(batch)
    }
}
