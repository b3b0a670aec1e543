//! The hash that follows a spool's unbroken prefix, and the states it keeps on the way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use oci::{Digest, Hasher, Slice};

use super::Spool;
use crate::store::pieces::PIECE;

/// Bytes read at once while hashing: they stay in the processor's cache between the read and the hash.
const HASH_BLOCK: usize = 256 << 10;

/// How long the hash waits for more before it gives its thread back: going to sleep and being called again for each batch costs more
/// than the hash itself when the upstream is fast.
const LINGER: Duration = Duration::from_millis(5);

/// The hash of a spool's unbroken prefix, with its earlier states.
#[derive(Debug)]
pub struct PrefixHash {
    hasher: Hasher,
    position: u64,
    kept: Vec<Checkpoint>,
    block: Vec<u8>,
}

/// A hash state at an offset, from which hashing can go on elsewhere.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Bytes hashed so far.
    pub position: u64,
    /// The state after them.
    pub hasher: Hasher,
}

impl PrefixHash {
    /// Nothing hashed yet.
    pub fn new(digest: &Digest) -> Self {
        Self {
            hasher: Hasher::new(digest.algorithm()),
            position: 0,
            kept: Vec::new(),
            block: Vec::new(),
        }
    }

    /// How many bytes are hashed.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Hashes what has arrived and what arrives meanwhile, keeping a state at each piece, until nothing more comes for a moment. Blocks on
    /// disk and CPU.
    pub fn follow(&mut self, spool: &Spool) -> io::Result<()> {
        self.block.resize(HASH_BLOCK, 0);
        loop {
            let until = spool.reach(0);
            while self.position < until {
                self.hash_block(spool, until)?;
            }
            let whole = spool.size() == Some(self.position);
            if whole || !spool.arrivals.wait_beyond(self.position, LINGER) {
                return Ok(());
            }
        }
    }

    fn hash_block(&mut self, spool: &Spool, until: u64) -> io::Result<()> {
        let left = usize::try_from(until - self.position).unwrap_or(HASH_BLOCK);
        let block = self
            .block
            .get_mut(..left.min(HASH_BLOCK))
            .unwrap_or_default();
        spool.file.read_exact_at(block, self.position)?;
        self.hasher.update(block);
        self.position += block.len() as u64;
        self.keep();
        Ok(())
    }

    /// What was hashed: the digest, and how many bytes it is of.
    pub(super) fn finish(self) -> (Digest, u64) {
        (self.hasher.finish(), self.position)
    }

    /// The latest kept state at or before `position`.
    pub fn checkpoint(&self, position: u64) -> Option<Checkpoint> {
        self.kept
            .iter()
            .rev()
            .find(|kept| kept.position <= position)
            .cloned()
    }

    fn keep(&mut self) {
        if self.kept.last().map_or(0, |kept| kept.position) + PIECE <= self.position {
            self.kept.push(Checkpoint {
                position: self.position,
                hasher: self.hasher.clone(),
            });
        }
    }
}

/// Continues `hasher` over `slice` of `file`. Blocks on disk and CPU.
pub fn hash_file(file: &File, slice: Slice, mut hasher: Hasher) -> io::Result<Hasher> {
    let mut block = vec![0; HASH_BLOCK];
    let mut at = slice.start;
    while at < slice.end {
        let left = usize::try_from(slice.end - at).unwrap_or(HASH_BLOCK);
        let block = block.get_mut(..left.min(HASH_BLOCK)).unwrap_or_default();
        file.read_exact_at(block, at)?;
        hasher.update(block);
        at += block.len() as u64;
    }
    Ok(hasher)
}
