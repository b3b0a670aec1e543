//! What is stored, in memory: which blobs, how large, when last used, which are open, and how much room all of it takes.
//!
//! The index says what can be looked for on the disk, so a hit costs no system call to find. Nothing here touches the disk.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::Notify;

use oci::Digest;

use super::evict::{Candidate, Hold, choose};
use super::limit::open_files;
use super::publish::FileIdentity;
use crate::clock::Timestamp;
use crate::metrics::Metrics;

/// A use is written down when the one written last is older than this: the order of eviction needs no more.
const USE_GRAIN: Duration = Duration::from_mins(1);

/// How long a file stays open for the next reader.
const KEPT_OPEN: Duration = Duration::from_secs(3);

/// The index of stored blobs and the account of the disk. Clones share it.
#[derive(Clone, Debug)]
pub struct Usage {
    account: Arc<Account>,
}

/// Room taken by a spool. Given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    account: Arc<Account>,
    bytes: u64,
}

/// Whether a file's bytes are known to be what its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// They were hashed, and the file has not changed since.
    Proven,
    /// They must be hashed before they are served.
    Unproven,
}

/// A stored blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredBlob {
    /// Its name.
    pub digest: Digest,
    /// What its file was like when last looked at.
    pub identity: FileIdentity,
    /// When it was last asked for.
    pub last_used: Timestamp,
    /// Whether its bytes are known to be right.
    pub trust: Trust,
}

/// A stored blob as it was found for a reader.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) blob: StoredBlob,
    /// The open file, if it is open already.
    pub(super) file: Option<Arc<File>>,
}

#[derive(Debug)]
struct Account {
    index: Mutex<Index>,
    /// Files kept open for the next reader.
    open: Cache<Digest, Arc<File>>,
    reserved: AtomicU64,
    parked: AtomicU64,
    max_size: u64,
    over: Arc<Notify>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Index {
    entries: HashMap<Digest, Entry>,
    bytes: u64,
    /// Uses that the catalog does not know yet.
    used: HashMap<Digest, Timestamp>,
}

#[derive(Debug)]
struct Entry {
    identity: FileIdentity,
    last_used: Timestamp,
    /// The last use that was handed on to be written down.
    written: Timestamp,
    trust: Trust,
    /// The file as it was handed out last: alive as long as anyone has it open.
    file: Weak<File>,
}

impl Usage {
    /// Nothing is stored yet, and `max_size` bytes may be.
    pub fn new(max_size: u64, metrics: &Metrics) -> Self {
        let account = Account {
            index: Mutex::default(),
            open: Cache::new(open_files()),
            reserved: AtomicU64::new(0),
            parked: AtomicU64::new(0),
            max_size,
            over: Arc::new(Notify::new()),
            metrics: metrics.clone(),
        };
        Self {
            account: Arc::new(account),
        }
    }

    /// Bytes that may be stored.
    pub fn max_size(&self) -> u64 {
        self.account.max_size
    }

    /// Bytes of blobs, spools and parked pieces together.
    pub fn total(&self) -> u64 {
        self.account.total(self.account.lock().bytes)
    }

    /// Bytes of blobs.
    pub fn blob_bytes(&self) -> u64 {
        self.account.lock().bytes
    }

    /// Bytes of parked pieces, as last counted.
    pub fn parked_bytes(&self) -> u64 {
        self.account.parked.load(Ordering::Relaxed)
    }

    /// How many blobs are stored.
    pub fn count(&self) -> usize {
        self.account.lock().entries.len()
    }

    /// Every stored blob, in no order.
    pub fn list(&self) -> Vec<StoredBlob> {
        let index = self.account.lock();
        let entries = index.entries.iter();
        entries.map(|(digest, entry)| entry.blob(*digest)).collect()
    }

    /// Takes room for a spool. Never refuses: it wakes eviction instead when there is too little.
    pub fn reserve(&self, bytes: u64) -> Reservation {
        let mut reservation = Reservation {
            account: Arc::clone(&self.account),
            bytes: 0,
        };
        reservation.grow(bytes);
        reservation
    }

