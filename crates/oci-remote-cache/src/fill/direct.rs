//! A reader that goes on from the upstream by itself, because the cache cannot keep the blob: disk full, read-only, or too large.
//!
//! A cache fault never fails a pull. The reader continues at its own offset, hashes on from the last state the fill kept, and still holds
//! the last chunk until the digest has matched. Connections are limited: who comes too late waits for a place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use oci::{Digest, Hasher, Slice};
use tokio::sync::OwnedSemaphorePermit;

use super::tail::{HELD, Release};
use super::{Fill, FillError, Fills};
use crate::deadline::Deadline;
use crate::store::spool::{Checkpoint, Mismatch, PrefixHash, Spool, hash_file};
use crate::upstream::resume::BlobStream;
use crate::verdict::Why;

/// What a fill that stopped keeping its blob leaves to its readers.
#[derive(Debug)]
pub struct Alone {
    why: Why,
    size: Option<u64>,
    validator: Option<String>,
    spool: Option<Arc<Spool>>,
    hash: Option<PrefixHash>,
    /// The upstream's answer, still unread: the first reader who can use it does.
    opened: Mutex<Option<(BlobStream, OwnedSemaphorePermit)>>,
}

/// One reader on its own.
#[derive(Debug)]
pub struct DirectReader {
    stream: BlobStream,
    _place: Option<OwnedSemaphorePermit>,
    check: Option<Check>,
    /// First byte the client has not got.
    from: u64,
    held: VecDeque<Bytes>,
    held_bytes: u64,
    ended: bool,
}

/// The hash that decides whether the last bytes may leave.
#[derive(Debug)]
struct Check {
    hasher: Hasher,
    wanted: Digest,
    upstream: crate::names::UpstreamId,
}

impl Alone {
    /// Nothing was kept, and nothing will be.
    pub(super) fn from_start(why: Why, stream: BlobStream, place: OwnedSemaphorePermit) -> Self {
        Self {
            why,
            size: stream.total(),
            validator: stream.validator().map(str::to_owned),
            spool: None,
            hash: None,
            opened: Mutex::new(Some((stream, place))),
        }
    }

    /// The fill broke at some point; what is in the spool can still be read.
    pub(super) fn midway(
        why: Why,
        (size, validator): (Option<u64>, Option<String>),
        spool: Arc<Spool>,
        hash: PrefixHash,
    ) -> Self {
        Self {
            why,
            size,
            validator,
            spool: Some(spool),
            hash: Some(hash),
            opened: Mutex::default(),
        }
    }

    /// Why nothing is kept.
    pub fn why(&self) -> Why {
        self.why
    }

    /// A reader of the bytes from `rest.0` to `rest.1` (or the end).
    pub(super) async fn reader(
        &self,
        fills: &Fills,
        fill: &Fill,
        rest: (u64, Option<u64>),
        release: Release,
    ) -> Result<DirectReader, FillError> {
        let (from, end) = rest;
        let check = match release {
            Release::Arrived => None,
            Release::Verified if self.size.is_some() => Some(self.state(fills, fill, from).await),
            // Without a size there is no closed range to ask for: the blob comes from its beginning, and is hashed from there.
            Release::Verified => Some(beginning(fill)),
        };
        let start = check.as_ref().map_or(from, |state| state.position);
        let (mut stream, place) = match self.opened_at(start) {
            (Some(stream), place) => (stream, place),
            (None, place) => self.open(fills, fill, place, (start, end)).await?,
        };
        if let Some(end) = end {
            stream.stop_at(end);
        }
        let wanted = fill.key.digest;
        let upstream = fill.key.upstream.clone();
        let check = check.map(|state| Check {
            hasher: state.hasher,
            wanted,
            upstream,
        });
        Ok(DirectReader {
            stream,
            _place: place,
            check,
            from,
            held: VecDeque::new(),
            held_bytes: 0,
            ended: false,
        })
    }

