//! One range of a spool, written front to back, and the checksums of the pieces that pass through.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;
use oci::Slice;

use super::{Spool, checksum_of};
use crate::store::pieces::PIECE;

/// Writes one range of a spool, front to back.
#[derive(Debug)]
pub struct SpoolWriter {
    spool: Arc<Spool>,
    position: u64,
    sum: PieceSum,
}

/// The checksum of the piece that is being written, as far as its bytes passed through here.
#[derive(Debug)]
struct PieceSum {
    start: u64,
    hasher: crc32fast::Hasher,
}

/// The checksum of a range.
struct Sum {
    range: Slice,
    checksum: u32,
}

impl SpoolWriter {
    pub(super) fn new(spool: Arc<Spool>, position: u64) -> Self {
        Self {
            spool,
            position,
            sum: PieceSum::at(position),
        }
    }

    /// Writes `parts` after what was written before and counts them as arrived; returns the offset behind them. What has arrived already,
    /// or is another writer's by now, is passed over. Blocks on the disk.
    pub fn write(&mut self, parts: &[Bytes]) -> io::Result<u64> {
        let start = self.position;
        let length: usize = parts.iter().map(Bytes::len).sum();
        let all = Slice {
            start,
            end: start + length as u64,
        };
        self.position = all.end;
        let ours = self.spool.arrivals.claim(all);
        if let Err(error) = self.put(parts, start, &ours) {
            self.spool.arrivals.let_go(&ours);
            return Err(error);
        }
        let sums = if ours == [all] {
            self.sum.take_in(start, parts)
        } else {
            // What lies in the file did not all pass through here.
            self.sum = PieceSum::at(all.end);
            Vec::new()
        };
        for (index, part) in self.spool.count(&ours) {
            // A piece that another writer began is read again.
            let checksum = match sums.iter().find(|sum| sum.range == part) {
                Some(sum) => sum.checksum,
                None => checksum_of(&self.spool.file, part)?,
            };
            self.spool.note_piece(index, checksum)?;
        }
        Ok(self.position)
    }

    /// Writes what of `parts`, which begin at `at`, lies in one of `ours`.
    fn put(&self, parts: &[Bytes], mut at: u64, ours: &[Slice]) -> io::Result<()> {
        for part in parts {
            let end = at + part.len() as u64;
            for slice in ours {
                let (from, until) = (slice.start.clamp(at, end), slice.end.clamp(at, end));
                let offset = |place: u64| usize::try_from(place - at).unwrap_or(part.len());
                let bytes = part.slice(offset(from)..offset(until));
                self.spool.file.write_all_at(&bytes, from)?;
            }
            at = end;
        }
        Ok(())
    }
}

impl PieceSum {
    fn at(start: u64) -> Self {
        Self {
            start,
            hasher: crc32fast::Hasher::new(),
        }
    }

    /// Takes in `parts`, which begin at `position`; returns the sums of all that ended with them, the one still open included.
    fn take_in(&mut self, mut position: u64, parts: &[Bytes]) -> Vec<Sum> {
        let mut ended = Vec::new();
        for part in parts {
            self.take_part(position, part, &mut ended);
            position += part.len() as u64;
        }
        ended.push(self.until(position));
        ended
    }

    fn take_part(&mut self, mut position: u64, mut part: &[u8], ended: &mut Vec<Sum>) {
        while !part.is_empty() {
            let room = usize::try_from(PIECE - position % PIECE).unwrap_or(part.len());
            let (taken, rest) = part.split_at(room.min(part.len()));
            self.hasher.update(taken);
            position += taken.len() as u64;
            if position.is_multiple_of(PIECE) {
                ended.push(self.until(position));
                *self = Self::at(position);
            }
            part = rest;
        }
    }

    fn until(&self, end: u64) -> Sum {
        Sum {
            range: Slice {
                start: self.start,
                end,
            },
            checksum: self.hasher.clone().finalize(),
        }
    }
}