    /// Sets how much the parked pieces take.
    pub fn set_parked(&self, bytes: u64) {
        self.account.parked.store(bytes, Ordering::Relaxed);
        self.account.changed(&self.account.lock());
    }

    /// Bytes by which more is stored than should be.
    pub fn excess(&self) -> u64 {
        excess(self.total(), self.account.max_size)
    }

    pub(super) fn contains(&self, digest: &Digest) -> bool {
        self.account.lock().entries.contains_key(digest)
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<StoredBlob> {
        let index = self.account.lock();
        index.entries.get(digest).map(|entry| entry.blob(*digest))
    }

    /// Finds a blob for a reader and notes the use.
    pub(super) fn find(&self, digest: &Digest, now: Timestamp) -> Option<Found> {
        let mut guard = self.account.lock();
        let index = &mut *guard;
        let entry = index.entries.get_mut(digest)?;
        entry.last_used = entry.last_used.max(now);
        if entry.written.age(now) >= USE_GRAIN {
            entry.written = now;
            index.used.insert(*digest, now);
        }
        // Looking it up while the index is locked keeps eviction from taking it for unused.
        let file = match entry.trust {
            Trust::Proven => self.account.open.get(digest),
            Trust::Unproven => None,
        };
        Some(Found {
            blob: entry.blob(*digest),
            file: file.or_else(|| entry.open_file()),
        })
    }

    /// Adds a blob, or takes over what is new about it.
    pub(super) fn insert(&self, blob: StoredBlob) {
        let mut index = self.account.lock();
        index.put(blob);
        self.account.changed(&index);
    }

    /// Adds a blob that was just published and is open, in place of the room its spool had.
    pub(super) fn insert_published(
        &self,
        blob: StoredBlob,
        file: &Arc<File>,
        room: Option<Reservation>,
    ) {
        let mut index = self.account.lock();
        index.put(blob);
        if let Some(entry) = index.entries.get_mut(&blob.digest) {
            entry.file = Arc::downgrade(file);
        }
        self.account.open.insert(blob.digest, Arc::clone(file));
        if let Some(room) = room {
            room.hand_over();
        }
        self.account.changed(&index);
    }

    /// Keeps a file open that was found to be as it should be; it may have been removed meanwhile.
    pub(super) fn keep_open(&self, digest: &Digest, file: &Arc<File>) {
        let mut index = self.account.lock();
        if let Some(entry) = index.entries.get_mut(digest) {
            entry.file = Arc::downgrade(file);
            self.account.open.insert(*digest, Arc::clone(file));
        }
    }

    /// Closes files that nobody has asked for since a while.
    pub(super) fn close_idle(&self, now: Timestamp) {
        let index = self.account.lock();
        let is_idle = |digest: &Digest| {
            let entry = index.entries.get(digest);
            entry.is_none_or(|entry| entry.last_used.age(now) > KEPT_OPEN)
        };
        let idle: Vec<Digest> = self
            .account
            .open
            .iter()
            .map(|(digest, _)| digest)
            .filter(is_idle)
            .collect();
        for digest in idle {
            self.account.open.remove(&digest);
        }
    }

    /// Takes a blob out of the index.
    pub(super) fn remove(&self, digest: &Digest) -> Option<StoredBlob> {
        let mut index = self.account.lock();
        let removed = index.take(digest);
        self.account.open.remove(digest);
        self.account.changed(&index);
        removed
    }

    /// Takes a blob out of the index unless its file has become another since `seen` was read.
    pub(super) fn remove_same(&self, seen: &StoredBlob) -> Option<StoredBlob> {
        let mut index = self.account.lock();
        let entry = index.entries.get(&seen.digest)?;
        if entry.identity != seen.identity {
            return None;
        }
        let removed = index.take(&seen.digest);
        self.account.open.remove(&seen.digest);
        self.account.changed(&index);
        removed
    }

    /// Takes over that a blob is proven, as the file that it is now, unless it was removed or became another since `seen` was read.
    pub(super) fn prove(&self, seen: &StoredBlob, identity: FileIdentity) {
        let mut index = self.account.lock();
        let entry = index.entries.get(&seen.digest);
        if entry.is_none_or(|entry| entry.identity != seen.identity) {
            return;
        }
        index.put(StoredBlob {
            identity,
            trust: Trust::Proven,
            ..*seen
        });
        self.account.changed(&index);
    }

    /// Takes a blob out of the index unless somebody reads it.
    pub(super) fn remove_unused(&self, digest: &Digest) -> Option<StoredBlob> {
        let mut index = self.account.lock();
        let entry = index.entries.get(digest)?;
        if self.account.hold(digest, entry) == Hold::InUse {
            return None;
        }
        let removed = index.take(digest);
        self.account.open.remove(digest);
        self.account.changed(&index);
        removed
    }

    /// What to evict so that `bytes` become free.
    pub(super) fn choose(&self, bytes: u64) -> Vec<Candidate> {
        let index = self.account.lock();
        let candidates = index.entries.iter().map(|(digest, entry)| Candidate {
            digest: *digest,
            size: entry.identity.size,
            last_used: entry.last_used,
            hold: self.account.hold(digest, entry),
        });
        choose(candidates, bytes)
    }

    /// Uses that were not written down yet.
    pub(super) fn take_used(&self) -> Vec<(Digest, Timestamp)> {
        self.account.lock().used.drain().collect()
    }

    /// Rings when more is stored than may be. Holding it keeps nothing else alive.
    pub(super) fn bell(&self) -> Arc<Notify> {
        Arc::clone(&self.account.over)
    }
}

impl Reservation {
    /// Takes `more` bytes in addition.
    pub fn grow(&mut self, more: u64) {
        self.bytes = self.bytes.saturating_add(more);
        self.account.reserved.fetch_add(more, Ordering::Relaxed);
        self.account.changed(&self.account.lock());
    }

