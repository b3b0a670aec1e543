//! The life of one fill, top to bottom: open, spool, fetch, hash, verify, record, publish.
//!
//! The task owns the transfer; readers only watch its progress. Fetching, writing and hashing overlap: bytes are written on the blocking
//! pool while the next ones arrive, and the hash follows the unbroken prefix there too. What to fetch next is decided in [`super::plan`].

mod extras;
mod fetch;
mod open;
mod outbox;
mod pace;
mod transfer;

use std::sync::Arc;
use std::time::Duration;

use self::open::{Opened, open, resume_kept};
use super::{Alone, Fill, FillError, Fills, Phase};
use crate::metrics::OutcomeLabel;
use crate::names::CredentialId;
use crate::store::catalog::{Change, Kind, Membership, PendingRecord, Proof};
use crate::store::spool::{Spool, Verified};
use crate::store::usage::Reservation;
use crate::upstream::Fault;

/// How long requests find a fill that cannot keep its blob, and go on alone at once, before another one tries.
const ALONE: Duration = Duration::from_secs(2);

/// How a fill ended.
enum Outcome {
    Verified(Verified, Arc<Spool>, Option<Reservation>),
    Alone(Box<Alone>),
    Parked(Arc<Spool>),
    Failed(FillError, Option<Arc<Spool>>),
    /// The upstream gave up midway; what came is worth keeping for the next try.
    Broken(FillError, Arc<Spool>),
}

/// Runs a fill to its end.
pub(super) async fn run(fill: Arc<Fill>, fills: Fills) {
    fills.metrics.fills.inc();
    let outcome = Box::pin(fetch_all(&fill, &fills)).await;
    let label = conclude(&fill, &fills, outcome).await;
    fills.metrics.fills.dec();
    fills
        .metrics
        .fills_ended
        .get_or_create(&OutcomeLabel { outcome: label })
        .inc();
}

async fn fetch_all(fill: &Arc<Fill>, fills: &Fills) -> Outcome {
    let kept = resume_kept(fill, fills).await;
    match open(fill, fills, kept.clone()).await {
        Ok(Opened::Transfer(transfer)) => transfer.drive().await,
        Ok(Opened::Alone(alone)) => {
            // What was kept is of no use: the blob is too large by now, or the disk does not take more of it.
            if let Some(spool) = kept {
                on_disk(fills, move || spool.discard()).await;
            }
            Outcome::Alone(alone)
        }
        // An upstream that is away must not cost what was fetched while it was there.
        Err(error) => match kept {
            Some(spool) => Outcome::Broken(error, spool),
            None => Outcome::Failed(error, None),
        },
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
            fill.set(|progress| progress.phase = Phase::Alone(Arc::from(alone)));
            tokio::select! {
                () = tokio::time::sleep(ALONE) => {}
                () = fills.tasks.stopping() => {}
            }
            fills.leave(fill);
            "alone"
        }
        Outcome::Parked(spool) => {
            // The fill is closed: nobody can have joined it since, and who asks waits for the files to have moved.
            let store = fills.store.clone();
            on_disk(fills, move || spool.park(store.layout())).await;
            fills.store.count_parked().await;
            fills.leave(fill);
            fill.set(|progress| progress.phase = Phase::Failed(FillError::Parked));
            "parked"
        }
        Outcome::Broken(error, spool) => {
            let store = fills.store.clone();
            on_disk(fills, move || spool.park(store.layout())).await;
            fills.store.count_parked().await;
            fail(fill, fills, error)
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
        FillError::Upstream(_)
        | FillError::Busy { .. }
        | FillError::Parked
        | FillError::Stopping => "failed",
    };
    if is_refusal(&error) {
        // Anyone can ask for what is not there: that is no news.
        tracing::debug!(%error, source = %fill.source, digest = %fill.key.digest, "a blob was not fetched");
    } else {
        tracing::warn!(%error, source = %fill.source, digest = %fill.key.digest, "a blob was not fetched");
    }
    if matches!(error, FillError::Mismatch { .. }) {
        fills.avoid(fill);
    }
    // Whom the upstream refused was one client, by its own login: the next one to ask has another.
    let personal = is_refusal(&error) && !fill.ask.identity.is_configured();
    if personal || matches!(error, FillError::Pieces(_)) {
        fills.leave(fill);
    } else {
        fills.leave_failed(fill, error.clone());
    }
    fill.set(|progress| progress.phase = Phase::Failed(error));
    label
}

fn is_refusal(error: &FillError) -> bool {
    match error {
        FillError::Upstream(error) => {
            matches!(error.fault(), Fault::NotFound { .. } | Fault::Denied { .. })
        }
        FillError::Mismatch { .. }
        | FillError::Pieces(_)
        | FillError::Busy { .. }
        | FillError::Parked
        | FillError::Stopping => false,
    }
}

/// Membership is on disk before the last bytes leave, so that what a client finished pulling before a kill -9 is a hit after it;
/// the syncs and the rename come after, off the readers' path.
async fn publish(
    fill: &Arc<Fill>,
    fills: &Fills,
    (verified, room): (Verified, Option<Reservation>),
    spool: Arc<Spool>,
) {
    let credential = fill
        .progress()
        .credential
        .unwrap_or_else(CredentialId::anonymous);
    let membership = Membership {
        source: fill.source.clone(),
        digest: fill.key.digest,
        kind: Kind::Blob,
        credential,
        proof: Proof::Delivered,
    };
    let pending = Change::Pending(PendingRecord {
        digest: fill.key.digest,
        size: verified.size(),
        spool_name: spool.name(),
    });
    if let Err(error) = fills
        .store
        .catalog()
        .record(vec![Change::Membership(membership), pending])
        .await
    {
        tracing::warn!(%error, "a finished blob could not be recorded; it is served all the same");
    }
    let size = verified.size();
    fill.set(|progress| {
        progress.size = Some(size);
        progress.phase = Phase::Verified;
    });
    if let Err(error) = fills.store.admit_held(verified, room).await {
        tracing::warn!(%error, digest = %fill.key.digest, "a finished blob could not be published");
        on_disk(fills, move || spool.discard()).await;
    } else {
        on_disk(fills, move || spool.drop_list()).await;
    }
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
