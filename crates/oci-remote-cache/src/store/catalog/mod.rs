//! What the blob files cannot say: who may read them, which tags name them, of what type they are, when they were used.
//!
//! The files are the truth for bytes. A lost catalog loses none of them: it is rebuilt from the files and the upstreams. Kept in SQLite in
//! WAL mode with `synchronous = NORMAL`: a commit is an append without fsync, survives a kill, and after a power loss at most the last
//! records are gone. One thread writes and gathers what is queued into one commit; reads go beside it, one indexed look each.
//!
//! Which credential may read what is not decided here, only remembered.

mod read;
mod record;
mod remembered;
mod schema;
mod writer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use oci::{Digest, MediaType};

use self::read::Readers;
pub use self::record::{
    BlobRecord, Change, Holding, Kind, ManifestRecord, Membership, PendingRecord, Proof, TagEra,
    TagRecord,
};
use self::remembered::Remembered;
use self::schema::Place;
use self::writer::{Job, Writer};
use super::error::{Cause, StoreError};
use super::layout::Layout;
use super::publish::FileIdentity;
use crate::clock::Timestamp;
use crate::metrics::Metrics;
use crate::names::{CredentialId, Source};

/// Jobs that may wait for the writer before those who write must wait too.
const QUEUE: usize = 1024;

/// The catalog. Clones share it.
#[derive(Clone)]
pub struct Catalog {
    inner: Arc<Inner>,
}

/// Where a catalog is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// In its file.
    OnDisk,
    /// In memory, starting from what can be read of the file: for a folder that cannot be written.
    InMemory,
}

struct Inner {
    path: PathBuf,
    queue: mpsc::Sender<Job>,
    readers: Readers,
    remembered: Arc<Remembered>,
    metrics: Metrics,
}

impl Catalog {
    /// Opens the folder's catalog, making it if need be. A damaged one is set aside and made anew. Blocks on the disk.
    pub fn open(layout: &Layout, keeping: Keeping, metrics: &Metrics) -> Result<Self, StoreError> {
        let path = layout.catalog_path();
        let (connection, place) = match keeping {
            Keeping::OnDisk => (
                schema::open_file(&path, metrics)?,
                Place::File(path.clone()),
            ),
            Keeping::InMemory => schema::open_memory(&path)?,
        };
        let (queue, jobs) = mpsc::channel(QUEUE);
        let catalog = Self::over(&path, place, queue, metrics)?;
        let writer = Writer {
            path,
            connection,
            remembered: Arc::clone(&catalog.inner.remembered),
            metrics: metrics.clone(),
            since_checkpoint: 0,
            lock: layout.lock(),
        };
        writer.start(jobs)?;
        Ok(catalog)
    }

    /// Looks into the folder's catalog beside the process that writes it. Every write fails. Blocks on the disk.
    pub fn peek(layout: &Layout, metrics: &Metrics) -> Result<Self, StoreError> {
        let path = layout.catalog_path();
        let place = schema::find_readable(&path)?;
        let (queue, _closed) = mpsc::channel(1);
        Self::over(&path, place, queue, metrics)
    }