    /// How many bytes are taken.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives the room up while the caller has the index locked.
    fn hand_over(mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.account.reserved.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.account
                .reserved
                .fetch_sub(self.bytes, Ordering::Relaxed);
            self.account.changed(&self.account.lock());
        }
    }
}

impl Account {
    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn total(&self, blobs: u64) -> u64 {
        blobs
            .saturating_add(self.reserved.load(Ordering::Relaxed))
            .saturating_add(self.parked.load(Ordering::Relaxed))
    }

    /// Tells the metrics, and eviction where the limit is passed.
    fn changed(&self, index: &Index) {
        let total = self.total(index.bytes);
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.metrics.stored_bytes.set(gauge(total));
        self.metrics
            .stored_blobs
            .set(gauge(index.entries.len() as u64));
        if total > self.max_size {
            self.over.notify_one();
        }
    }

    /// Whether anyone but the cache of open files has the blob open.
    fn hold(&self, digest: &Digest, entry: &Entry) -> Hold {
        let kept = self
            .open
            .peek(digest)
            .is_some_and(|file| Arc::as_ptr(&file) == entry.file.as_ptr());
        if entry.file.strong_count() > usize::from(kept) {
            Hold::InUse
        } else {
            Hold::Free
        }
    }
}

impl Index {
    fn put(&mut self, blob: StoredBlob) {
        let entry = Entry {
            identity: blob.identity,
            last_used: blob.last_used,
            written: blob.last_used,
            trust: blob.trust,
            file: Weak::new(),
        };
        self.bytes = self.bytes.saturating_add(blob.identity.size);
        if let Some(old) = self.entries.insert(blob.digest, entry) {
            self.bytes = self.bytes.saturating_sub(old.identity.size);
        }
    }

