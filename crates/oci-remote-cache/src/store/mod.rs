//! This node's disk: verified blobs in files named by their digest, the catalog beside them, and the account of the room they take.
//!
//! Bytes come in as a [`spool::Verified`] only and go out as [`Blob`]s and spans. Who may read them is decided above, from what the
//! catalog remembers. No fault of the store has to fail a pull: the caller goes on without it.

pub mod catalog;
pub mod error;
pub mod evict;
pub mod layout;
mod limit;
pub mod pieces;
mod prove;
pub mod publish;
pub mod recover;
pub mod span;
pub mod spool;
pub mod usage;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::warn;

use oci::{Digest, Slice};

use self::catalog::{Catalog, Keeping};
use self::error::{OpenError, StoreError};
use self::evict::{Evicted, evict, keep_tidy, sweep_parked};
use self::layout::Layout;
use self::limit::default_max_size;
use self::prove::Turns;
use self::publish::{FileIdentity, publish, remove};
use self::recover::Recovery;
use self::span::Span;
use self::spool::Verified;
use self::usage::{Reservation, StoredBlob, Trust, Usage};
use crate::clock::{Clock, Timestamp};
use crate::metrics::Metrics;
use crate::tasks::Tasks;

/// How long a refused write makes the store not ready.
const FAILED_LATELY: Duration = Duration::from_mins(1);

/// What the configuration says about the store.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// The cache folder.
    pub dir: PathBuf,
    /// Bytes that may be stored; by default most of what is free.
    pub max_size: Option<u64>,
    /// Length of the largest blob that is stored; by default half of `max_size`.
    pub max_blob: Option<u64>,
}

/// The store. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<Shared>,
}

/// A stored blob, open for reading. It stays readable when it is evicted meanwhile.
#[derive(Clone, Debug)]
pub struct Blob {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its open file.
    pub file: Arc<File>,
}

/// What hashing a stored blob showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// The bytes are what the name says.
    Sound,
    /// They were not; the blob is removed.
    Damaged,
    /// There is no such blob.
    Absent,
    /// It cannot be read right now.
    Unreadable,
}

#[derive(Debug)]
struct Shared {
    layout: Layout,
    catalog: Catalog,
    usage: Usage,
    max_blob: u64,
    condition: Option<String>,
    failed: Mutex<Option<(Timestamp, String)>>,
    clock: Clock,
    metrics: Metrics,
    tasks: Tasks,
    proving: Turns,
}

impl Store {
    /// Opens the cache folder: takes its lock, finishes what a crash interrupted, finds what is stored.
    pub async fn open(
        settings: StoreSettings,
        clock: Clock,
        metrics: Metrics,
        tasks: Tasks,
    ) -> Result<Self, OpenError> {
        let dir = settings.dir.clone();
        let parts = Parts {
            clock,
            metrics,
            tasks: tasks.clone(),
        };
        let opened = tasks.spawn_blocking(move || open_blocking(&settings, parts));
        let store = opened.await.map_err(|error| OpenError::Unreadable {
            dir,
            source: io::Error::other(error),
        })??;
        keep_tidy(&store, &tasks);
        store.prove_in_background();
        Ok(store)
    }