    fn over(
        path: &Path,
        place: Place,
        queue: mpsc::Sender<Job>,
        metrics: &Metrics,
    ) -> Result<Self, StoreError> {
        let readers = Readers::new(place);
        let failed = |error| StoreError::new("read the catalog", path, error);
        let suspended = readers.with(read::suspended).map_err(failed)?;
        let public = readers.with(read::public).map_err(failed)?;
        let inner = Inner {
            path: path.to_owned(),
            queue,
            readers,
            remembered: Arc::new(Remembered::new(suspended, public)),
            metrics: metrics.clone(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Writes down all of `changes`, in order, in one commit; completes when it survives the end of this process. Dropping the future
    /// does not take a queued write back.
    pub async fn record(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let (done, outcome) = oneshot::channel();
        let job = Job { changes, done };
        let queued = self.inner.queue.send(job).await;
        queued.map_err(|_closed| self.closed())?;
        outcome.await.map_err(|_closed| self.closed())?
    }

    /// [`Catalog::record`] for threads that may block. Must not be called on an async thread.
    pub fn record_blocking(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let (done, outcome) = oneshot::channel();
        let job = Job { changes, done };
        let queued = self.inner.queue.blocking_send(job);
        queued.map_err(|_closed| self.closed())?;
        outcome.blocking_recv().map_err(|_closed| self.closed())?
    }

    /// Completes when everything queued before is committed.
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.record(Vec::new()).await
    }

    /// A blob was published; what was pending for it no longer is.
    pub async fn record_blob(
        &self,
        digest: Digest,
        identity: FileIdentity,
        used: Timestamp,
    ) -> Result<(), StoreError> {
        let record = BlobRecord {
            digest,
            identity,
            last_used: used,
        };
        self.record(vec![Change::Blob(record)]).await
    }

    /// A spool was verified: should this process end before it is published, the next start publishes it.
    pub async fn record_pending(
        &self,
        digest: Digest,
        size: u64,
        spool_name: String,
    ) -> Result<(), StoreError> {
        let record = PendingRecord {
            digest,
            size,
            spool_name,
        };
        self.record(vec![Change::Pending(record)]).await
    }

    /// A blob was evicted or is damaged. What repositories hold, and manifests' types, stay known.
    pub async fn forget_blob(&self, digest: Digest) -> Result<(), StoreError> {
        self.record(vec![Change::Forget(digest)]).await
    }

    /// Blobs were asked for. Blobs that are not recorded are passed over.
    pub async fn touch(&self, used: Vec<(Digest, Timestamp)>) -> Result<(), StoreError> {
        let changes = used
            .into_iter()
            .map(|(digest, at)| Change::Used(digest, at));
        self.record(changes.collect()).await
    }

    /// A repository holds a digest. Where that is known already, the most open credential stays.
    pub async fn record_membership(&self, membership: Membership) -> Result<(), StoreError> {
        self.record(vec![Change::Membership(membership)]).await
    }

    /// A manifest's type and length became known.
    pub async fn record_manifest(
        &self,
        digest: Digest,
        media_type: &MediaType,
        size: u64,
    ) -> Result<(), StoreError> {
        let record = ManifestRecord {
            media_type: media_type.clone(),
            size,
        };
        self.record(vec![Change::Manifest(digest, record)]).await
    }

    /// A tag was looked up. A change of its digest goes into the tag's history.
    pub async fn record_tag(&self, tag: TagRecord) -> Result<(), StoreError> {
        self.record(vec![Change::Tag(Box::new(tag))]).await
    }

    /// The upstream refused the repository to this credential. Holds at once, and also where it cannot be written down.
    pub async fn suspend(
        &self,
        source: &Source,
        credential: &CredentialId,
        at: Timestamp,
    ) -> Result<(), StoreError> {
        let change = Change::Suspend(source.clone(), credential.clone(), at);
        self.inner.remembered.apply_access(&change);
        self.record(vec![change]).await
    }

    /// The upstream opened the repository to this credential again.
    pub async fn lift(&self, source: &Source, credential: &CredentialId) -> Result<(), StoreError> {
        if !self.is_suspended(source, credential) {
            return Ok(());
        }
        let change = Change::Lift(source.clone(), credential.clone());
        self.record(vec![change]).await
    }

    /// Whether the upstream last refused the repository to this credential. From memory.
    pub fn is_suspended(&self, source: &Source, credential: &CredentialId) -> bool {
        let suspended = &self.inner.remembered.suspended;
        let suspended = suspended.lock().unwrap_or_else(PoisonError::into_inner);
        suspended.contains(&(source.clone(), credential.clone()))
    }

    /// The upstream showed the repository to nobody in particular (a time), or refused it. Holds at once, and also where it cannot be
    /// written down.
    pub async fn record_public(
        &self,
        source: &Source,
        seen: Option<Timestamp>,
    ) -> Result<(), StoreError> {
        let change = match seen {
            Some(at) => Change::Public(source.clone(), at),
            None if self.public_since(source).is_none() => return Ok(()),
            None => Change::NotPublic(source.clone()),
        };
        self.inner.remembered.apply_access(&change);
        self.record(vec![change]).await
    }

    /// When the upstream last showed the repository to nobody in particular, unless it has refused since. From memory.
    pub fn public_since(&self, source: &Source) -> Option<Timestamp> {
        let public = &self.inner.remembered.public;
        let public = public.lock().unwrap_or_else(PoisonError::into_inner);
        public.get(source).copied()
    }

    /// Every repository that is suspended for a credential. From memory.
    pub fn suspended(&self) -> Vec<(Source, CredentialId)> {
        let suspended = &self.inner.remembered.suspended;
        let suspended = suspended.lock().unwrap_or_else(PoisonError::into_inner);
        suspended.iter().cloned().collect()
    }

    /// Under which credential the repository was shown to hold this digest; `None` when that is not known.
    pub fn membership(
        &self,
        source: &Source,
        digest: &Digest,
        kind: Kind,
    ) -> Result<Option<CredentialId>, StoreError> {
        let key = (source.clone(), *digest, kind);
        self.inner.remembered.right(key, |(source, digest, kind)| {
            self.read(|db| read::membership(db, source, digest, *kind))
        })
    }

    /// Reads, counting a failure as a fault of the store.
    fn read<T>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        self.inner.readers.with(query).map_err(|error| {
            self.inner.metrics.store_faults.inc();
            StoreError::new("read the catalog", &self.inner.path, error)
        })
    }

    fn closed(&self) -> StoreError {
        self.inner.metrics.store_faults.inc();
        StoreError::new("write to the catalog", &self.inner.path, Cause::Closed)
    }
}

impl fmt::Debug for Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Catalog").field(&self.inner.path).finish()
    }
}