    fn take(&mut self, digest: &Digest) -> Option<StoredBlob> {
        let entry = self.entries.remove(digest)?;
        self.bytes = self.bytes.saturating_sub(entry.identity.size);
        self.used.remove(digest);
        Some(entry.blob(*digest))
    }
}

impl Entry {
    fn blob(&self, digest: Digest) -> StoredBlob {
        StoredBlob {
            digest,
            identity: self.identity,
            last_used: self.last_used,
            trust: self.trust,
        }
    }

    /// The file, where a reader still has it open.
    fn open_file(&self) -> Option<Arc<File>> {
        match self.trust {
            Trust::Proven => self.file.upgrade(),
            Trust::Unproven => None,
        }
    }
}

/// Bytes to evict where `total` bytes are stored: down to nine tenths of the limit, so that eviction does not run for every blob.
fn excess(total: u64, max_size: u64) -> u64 {
    if total <= max_size {
        return 0;
    }
    total - (max_size - max_size / 10)
}

#[cfg(test)]
mod tests {
    use oci::Algorithm;

    use super::*;

    fn blob(text: &str, size: u64, used: i64) -> StoredBlob {
        let identity = FileIdentity {
            size,
            mtime_ns: 0,
            inode: 1,
        };
        StoredBlob {
            digest: Digest::of(Algorithm::Sha256, text.as_bytes()),
            identity,
            last_used: Timestamp(used),
            trust: Trust::Proven,
        }
    }

    #[test]
    fn room_is_counted_once() {
        let metrics = Metrics::new();
        let usage = Usage::new(1000, &metrics);
        let mut room = usage.reserve(10);
        room.grow(20);
        assert_eq!((usage.total(), room.bytes()), (30, 30));
        let file = Arc::new(tempfile::tempfile().unwrap());
        usage.insert_published(blob("a", 30, 1), &file, Some(room));
        assert_eq!(usage.total(), 30);
        usage.insert(blob("a", 40, 1));
        usage.set_parked(5);
        assert_eq!((usage.total(), usage.blob_bytes()), (45, 40));
        assert_eq!(metrics.stored_bytes.get(), 45);
        usage.remove(&blob("a", 0, 0).digest);
        drop(usage.reserve(7));
        assert_eq!((usage.total(), usage.count()), (5, 0));
    }

    #[test]
    fn open_blobs_are_not_evicted() {
        let usage = Usage::new(1000, &Metrics::new());
        let file = Arc::new(tempfile::tempfile().unwrap());
        let blob = blob("a", 30, 1);
        usage.insert_published(blob, &file, None);
        assert!(usage.choose(1).is_empty());
        assert_eq!(usage.remove_unused(&blob.digest), None);
        drop(file);
        assert_eq!(usage.choose(1).len(), 1);
        let reader = usage.find(&blob.digest, Timestamp(5)).unwrap().file;
        assert!(reader.is_some());
        assert!(usage.choose(1).is_empty());
        drop(reader);
        assert_eq!(
            usage
                .remove_unused(&blob.digest)
                .map(|removed| removed.last_used),
            Some(Timestamp(5))
        );
    }

    #[test]
    fn uses_are_handed_on_once_a_minute() {
        let usage = Usage::new(1000, &Metrics::new());
        let blob = blob("a", 30, 0);
        usage.insert(blob);
        usage.find(&blob.digest, Timestamp(59_999)).unwrap();
        assert_eq!(usage.take_used(), []);
        usage.find(&blob.digest, Timestamp(60_000)).unwrap();
        usage.find(&blob.digest, Timestamp(60_001)).unwrap();
        assert_eq!(usage.take_used(), [(blob.digest, Timestamp(60_000))]);
        assert_eq!(usage.take_used(), []);
        assert_eq!(
            usage.get(&blob.digest).unwrap().last_used,
            Timestamp(60_001)
        );
    }

    #[test]
    fn eviction_leaves_a_tenth_free() {
        assert_eq!(excess(1000, 1000), 0);
        assert_eq!(excess(1001, 1000), 101);
        assert_eq!(excess(5, 0), 5);
    }
}
