//! One range of a spool, written front to back, and the checksums of the pieces that pass through.

use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::Arc;

use bytes::Bytes;
use oci::Slice;

use super::{Spool, checksum_of};
use crate::store::pieces::PIECE;

/// Parts given to one system call, at most; the kernel takes 1024.
const PARTS: usize = 256;

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

    /// Writes `parts` after what was written before and counts them as arrived; returns the offset behind them. Blocks on the disk.
    pub fn write(&mut self, parts: &[Bytes]) -> io::Result<u64> {
        let start = self.position;
        for parts in parts.chunks(PARTS) {
            let mut slices: Vec<IoSlice<'_>> =
                parts.iter().map(|part| IoSlice::new(part)).collect();
            write_all_vectored(&self.spool.file, &mut slices, self.position)?;
            self.position += parts.iter().map(|part| part.len() as u64).sum::<u64>();
        }
        let sums = self.sum.take_in(start, parts);
        let written = Slice {
            start,
            end: self.position,
        };
        for (index, part) in self.spool.count(written) {
            // A piece that another writer began is read again.
            let checksum = match sums.iter().find(|sum| sum.range == part) {
                Some(sum) => sum.checksum,
                None => checksum_of(&self.spool.file, part)?,
            };
            self.spool.note_piece(index, checksum)?;
        }
        Ok(self.position)
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

/// Writes all of `slices` at `offset`.
fn write_all_vectored(
    file: &File,
    mut slices: &mut [IoSlice<'_>],
    mut offset: u64,
) -> io::Result<()> {
    // Takes out the empty ones in front: of an empty blob there is nothing to write.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match rustix::io::pwritev(file, slices, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut slices, written);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
