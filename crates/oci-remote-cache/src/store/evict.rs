//! Making room: parked pieces first, then the blobs that were not asked for the longest.
//!
//! What to evict is chosen by a pure function; the act removes the name only, and who has the file open reads on.

use std::collections::BinaryHeap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tracing::{info, warn};

use oci::Digest;

use super::catalog::{Catalog, Change};
use super::layout::Layout;
use super::publish::remove;
use super::usage::{StoredBlob, Usage};
use super::{Shared, Store};
use crate::clock::Timestamp;
use crate::metrics::Metrics;
use crate::tasks::Tasks;

/// How often the uses of blobs are written down.
const WRITE_USES: Duration = Duration::from_secs(10);

/// How often files that nobody asked for lately are closed.
const CLOSE_FILES: Duration = Duration::from_secs(1);

/// How often parked pieces that are too old are looked for.
const SWEEP_PARKED: Duration = Duration::from_hours(1);

/// How long pieces stay parked that nobody asks for: a week.
const PARKED_FOR: Duration = Duration::from_hours(7 * 24);

/// Pause after an eviction that found nothing.
const NOTHING_TO_EVICT: Duration = Duration::from_millis(200);

/// Bytes of a block as `stat` counts them.
const BLOCK: u64 = 512;

/// A blob that could be evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub digest: Digest,
    /// Bytes that evicting it frees.
    pub size: u64,
    /// When it was last asked for.
    pub last_used: Timestamp,
    /// Whether somebody reads it.
    pub hold: Hold,
}

/// Whether a blob may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Nobody reads it.
    Free,
    /// Somebody has it open.
    InUse,
}

/// What an eviction achieved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Blobs removed.
    pub blobs: u64,
    /// Bytes freed, of parked pieces too.
    pub bytes: u64,
}

/// The blobs to evict, longest unused first, so that at least `bytes` become free: no more than needed, none that is in use.
pub fn choose(candidates: impl IntoIterator<Item = Candidate>, bytes: u64) -> Vec<Candidate> {
    // The most recently used of those chosen so far is on top, and goes as soon as the others suffice without it.
    let mut chosen: BinaryHeap<ByUse> = BinaryHeap::new();
    let mut freed: u64 = 0;
    for candidate in candidates {
        if candidate.hold == Hold::InUse {
            continue;
        }
        freed = freed.saturating_add(candidate.size);
        chosen.push(ByUse(candidate));
        while let Some(ByUse(latest)) = chosen.peek()
            && freed - latest.size >= bytes
        {
            freed -= latest.size;
            chosen.pop();
        }
    }
    let chosen = chosen.into_sorted_vec().into_iter();
    chosen.map(|ByUse(candidate)| candidate).collect()
}

/// Candidates in order of their last use; the digest makes the order the same each time.
#[derive(PartialEq, Eq)]
struct ByUse(Candidate);

