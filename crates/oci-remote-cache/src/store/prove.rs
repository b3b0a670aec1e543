//! From a name to an open file whose bytes are known to be right: at once where the file is as it was recorded, else by hashing it.
//!
//! A blob that turns out damaged is removed and forgotten, so that it is fetched again. When a file is looked for is decided elsewhere.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::io::Errno;
use tracing::{info, warn};

use oci::{Digest, Hasher, Slice};

use super::catalog::{BlobRecord, Change};
use super::layout::open_no_follow;
use super::publish::{FileIdentity, remove};
use super::spool::hash_file;
use super::usage::{StoredBlob, Trust};
use super::{Blob, Shared, Store};
use crate::tasks::Tasks;

/// One turn for each blob that is being hashed, so that a storm hashes it once.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>);

impl Store {
    /// Opens a blob that is not open; one that must be hashed is hashed by the first who asks, while the others wait.
    pub(super) async fn opened(&self, stored: StoredBlob) -> Option<Blob> {
        if stored.trust == Trust::Proven {
            return self.open_now(stored).await;
        }
        let turn = self.shared.proving.of(&stored.digest);
        let turn = turn.lock().await;
        let stored = self.shared.usage.get(&stored.digest)?;
        let blob = self.open_now(stored).await;
        drop(turn);
        blob
    }

    /// Opens a blob, and hashes it unless it is known to be right.
    pub(super) async fn open_now(&self, seen: StoredBlob) -> Option<Blob> {
        let shared = Arc::clone(&self.shared);
        let opened = self.shared.tasks.spawn_blocking(move || shared.open(&seen));
        opened.await.ok()?
    }

    /// Hashes, one after the other, what was found without a fitting record, so that fewer clients must wait for it.
    pub(super) fn prove_in_background(&self) {
        let unproven = |blob: &StoredBlob| blob.trust == Trust::Unproven;
        let unproven: Vec<StoredBlob> = self.list().into_iter().filter(unproven).collect();
        if unproven.is_empty() {
            return;
        }
        let shared = Arc::downgrade(&self.shared);
        let tasks = self.shared.tasks.clone();
        drop(tasks.clone().spawn(prove_all(shared, unproven, tasks)));
    }
}

impl Shared {
    /// Opens a blob's file, and hashes it unless it is exactly what was recorded. Blocks on the disk.
    fn open(&self, seen: &StoredBlob) -> Option<Blob> {
        match self.open_as(seen) {
            Ok(Some(blob)) => Some(blob),
            Ok(None) => {
                self.drop_blob(seen, "its bytes are not what its name says");
                None
            }
            Err(error) if is_shortage(&error) => {
                self.metrics.store_faults.inc();
                warn!(digest = %seen.digest, %error, "a stored blob cannot be opened now");
                None
            }
            Err(error) => {
                self.drop_blob(seen, &error.to_string());
                None
            }
        }
    }

    /// `None` when the bytes are not what the name says.
    fn open_as(&self, seen: &StoredBlob) -> io::Result<Option<Blob>> {
        let digest = seen.digest;
        let file = Arc::new(open_no_follow(&self.layout.blob_path(&digest))?);
        let identity = FileIdentity::of(&file)?;
        if seen.trust == Trust::Unproven || identity != seen.identity {
            let whole = Slice {
                start: 0,
                end: identity.size,
            };
            let hasher = Hasher::new(digest.algorithm());
            if hash_file(&file, whole, hasher)?.finish() != digest {
                return Ok(None);
            }
            self.proved(seen, identity);
        } else if identity.size > 0 {
            // A disk that has lost it says so now, while it can still be fetched for the client who asks.
            file.read_exact_at(&mut [0], 0)?;
        }
        self.usage.keep_open(&digest, &file);
        Ok(Some(StoredBlob { identity, ..*seen }.open(file)))
    }

    fn proved(&self, seen: &StoredBlob, identity: FileIdentity) {
        self.usage.prove(seen, identity);
        let record = BlobRecord {
            digest: seen.digest,
            identity,
            last_used: seen.last_used,
        };
        // Counted and logged by the writer; the blob is hashed again at the next start.
        self.catalog
            .record_blocking(vec![Change::Blob(record)])
            .ok();
    }

    /// Removes a blob that cannot be served, unless it was removed or replaced since it was looked for.
    fn drop_blob(&self, seen: &StoredBlob, why: &str) {
        let digest = &seen.digest;
        if self.usage.remove_same(seen).is_none() {
            return;
        }
        self.metrics.store_faults.inc();
        warn!(%digest, why, "a stored blob cannot be served: removed");
        if let Err(error) = remove(&self.layout.blob_path(digest)) {
            warn!(%digest, %error, "a damaged blob cannot be removed");
        }
        // Counted and logged by the writer; a row without a file is dropped at the next start.
        self.catalog
            .record_blocking(vec![Change::Forget(*digest)])
            .ok();
    }
}

impl Turns {
    pub(super) fn of(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut proving = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        proving.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(proving.entry(*digest).or_default())
    }
}

/// Hashes each of the blobs unless a client's request did so already; ends early with the store or the process.
async fn prove_all(shared: Weak<Shared>, unproven: Vec<StoredBlob>, tasks: Tasks) {
    for blob in unproven {
        let Some(shared) = shared.upgrade().filter(|_| !tasks.is_stopping()) else {
            return;
        };
        drop(Store { shared }.opened(blob).await);
    }
    info!("all stored blobs are proven");
}

/// Whether it is the process that lacks something, and not the file.
fn is_shortage(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    [Errno::MFILE, Errno::NFILE, Errno::NOMEM]
        .iter()
        .any(|shortage| number == Some(shortage.raw_os_error()))
}
