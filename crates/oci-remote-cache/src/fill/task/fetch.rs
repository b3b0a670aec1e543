//! One range on its way from an upstream into a spool.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::fill::plan::Active;
use crate::fill::{Fill, Fills};
use crate::store::spool::Spool;
use crate::tasks::Tasks;
use crate::upstream::UpstreamError;
use crate::upstream::resume::BlobStream;

/// A rate is told over no less than this, in milliseconds.
const SETTLED: u64 = 200;

/// Bytes written at once, at most.
const BATCH: usize = 1 << 20;

/// The end of a range that goes on until the upstream says that the blob is over.
pub(super) const UNKNOWN: u64 = u64::MAX;

/// How a fetch ended.
pub(super) enum Ended {
    /// Its range is in; `last` when the upstream ended the blob there.
    Complete { position: u64, last: bool },
    /// The upstream gave no more, however often it was asked.
    Refused(UpstreamError),
    /// The disk took no more.
    Disk(std::io::Error),
}

/// A running fetch, seen from the transfer that owns it.
pub(super) struct Fetch {
    work: Pin<Box<dyn Future<Output = Ended> + Send>>,
    range: Arc<Range>,
}

/// How far a fetch is and where it stops; the transfer may move the stop nearer.
#[derive(Debug)]
struct Range {
    position: AtomicU64,
    end: AtomicU64,
    measured: Mutex<Measured>,
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    at: Instant,
    position: u64,
    rate: Option<u64>,
}

/// The work of one fetch.
struct Worker {
    stream: BlobStream,
    range: Arc<Range>,
    fill: Arc<Fill>,
    spool: Arc<Spool>,
    tasks: Tasks,
    /// Microseconds that the blob's connections have waited for the upstream; the transfer takes them out.
    waited: Arc<AtomicU64>,
    _place: OwnedSemaphorePermit,
}

impl Fetch {
    pub(super) fn new(
        stream: BlobStream,
        end: u64,
        place: OwnedSemaphorePermit,
        fill: &Arc<Fill>,
        (fills, spool, waited): (&Fills, &Arc<Spool>, &Arc<AtomicU64>),
    ) -> Self {
        let position = stream.position();
        let measured = Mutex::new(Measured {
            at: Instant::now(),
            position,
            rate: None,
        });
        let range = Arc::new(Range {
            position: position.into(),
            end: end.into(),
            measured,
        });
        let worker = Worker {
            stream,
            range: Arc::clone(&range),
            fill: Arc::clone(fill),
            spool: Arc::clone(spool),
            tasks: fills.tasks.clone(),
            waited: Arc::clone(waited),
            _place: place,
        };
        Self {
            work: Box::pin(worker.run()),
            range,
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
        Active {
            position: self.range.position.load(Ordering::Relaxed).min(end),
            end,
            rate,
        }
    }

    /// Lets the fetch end at `end`; another one takes the rest.
    pub(super) fn stop_at(&self, end: u64) {
        self.range.end.fetch_min(end, Ordering::Relaxed);
    }

    /// Notes the rate since the last look.
    pub(super) fn measure(&self, now: Instant) {
        let position = self.range.position.load(Ordering::Relaxed);
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
    /// Reads and writes in turn; one batch is written while the next one arrives.
    async fn run(mut self) -> Ended {
        let mut writing: Option<JoinHandle<std::io::Result<()>>> = None;
        loop {
            let end = self.range.end.load(Ordering::Relaxed);
            if end != UNKNOWN {
                self.stream.stop_at(end);
            }
            let offset = self.stream.position();
            let batch = match self.batch().await {
                Ok(batch) => batch,
                Err(error) => {
                    return Self::after(writing)
                        .await
                        .map_or_else(Ended::Disk, |()| Ended::Refused(error));
                }
            };
            if let Err(error) = Self::after(writing.take()).await {
                return Ended::Disk(error);
            }
            if batch.is_empty() {
                let last = self.stream.total() == Some(offset);
                return Ended::Complete {
                    position: offset,
                    last,
                };
            }
            writing = Some(self.write(offset, batch));
        }
    }

    /// Writes on the blocking pool and tells the readers from there, so that they do not wait for the next batch.
    fn write(&self, offset: u64, batch: Vec<Bytes>) -> JoinHandle<std::io::Result<()>> {
        let (spool, range, fill) = (
            Arc::clone(&self.spool),
            Arc::clone(&self.range),
            Arc::clone(&self.fill),
        );
        self.tasks.spawn_blocking(move || {
            let position = spool.write(offset, &batch)?;
            range.position.store(position, Ordering::Relaxed);
            fill.announce();
            fill.wake.notify_one();
            Ok(())
        })
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
        // A batch that was there as a whole waited for us, not we for it: the machine is busy.
        if size < BATCH {
            self.waited.fetch_add(waited, Ordering::Relaxed);
        }
        Ok(batch)
    }

    async fn after(writing: Option<JoinHandle<std::io::Result<()>>>) -> std::io::Result<()> {
        match writing {
            Some(writing) => writing.await.map_err(std::io::Error::other)?,
            None => Ok(()),
        }
    }
}