impl Ord for ByUse {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let key = |Self(candidate): &Self| (candidate.last_used, candidate.digest);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for ByUse {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Why the task that keeps the store tidy woke up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    LimitPassed,
    UsesDue,
    FilesDue,
    SweepDue,
    Stopping,
}

/// Starts the task that keeps the limit and writes down what was used. It ends with the store.
pub(super) fn keep_tidy(store: &Store, tasks: &Tasks) {
    let bell = store.usage().bell();
    let shared = Arc::downgrade(&store.shared);
    drop(tasks.spawn(keep(shared, bell, tasks.clone())));
}

async fn keep(shared: Weak<Shared>, bell: Arc<Notify>, tasks: Tasks) {
    let mut uses_due = every(WRITE_USES);
    let mut files_due = every(CLOSE_FILES);
    let mut sweep_due = every(SWEEP_PARKED);
    loop {
        let wake = tokio::select! {
            () = tasks.stopping() => Wake::Stopping,
            () = bell.notified() => Wake::LimitPassed,
            _ = uses_due.tick() => Wake::UsesDue,
            _ = files_due.tick() => Wake::FilesDue,
            _ = sweep_due.tick() => Wake::SweepDue,
        };
        let store = tidy(&shared, wake).await;
        if store.is_none() || wake == Wake::Stopping {
            return;
        }
    }
}

fn every(period: Duration) -> Interval {
    let mut due = interval_at(Instant::now() + period, period);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    due
}

/// One round of tidying; `None` when the store is gone.
async fn tidy(shared: &Weak<Shared>, wake: Wake) -> Option<()> {
    let store = Store {
        shared: shared.upgrade()?,
    };
    match wake {
        Wake::LimitPassed => {
            let excess = store.usage().excess();
            let evicted = store.evict(excess).await;
            drop(store);
            if excess > 0 && evicted.bytes == 0 {
                // All that is stored is being read: looking again for every byte that comes would not help.
                tokio::time::sleep(NOTHING_TO_EVICT).await;
            }
        }
        Wake::UsesDue | Wake::Stopping => store.close().await,
        Wake::SweepDue => store.count_parked().await,
        Wake::FilesDue => store.usage().close_idle(store.shared.clock.now()),
    }
    Some(())
}

/// Frees at least `bytes`, if that much can go. Blocks on the disk; not for async threads.
pub(super) fn evict(
    layout: &Layout,
    usage: &Usage,
    catalog: &Catalog,
    metrics: &Metrics,
    bytes: u64,
) -> Evicted {
    let mut evicted = Evicted::default();
    if bytes == 0 {
        return evicted;
    }
    evicted.bytes = evict_parked(layout, usage, bytes);
    let mut forgotten = Vec::new();
    for candidate in usage.choose(bytes.saturating_sub(evicted.bytes)) {
        // Whoever publishes this digest between the two steps leaves an entry without a file: the next reader finds that out.
        let Some(blob) = usage.remove_unused(&candidate.digest) else {
            continue;
        };
        if let Err(error) = remove(&layout.blob_path(&blob.digest)) {
            give_up(usage, metrics, blob, &error);
            break;
        }
        metrics.evicted.inc();
        evicted.blobs += 1;
        evicted.bytes += blob.identity.size;
        forgotten.push(Change::Forget(blob.digest));
    }
    if !forgotten.is_empty() {
        info!(blobs = evicted.blobs, bytes = evicted.bytes, "evicted");
        // A row without a file is dropped at the next start.
        catalog.record_blocking(forgotten).ok();
    }
    evicted
}

/// Puts back what could not be removed: it is still there.
fn give_up(usage: &Usage, metrics: &Metrics, blob: StoredBlob, error: &std::io::Error) {
    metrics.store_faults.inc();
    warn!(digest = %blob.digest, %error, "a blob cannot be evicted");
    usage.insert(blob);
}

/// Removes parked pieces, the oldest first, and returns how many bytes that freed.
fn evict_parked(layout: &Layout, usage: &Usage, bytes: u64) -> u64 {
    let mut files = parked(&layout.parked_dir());
    files.sort_by_key(|file| file.changed);
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    let mut freed = 0;
    for file in files {
        if freed >= bytes {
            break;
        }
        // It may have been taken up again by a fill just now.
        if remove(&file.path).is_ok() {
            freed += file.bytes;
        }
    }
    usage.set_parked(total - freed);
    freed
}

struct ParkedFile {
    path: PathBuf,
    bytes: u64,
    changed: Timestamp,
}

/// Removes parked pieces to which nothing was added for too long, and counts the bytes that the others have on the disk: their files may
/// be sparse. Blocks on the disk.
pub(super) fn sweep_parked(folder: &Path, now: Timestamp) -> u64 {
    let mut bytes = 0;
    for file in parked(folder) {
        let is_old = file.changed.age(now) > PARKED_FOR;
        // What cannot be removed is counted on.
        if !is_old || remove(&file.path).is_err() {
            bytes += file.bytes;
        }
    }
    bytes
}

fn parked(folder: &Path) -> Vec<ParkedFile> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let files = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let found = path.symlink_metadata().ok()?;
        Some(ParkedFile {
            path,
            bytes: found.blocks().saturating_mul(BLOCK),
            changed: Timestamp(found.mtime().saturating_mul(1000)),
        })
    });
    files.collect()
}

#[cfg(test)]
mod tests {
    use oci::Algorithm;
    use proptest::prelude::*;

    use super::*;

    fn candidate((number, size, used, pinned): (u32, u64, i64, bool)) -> Candidate {
        Candidate {
            digest: Digest::of(Algorithm::Sha256, &number.to_be_bytes()),
            size,
            last_used: Timestamp(used),
            hold: if pinned { Hold::InUse } else { Hold::Free },
        }
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let all = [
            (1, 10, 30, false),
            (2, 10, 10, true),
            (3, 10, 20, false),
            (4, 10, 5, false),
        ];
        let chosen = choose(all.map(candidate), 15);
        let used: Vec<i64> = chosen.iter().map(|chosen| chosen.last_used.0).collect();
        assert_eq!(used, [5, 20]);
    }

    proptest! {
        /// The choice is the shortest run of the least recently used free blobs that suffices.
        #[test]
        fn chooses_the_least_needed(
            all in prop::collection::vec((any::<u32>(), 0u64..1000, 0i64..50, any::<bool>()), 0..60),
            bytes in 0u64..20_000,
        ) {
            let candidates: Vec<Candidate> = all.into_iter().map(candidate).collect();
            let chosen = choose(candidates.clone(), bytes);
            let freed: u64 = chosen.iter().map(|one| one.size).sum();
            let free = || candidates.iter().filter(|one| one.hold == Hold::Free);
            prop_assert!(chosen.iter().all(|one| one.hold == Hold::Free));
            prop_assert!(freed >= bytes || chosen.len() == free().count());
            if let Some(last) = chosen.last() {
                prop_assert!(freed - last.size < bytes, "one fewer would have done");
                let kept = free().filter(|one| !chosen.contains(one));
                prop_assert!(kept.map(|one| one.last_used).min().is_none_or(|next| next >= last.last_used));
            }
        }
    }
}