    /// Whether the blob is stored, as far as memory tells: its file may yet turn out damaged.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.shared.usage.contains(digest)
    }

    /// Opens a stored blob and notes its use. `None` when it is not stored, when it turned out damaged (then it is forgotten), or when it
    /// cannot be opened right now.
    pub async fn blob(&self, digest: &Digest) -> Option<Blob> {
        let found = self.shared.usage.find(digest, self.shared.clock.now())?;
        let Some(file) = found.file else {
            return self.opened(found.blob).await;
        };
        // Somebody else may have written into the file since it was opened.
        if FileIdentity::of(&file).is_ok_and(|identity| identity == found.blob.identity) {
            return Some(found.blob.open(file));
        }
        self.opened(StoredBlob {
            trust: Trust::Unproven,
            ..found.blob
        })
        .await
    }

    /// Notes that a blob was used although its file was not opened: manifests are answered from memory.
    pub fn touch(&self, digest: &Digest) {
        drop(self.shared.usage.find(digest, self.shared.clock.now()));
    }

    /// Publishes verified bytes, taking over the room their spool had. A digest that is stored already stays as it is, and the spool is
    /// removed. That the catalog could not write it down is counted and logged, no failure: the blob is hashed at the next start.
    pub async fn admit(
        &self,
        verified: Verified,
        room: Option<Reservation>,
    ) -> Result<Blob, StoreError> {
        let digest = *verified.digest();
        if let Some(blob) = self.proven(&digest).await {
            let spool = verified.path().to_owned();
            let removed = move || remove(&spool);
            self.blocking("remove a spool", verified.path(), removed)
                .await?;
            return Ok(blob);
        }
        let path = self.shared.layout.blob_path(&digest);
        let shared = Arc::clone(&self.shared);
        // Published and counted in one go: dropping this future must not leave a file that nobody counts.
        let stored = self
            .blocking("publish", &path, move || Ok(shared.admit(&verified, room)))
            .await?;
        let (blob, stored) = stored?;
        let recorded = self
            .shared
            .catalog
            .record_blob(digest, stored.identity, stored.last_used);
        // Counted and logged by the writer.
        recorded.await.ok();
        Ok(blob)
    }

    /// Tries to free `bytes`, for a write that found the disk full; says whether it did.
    pub async fn make_room(&self, bytes: u64) -> bool {
        // What cannot be enough is not thrown away in vain.
        let free: u64 = self.shared.usage.parked_bytes() + self.shared.usage.blob_bytes();
        free >= bytes && self.evict(bytes).await.bytes >= bytes
    }

    /// Removes a blob, whoever reads it; says whether it was there.
    pub async fn remove(&self, digest: &Digest) -> Result<bool, StoreError> {
        let path = self.shared.layout.blob_path(digest);
        let file = path.clone();
        self.blocking("remove", &path, move || remove(&file))
            .await?;
        let was_there = self.shared.usage.remove(digest).is_some();
        self.shared.catalog.forget_blob(*digest).await?;
        Ok(was_there)
    }

    /// [`Store::admit`] for bytes that a repository holds. Where it was taken back from it meanwhile the blob goes again.
    pub async fn admit_held(
        &self,
        verified: Verified,
        room: Option<Reservation>,
    ) -> Result<(), StoreError> {
        let digest = *verified.digest();
        self.admit(verified, room).await?;
        // Where the catalog cannot tell, the blob stays; a failure to remove it is counted, and it may be evicted.
        if matches!(self.shared.catalog.is_held(&digest), Ok(false)) {
            self.remove(&digest).await.ok();
        }
        Ok(())
    }

    /// Hashes a stored blob, whatever is recorded of it. A damaged one is removed.
    pub async fn check(&self, digest: &Digest) -> Health {
        let Some(stored) = self.shared.usage.get(digest) else {
            return Health::Absent;
        };
        let unproven = StoredBlob {
            trust: Trust::Unproven,
            ..stored
        };
        match self.open_now(unproven).await {
            Some(_) => Health::Sound,
            None if self.contains(digest) => Health::Unreadable,
            None => Health::Damaged,
        }
    }

    /// Every stored blob, in no order.
    pub fn list(&self) -> Vec<StoredBlob> {
        self.shared.usage.list()
    }

    /// What the blob files cannot say.
    pub fn catalog(&self) -> &Catalog {
        &self.shared.catalog
    }

    /// The folder.
    pub fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// The account of what is stored.
    pub fn usage(&self) -> &Usage {
        &self.shared.usage
    }

    /// Length of the largest blob that is stored; larger ones pass through.
    pub fn max_blob(&self) -> u64 {
        self.shared.max_blob
    }

    /// Whether anything can be stored.
    pub fn writable(&self) -> bool {
        self.shared.layout.writable()
    }

    /// Why the store is not what it should be, if so: since it was opened, or for a while after a write failed.
    pub fn condition(&self) -> Option<String> {
        let failed = self
            .shared
            .failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let lately = failed.filter(|(at, _)| at.age(self.shared.clock.now()) < FAILED_LATELY);
        self.shared
            .condition
            .clone()
            .or_else(|| lately.map(|(_, what)| what))
    }

    /// Counts and remembers that the disk refused a write.
    pub fn note_failure(&self, what: &str, error: &io::Error) {
        self.shared.metrics.store_faults.inc();
        let failed = (self.shared.clock.now(), format!("{what}: {error}"));
        *self
            .shared
            .failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(failed);
    }

    /// Counts the parked pieces anew, after some were added or taken up, and removes those that are too old.
    pub async fn count_parked(&self) {
        let shared = Arc::clone(&self.shared);
        let counted = self.shared.tasks.spawn_blocking(move || {
            let parked = sweep_parked(&shared.layout.parked_dir(), shared.clock.now());
            shared.usage.set_parked(parked);
        });
        // Only at shutdown is the work not done.
        counted.await.ok();
    }

    /// Writes down what is only in memory, before the process ends.
    pub async fn close(&self) {
        let used = self.shared.usage.take_used();
        // Counted and logged by the writer; what is lost is when blobs were used.
        self.shared.catalog.touch(used).await.ok();
    }

    async fn evict(&self, bytes: u64) -> Evicted {
        let shared = Arc::clone(&self.shared);
        let evicted = self.shared.tasks.spawn_blocking(move || {
            let Shared {
                layout,
                usage,
                catalog,
                metrics,
                ..
            } = &*shared;
            evict(layout, usage, catalog, metrics, bytes)
        });
        evicted.await.unwrap_or_default()
    }

    /// The blob, if it is stored and needs no hashing.
    async fn proven(&self, digest: &Digest) -> Option<Blob> {
        let found = self.shared.usage.find(digest, self.shared.clock.now())?;
        match (found.file, found.blob.trust) {
            (Some(file), _) => Some(found.blob.open(file)),
            (None, Trust::Unproven) => None,
            (None, Trust::Proven) => self.opened(found.blob).await,
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        doing: &'static str,
        path: &Path,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let done = self.shared.tasks.spawn_blocking(work).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        done.map_err(|error| {
            self.shared.metrics.store_faults.inc();
            StoreError::new(doing, path, error)
        })
    }
}