    /// The upstream's answer, where it begins as this reader does. Else only its place: an answer that nobody can use must not keep one.
    fn opened_at(&self, start: u64) -> (Option<BlobStream>, Option<OwnedSemaphorePermit>) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        match opened.take() {
            Some((stream, place)) if stream.position() == start => (Some(stream), Some(place)),
            Some((_unusable, place)) => (None, Some(place)),
            None => (None, None),
        }
    }

    async fn open(
        &self,
        fills: &Fills,
        fill: &Fill,
        place: Option<OwnedSemaphorePermit>,
        (start, end): (u64, Option<u64>),
    ) -> Result<(BlobStream, Option<OwnedSemaphorePermit>), FillError> {
        let place = match place {
            Some(place) => Some(place),
            None => fills.place(&fill.key.upstream).await,
        };
        let stream = match (self.size, end) {
            (Some(size), Some(end)) if start > 0 || end < size => {
                let rest = Slice { start, end };
                fill.ask_again().later(rest, size, self.validator.clone())
            }
            _ => fill.ask.clone().open(None, Deadline::for_answer()).await?,
        };
        Ok((stream, place))
    }

    /// The hash state from which a reader at `from` can go on: the last one kept, carried forward over what the spool holds.
    async fn state(&self, fills: &Fills, fill: &Fill, from: u64) -> Checkpoint {
        let zero = beginning(fill);
        let kept = self
            .hash
            .as_ref()
            .and_then(|hash| hash.checkpoint(from))
            .unwrap_or(zero);
        let Some(spool) = self.spool.clone() else {
            return kept;
        };
        let until = spool.reach(kept.position).min(from);
        let before = kept.clone();
        let forward = fills.tasks.spawn_blocking(move || {
            let span = spool.span(Slice {
                start: kept.position,
                end: until,
            });
            hash_file(
                &span.file,
                Slice {
                    start: kept.position,
                    end: until,
                },
                kept.hasher,
            )
        });
        match forward.await {
            Ok(Ok(hasher)) => Checkpoint {
                position: until,
                hasher,
            },
            // The spool cannot be read any more: its bytes come from the upstream again, only to be hashed.
            Ok(Err(_)) | Err(_) => before,
        }
    }
}

/// The hash of nothing yet.
fn beginning(fill: &Fill) -> Checkpoint {
    Checkpoint {
        position: 0,
        hasher: Hasher::new(fill.key.digest.algorithm()),
    }
}

impl DirectReader {
    /// A reader of a whole blob that is passed through without being looked at: its digest's algorithm is not ours to verify.
    pub fn unchecked(stream: BlobStream) -> Self {
        let from = stream.position();
        Self {
            stream,
            _place: None,
            check: None,
            from,
            held: VecDeque::new(),
            held_bytes: 0,
            ended: false,
        }
    }

    /// Waits for the first bytes, or for why there are none.
    pub(super) async fn begin(&mut self) -> Result<(), FillError> {
        while self.held.is_empty() && !self.ended {
            match self.stream.next().await? {
                Some(bytes) => self.take(bytes),
                None => self.end()?,
            }
        }
        Ok(())
    }

    /// The next bytes; `None` when all have been given.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FillError> {
        loop {
            if let Some(bytes) = self.releasable() {
                return Ok(Some(bytes));
            }
            if self.ended {
                return Ok(None);
            }
            match self.stream.next().await? {
                Some(bytes) => self.take(bytes),
                None => self.end()?,
            }
        }
    }

    /// The offset at which the upstream ended, once it has; then the digest has matched too, where it was to be looked at.
    pub(super) fn ended_at(&self) -> Option<u64> {
        self.ended.then(|| self.stream.position())
    }

    fn take(&mut self, mut bytes: Bytes) {
        if let Some(check) = self.check.as_mut() {
            check.hasher.update(&bytes);
        }
        let start = self.stream.position() - bytes.len() as u64;
        let behind = self.from.saturating_sub(start).min(bytes.len() as u64);
        drop(bytes.split_to(usize::try_from(behind).unwrap_or(bytes.len())));
        if !bytes.is_empty() {
            self.held_bytes += bytes.len() as u64;
            self.held.push_back(bytes);
        }
    }

    /// The oldest held bytes, if enough newer ones are held back behind them, or if nothing needs to be held.
    fn releasable(&mut self) -> Option<Bytes> {
        let free = self.ended || self.check.is_none();
        let oldest = self.held.front_mut()?;
        let spare = if free {
            u64::MAX
        } else {
            self.held_bytes.saturating_sub(HELD)
        };
        if spare == 0 {
            return None;
        }
        let taken = usize::try_from(spare)
            .unwrap_or(usize::MAX)
            .min(oldest.len());
        let bytes = oldest.split_to(taken);
        if oldest.is_empty() {
            self.held.pop_front();
        }
        self.held_bytes -= bytes.len() as u64;
        Some(bytes)
    }

    fn end(&mut self) -> Result<(), FillError> {
        self.ended = true;
        let Some(check) = self.check.take() else {
            return Ok(());
        };
        let found = check.hasher.finish();
        if found == check.wanted {
            return Ok(());
        }
        self.held.clear();
        let mismatch = Box::new(Mismatch {
            wanted: check.wanted,
            found,
            size: self.stream.position(),
        });
        Err(FillError::Mismatch {
            upstream: check.upstream,
            mismatch,
        })
    }
}
