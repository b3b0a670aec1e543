//! The beginning of a fill: what is left from before, the upstream's answer, the spool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use oci::Slice;
use tokio::time::sleep;

use super::transfer::{Known, Transfer};
use crate::deadline::Deadline;
use crate::fill::plan::Appetite;
use crate::fill::{Alone, Fill, FillError, Fills, Phase};
use crate::store::spool::Spool;
use crate::store::usage::Reservation;
use crate::upstream::resume::{BlobStream, Mixing};
use crate::upstream::{Fault, UpstreamError};
use crate::verdict::Why;

/// How a fill begins.
pub(super) enum Opened {
    Transfer(Box<Transfer>),
    Alone(Box<Alone>),
}

/// Asks the upstream, and makes the spool once it has answered.
pub(super) async fn open(
    fill: &Arc<Fill>,
    fills: &Fills,
    kept: Option<Arc<Spool>>,
) -> Result<Opened, FillError> {
    let deadline = Deadline::for_answer();
    let range = first_range(fill, kept.as_deref());
    let Ok(Some(place)) = deadline.run(fills.place(&fill.key.upstream)).await else {
        return Err(FillError::Busy {
            upstream: fill.key.upstream.clone(),
        });
    };
    let stream = ask(fill, range, deadline).await?;
    fill.set(|progress| {
        progress.credential = Some(stream.credential().clone());
        progress.place = stream.place();
    });
    let size = stream.total();
    let alone = |why, stream, place| {
        fill.set(|progress| progress.size = size);
        Ok(Opened::Alone(Box::new(Alone::from_start(
            why, stream, place,
        ))))
    };
    if size.is_some_and(|size| size > fills.store.max_blob()) {
        return alone(Why::TooLarge, stream, place);
    }
    let Some((spool, reservation)) = make_spool(fill, fills, kept.clone(), size).await else {
        return alone(Why::Disk, stream, place);
    };
    // Pieces of a blob of another size are not among the bytes, and not to blame for them.
    let resumed = kept.is_some_and(|kept| Arc::ptr_eq(&kept, &spool));
    fill.set(|progress| {
        progress.size = size;
        progress.spool = Some(Arc::clone(&spool));
        progress.phase = Phase::Filling;
    });
    let validator = stream.validator().map(str::to_owned);
    let known = Known {
        size,
        validator,
        resumed,
    };
    let mut transfer = Transfer::new(fill, fills, (spool, reservation), known);
    transfer.begin(stream, place);
    Ok(Opened::Transfer(Box::new(transfer)))
}

/// The upstream's answer. A range may lie outside of the blob, since anyone can push a manifest that lies about a layer; and some upstreams
/// know no ranges, or do not tell the size with them, without which no range leads to an end. Asked for everything they say it, or end.
async fn ask(
    fill: &Fill,
    range: Option<Slice>,
    deadline: Deadline,
) -> Result<BlobStream, UpstreamError> {
    if range.is_none() {
        return fill.ask.clone().open(None, deadline).await;
    }
    match once_it_may_be_asked(fill, range, deadline).await {
        // It was left alone, and heard no question.
        Err(error) if matches!(error.fault(), Fault::BreakerOpen { .. }) => Err(error),
        Err(error) if error.may_be_of_a_range() => once_it_may_be_asked(fill, None, deadline).await,
        Ok(stream) if stream.total().is_none() => {
            drop(stream);
            once_it_may_be_asked(fill, None, deadline).await
        }
        answered => answered,
    }
}

/// The answer, after a wait for the breaker if need be: ranges that failed may have opened it, which says nothing of a plain GET, and
/// pieces that were kept are worth a second.
async fn once_it_may_be_asked(
    fill: &Fill,
    range: Option<Slice>,
    deadline: Deadline,
) -> Result<BlobStream, UpstreamError> {
    let answered = fill.ask.clone().open(range, deadline).await;
    if let Err(error) = &answered
        && let Fault::BreakerOpen { retry_after } = *error.fault()
        && retry_after < deadline.remaining()
    {
        sleep(retry_after).await;
        return fill.ask.clone().open(range, deadline).await;
    }
    answered
}

/// The pieces kept from an earlier transfer. That there was one says nothing about what is wanted now: a lazy client that comes again
/// costs again only what it lacks.
pub(super) async fn resume_kept(fill: &Arc<Fill>, fills: &Fills) -> Option<Arc<Spool>> {
    let store = fills.store.clone();
    if !store.writable() {
        return None;
    }
    let key = fill.key.clone();
    let kept = fills
        .tasks
        .spawn_blocking(move || Spool::resume(store.layout(), key.digest, &key.upstream))
        .await;
    match kept {
        Ok(Ok(Some(kept))) => {
            fills.store.count_parked().await;
            let kept = Arc::new(kept);
            check_kept(fill, fills, &kept);
            Some(kept)
        }
        Ok(Err(error)) => {
            tracing::warn!(%error, "pieces kept from an earlier transfer cannot be used");
            None
        }
        Ok(Ok(None)) | Err(_) => None,
    }
}

/// Looks at the kept pieces while the upstream is asked and the first readers are served: what they wait for goes first, in turns.
fn check_kept(fill: &Arc<Fill>, fills: &Fills, kept: &Arc<Spool>) {
    let (fill, kept) = (Arc::clone(fill), Arc::clone(kept));
    let look = move || {
        let size = kept.size().unwrap_or_default();
        let turn = AtomicUsize::new(0);
        let first = || fill.waited_for(size, &kept, turn.fetch_add(1, Ordering::Relaxed));
        let tell = || {
            fill.announce();
            fill.wake.notify_one();
        };
        kept.check_kept(first, tell);
    };
    // Nobody waits for its end: it tells of each piece.
    drop(fills.tasks.spawn_blocking(look));
}

/// The range to open with; `None` is a plain GET of everything, which also tells the size.
fn first_range(fill: &Fill, kept: Option<&Spool>) -> Option<Slice> {
    if let Some((spool, size)) = kept.and_then(|spool| Some((spool, spool.size()?))) {
        let wanted = fill.first_wanted(size).unwrap_or(Slice {
            start: 0,
            end: size,
        });
        // Even when nothing is missing the upstream is asked, for its answer is what proves that this repository holds the blob.
        let last = Slice {
            start: size.saturating_sub(1),
            end: size,
        };
        return spool.gaps(wanted).first().copied().or(Some(last));
    }
    if fill.ask.mixing == Mixing::Refused {
        return None;
    }
    let size = fill.told?.size;
    fill.first_wanted(Some(size).filter(|&size| size > fill.always_whole())?)
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
    // Where only parts are wanted the rest may never come: nothing is evicted for it.
    let expected = size.filter(|&size| fill.appetite(size) == Appetite::Whole);
    let reservation = store.usage().reserve(expected.unwrap_or(0));
    let key = fill.key.clone();
    let made = fills.tasks.spawn_blocking(move || {
        let fits = |spool: &Arc<Spool>| size.is_none() || spool.size() == size;
        let spool = match kept {
            Some(spool) if fits(&spool) => spool,
            unfit => {
                // It is another file's by now.
                unfit.inspect(|spool| spool.give_up());
                Arc::new(Spool::create(store.layout(), key.digest, &key.upstream)?)
            }
        };
        size.map_or(Ok(()), |size| spool.settle_size(size))?;
        Ok::<_, std::io::Error>(spool)
    });
    match made.await.ok()? {
        Ok(spool) => Some((spool, reservation)),
        Err(error) => {
            fills.store.note_failure("no spool can be made", &error);
            tracing::warn!(%error, "no spool can be made; the blob passes through uncached");
            None
        }
    }
}