impl Shared {
    /// Publishes and counts in one go. Blocks on the disk.
    fn admit(
        &self,
        verified: &Verified,
        room: Option<Reservation>,
    ) -> Result<(Blob, StoredBlob), StoreError> {
        let identity = publish(&self.layout, verified).inspect_err(|_error| {
            self.metrics.store_faults.inc();
        })?;
        let stored = StoredBlob {
            digest: *verified.digest(),
            identity,
            last_used: self.clock.now(),
            trust: Trust::Proven,
        };
        let file = Arc::clone(verified.file());
        self.usage.insert_published(stored, &file, room);
        Ok((stored.open(file), stored))
    }
}

impl Blob {
    /// A part of the blob.
    pub fn span(&self, slice: Slice) -> Span {
        Span {
            file: Arc::clone(&self.file),
            offset: slice.start,
            len: slice.len(),
        }
    }
}

impl StoredBlob {
    fn open(self, file: Arc<File>) -> Blob {
        Blob {
            digest: self.digest,
            size: self.identity.size,
            file,
        }
    }
}

/// What every part of the process shares.
struct Parts {
    clock: Clock,
    metrics: Metrics,
    tasks: Tasks,
}

fn open_blocking(settings: &StoreSettings, parts: Parts) -> Result<Store, OpenError> {
    let layout = Layout::open(&settings.dir)?;
    let (catalog, condition) = open_catalog(&layout, &parts.metrics)?;
    let recovery = Recovery {
        layout: &layout,
        catalog: &catalog,
        metrics: &parts.metrics,
        now: parts.clock.now(),
    };
    let blobs = recovery.run();
    let parked = sweep_parked(&layout.parked_dir(), parts.clock.now());
    let ours = blobs.iter().map(|blob| blob.identity.size).sum::<u64>();
    let max_size = settings
        .max_size
        .unwrap_or_else(|| default_max_size(layout.root(), ours.saturating_add(parked)));
    let usage = Usage::new(max_size, &parts.metrics);
    for blob in blobs {
        usage.insert(blob);
    }
    usage.set_parked(parked);
    let shared = Shared {
        layout,
        catalog,
        usage,
        max_blob: settings.max_blob.unwrap_or(max_size / 2),
        condition,
        failed: Mutex::default(),
        clock: parts.clock,
        metrics: parts.metrics,
        tasks: parts.tasks,
        proving: Turns::default(),
    };
    Ok(Store {
        shared: Arc::new(shared),
    })
}

/// The catalog, in memory where it cannot be kept in its file, and then why.
fn open_catalog(
    layout: &Layout,
    metrics: &Metrics,
) -> Result<(Catalog, Option<String>), OpenError> {
    let why = if layout.writable() {
        match Catalog::open(layout, Keeping::OnDisk, metrics) {
            Ok(catalog) => return Ok((catalog, None)),
            Err(error) => {
                metrics.store_faults.inc();
                format!("{error}; the catalog is kept in memory")
            }
        }
    } else {
        let root = layout.root().display();
        format!(
            "cache_dir {root} cannot be written: what is there is served, the rest passes through"
        )
    };
    warn!(condition = why, "the store is not what it should be");
    let catalog = Catalog::open(layout, Keeping::InMemory, metrics);
    let catalog = catalog.map_err(|source| OpenError::Catalog {
        dir: layout.root().to_owned(),
        source,
    })?;
    Ok((catalog, Some(why)))
}
